"""Finds the segments that an earlier engine left in a folder."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvplug.errors import KVPlugError
from kvplug.reuse.entry import CatalogEntry, SegmentState, text_bytes
from kvplug.reuse.file import (
    SUFFIX,
    BadSegment,
    SegmentHeader,
    on_blocks,
    parse_name,
    read_header,
    segment_id,
)

__all__ = ["FoundSegment", "scan_folder"]

logger = logging.getLogger("kvplug.reuse")


@dataclass(frozen=True, slots=True)
class FoundSegment:
    """A segment all of whose files are there.

    Attributes:
        header: Of one of its files.
        bytes: In memory, on all ranks together.
        file_bytes: Of all its files.
        last_used: Seconds since the epoch.
    """

    header: SegmentHeader
    bytes: int
    file_bytes: int
    last_used: float

    def entry(self) -> CatalogEntry:
        """The segment, on disk."""
        header = self.header
        return CatalogEntry(
            header.id,
            header.fingerprint,
            header.token_ids,
            header.context_ids,
            self.bytes,
            SegmentState.DISK,
            on_disk=True,
            last_used=self.last_used,
            session=header.session,
            file_bytes=self.file_bytes,
        )


def scan_folder(
    directory: str | Path, now: float, world: int | None = None
) -> tuple[list[FoundSegment], Counter[str]]:
    """Read the headers of a folder's segment files and compare the files' lengths.

    The planes' checksums are compared when a segment is fetched. Files that cannot be used stay
    where they are and are named in the log.

    Args:
        directory: The folder; one that does not exist has no segments.
        now: Seconds since the epoch; a later file counts as used now.
        world: Ranks that each segment must have files of; any number if None.

    Returns:
        The segments, most recently used first; and files that are not used, by cause. Segments
        that lack the file of a rank count as ``incomplete``.

    Raises:
        KVPlugError: It is not a folder, or not readable.
    """
    refused: Counter[str] = Counter()
    parts: dict[tuple[str, int], dict[int, tuple[SegmentHeader, int, float]]] = {}
    for path in _files(Path(directory)):
        try:
            header, size, used = _read(path, world)
        except BadSegment as error:
            refused[error.cause] += 1
            logger.warning("a stored segment is not used: %s", error)
            continue
        parts.setdefault((header.id, header.world), {})[header.rank] = (header, size, used)
    found: list[FoundSegment] = []
    for (name, ranks_needed), ranks in parts.items():
        headers = [header for header, *_ in ranks.values()]
        ancestries = {header.fingerprint.ancestry for header in headers}
        if len(ranks) != ranks_needed or len(ancestries) > 1:
            refused["incomplete"] += len(ranks)
            logger.warning("a stored segment is not used: %s lacks some of its files", name)
            continue
        first, num_tokens = headers[0], len(headers[0].token_ids) + len(headers[0].context_ids)
        used = max(max(first.fingerprint.created, used) for *_, used in ranks.values())
        found.append(
            FoundSegment(
                first,
                sum(header.size for header in headers) + text_bytes(num_tokens, ranks_needed),
                sum(on_blocks(size) for _, size, _ in ranks.values()),
                min(used, now),
            )
        )
    found.sort(key=lambda one: (one.last_used, one.header.id), reverse=True)
    return found, refused


def _read(path: Path, world: int | None) -> tuple[SegmentHeader, int, float]:
    """A file's header, its bytes, and the time it was last used."""
    named = parse_name(path.name)
    if named is None:
        raise BadSegment(path, "not a segment file", "its name is not one of a segment file")
    header = read_header(path)
    if header.id != named[0] or header.id != segment_id(header.fingerprint):
        raise BadSegment(path, "bad header", f"it is segment {header.id}")
    if (header.rank, header.world) != named[1:]:
        raise BadSegment(path, "other rank", f"{header.rank} of {header.world}")
    if world not in (None, header.world):
        raise BadSegment(path, "other rank", f"of {header.world}, not {world}")
    try:
        facts = path.stat()
    except OSError as error:
        raise BadSegment(path, "unreadable", error.strerror or str(error)) from None
    return header, facts.st_size, facts.st_mtime


def _files(folder: Path) -> Iterator[Path]:
    try:
        paths = sorted(folder.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise KVPlugError(
            f"reuse.store.directory: {folder} is not readable ({error.strerror}). Fix: name a "
            "folder that the engine's user can read and write."
        ) from None
    yield from (p for p in paths if p.suffix == SUFFIX and not p.name.startswith("."))
