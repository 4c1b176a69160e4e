"""Files in one or several folders: what is stored outlives the engine.

    ROOT/IDENTITY/.kvplug             says whose folder it is
    ROOT/IDENTITY/ab/KEY.RANK-WORLD   a payload; ab are the key's first two digits
    ROOT/IDENTITY/tmp/...             payloads on their way, each locked by its writer

Whatever is not of this form is neither read nor removed, nor are folders of other identities.
Processes of one identity may share a folder: ranks, engines one after another, and engines at once.
An engine sees what others stored there while it runs when it stores the same itself, and the rest
at its next start.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import math
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from kvplug.contract import Size, Tier, TierError, TierOptions, TierPlace, TierUsage
from kvplug_policies.entry_names import entry_name, identity_name, parse_entry
from kvplug_policies.whole_files import read_whole, sync, takes_direct, write_whole

MARKER = ".kvplug"
PASSING = "tmp"

MAX_PAYLOAD = 1 << 30
"""Most bytes of a file that is read or written."""

RETRY = 30.0
"""Seconds for which a folder that failed is left alone."""

SEEN_AGAIN = 60.0
"""Seconds after which a use is noted again."""

_SLACK = 16
"""A folder is looked through again whenever a sixteenth of its bytes was written, and room is made
in sixteenths."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_ABSENT = {errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.EINVAL, errno.ENOTDIR}
_BUSY = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN}
"""Errors that say nothing about a folder."""


Entry = tuple[bytes, int, int, int, float]
"""Key, rank, world, bytes, and time of last use of a file."""


@dataclass
class Root:
    """One folder of the tier.

    Attributes:
        path: The folder as the user named it.
        limit: Bytes that this rank may store there.
        base: Folder of the identity below it.
        used: Bytes of this rank's files, as far as known.
        entries: Files of this rank, as far as known.
        written: Bytes written since the folder was last looked through.
        unreadable: Time until which it is not read.
        unwritable: Time until which it is not written.
        cause: Why it failed last.
        direct: True if it is read and written past the cache.
        listed: What was there when the folder was opened, until somebody asks.
        ready: Folders of keys that are known to be folders.
        lock: Held to change the numbers.
    """

    path: Path
    limit: int
    base: Path
    used: int = 0
    entries: int = 0
    written: int = 0
    unreadable: float = 0.0
    unwritable: float = 0.0
    cause: str = ""
    direct: bool = False
    listed: list[Entry] | None = None
    ready: set[Path] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, size: int, entries: int) -> None:
        with self.lock:
            self.used = max(0, self.used + size)
            self.entries = max(0, self.entries + entries)
            self.written += max(0, size)


