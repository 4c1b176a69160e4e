"""Processes forked from one that has imported vLLM, which must not outlive it nor share its output.

Imports the standard library alone, so that a process may call it before it imports anything else.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def detach(log: Path) -> None:
    """Have this process write to ``log``, read nothing, and end with the process it came from.

    On SIGUSR1 it writes to the log where each of its threads is.
    """
    die_with_parent()
    with log.open("ab", buffering=0) as out, Path(os.devnull).open("rb", buffering=0) as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)


def take_environment(environment: Mapping[str, str]) -> None:
    """Have this process see these environment variables and no others.

    What a process is forked from may have been started long before, for something else.
    """
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
