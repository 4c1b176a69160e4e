"""The folder of an engine's stored segments: whose it is, and what is removed from it at once."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterable
from pathlib import Path

from kvplug.errors import KVPlugError
from kvplug.reuse.file import file_name, parse_name

__all__ = ["OwnedFolder", "engine_folder", "remove_files"]

LOCK = ".kvplug.lock"

_FIX = "Fix: name a folder that the engine's user can read and write."


def engine_folder(directory: str, data_parallel: int) -> str:
    """The folder of one engine: data-parallel ranks of one deployment have one each.

    Args:
        directory: ``reuse.store.directory``; empty for none.
        data_parallel: The engine's data-parallel rank.
    """
    if not directory or not data_parallel:
        return directory
    return str(Path(directory) / f"data-parallel-{data_parallel}")


def remove_files(directory: str, segments: Iterable[str], world: int) -> bool:
    """Remove the files of segments, on all ranks.

    Returns:
        False if one is still there.
    """
    removed = True
    for segment in segments:
        for rank in range(world):
            try:
                (Path(directory) / file_name(segment, rank, world)).unlink(missing_ok=True)
            except OSError:
                removed = False
    return removed


class OwnedFolder:
    """A folder that this process has for its own until it closes it or ends, however it ends.

    Args:
        directory: The folder, created if it does not exist.
        owns: Lock it and remove what an earlier engine left unfinished; False on workers whose
            engine owns it through another one.

    Attributes:
        path: The folder.

    Raises:
        KVPlugError: It cannot be created or locked, or belongs to another engine.
    """

    def __init__(self, directory: str, *, owns: bool) -> None:
        self.path = Path(directory)
        self._lock: int | None = None
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise KVPlugError(
                f"reuse.store.directory: {directory} cannot be created ({error.strerror}). {_FIX}"
            ) from None
        if owns:
            self._lock = _locked(self.path)
            self._sweep()

    def close(self) -> None:
        """Give the folder back. Idempotent."""
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def __del__(self) -> None:
        if getattr(self, "_lock", None) is not None:
            self.close()

    def _sweep(self) -> None:
        """Remove files that an earlier engine had not finished writing."""
        for path in self.path.glob(".*.kvseg.*.tmp"):
            if parse_name(path.name[1:].rsplit(".", 2)[0]) is not None:
                with contextlib.suppress(OSError):
                    path.unlink()


def _locked(folder: Path) -> int:
    """Lock a folder; returns the open file that holds the lock."""
    where = f"reuse.store.directory: {folder}"
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        lock = os.open(folder / LOCK, flags, 0o600)
    except OSError as error:
        raise KVPlugError(f"{where} cannot be locked ({error.strerror}). {_FIX}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(lock, 256, 0).decode("ascii", "replace").strip()
        os.close(lock)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise KVPlugError(
                f"{where} belongs to another engine that runs{f' ({owner})' if owner else ''}. "
                "Fix: name a folder of its own for each engine."
            ) from None
        raise KVPlugError(
            f"{where} cannot be locked ({error.strerror}). Fix: name a folder on a file system "
            "with locks."
        ) from None
    with contextlib.suppress(OSError):
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return lock