class Disk(Tier):
    """Stores payloads as files, spread over folders by their keys.

    What a crash of the process leaves is whole: a file gets its name when all of it is written.
    After a crash of the machine a file may be torn unless ``fsync`` is ``each``; its checksum
    tells, and it is a miss.
    """

    name = "disk"
    changes = "stores KV that leaves the engine's pool in files"
    durable = True

    class Options(TierOptions):
        """Options of ``disk``.

        Attributes:
            path: Folders.
            size: Bytes of files of one identity: of all folders together, or of each.
            fsync: When written bytes are forced to the medium.
            fsync_seconds: Seconds between two times with ``fsync: interval``.
            direct: Read and write past the operating system's cache.
        """

        path: str | list[str] = Field(
            description="folder, or several on disks of their own; created if missing"
        )
        size: Size | list[Size] = Field(
            description="bytes of files, of all folders together in equal parts, or a list with "
            "the bytes of each folder"
        )
        fsync: Literal["never", "each", "interval"] = Field(
            "never",
            description="when files are forced to the medium: needed against a crash of the "
            "machine only, after which a torn file is a miss",
        )
        fsync_seconds: float = Field(
            5.0, ge=0.1, le=3600, description="seconds between two times with `fsync: interval`"
        )
        direct: bool = Field(
            False, description="read and write past the operating system's cache (O_DIRECT)"
        )

        @field_validator("path")
        @classmethod
        def _some_folders(cls, path: str | list[str]) -> str | list[str]:
            paths = [path] if isinstance(path, str) else path
            if not paths or not all(paths) or any("\0" in one for one in paths):
                raise ValueError("must name a folder, or several")
            if len({os.path.realpath(one) for one in paths}) < len(paths):
                raise ValueError("must name each folder once")
            return path

        @model_validator(mode="after")
        def _sizes_of_folders(self) -> Disk.Options:
            sizes = self.sizes
            if len(sizes) != len(self.paths):
                raise ValueError("size must be one number, or as many as path has folders")
            if min(sizes) < 1 << 20:
                raise ValueError("size must be at least 1MiB for each folder of path")
            if self.fsync != "interval" and "fsync_seconds" in self.model_fields_set:
                raise ValueError("fsync_seconds needs fsync: interval")
            return self

        @property
        def places(self) -> frozenset[str]:
            return frozenset(os.path.realpath(Path(one).expanduser()) for one in self.paths)

        @property
        def paths(self) -> list[str]:
            """The folders."""
            return [self.path] if isinstance(self.path, str) else self.path

        @property
        def sizes(self) -> list[int]:
            """Bytes of each folder."""
            if isinstance(self.size, list):
                return self.size
            return [self.size // len(self.paths)] * len(self.paths)

    options: Options

    def open(self, place: TierPlace) -> None:
        self._place = place
        self._name = identity_name(place.identity)
        self._removed = self._swept = 0
        self._closed = threading.Event()
        self._unsynced: list[Path] = []
        self._syncing = threading.Lock()
        self._roots = []
        ranks = len(place.ranks)
        for path, size in zip(self.options.paths, self.options.sizes, strict=True):
            folder = Path(path).expanduser().absolute()
            limit = size // place.world * ranks
            self._roots.append(Root(folder, limit, folder / self._name))
        problems = [problem for root in self._roots if (problem := self._opened(root))]
        if len(problems) == len(self._roots):
            raise TierError("no folder", " ".join(problems))
        if self.options.fsync == "interval" and place.rank >= 0:
            thread = threading.Thread(target=self._sync_often, name="kvplug fsync", daemon=True)
            thread.start()

    def _opened(self, root: Root) -> str:
        """Make a folder ready; returns what keeps it from being used."""
        try:
            problem = self._claimed(root)
            if not problem:
                root.direct = self.options.direct and takes_direct(self._passing(root))
                self._sweep(root)
                found = self._look(root)
                if self._place.rank < 0:
                    root.listed = found
                return ""
        except OSError as error:
            problem = f"{root.path}: {error.strerror or error}"
        root.cause = problem
        # What belongs to somebody else does so for good.
        root.unreadable = root.unwritable = math.inf
        return f"{problem}; name a folder that the engine's user can write to."

    def _claimed(self, root: Root) -> str:
        base = root.base
        said = f"kvplug tier 1\nidentity {self._place.identity}\n".encode()
        root.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileExistsError):
            base.mkdir(mode=0o700)
        if not stat.S_ISDIR(base.lstat().st_mode):
            return f"{base} is not a folder"
        marker = base / MARKER
        found = _read_marker(marker)
        if found is None:
            if any(entry.name not in (PASSING, MARKER) for entry in base.iterdir()):
                return f"{base} is not empty and has no {MARKER}"
        elif found != said and not said.startswith(found.rstrip(b"\0")):
            return f"{marker} is of another identity"
        if found != said:
            # New, or torn by a crash of the machine: the folder's name says whose it is, too.
            (base / PASSING).mkdir(mode=0o700, exist_ok=True)
            # Others may do the same at once: what they write is the same.
            self._write(root, marker, memoryview(said), lasting=True)
            found = _read_marker(marker)
        if found != said:
            return f"{marker} is of another identity"
        (base / PASSING).mkdir(mode=0o700, exist_ok=True)
        return ""

    def _sweep(self, root: Root) -> None:
        """Remove what a writer that is gone left unfinished."""
        for path in list((root.base / PASSING).iterdir()):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with contextlib.suppress(OSError):
                handle = os.open(path, flags)
                try:
                    # A writer holds the lock until its file has its name, or it ends.
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                    self._swept += 1
                finally:
                    os.close(handle)

    # -- what is there ------------------------------------------------------------------------

    def _own(self, rank: int) -> bool:
        """True for entries that this rank counts; those of another world leave in their turn."""
        return self._place.rank < 0 or rank % self._place.world == self._place.rank

    def _scan(self, root: Root) -> Iterator[Entry]:
        """Go through a folder's entries."""
        for folder in sorted(root.base.iterdir()):
            digits = folder.name
            if len(digits) != 2:
                continue
            try:
                found = os.scandir(folder)
            except OSError:
                continue
            with found:
                for entry in found:
                    named = parse_entry(entry.name)
                    if named is None or not entry.name.startswith(digits):
                        continue
                    with contextlib.suppress(OSError):
                        facts = entry.stat(follow_symlinks=False)
                        if stat.S_ISREG(facts.st_mode):
                            yield *named, facts.st_size, facts.st_mtime

    def _look(self, root: Root) -> list[Entry]:
        """Count a folder's files afresh; returns those that this rank counts."""
        found = [entry for entry in self._scan(root) if self._own(entry[1])]
        with root.lock:
            root.used, root.entries = sum(entry[3] for entry in found), len(found)
            root.written = 0
        return found

    def _room(self, root: Root, size: int) -> bool:
        """Make room for more bytes in a folder, where that is needed and possible."""
        if size > root.limit:
            return False
        if root.used + size <= root.limit and root.written + size <= root.limit // _SLACK:
            return True
        found = self._look(root)
        if root.used + size <= root.limit:
            return True
        found.sort(key=lambda entry: entry[4])
        enough = root.limit - max(size, root.limit // _SLACK)
        for key, rank, world, gone, _ in found:
            if root.used <= enough:
                break
            with contextlib.suppress(FileNotFoundError):
                self._path(root, key, rank, world).unlink()
                self._removed += 1
            root.count(-gone, -1)
        return root.used + size <= root.limit

    def stored(self) -> Iterator[tuple[bytes, int, float]]:
        ranks, world = self._place.ranks, self._place.world
        parts: dict[bytes, tuple[int, int, float]] = {}
        for root in self._live("unreadable"):
            # What was found when the folder was opened is still what there is to say of it.
            listed, root.listed = root.listed, None
            with contextlib.suppress(OSError):
                for key, rank, of, size, used in self._scan(root) if listed is None else listed:
                    if of != world or rank not in ranks or not size:
                        continue
                    if len(ranks) == 1:
                        yield key, size, used
                        continue
                    seen, sizes, last = parts.get(key, (0, 0, 0.0))
                    if not seen >> rank & 1:
                        parts[key] = seen | 1 << rank, sizes + size, max(last, used)
        whole = (1 << world) - 1
        yield from ((key, size, used) for key, (seen, size, used) in parts.items() if seen == whole)

    def usage(self) -> TierUsage:
        limit = sum(root.limit for root in self._roots)
        if len(self._roots) > 1:
            # Keys spread evenly, but not exactly so.
            limit -= limit // 20
        entries, used = (sum(getattr(r, n) for r in self._roots) for n in ("entries", "used"))
        return TierUsage(entries, used, limit)

    def counters(self) -> dict[str, float]:
        now = time.monotonic()
        out = sum(now < max(root.unreadable, root.unwritable) for root in self._roots)
        return {
            "removed_over_size": self._removed,
            "unfinished_removed": self._swept,
            "folders_left_out": out,
        }

    def described(self) -> Mapping[str, str]:
        texts = {}
        for root in self._roots:
            how = "O_DIRECT" if root.direct else "buffered"
            if self.options.direct and not root.direct:
                how = "buffered, its file system refuses O_DIRECT"
            count = f"{root.entries:,} chunks, {root.used / 2**20:,.0f} MiB, {how}"
            texts[str(root.path)] = f"left out: {root.cause}" if root.cause else count
        return texts

    # -- reading and writing ------------------------------------------------------------------

    def _live(self, what: str) -> list[Root]:
        """Folders that did not fail lately."""
        now = time.monotonic()
        return [root for root in self._roots if getattr(root, what) <= now]

    def _order(self, key: bytes, what: str) -> list[Root]:
        """Folders for a key, the one where it belongs first."""
        live = self._live(what)
        if len(live) < 2:
            return live

        def weight(root: Root) -> float:
            drawn = hashlib.blake2b(key + os.fsencode(root.path), digest_size=7).digest()
            return -root.limit / math.log((int.from_bytes(drawn, "big") + 1) / (2**56 + 1))

        return sorted(live, key=weight, reverse=True)

    def _path(self, root: Root, key: bytes, rank: int, world: int = 0) -> Path:
        name = entry_name(key, rank, world or self._place.world)
        return root.base / name[:2] / name

    @staticmethod
    def _passing(root: Root) -> Path:
        """A new name for a file that is being written."""
        return root.base / PASSING / secrets.token_hex(8)

    def _failed(self, root: Root, error: OSError, *whats: str) -> None:
        """Leave a folder alone for a while, unless an error says nothing about it."""
        if error.errno in _BUSY:
            return
        root.cause = error.strerror or str(error)
        root.ready.clear()
        for what in whats:
            setattr(root, what, max(getattr(root, what), time.monotonic() + RETRY))

    def put(self, items: Sequence[tuple[bytes, Any]]) -> list[str]:
        if self._closed.is_set():
            raise TierError("closed")
        if self._place.rank < 0:
            raise TierError("not a worker")
        return [self._put(key, memoryview(payload).cast("B")) for key, payload in items]

    def _put(self, key: bytes, payload: memoryview) -> str:
        if not 0 < len(payload) <= MAX_PAYLOAD:
            return "too large" if len(payload) else "empty"
        answer = "unwritable"
        for root in self._order(key, "unwritable"):
            try:
                if root.cause and (problem := self._claimed(root)):
                    raise OSError(errno.EIO, problem)
                path = self._path(root, key, self._place.rank)
                there = self._there(path)
                if there == len(payload):
                    return ""
                if not self._room(root, len(payload)):
                    answer = "full"
                    continue
                self._write(root, path, payload)
                root.count(len(payload) - max(there, 0), int(there < 0))
                root.cause = ""
                return ""
            except OSError as error:
                if error.errno in _FULL:
                    answer = "full"
                    continue
                answer = "unwritable"
                self._failed(root, error, "unwritable")
        return answer

    @staticmethod
    def _there(path: Path) -> int:
        """Bytes of a file; -1 if there is none."""
        try:
            facts = path.lstat()
        except FileNotFoundError:
            return -1
        return facts.st_size if stat.S_ISREG(facts.st_mode) else -1

    def _write(self, root: Root, path: Path, payload: memoryview, *, lasting: bool = False) -> None:
        for _ in range(3):
            # One that sweeps may have taken a file for a dead writer's.
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                self._write_once(root, path, payload, lasting)
                return
        raise OSError(errno.EIO, "the folder is gone")

    def _write_once(self, root: Root, path: Path, payload: memoryview, lasting: bool) -> None:
        passing, folder = self._passing(root), path.parent
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        handle = os.open(passing, flags | (os.O_DIRECT if root.direct else 0), 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write_whole(handle, payload, direct=root.direct)
            if lasting or self.options.fsync == "each":
                os.fdatasync(handle)
            if folder not in root.ready:
                with contextlib.suppress(FileExistsError):
                    folder.mkdir(0o700)
                if not stat.S_ISDIR(folder.lstat().st_mode):
                    raise OSError(errno.ENOTDIR, f"{folder} is not a folder")
                root.ready.add(folder)
            passing.rename(path)
        except BaseException:
            with contextlib.suppress(OSError):
                passing.unlink()
            root.ready.discard(folder)
            raise
        finally:
            os.close(handle)
        if lasting or self.options.fsync == "each":
            sync(folder)
        elif self.options.fsync == "interval":
            with self._syncing:
                self._unsynced.append(path)

    def get(self, keys: Sequence[bytes]) -> list[Any]:
        return [self._get(key) for key in keys]

    def _get(self, key: bytes) -> memoryview | None:
        asked = False
        for root in self._order(key, "unreadable"):
            try:
                found = self._read(root, self._path(root, key, self._place.rank))
            except OSError as error:
                self._failed(root, error, "unreadable")
                continue
            asked = True
            if found is not None:
                return found
        if not asked:
            raise TierError("unreadable", "; ".join(root.cause for root in self._roots))
        return None

    def _read(self, root: Root, path: Path) -> memoryview | None:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            handle = os.open(path, flags | (os.O_DIRECT if root.direct else 0))
        except OSError as error:
            # Nothing, or a link, a socket, or what O_DIRECT cannot open: nothing that was stored.
            if error.errno in _ABSENT and root.base.is_dir():
                return None
            raise
        try:
            facts = os.fstat(handle)
            if not stat.S_ISREG(facts.st_mode) or not 0 < facts.st_size <= MAX_PAYLOAD:
                return None
            if abs(time.time() - facts.st_mtime) > SEEN_AGAIN:
                with contextlib.suppress(OSError):
                    os.utime(handle)
            return read_whole(handle, facts.st_size, direct=root.direct)
        finally:
            os.close(handle)

    def has(self, keys: Sequence[bytes]) -> list[bool]:
        return [all(self._has(key, rank) for rank in self._place.ranks) for key in keys]

    def _has(self, key: bytes, rank: int) -> bool:
        for root in self._order(key, "unreadable"):
            try:
                if self._there(self._path(root, key, rank)) > 0:
                    return True
            except OSError as error:
                self._failed(root, error, "unreadable")
        return False

    def remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            for root in self._roots:
                for rank in self._place.ranks:
                    path = self._path(root, key, rank)
                    with contextlib.suppress(OSError):
                        size = self._there(path)
                        path.unlink()
                        root.count(-max(size, 0), -int(size >= 0))

    # -- forcing to the medium ----------------------------------------------------------------

    def _sync_often(self) -> None:
        while not self._closed.wait(self.options.fsync_seconds):
            self._sync_written()

    def _sync_written(self) -> None:
        with self._syncing:
            paths, self._unsynced = self._unsynced, []
        for path in paths:
            sync(path)
        for folder in {path.parent for path in paths}:
            sync(folder)

    def close(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            self._sync_written()


def _read_marker(path: Path) -> bytes | None:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return os.read(handle, 4096) if stat.S_ISREG(os.fstat(handle).st_mode) else b"no file"
    finally:
        os.close(handle)
