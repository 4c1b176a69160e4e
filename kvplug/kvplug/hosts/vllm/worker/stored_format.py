"""A format as other kinds use it on a worker: they read and write pages of its bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kvplug.containment import ON_WORKER, ContainedPolicy, PolicyFailure
from kvplug.contract import FormatPolicy, LayerView, WriteBatch
from kvplug.hosts.torch_state import TorchPolicy

Fail = Callable[[str, PolicyFailure], None]
"""``fail(method, failure)``: takes note of a failure of the format."""


class StoredFormat:
    """Reads and writes pages through a format that may fail.

    Args:
        policy: The format.
        contained: The same, as it is called on this worker; made here if None.
        fail: Takes note of failures, if anyone does.
        lost: Takes note of blocks whose tokens could not be stored, if anyone does.
    """

    def __init__(
        self,
        policy: FormatPolicy,
        contained: ContainedPolicy | None = None,
        fail: Fail | None = None,
        lost: set[int] | None = None,
    ):
        self._policy = policy
        self._contained = contained or TorchPolicy(policy, ON_WORKER)
        self._fail = fail
        self._lost = lost

    def read(self, layer: LayerView, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Read K and V of whole blocks; see `FormatPolicy.read`.

        Raises:
            PolicyFailure: The format failed.
        """
        try:
            found: tuple[Tensor, Tensor] = self._contained.run(self._read, layer, cache, blocks)
        except PolicyFailure as failure:
            self._note("read", failure)
            raise
        return found

    def write(self, layer: LayerView, batch: WriteBatch, cache: Tensor) -> None:
        """Store tokens; see `FormatPolicy.write`.

        Raises:
            PolicyFailure: The format failed.
        """
        try:
            self._contained.call("write", layer, batch, cache)
        except PolicyFailure as failure:
            self._note("write", failure)
            raise

    def lose(self, blocks: Tensor) -> None:
        """Take note of blocks whose tokens could not be stored."""
        if self._lost is not None:
            self._lost.update(blocks.tolist())

    def _note(self, method: str, failure: PolicyFailure) -> None:
        if self._fail is not None:
            self._fail(method, failure)

    def _read(self, layer: LayerView, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        given: Any = self._policy.read(layer, cache, blocks)
        key, value = given
        want = (len(blocks), layer.num_kv_heads, int(cache.shape[2]), layer.head_size)
        for one in (key, value):
            if type(one) is not Tensor or tuple(one.shape) != want or one.device != cache.device:
                raise ValueError(f"read must return K and V of shape {want} on {cache.device}")
        return key, value
