"""The bytes of stored segments on one worker, in host memory and in a folder.

The scheduler's catalog decides what is kept. Files are written, read and removed by a separate
thread, so that no step of the engine waits for a disk.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from kvplug.reuse.file import (
    BadSegment,
    SegmentHeader,
    file_name,
    read_segment,
    segment_id,
    write_segment,
)
from kvplug.reuse.folder import OwnedFolder

__all__ = ["PagePlane", "SegmentMemory", "StoreReport", "StoredSegment"]

logger = logging.getLogger("kvplug.reuse")

_SOON, _LATER, _LAST = 0, 1, 2

_MARK = 60.0


@dataclass(frozen=True, slots=True)
class PagePlane:
    """A plane as this rank's pages hold it.

    Attributes:
        dtype: Name of its type.
        layers: Layers.
        shape: Of one token in one layer: heads, and values or bytes of a head.
    """

    dtype: str
    layers: int
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class StoredSegment:
    """A segment's bytes on this rank.

    Attributes:
        header: Describes it.
        planes: CPU tensors by name.
    """

    header: SegmentHeader
    planes: dict[str, Tensor]


@dataclass(slots=True)
class StoreReport:
    """Work the thread has done since the last report.

    Attributes:
        written: Ids whose files are on disk.
        fetched: Ids that are in memory again.
        failed: Ids that could not be written or read, with the cause.
    """

    written: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.written or self.fetched or self.failed)


class SegmentMemory:
    """Stored segments of one worker.

    Args:
        directory: Folder of the files, created if it does not exist; empty for none.
        rank: Rank of this worker among those that share each token's heads.
        world: Number of those workers. The first one has the folder for its engine.

    Raises:
        KVPlugError: The folder cannot be created or locked, or belongs to another engine.
    """

    def __init__(self, directory: str, rank: int = 0, world: int = 1) -> None:
        self._owned = OwnedFolder(directory, owns=rank == 0) if directory else None
        self._folder = self._owned.path if self._owned is not None else None
        self._planes: Mapping[str, PagePlane] = {}
        self._rank = rank
        self._world = world
        self._segments: dict[str, StoredSegment] = {}
        self._lock = threading.Lock()
        self._report = StoreReport()
        # Number of the latest job of each kind for an id; an older job does nothing.
        self._writes: dict[str, int] = {}
        self._marked: dict[str, float] = {}
        self._reads: dict[str, int] = {}
        self._numbers = itertools.count()
        self._jobs: queue.PriorityQueue[tuple[int, int, Callable[[], None] | None]] = (
            queue.PriorityQueue()
        )
        self._thread: threading.Thread | None = None
        self._closed = False
        self._write_failed = False
        self._counts = dict.fromkeys(
            ("written", "written_bytes", "fetched", "fetched_bytes", "deleted", "write_errors"), 0
        )
        self._refused: dict[str, int] = {}
        if self._folder is not None:
            self._thread = threading.Thread(target=self._work, name="kvplug-segments", daemon=True)
            self._thread.start()

    def __len__(self) -> int:
        return len(self._segments)

    def __contains__(self, segment: object) -> bool:
        return segment in self._segments

    @property
    def bytes(self) -> int:
        """Bytes of the planes in memory."""
        with self._lock:
            return sum(stored.header.size for stored in self._segments.values())

    def expect(self, planes: Mapping[str, PagePlane]) -> None:
        """Refuse files whose planes are not such as these.

        Args:
            planes: What this rank's pages hold, by name.
        """
        self._planes = planes

    def put(self, header: SegmentHeader, planes: dict[str, Tensor]) -> None:
        """Keep a segment, and write its file in the background if there is a folder.

        Args:
            header: Describes it; of this worker's rank and world.
            planes: CPU tensors as the header lists them, kept without a copy.

        Raises:
            ValueError: The header is of another rank, or its id is not a segment id.
        """
        if (header.rank, header.world) != (self._rank, self._world):
            raise ValueError(
                f"segment {header.id} is of rank {header.rank} of {header.world}, "
                f"this is {self._rank} of {self._world}"
            )
        path = self._path(header.id)
        with self._lock:
            self._segments[header.id] = StoredSegment(header, planes)
            if path is not None and not self._closed:
                number = self._writes[header.id] = next(self._numbers)
                job = lambda: self._write(path, header, planes, number)  # noqa: E731
                self._jobs.put((_LATER, number, job))

    def get(self, segment: str) -> StoredSegment:
        """Return a segment's bytes, read-only. Marks its file as used, at most once a minute.

        Raises:
            KeyError: The segment is not in memory.
        """
        stored = self._segments[segment]
        path, now = self._path(segment), time.monotonic()
        if path is not None and now - self._marked.get(segment, -_MARK) >= _MARK:
            self._marked[segment] = now
            with self._lock:
                if not self._closed:
                    self._jobs.put((_LATER, next(self._numbers), lambda: _mark_used(path)))
        return stored

    def drop(self, segments: Iterable[str]) -> None:
        """Remove segments from memory; their files stay. Unknown ids are ignored."""
        with self._lock:
            for segment in segments:
                self._segments.pop(segment, None)
                self._reads.pop(segment, None)
                self._marked.pop(segment, None)

    def delete(self, segments: Iterable[str]) -> None:
        """Remove files, and cancel those not written yet; what is in memory stays."""
        for segment in segments:
            path = self._path(segment)
            if path is None:
                continue
            with self._lock:
                self._writes.pop(segment, None)
                self._reads.pop(segment, None)
                if segment in self._report.written:
                    self._report.written.remove(segment)
                if not self._closed:
                    number = next(self._numbers)
                    job = lambda path=path: self._remove(path)  # noqa: E731
                    self._jobs.put((_LATER, number, job))

    def fetch(self, segments: Iterable[str] | Mapping[str, int]) -> None:
        """Read segments from the folder in the background, ahead of pending writes.

        A file is believed for what it holds as it is read, not for its name: the id follows from
        the fingerprint in it.

        Args:
            segments: Their ids; with the approximate reuses that are behind each, to be compared.
        """
        behind = segments if isinstance(segments, Mapping) else {}
        for segment in segments:
            path = self._path(segment)
            with self._lock:
                if path is None or self._closed:
                    self._report.failed[segment] = "missing"
                    continue
                number = self._reads[segment] = next(self._numbers)
                ancestry = behind.get(segment)
                job = lambda path=path, segment=segment, number=number, ancestry=ancestry: (  # noqa: E731
                    self._read(path, segment, number, ancestry)
                )
                self._jobs.put((_SOON, number, job))

    def take_report(self) -> StoreReport:
        """Return what has been done since the last call."""
        with self._lock:
            report, self._report = self._report, StoreReport()
        return report

    def counters(self) -> dict[str, float]:
        """Return segments and bytes written, fetched and deleted; write errors; refused files."""
        with self._lock:
            counts: dict[str, float] = {
                "memory_segments": len(self._segments),
                **self._counts,
                **{f"refused {cause}": n for cause, n in sorted(self._refused.items())},
            }
        return counts

    def flush(self) -> None:
        """Wait until all requested work is done."""
        if self._thread is not None and self._thread.is_alive():
            done = threading.Event()
            self._jobs.put((_LAST, next(self._numbers), done.set))
            done.wait()

    def close(self) -> None:
        """Finish pending writes and end the thread; a second call does nothing."""
        with self._lock:
            closed, self._closed = self._closed, True
        if self._thread is not None and not closed:
            self._jobs.put((_LAST, next(self._numbers), None))
            self._thread.join()
        if self._owned is not None:
            self._owned.close()

    # -- The thread --------------------------------------------------------------------------------

    def _path(self, segment: str) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / file_name(segment, self._rank, self._world)

    def _work(self) -> None:
        while True:
            *_, job = self._jobs.get()
            if job is None:
                return
            try:
                job()
            except Exception:
                logger.exception("work on a stored segment's file failed")

    def _write(
        self, path: Path, header: SegmentHeader, planes: dict[str, Tensor], number: int
    ) -> None:
        if self._writes.get(header.id) != number:
            return
        cause, size = "", 0
        try:
            size = write_segment(path, header, planes)
        except Exception as error:
            cause = (getattr(error, "strerror", "") or "cannot be written").lower()
            if not self._write_failed:
                self._write_failed = True
                logger.error(
                    "a segment could not be written and stays in memory only (%s: %s); further "
                    "failures are counted, not logged",
                    path,
                    error,
                )
        with self._lock:
            if self._writes.get(header.id) != number:
                return
            del self._writes[header.id]
            if cause:
                self._counts["write_errors"] += 1
                self._report.failed[header.id] = cause
            else:
                self._counts["written"] += 1
                self._counts["written_bytes"] += size
                self._report.written.append(header.id)

    def _read(self, path: Path, segment: str, number: int, ancestry: int | None) -> None:
        if self._reads.get(segment) != number:
            return
        stored, cause = None, ""
        try:
            header, planes = read_segment(path)
            self._require(path, header, segment, ancestry)
            stored = StoredSegment(header, planes)
            _mark_used(path)
        except BadSegment as error:
            cause = error.cause
            logger.warning("a stored segment is not used: %s", error)
        except MemoryError as error:
            cause = "no memory"
            logger.warning("a stored segment is not used: %s: %s", path, error)
        except Exception as error:
            # Whatever it is, the scheduler waits for a report.
            cause = "unreadable"
            logger.warning("a stored segment is not used: %s", path, exc_info=error)
        with self._lock:
            if self._reads.get(segment) != number:
                return
            del self._reads[segment]
            if stored is not None:
                self._segments[segment] = stored
                self._counts["fetched"] += 1
                self._counts["fetched_bytes"] += stored.header.size
                self._report.fetched.append(segment)
            else:
                self._refused[cause] = self._refused.get(cause, 0) + 1
                self._report.failed[segment] = cause

    def _require(
        self, path: Path, header: SegmentHeader, segment: str, ancestry: int | None
    ) -> None:
        """Raise BadSegment unless a file holds the segment that was asked for."""
        found = segment_id(header.fingerprint)
        if header.id != segment or found != segment:
            raise BadSegment(path, "bad header", f"it is segment {found}")
        if ancestry not in (None, header.fingerprint.ancestry):
            raise BadSegment(path, "bad header", "other reuses are behind it than were")
        if (header.rank, header.world) != (self._rank, self._world):
            raise BadSegment(path, "other rank", f"{header.rank} of {header.world}")
        length = header.fingerprint.length
        planes = {plane.name: plane for plane in header.planes}
        for name, page in self._planes.items():
            shape = (page.layers, length, *page.shape)
            if name not in planes or (planes[name].dtype, planes[name].shape) != (
                page.dtype,
                shape,
            ):
                raise BadSegment(path, "other geometry", f"{name} is not {page.dtype} {shape}")

    def _remove(self, path: Path) -> None:
        try:
            path.unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            logger.warning("a stored segment's file cannot be removed: %s: %s", path, error)
            return
        with self._lock:
            self._counts["deleted"] += 1


def _mark_used(path: Path) -> None:
    """Set a file's modification time, from which a restart knows when it was last used."""
    with contextlib.suppress(OSError):
        os.utime(path)
