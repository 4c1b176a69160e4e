"""Reads an event log, and tells what it says of one request, one block, or all misses.

A log is read as bytes that anybody may have written: a line that is none of kvplug's is left out
and counted, and nothing is kept that the answer does not need.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvplug.client_names import MAX_REQUEST_NAME
from kvplug.errors import KVPlugError
from kvplug.observe.events import EventType
from kvplug.observe.log import FORMAT, rotated
from kvplug.observe.misses import MissCause
from kvplug.plain_text import one_line
from kvplug.regular_file import UnreadableFile, open_regular

__all__ = ["BadLog", "Entry", "MissTable", "Story", "block_story", "miss_table", "request_story"]

MAX_BYTES = 256 << 30
MAX_LINE = 1 << 20
"""Longest line that is read, in bytes."""

MAX_ENTRIES = 10_000
"""Latest events of a story that are kept."""

MAX_REMEMBERED = 100_000
"""Blocks whose last eviction is remembered while a log is read."""

MAX_POSITIONS = 10_000
"""Positions at which prompts differ that are counted apart."""

MIN_HASH = 6
"""Hexadecimal digits that name a block at least."""

_TEXT = 600


class BadLog(KVPlugError, ValueError):
    """A file that is no event log, or says nothing of what was asked."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a log.

    Attributes:
        at: Seconds since the epoch.
        step: Scheduler step; 0 for a start.
        event: Type of the event; None where an engine started.
        count: What it counts.
        kind: Kind of the policy, or the empty string.
        policy: Its name, or the empty string.
        request: The request, or the empty string.
        detail: Cause or decision.
        blocks: Short hashes of blocks.
        facts: Further numbers and words.
    """

    at: float
    step: int
    event: EventType | None
    count: int = 1
    kind: str = ""
    policy: str = ""
    request: str = ""
    detail: str = ""
    blocks: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Story:
    """What a log says of one thing.

    Attributes:
        of: The request or the block, as the log names it.
        entries: What happened, in order; the latest 10,000.
        left_out: Earlier ones that are not kept.
        ignored: Lines of the log that are none of kvplug's.
        evicted_by: Of missed blocks, by short hash: the eviction that took them, where it is there.
    """

    of: str
    entries: list[Entry]
    left_out: int = 0
    ignored: int = 0
    evicted_by: dict[str, Entry] = field(default_factory=dict)


@dataclass
class MissTable:
    """All misses of a log.

    Attributes:
        requests: Requests that were admitted.
        blocks: Full blocks of their prompts, by where they came from.
        causes: Missed blocks by cause.
        positions: Requests by the first token that differed from a known text.
        thrashed: Blocks evicted and computed again within one pool of evictions.
        ignored: Lines of the log that are none of kvplug's.
    """

    requests: int = 0
    blocks: Counter[str] = field(default_factory=Counter)
    causes: Counter[str] = field(default_factory=Counter)
    positions: Counter[int] = field(default_factory=Counter)
    thrashed: int = 0
    ignored: int = 0


class _Reader:
    """Lines of a log and of what a rotation left of it, the oldest first."""

    def __init__(self, path: Path):
        self.path = path
        self.ignored = 0

    def __iter__(self) -> Iterator[Entry]:
        any_line = False
        older = rotated(self.path)
        # A rotation while this runs may hide a half; what is read is true all the same.
        for path in (older, self.path) if older.exists() else (self.path,):
            for number, line in enumerate(_lines(path)):
                if line is None:
                    self.ignored += 1
                    continue
                entry = _entry(line)
                if entry is not None:
                    any_line = True
                    yield entry
                elif number == 0 and not any_line and path == self.path:
                    self._refuse(line)
                    self.ignored += 1
                else:
                    self.ignored += 1
        if not any_line:
            raise BadLog(f"{self.path}: is no event log of kvplug: none of its lines is an event")

    def _refuse(self, line: bytes) -> None:
        """Name a guard's record for what it is."""
        if b'"fingerprint"' in line and (b'"pieces"' in line or b'"families"' in line):
            raise BadLog(
                f"{self.path}: is a record of the guard, not an event log; use "
                f"`kvplug reuse explain {self.path}`"
            )


def request_story(path: Path, request: str) -> Story:
    """Tell what happened to a request.

    Args:
        path: The log.
        request: Its id, or the beginning of it: vLLM adds a suffix to the one a client knows.

    Raises:
        BadLog: The log has no such request, several, or is no log.
    """
    reader = _Reader(path)
    found: dict[str, deque[Entry]] = {}
    counts: Counter[str] = Counter()
    last: OrderedDict[str, Entry] = OrderedDict()
    evicted_by: dict[str, Entry] = {}
    for entry in reader:
        if entry.event is EventType.EVICTED:
            for block in entry.blocks:
                last[block] = entry
                last.move_to_end(block)
            while len(last) > MAX_REMEMBERED:
                last.popitem(last=False)
        if not entry.request.startswith(request) or not entry.request:
            continue
        if entry.request not in found and len(found) > 16 and request not in found:
            continue
        found.setdefault(entry.request, deque(maxlen=MAX_ENTRIES)).append(entry)
        counts[entry.request] += 1
        if entry.event is EventType.MISSED:
            evicted_by |= {b: last[b] for b in entry.blocks if b in last}
    if request in found:
        found = {request: found[request]}
    if not found:
        raise BadLog(f"{path}: has no request {one_line(request, MAX_REQUEST_NAME)!r}")
    if len(found) > 1:
        names = ", ".join(repr(one_line(name, 60)) for name in [*found][:4])
        raise BadLog(
            f"{path}: {len(found)} requests begin with {one_line(request, 60)!r}, e.g. {names}; "
            "name one of them"
        )
    ((name, entries),) = found.items()
    return Story(name, list(entries), counts[name] - len(entries), reader.ignored, evicted_by)


