"""Sequence policies: which blocks or tokens of a running request to keep."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from kvplug.contract.policy import Kind, LayerView, Policy


class Signal(StrEnum):
    """Importance signals a kernel computes on the worker when a policy needs them."""

    ATTENTION_MASS = "attention mass"
    KEY_NORM = "key norm"
    VALUE_NORM = "value norm"
    KEY_SIMILARITY = "key similarity"


class Granularity(StrEnum):
    """What is dropped: whole blocks, tokens, or each head its own tokens."""

    BLOCK = "block"
    TOKEN = "token"
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class Window:
    """A positional rule: the sink blocks and a window of blocks before the current one.

    A query in block ``b`` sees blocks ``[0, sink_blocks)`` and ``[b - window_blocks, b]``; both
    sides of the engine evaluate this, so nothing has to be sent. What a token sees depends on its
    position alone, never on how a prompt was cut into chunks or which requests ran beside it.

    Attributes:
        sink_blocks: Blocks kept from the start of the text.
        window_blocks: Full blocks kept before the block a query is in.
    """

    sink_blocks: int
    window_blocks: int

    def __post_init__(self) -> None:
        if self.sink_blocks < 0 or self.window_blocks < 0:
            raise ValueError(f"sink_blocks and window_blocks must be >= 0, got {self}")

    def gap(self, block: int) -> tuple[int, int]:
        """Block range ``[start, end)`` that a query in ``block`` does not see; empty when equal."""
        return self.sink_blocks, max(self.sink_blocks, block - self.window_blocks)

    @property
    def exact_blocks(self) -> int:
        """Leading blocks whose tokens see everything before them."""
        return self.sink_blocks + self.window_blocks + 1


@dataclass(frozen=True, slots=True)
class SequenceView:
    """One running request as a deciding policy sees it.

    Attributes:
        request_id: The engine's id.
        num_tokens: Tokens computed and settled.
        num_prompt_tokens: Tokens of its prompt.
        kept: Block indices still held, ascending; shape ``[held]``, int32.
        scores: Per asked signal, one value per held unit, aggregated over ranks; shape
            ``[held]`` (block), ``[held * block_size]`` (token) or ``[kv_heads, held *
            block_size]`` (head), float16.
        layer_group: Index of the layer group, for policies whose budget differs by layer.
    """

    request_id: str
    num_tokens: int
    num_prompt_tokens: int
    kept: npt.NDArray[np.int32]
    scores: dict[Signal, npt.NDArray[np.float16]]
    layer_group: int = 0


class SequencePolicy(Policy):
    """Decides what a running request keeps. Approximate unless the budget covers the text.

    Two ways to decide, and a policy takes exactly one:

    * positional: `window` returns a `Window`. Known in advance on both sides of the engine, no
      traffic, blocks freed the moment they fall out of it.
    * by score: `window` returns None and `keep` picks per step from the signals in `needs`.
      Scores are computed on the worker, the decision is made in the scheduler, the drop is
      announced, and the blocks are freed once a worker acknowledged it.
    """

    kind: ClassVar[Kind] = Kind.SEQUENCE
    exact: ClassVar[bool] = False
    changes_length: ClassVar[bool] = True
    needs: ClassVar[frozenset[Signal]] = frozenset()
    granularity: ClassVar[Granularity] = Granularity.BLOCK

    @abstractmethod
    def window(self, layer: LayerView) -> Window | None:
        """The positional rule of a layer, or None to decide by score with `keep`.

        Layers with equal windows share block tables; each distinct window costs the engine one
        more KV-cache group.
        """

    def keep(self, views: Sequence[SequenceView], budget: int) -> Sequence[npt.NDArray[np.int32]]:
        """For each request, the indices of held units to keep, ascending.

        Called once per step with every request that is over ``budget`` (in units of
        `granularity`). The tail block is always kept by the host.
        """
        raise NotImplementedError(f"{type(self).__name__} is positional: it has no keep()")
