"""Operations compiled from C++ for the CPU they run on."""

from __future__ import annotations

from .library import Compiled, compiled, prepare, state

__all__ = ["Compiled", "compiled", "prepare", "state"]
