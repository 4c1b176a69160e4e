"""Settings of torch that hold for a whole process, put back where a policy changed them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kvplug.containment import ContainedPolicy

State = tuple[Any, ...]

SETTINGS = (
    "the default dtype",
    "whether gradients are recorded",
    "whether algorithms are deterministic",
    "the precision of float32 products",
    "the number of threads",
)
"""What `state` holds, in order."""


def state() -> State:
    """Return the settings: another default dtype, for one, changes what a model computes."""
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
    )


_SET: tuple[Callable[[Any], Any], ...] = (
    torch.set_default_dtype,
    torch.set_grad_enabled,
    torch.use_deterministic_algorithms,
    torch.set_float32_matmul_precision,
    torch.set_num_threads,
)


def restore(before: State) -> list[str]:
    """Put the settings back; returns those that were changed."""
    changed = []
    for name, put, old, new in zip(SETTINGS, _SET, before, state(), strict=True):
        if new != old:
            put(old)
            changed.append(name)
    return changed


class TorchPolicy(ContainedPolicy):
    """A policy that computes with torch, contained: no setting of torch outlives its calls."""

    _warned = False

    def call(self, method: str, *arguments: Any) -> Any:
        before = state()
        try:
            return super().call(method, *arguments)
        finally:
            if state() != before:
                self._restore(before)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        before = state()
        try:
            return super().run(function, *arguments)
        finally:
            if state() != before:
                self._restore(before)

    def _restore(self, before: State) -> None:
        changed = ", ".join(restore(before))
        if not self._warned:
            self._warned = True
            self.warn(f"changed {changed}; it is put back after each call")
