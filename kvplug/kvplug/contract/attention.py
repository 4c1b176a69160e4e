"""Attention policies: how a decode step attends what a request holds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvplug.contract.policy import ALL_FEATURES, Feature, Kind, LayerView, Policy

if TYPE_CHECKING:
    from torch import Tensor

Gather = Callable[[Sequence[int], Sequence[int], Sequence[int]], "tuple[Tensor, Tensor]"]
"""``gather(rows, starts, ends)``: keys and values of tokens ``[starts[i], ends[i])`` of row
``rows[i]``, each ``[len(rows), kv_heads, n, head_size]`` with ``n`` at least the longest range.
What lies beyond a row's own tokens is undefined. Starts are multiples of the block size."""


@dataclass(frozen=True)
class DecodeRows:
    """Decode rows of one step and layer that a policy attends: one query each.

    Attributes:
        query: Queries, rotated like the keys, ``[rows, num_heads, head_size]``.
        slots: Slot of each row's request, distinct: a small number that names a running request.
        owners: Number of the request that has the slot. It changes when another request takes the
            slot, and when the request starts over: what was remembered of it is stale then.
        lens: Tokens of each row, its query's own among them; at least one.
        scale: Softmax scale.
        softcap: Soft cap of the logits; 0 for none.
        gather: Reads keys and values of the rows.
    """

    query: Tensor
    slots: Sequence[int]
    owners: Sequence[int]
    lens: Sequence[int]
    scale: float
    softcap: float
    gather: Gather


class AttentionPolicy(Policy):
    """Attends decode rows in place of the engine's kernel, approximately.

    Only requests that ask for it (``kvplug: {attention: approximate}``) are served by it, from
    their first generated token on; their prompt, and every other request, go to the engine's
    kernel. KV computed after the policy first acted is approximate: it never enters the prefix
    cache.

    Runs on the workers, one object per engine and rank. The host calls it for layers with plain
    causal attention alone: no sliding window, ALiBi or learned sinks.
    """

    kind: ClassVar[Kind] = Kind.ATTENTION
    exact: ClassVar[bool] = False
    changes: ClassVar[str] = "how decode steps attend"
    supports: ClassVar[frozenset[Feature]] = ALL_FEATURES - {
        Feature.QUANTIZED_KV_CACHE,
        Feature.CONTEXT_PARALLEL,
        Feature.PIPELINE_PARALLEL,
        Feature.DISAGGREGATED_PREFILL,
        Feature.KV_SHARING,
        Feature.SLIDING_WINDOW_LAYERS,
        Feature.DRAFT_MODEL,
        Feature.MULTIMODAL,
    }
    excludes: ClassVar[Mapping[str, str]] = {
        "sequence": "the policy reads every token of a request, and a sequence policy evicts some"
    }

    def serves(self, num_tokens: int) -> bool:
        """Return True if rows of that many tokens go to `attend`; the kernel attends others."""
        return True

    @abstractmethod
    def attend(self, layer: LayerView, rows: DecodeRows) -> Tensor | None:
        """Attend the rows of a step in one layer.

        Args:
            layer: The layer.
            rows: The rows.

        Returns:
            Attention output, float32 ``[rows, num_heads, head_size]``, or None to leave these rows
            to the engine's kernel.
        """
