"""Layer steps: what a kind adds to building attention metadata, and to a layer's attention.

A builder or an implementation of vLLM's runs a chain of steps. Each step is given the rest of the
chain as a function and calls it as often as it needs, with what it changed; the innermost function
is vLLM's own. `kinds` states the order of the chains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from kvplug.hosts.vllm.worker.metadata import to_device
from kvplug.hosts.vllm.worker.pages import TokenPages
from kvplug.hosts.vllm.worker.rows import StepRows


class RowSlots:
    """Slots of the rows a builder was given, looked up once and only if a step asks.

    Args:
        rows: The step's rows.
        common: The common metadata at the head of the chain.
        block_size: Tokens per block of the builder's KV-cache group.
    """

    def __init__(self, rows: StepRows, common: Any, block_size: int):
        self._rows = rows
        self._common = common
        self._block_size = block_size

    def of(self, common: Any) -> RowSlots:
        """Slots of other rows of the same KV-cache group."""
        return RowSlots(self._rows, common, self._block_size)

    @cached_property
    def value(self) -> Tensor:
        """Slot of each row, ``[rows]`` int64; -1 where unknown."""
        common = self._common
        if not self._rows.by_block and common.req_idx is not None:
            return _runner_slots(common)
        return self._rows.slots_of(common.block_table_tensor, common.seq_lens, self._block_size)


def _runner_slots(common: Any) -> Tensor:
    """Slots of rows in the second runner, ``[rows]`` int64; -1 for padding."""
    slots = np.full(common.seq_lens.shape[0], -1, dtype=np.int64)
    slots[: len(common.req_idx)] = common.req_idx
    return to_device(slots, common.seq_lens.device)


@dataclass(frozen=True)
class BuildCall:
    """One call of a metadata builder.

    Attributes:
        common: vLLM's common metadata of the step.
        prefix_len: Tokens of the prefix that all rows share.
        fast: Whether to build quickly rather than for speed of execution.
        rows: Slots of the rows at the head of the chain.
        layers: Names of the builder's layers.
    """

    common: Any
    prefix_len: int
    fast: bool
    rows: RowSlots
    layers: tuple[str, ...] = ()

    @property
    def slots(self) -> Tensor:
        """Slot of each row at the head of the chain, ``[rows]`` int64; -1 where unknown."""
        return self.rows.value

    def part(self, common: Any) -> BuildCall:
        """Return the call on some of the rows as if they were the whole step."""
        return replace(self, common=common, prefix_len=0, rows=self.rows.of(common))

    def on(self, common: Any) -> BuildCall:
        """Return the call with other rows or lengths, which share no prefix that is known."""
        return replace(self, common=common, prefix_len=0)


@dataclass(frozen=True)
class WriteCall:
    """One call of a layer's KV-cache update.

    Attributes:
        impl: vLLM's attention implementation.
        layer: vLLM's attention layer.
        key: ``[num_tokens, num_kv_heads, head_size]``.
        value: The same shape.
        cache: The layer's KV cache.
        slot_mapping: Cache slot of each token, ``[num_tokens]``.
    """

    impl: Any
    layer: Any
    key: Tensor
    value: Tensor
    cache: Tensor
    slot_mapping: Tensor


@dataclass(frozen=True)
class AttendCall:
    """One call of a layer's attention.

    Attributes:
        impl: vLLM's attention implementation.
        layer: vLLM's attention layer.
        query: ``[num_tokens, num_heads, head_size]``.
        key: ``[num_tokens, num_kv_heads, head_size]``.
        value: The same shape.
        cache: The layer's KV cache.
        metadata: The backend's metadata, or None in a profiling run.
        output: ``[num_tokens, num_heads, head_size]``, written in place.
        args: Further positional arguments of vLLM's.
        kwargs: Further keyword arguments of vLLM's.
    """

    impl: Any
    layer: Any
    query: Tensor
    key: Tensor
    value: Tensor
    cache: Tensor
    metadata: Any
    output: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def on_tokens(self, tokens: Tensor, metadata: Any) -> AttendCall:
        """Return the call on some of its tokens, with an output of its own.

        Args:
            tokens: Indices of the tokens, ``[n]`` int64.
            metadata: The backend's metadata of these tokens alone.
        """
        return replace(
            self,
            query=self.query[tokens],
            key=self.key[tokens],
            value=self.value[tokens],
            metadata=metadata,
            output=torch.empty_like(self.output[tokens]),
        )


Build = Callable[[BuildCall], Any]
Write = Callable[[WriteCall], None]
Attend = Callable[[AttendCall], Tensor]


@dataclass(frozen=True)
class Built:
    """What a builder made of the second model runner's step, which may be changed before its
    forward: the runner names the rows of a step after it has built the metadata.

    Attributes:
        inner: The rest of the chain.
        call: The build.
        made: The metadata.
    """

    inner: Build
    call: BuildCall
    made: Any

    @classmethod
    def of(cls, inner: Build, call: BuildCall, made: Any) -> Self | None:
        """Take note of a build; None for one that is not the runner's own."""
        return cls(inner, call, made) if call.common.req_idx is not None else None

    def become(self, again: Any) -> None:
        """Make the metadata what another build made; the forward has the first one's object."""
        vars(self.made).update(vars(again))


class MetadataStep:
    """Step of one metadata builder; one object per builder."""

    def build(self, inner: Build, call: BuildCall) -> Any:
        """Build the backend's metadata through ``inner``."""
        return inner(call)


class AttentionStep:
    """Step of all attention layers of an engine."""

    def write(self, inner: Write, call: WriteCall) -> None:
        """Store new tokens through ``inner``."""
        inner(call)

    def attend(self, inner: Attend, call: AttendCall) -> Tensor:
        """Attend through ``inner``; returns the output."""
        return inner(call)

    def pages(self, impl: Any, layer: Any, cache: Tensor) -> TokenPages | None:
        """Open a layer's pages if they are in bytes of this step's own, else return None."""
        return None


def build_chain(steps: Sequence[MetadataStep], stock: Build) -> Build:
    """Compose steps, outermost first, around the stock builder."""
    built = stock
    for step in reversed(steps):
        built = partial(step.build, built)
    return built


def write_chain(steps: Sequence[AttentionStep], stock: Write) -> Write:
    """Compose steps, outermost first, around the stock KV-cache update."""
    built = stock
    for step in reversed(steps):
        built = partial(step.write, built)
    return built


def attend_chain(steps: Sequence[AttentionStep], stock: Attend) -> Attend:
    """Compose steps, outermost first, around the stock attention."""
    built = stock
    for step in reversed(steps):
        built = partial(step.attend, built)
    return built
