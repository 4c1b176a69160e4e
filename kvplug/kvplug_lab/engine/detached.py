"""Processes forked from one that has imported vLLM, which must not outlive it nor share its output.

Imports the standard library alone, so that a process may call it before it imports anything else.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def detach(log: Path) -> None:
    """Have this process write to ``log``, read nothing, and end with the process it came from."""
    die_with_parent()
    with log.open("ab", buffering=0) as out, Path(os.devnull).open("rb", buffering=0) as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
