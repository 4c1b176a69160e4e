"""Opens files that somebody else may have written: regular files only, and no larger than stated.

A path can name a pipe that nobody writes to, a device without an end or a folder; a reader that
goes through here never waits and never reads more than its limit.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kvplug.errors import KVPlugError

__all__ = ["UnreadableFile", "open_regular", "read_regular"]

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


class UnreadableFile(KVPlugError, ValueError):
    """A path that is not read; the message names it and says why.

    Attributes:
        path: The path as it was given.
        problem: Why it is not read, without the path.
    """

    exit_code = 2

    def __init__(self, path: str | Path, problem: str):
        self.path = str(path)
        self.problem = problem
        super().__init__(f"{self.path}: {problem}")

    def __reduce__(self) -> tuple[type[UnreadableFile], tuple[str, str]]:
        return type(self), (self.path, self.problem)


@contextmanager
def open_regular(path: str | Path, max_bytes: int) -> Iterator[BinaryIO]:
    """Open a regular file for reading, or the one that a link leads to.

    Args:
        path: The file.
        max_bytes: Size above which it is refused. A file that grows later is the reader's to
            bound.

    Yields:
        The open file, at its start.

    Raises:
        UnreadableFile: There is no such file, it is no regular file, it may not be read, or it is
            larger.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        # Opening a device can do things, so look before; what lies there may change meanwhile.
        _require_regular(path, Path(path).stat(), max_bytes)
        handle = os.open(path, flags)
    except OSError as error:
        raise UnreadableFile(path, f"cannot be read: {error.strerror or error}") from error
    except UnreadableFile:
        raise
    except ValueError as error:  # a zero byte in the path
        raise UnreadableFile(path, f"cannot be read: {error}") from error
    with os.fdopen(handle, "rb") as file:
        _require_regular(path, os.fstat(handle), max_bytes)
        yield file


def read_regular(path: str | Path, max_bytes: int) -> bytes:
    """Read a whole regular file.

    Args:
        path: The file, or a link to it.
        max_bytes: Size above which it is refused.

    Raises:
        UnreadableFile: There is no such file, it is no regular file, it cannot be read, or it is
            larger.
    """
    with open_regular(path, max_bytes) as file:
        try:
            data = file.read(max_bytes + 1)
        except OSError as error:
            raise UnreadableFile(path, f"cannot be read: {error.strerror or error}") from error
    if len(data) > max_bytes:
        raise UnreadableFile(path, _too_large(len(data), max_bytes))
    return data


def _require_regular(path: str | Path, found: os.stat_result, max_bytes: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        what = next((name for is_kind, name in _KINDS if is_kind(found.st_mode)), "special")
        raise UnreadableFile(path, f"is {what}, not a regular file")
    if found.st_size > max_bytes:
        raise UnreadableFile(path, _too_large(found.st_size, max_bytes))


def _too_large(size: int, max_bytes: int) -> str:
    return f"has {size:,} bytes; at most {max_bytes:,} are read"
