"""Shared parts of attention functions that transformers' models are made to call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from kvplug.errors import KVPlugError


@contextmanager
def hooked(model: Any, name: str) -> Iterator[None]:
    """Make a model call the attention function registered under a name, within the block."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def check_call(module: Any, passed: object | None, kwargs: Mapping[str, Any]) -> None:
    """Refuse a call of an attention function by a model that it does not support.

    Args:
        module: The attention module.
        passed: The object that was passed to the model, as the function received it.
        kwargs: What else the model passed.

    Raises:
        KVPlugError: The model does not pass the object on, or has learned attention sinks.
    """
    if passed is None:
        raise KVPlugError(f"{type(module).__name__} does not pass kwargs on to its attention")
    if kwargs.get("s_aux") is not None:
        raise KVPlugError(f"{type(module).__name__}: learned attention sinks are not supported")


def softmax_scale(scaling: float | None, query: Tensor) -> float:
    """The softmax scale that a model states, or its default: one over the root of head size."""
    return scaling if scaling is not None else float(query.shape[-1] ** -0.5)
