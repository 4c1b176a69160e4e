"""Tensors that policies return, checked before a host uses them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def plain_tensor(what: str, given: Any, shape: torch.Size, like: Tensor) -> Tensor:
    """Return a policy's tensor, detached and in the dtype of another.

    Args:
        what: The method that returned it, for messages.
        given: What it returned.
        shape: The shape it must have.
        like: A tensor of the device it must lie on, and of the dtype it is returned in.

    Raises:
        TypeError: It is no dense tensor of numbers that are compared.
        ValueError: It has another shape, lies elsewhere or, on the CPU, is not finite. On an
            accelerator the host would have to wait to know.
    """
    if type(given) is not Tensor or given.layout is not torch.strided or given.is_complex():
        raise TypeError(f"{what} returned {_described(given)}, expected a dense tensor of reals")
    if given.shape != shape:
        raise ValueError(f"{what} returned shape {tuple(given.shape)}, expected {tuple(shape)}")
    if given.device != like.device:
        raise ValueError(f"{what} returned a tensor on {given.device}, expected {like.device}")
    plain = given.detach().to(like.dtype)
    if plain.device.type == "cpu" and not bool(torch.isfinite(plain).all()):
        raise ValueError(f"{what} returned numbers that are not finite in {plain.dtype}")
    return plain


def _described(given: Any) -> str:
    if isinstance(given, Tensor):
        return f"a {type(given).__name__} of {given.dtype}, {given.layout}"
    return type(given).__name__
