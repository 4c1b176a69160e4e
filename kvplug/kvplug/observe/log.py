"""The event log: what happened, one JSON object a line, in two files of bounded size.

The scheduler hands a step's events over and goes on. A thread encodes and writes them. Where it
does not keep up, or the disk takes nothing, events are lost and counted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvplug import __version__
from kvplug.observe.events import Event

__all__ = ["FORMAT", "EventLog", "line_of", "of_rank", "rotated"]

FORMAT = 1
"""Version of a line."""

MIB = 1 << 20

WAITING = 65_536
"""Most events that wait to be written."""

CLOSING = 10.0
"""Seconds that the engine's end waits for the writer."""

logger = logging.getLogger("vllm.kvplug")


def of_rank(path: Path, rank: int) -> Path:
    """The file of a data-parallel engine: ``events.jsonl``, ``events.rank1.jsonl`` and so on."""
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}") if rank else path


def rotated(path: Path) -> Path:
    """Where the older half of a log lies."""
    return path.with_name(path.name + ".1")


class EventLog:
    """Writes events to a file that one engine owns.

    Args:
        path: The file. What is there is kept and appended to.
        size: Most bytes of it and of the older file that a rotation leaves.
        header: Facts of the engine, for the first line that it writes to a file.

    Attributes:
        path: As given.
        lost: Events that were not written.

    Raises:
        ValueError: The file cannot be written, is no plain file, or another engine writes it.
    """

    def __init__(self, path: Path, size: int, header: dict[str, Any] | None = None):
        self.path = path
        self.lost = 0
        self._half = size // 2
        self._header = {"kvplug": __version__} | (header or {})
        self._news = threading.Condition()
        self._batches: deque[tuple[float, Sequence[Event]]] = deque()
        self._waiting = 0
        self._ended = False
        self._failed = self._torn = False
        try:
            self._file = self._open()
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {_reason(error)}") from None
        self._thread = threading.Thread(target=self._run, name="kvplug-events", daemon=True)
        self._thread.start()

    def put(self, events: Sequence[Event]) -> None:
        """Hand a step's events over; waits for nothing but another `put`'s few instructions."""
        if not events:
            return
        with self._news:
            if self._ended or self._waiting + len(events) > WAITING:
                self.lost += len(events)
                return
            self._waiting += len(events)
            self._batches.append((time.time(), events))
            self._news.notify()

    def close(self) -> None:
        """Write what waits, and end. Idempotent."""
        with self._news:
            self._ended = True
            self._news.notify()
        self._thread.join(CLOSING)

    # -- the writer ----------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._news:
                while not self._batches and not self._ended:
                    self._news.wait()
                batches, self._batches = self._batches, deque()
                self._waiting = 0
                ended = self._ended
            for at, events in batches:
                try:
                    self._write(b"".join(line_of(event, at) for event in events))
                except (OSError, ValueError, TypeError) as error:
                    self.lost += len(events)
                    if not self._failed:
                        self._failed = True
                        reason = _reason(error) if isinstance(error, OSError) else repr(error)
                        logger.error(
                            "kvplug: events cannot be written to %s: %s", self.path, reason
                        )
            if ended:
                with contextlib.suppress(OSError):
                    os.close(self._file)
                return

    def _write(self, lines: bytes) -> None:
        if self._size and self._size + len(lines) > self._half:
            self._rotate()
        left = memoryview(b"\n" + lines if self._torn else lines)
        while left:
            written = os.write(self._file, left)
            self._size += written
            left = left[written:]
            # A line of which the disk took a part must not take the next one with it.
            self._torn = bool(left)

    def _rotate(self) -> None:
        self.path.replace(rotated(self.path))
        before, self._file = self._file, self._open()
        self._torn = False
        os.close(before)

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        file = os.open(self.path, flags, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(errno.EINVAL, "it is no plain file")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.fchmod(file, 0o600)
            self._size = os.fstat(file).st_size
            # A line that a crash tore must not take the next one with it.
            torn = self._size and os.pread(file, 1, self._size - 1) != b"\n"
            head = {"v": FORMAT, "t": round(time.time(), 3), "event": "log"} | self._header
            begin = (b"\n" if torn else b"") + _encoded(head)
            self._size += os.write(file, begin)
        except BaseException:
            os.close(file)
            raise
        return file


def line_of(event: Event, at: float) -> bytes:
    """An event as a line.

    Args:
        event: The event.
        at: Seconds since the epoch.
    """
    line: dict[str, Any] = {
        "v": FORMAT,
        "t": round(at, 3),
        "step": event.step,
        "event": str(event.type),
        "count": event.count,
    }
    for name, value in (
        ("kind", str(event.kind) if event.kind is not None else ""),
        ("policy", event.policy),
        ("request", event.request),
        ("detail", event.detail),
        ("blocks", event.blocks),
        ("facts", event.facts),
    ):
        if value:
            line[name] = value
    return _encoded(line)


def _encoded(line: dict[str, Any]) -> bytes:
    return json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _reason(error: OSError) -> str:
    if error.errno == errno.EWOULDBLOCK:
        return "another engine writes it"
    if error.errno == errno.ELOOP:
        return "it is a symbolic link"
    return (error.strerror or str(error)).lower()
