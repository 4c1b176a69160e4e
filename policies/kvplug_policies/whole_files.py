"""Reads and writes whole files, through the operating system's cache or past it."""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path

import numpy as np

_BLOCK = 4096
"""Bytes to which memory, offsets and lengths are aligned past the cache."""


def write_whole(handle: int, payload: memoryview, *, direct: bool) -> None:
    """Write a new file.

    Args:
        handle: The file, opened with ``O_DIRECT`` if direct.
        payload: Its bytes.
        direct: Write past the cache: whole blocks from aligned memory, then cut the file.

    Raises:
        OSError: It cannot be written.
    """
    if direct:
        whole = -(-len(payload) // _BLOCK) * _BLOCK
        with mmap.mmap(-1, whole) as buffer:
            buffer[: len(payload)] = payload
            with memoryview(buffer) as view:
                _write_all(handle, view)
        os.ftruncate(handle, len(payload))
    else:
        _write_all(handle, payload)


def _write_all(handle: int, view: memoryview) -> None:
    at = 0
    while at < len(view):
        with view[at:] as rest:
            at += os.write(handle, rest)


def read_whole(handle: int, size: int, *, direct: bool) -> memoryview | None:
    """Read a file of some bytes; None if it has become shorter.

    Args:
        handle: The file, opened with ``O_DIRECT`` if direct.
        size: Its bytes.
        direct: Read past the cache.

    Raises:
        OSError: It cannot be read.
    """
    if direct:
        buffer = memoryview(mmap.mmap(-1, -(-size // _BLOCK) * _BLOCK))
    else:
        buffer = np.empty(size, np.uint8).data
    at = 0
    while at < size:
        count = os.readv(handle, [buffer[at:]])
        if not count:
            return None
        at += count
    return buffer[:size].toreadonly()


def takes_direct(passing: Path) -> bool:
    """Tell whether a file system writes past its cache, by writing a file and removing it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_DIRECT
    try:
        handle = os.open(passing, flags, 0o600)
    except OSError:
        return False
    try:
        write_whole(handle, memoryview(b"kvplug"), direct=True)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
        passing.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file or a folder to the medium, if it is still there."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
