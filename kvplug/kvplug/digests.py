"""Digests of files by content, remembered for as long as the file system says nothing changed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["Signature", "digest_cache", "file_digest", "file_digests", "signature"]

Signature = tuple[int, int, int, int, int]
"""Device, inode, size, and times of the last change of a file's bytes and of its inode. A program
can set the first of the two times, but not the second."""

_CHUNK = 1 << 23
_DIGEST = re.compile(rb"[0-9a-f]{32}")

_RACY = 2.0
"""Seconds after a change within which another one may leave a file's times as they are."""


def digest_cache() -> Path:
    """Folder of the digests that are remembered, in ``$XDG_CACHE_HOME``."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "kvplug" / "digests"


def signature(path: Path) -> Signature:
    """What the file system says about a file; links are followed.

    Raises:
        OSError: There is no such file, or it is not a regular one.
    """
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(f"{path} is not a regular file")
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def file_digest(path: Path) -> str:
    """Hash all bytes of a file: 32 hexadecimal digits of BLAKE2b.

    A file whose device, inode, size and times are those of an earlier call is not read again.

    Raises:
        OSError: It cannot be read, is not a regular file, or changes while it is read.
    """
    known = signature(path)
    remembered = _remembered(path, known)
    if remembered is None:
        return _read(path, known)
    if kept := _kept(remembered):
        return kept
    with _alone(remembered):
        # Another process may have hashed it meanwhile.
        if kept := _kept(remembered):
            return kept
        found = _read(path, known)
        if time.time() - max(known[3:]) / 1e9 > _RACY:
            _remember(remembered, found)
        return found


def file_digests(paths: Iterable[Path]) -> list[str]:
    """Hash several files at once, as `file_digest` does each.

    Raises:
        OSError: One of them cannot be read, is not a regular file, or changes while it is read.
    """
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(file_digest, paths))


def _read(path: Path, known: Signature) -> str:
    found = hashlib.blake2b(digest_size=16)
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(min(_CHUNK, known[2] + 1))
        while count := file.readinto(buffer):
            found.update(memoryview(buffer)[:count])
    if signature(path) != known:
        raise OSError(f"{path} changes while it is read")
    return found.hexdigest()


def _remembered(path: Path, known: Signature) -> Path | None:
    """File that has, or will have, the digest; None where nothing can be remembered."""
    folder = digest_cache()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return None
    key = "\0".join([os.fspath(path.absolute()), *map(str, known)])
    return folder / hashlib.blake2b(os.fsencode(key), digest_size=16).hexdigest()


def _kept(file: Path) -> str:
    """A digest that is remembered; empty if there is none."""
    try:
        found = file.read_bytes()
    except OSError:
        return ""
    return found.decode() if _DIGEST.fullmatch(found) else ""


def _remember(file: Path, found: str) -> None:
    passing = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        passing.write_text(found, "ascii")
        passing.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            passing.unlink()


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Keep other processes from hashing the same file meanwhile, where files can be locked."""
    with contextlib.ExitStack() as stack:
        lock = file.with_name(f"{file.name}.lock")
        with contextlib.suppress(OSError):
            handle = stack.enter_context(lock.open("w"))
            fcntl.flock(handle, fcntl.LOCK_EX)
            # Whoever waits for it goes on with the file that is open.
            stack.callback(lambda: lock.unlink(missing_ok=True))
        yield