def block_story(path: Path, block: str) -> Story:
    """Tell what happened to a block.

    Args:
        path: The log.
        block: Its hash as the log names it, or a longer or shorter beginning of it.

    Raises:
        BadLog: It is no hash, the log has nothing of it or of several, or is no log.
    """
    wanted = block.lower()[:16]
    if len(wanted) < MIN_HASH or set(wanted) - set("0123456789abcdef"):
        raise BadLog(f"--block: {one_line(block, 40)!r} is no hash of at least {MIN_HASH} digits")
    reader = _Reader(path)
    entries: deque[Entry] = deque(maxlen=MAX_ENTRIES)
    names: set[str] = set()
    count = 0
    for entry in reader:
        matching = [one for one in entry.blocks if one.startswith(wanted)]
        if matching:
            if len(names) < 16:
                names.update(matching)
            entries.append(entry)
            count += 1
    if not names:
        raise BadLog(f"{path}: says nothing of a block {wanted}; an event names at most 64 blocks")
    if len(names) > 1:
        several = ", ".join(sorted(names)[:4])
        raise BadLog(f"{path}: several blocks begin with {wanted}, e.g. {several}; name one")
    return Story(names.pop(), list(entries), count - len(entries), reader.ignored)


def miss_table(path: Path) -> MissTable:
    """Count all misses of a log.

    Raises:
        BadLog: It is no log.
    """
    reader = _Reader(path)
    found = MissTable()
    for entry in reader:
        if entry.event is EventType.ADMITTED:
            found.requests += 1
            for source, blocks in entry.facts.items():
                if _is_count(blocks) and source in ("hit", "segment", "tier", "missed"):
                    found.blocks[source] += blocks
        elif entry.event is EventType.MISSED:
            causes = entry.facts.get("causes")
            for cause, blocks in (causes if isinstance(causes, dict) else {}).items():
                if _is_count(blocks) and cause in set(MissCause):
                    found.causes[cause] += blocks
            token = entry.facts.get("token")
            if (
                isinstance(token, int)
                and _is_count(token)
                and (token in found.positions or len(found.positions) < MAX_POSITIONS)
            ):
                found.positions[token] += 1
        elif entry.event is EventType.THRASHED:
            found.thrashed += entry.count
    found.ignored = reader.ignored
    return found


def _lines(path: Path) -> Iterator[bytes | None]:
    """Whole lines of a file; None for one that is too long. A torn last line is left out."""
    try:
        with open_regular(path, MAX_BYTES) as file:
            while line := file.readline(MAX_LINE):
                if line.endswith(b"\n"):
                    yield line
                elif len(line) == MAX_LINE:
                    while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                        pass
                    yield None
                elif line.lstrip().startswith(b"{") and line.rstrip().endswith(b"}"):
                    yield line
    except UnreadableFile as error:
        raise BadLog(str(error)) from None
    except OSError as error:
        raise BadLog(f"{path}: {(error.strerror or str(error)).lower()}") from None


def _entry(line: bytes) -> Entry | None:
    """The event of a line, or None for a line that is none."""
    try:
        read = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(read, dict) or read.get("v") != FORMAT:
        return None
    at, step, count = read.get("t"), read.get("step", 0), read.get("count", 1)
    if not isinstance(at, int | float) or isinstance(at, bool) or not math.isfinite(at):
        return None
    if not _is_count(step) or not _is_count(count) or not 0 <= at < 1e11:
        return None
    name = read.get("event")
    event = None
    if name != "log":
        if not isinstance(name, str):
            return None
        with contextlib.suppress(ValueError):
            event = EventType(name)
        if event is None:
            return None
    words = [read.get(key, "") for key in ("kind", "policy", "request", "detail")]
    blocks, facts = read.get("blocks", []), read.get("facts", {})
    if not all(isinstance(word, str) for word in words):
        return None
    if not isinstance(blocks, list) or not all(isinstance(b, str) for b in blocks):
        return None
    if not isinstance(facts, dict):
        return None
    kind, policy, request, detail = words
    return Entry(
        float(at),
        step,
        event,
        count,
        one_line(kind, 64),
        one_line(policy, 64),
        request[:MAX_REQUEST_NAME],
        one_line(detail, _TEXT),
        tuple(one_line(b, 16) for b in blocks[:64]),
        facts,
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53
