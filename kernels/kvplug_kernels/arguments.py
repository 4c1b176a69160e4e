"""Checks of arguments that the operations share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FLOAT32 = (torch.float32,)
INT32 = (torch.int32,)
INTEGERS = (torch.int64, torch.int32)

P = ParamSpec("P")
R = TypeVar("R")


def checked(check: Callable[P, None]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate an implementation so that ``check`` sees its arguments before it runs.

    The types make every implementation of an operation have the signature of its one check.
    """

    def decorate(implementation: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(implementation)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            check(*args, **kwargs)
            return implementation(*args, **kwargs)

        return run

    return decorate


def check_tensor(
    name: str,
    tensor: Tensor,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | str],
    device: torch.device,
    *,
    any_strides: bool = False,
) -> None:
    """Raise ValueError unless the tensor has one of the dtypes, the shape (a string names a free
    dimension), the device and, but for ``any_strides``, a contiguous last dimension."""
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} must have dtype {allowed}, got {tensor.dtype}.")
    fits = tensor.ndim == len(shape) and all(
        isinstance(want, str) or want == size
        for want, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {tuple(tensor.shape)}.")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, got {tensor.device}.")
    if not any_strides and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}."
        )


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the tensor is contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}.")


def check_separate(name: str, out: Tensor | None, inputs: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError when the output ``out`` starts at the address of an input."""
    if out is None or out.numel() == 0:
        return
    for other, tensor in inputs.items():
        if tensor is not None and tensor.numel() > 0 and tensor.data_ptr() == out.data_ptr():
            raise ValueError(f"{name} must not share memory with {other}.")


def attention_outputs(
    query: Tensor, width: int, out: Tensor | None, lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return ``out`` and ``lse``, new where not given: uninitialized float32 ``[num_tokens,
    num_heads, width]`` and ``[num_tokens, num_heads]``."""
    if out is None:
        out = query.new_empty((*query.shape[:2], width), dtype=torch.float32)
    if lse is None:
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    return out, lse
