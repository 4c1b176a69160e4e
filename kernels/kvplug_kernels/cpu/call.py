"""Arguments of compiled functions: structures of pointers and 64-bit numbers."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

__all__ = ["DTYPES", "pointer", "structure"]

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Numbers of dtypes, those of ``simd.h``."""

_TYPES = {"*": ctypes.c_void_p, "%": ctypes.c_double}


def structure(name: str, fields: str) -> Any:
    """A class of structures.

    Args:
        name: Its name in C++.
        fields: Names of the fields: pointers begin with ``*``, doubles with ``%``, others are
            64-bit integers; ``name[n]`` is n integers.
    """
    made = []
    for field in fields.split():
        kind: Any = _TYPES.get(field[0], ctypes.c_int64)
        plain, _, count = field.lstrip("*%").rstrip("]").partition("[")
        made.append((plain, kind * int(count) if count else kind))
    return type(name, (ctypes.Structure,), {"_fields_": made})


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a tensor's first element."""
    return tensor.data_ptr() if tensor is not None else None
