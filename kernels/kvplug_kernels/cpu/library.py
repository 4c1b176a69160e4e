"""Compile an operation's ``cpu.cpp`` once for a machine, keep the library, and load it.

A library takes a C++ compiler (GCC) and no header of torch's or Python's: operations are plain
functions of pointers, called by ctypes. It is linked to the OpenMP runtime that torch has loaded,
so that both share one pool of threads.

Libraries lie in ``$XDG_CACHE_HOME/kvplug/cpu``, one for each source, compiler options, CPU and
OpenMP runtime. The folder and what is loaded from it must belong to the user, and be writable by
nobody else. Where nothing can be compiled, or ``KVPLUG_COMPILE=0`` is set, operations run in torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import re
import secrets
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Compiled", "NotCompiled", "cache_folder", "compiled", "compiler", "prepare", "state"]

logger = logging.getLogger("kvplug")

SWITCH = "KVPLUG_COMPILE"
COMPILERS = ("g++", "c++")
OPTIONS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp")
OPERATIONS = {
    "attend_exact": ("-ffp-contract=fast",),
    "paged_attend_quant": ("-ffp-contract=fast",),
    # Codes equal the specification's bit for bit.
    "quant_write": ("-ffp-contract=off",),
}
"""Operations with a ``cpu.cpp``, and its options beside `OPTIONS`."""
SECONDS = 240
"""After which a compiler is given up."""

_HERE = Path(__file__).parent
_ROOT = _HERE.parent


class NotCompiled(Exception):
    """A library that there is not; the message is the cause, one line."""


@dataclass(frozen=True)
class Compiled:
    """A loaded library.

    Attributes:
        library: Its functions.
        fresh: Whether it was compiled by this process.
    """

    library: ctypes.CDLL
    fresh: bool


@functools.cache
def compiled(operation: str) -> Compiled | None:
    """Return an operation's library, compiled and loaded by the first call; None where there is
    none, and the cause is logged once a process.

    Args:
        operation: One of `OPERATIONS`.
    """
    try:
        return _compiled(_ROOT / operation / "cpu.cpp", OPERATIONS[operation])
    except NotCompiled as error:
        cause = str(error)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
    _not_compiled(cause)
    return None


def prepare() -> bool:
    """Compile and load every operation, so that no call does; returns whether all could be."""
    return all([compiled(operation) is not None for operation in OPERATIONS])


_causes: list[str] = []


def _not_compiled(cause: str) -> None:
    if not _causes:
        level = logging.INFO if cause == _OFF else logging.WARNING
        logger.log(
            level, "kvplug: coded pages are attended by torch, not by compiled code: %s", cause
        )
    _causes.append(cause)


_OFF = f"{SWITCH}=0 is set"


def state() -> dict[str, str | bool | None]:
    """What a load would find, without compiling: ``compiler``, ``folder``, ``cause`` why nothing
    can be compiled or None, and ``cached``, whether every operation has been already."""
    cause = None
    cached = False
    try:
        _check_switch()
        folder = cache_folder()
        runtime = openmp_runtime()
        cached = all(
            (folder / _name(_ROOT / operation / "cpu.cpp", options, runtime)).exists()
            for operation, options in OPERATIONS.items()
        )
        if not cached:
            compiler()
    except NotCompiled as error:
        cause = str(error)
    except OSError as error:
        cause = f"{type(error).__name__}: {error}"
    found: str | None = None
    with contextlib.suppress(NotCompiled):
        found = compiler()
    return {"compiler": found, "folder": str(_folder_path()), "cached": cached, "cause": cause}


def _check_switch() -> None:
    if os.environ.get(SWITCH) == "0":
        raise NotCompiled(_OFF)


def compiler() -> str:
    """Path of the C++ compiler: ``$CXX``, else the first of `COMPILERS` there is.

    Raises:
        NotCompiled: There is none.
    """
    named = os.environ.get("CXX")
    for name in (named,) if named else COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return found
    if named:
        raise NotCompiled(f"there is no compiler {named!r}, which CXX names")
    raise NotCompiled("there is no C++ compiler; install g++")


def _folder_path() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "kvplug" / "cpu"


def cache_folder() -> Path:
    """Folder of compiled libraries, made on first use, with access for the user alone.

    Raises:
        NotCompiled: It belongs to somebody else, or others may write to it.
        OSError: It cannot be made.
    """
    folder = _folder_path()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    _check_own(folder, folder.lstat(), stat.S_ISDIR)
    return folder


def _check_own(path: Path, found: os.stat_result, kind: object) -> None:
    if not callable(kind) or not kind(found.st_mode):
        raise NotCompiled(f"{path} is not what it should be: remove it")
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise NotCompiled(
            f"{path} belongs to another user or may be written by others; code is not loaded "
            "from there: remove it, or set XDG_CACHE_HOME"
        )


def _compiled(source: Path, options: tuple[str, ...]) -> Compiled:
    _check_switch()
    runtime = openmp_runtime()
    name = _name(source, options, runtime)
    try:
        folder = cache_folder()
    except OSError:
        # A home that cannot be written to: compiled at every start, and kept for none.
        with tempfile.TemporaryDirectory(prefix="kvplug-cpu-") as scratch:
            return _made(Path(scratch) / name, source, options, runtime)
    with _alone(folder / f"{name}.lock"):
        kept = folder / name
        if kept.is_symlink() or kept.exists():
            _check_own(kept, kept.lstat(), stat.S_ISREG)
            with contextlib.suppress(OSError):
                return Compiled(ctypes.CDLL(str(kept)), fresh=False)
        return _made(kept, source, options, runtime)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock that every process on the machine respects."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _name(source: Path, options: tuple[str, ...], runtime: str | None) -> str:
    told = hashlib.sha256()
    for part in (*sorted(_HERE.glob("*.h")), source):
        told.update(part.read_bytes())
    for text in (*OPTIONS, *options, str(runtime), torch.__version__, *_cpu()):
        told.update(text.encode() + b"\0")
    return f"{source.parent.name}-{told.hexdigest()[:32]}.so"


def _cpu() -> Iterator[str]:
    """What ``-march=native`` depends on."""
    yield platform.machine()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        for line in text.split("\n\n", 1)[0].splitlines():
            name = line.split(":")[0].strip()
            if name in ("vendor_id", "cpu family", "model", "stepping", "flags", "Features") or (
                name.startswith("CPU ") and name != "CPU MHz"
            ):
                yield line


def openmp_runtime() -> str | None:
    """Path of the OpenMP runtime that this process has loaded, torch's own first; or None."""
    found = []
    with contextlib.suppress(OSError):
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
        found = re.findall(r"(/\S*/lib(?:g|i)?omp[0-9]*(?:-[0-9a-f]+)?\.so\S*)", maps)
    torches = str(Path(torch.__file__).parent)
    own = sorted(set(found), key=lambda path: (not path.startswith(torches), path))
    return own[0] if own else None


def _made(path: Path, source: Path, options: tuple[str, ...], runtime: str | None) -> Compiled:
    """Compile, link and load; the file appears at once and whole."""
    cxx = compiler()
    stem = path.with_name(f".{secrets.token_hex(8)}")
    compiled_to, linked_to = stem.with_suffix(".o"), stem.with_suffix(".so")
    try:
        _run([cxx, *OPTIONS, *options, "-c", str(source), "-o", str(compiled_to)])
        # Named as a file, the runtime is the one that is loaded already, by whatever name.
        last = [runtime] if runtime is not None else ["-fopenmp"]
        _run([cxx, "-shared", str(compiled_to), *last, "-o", str(linked_to)])
        linked_to.chmod(0o700)
        library = ctypes.CDLL(str(linked_to))
        linked_to.replace(path)
        return Compiled(library, fresh=True)
    finally:
        for left in (compiled_to, linked_to):
            left.unlink(missing_ok=True)


def _run(command: list[str]) -> None:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"LC_ALL": "C"},
        text=True,
        errors="replace",
        timeout=SECONDS,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        cause = (lines or done.stderr.splitlines() or ["no message"])[0]
        raise NotCompiled(f"{command[0]} failed: {cause.strip()[:300]}")
