"""Attention memory: reuse attention over far tokens while a request's queries stay alike."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kvplug.contract import AttentionPolicy, DecodeRows, EngineView, LayerView, PolicyOptions
from kvplug_attention_memo.memory import AttentionMemo, MemoOptions, far

SLOTS = 256
"""Requests remembered at most."""


class Memo(AttentionPolicy):
    """Keeps a request's attention over far tokens and reuses it while its queries stay alike.

    Each layer has an `AttentionMemo` of its own, and decides for itself.
    """

    name = "memo"
    changes: ClassVar[str] = (
        "reuses a decode step's attention over far tokens while queries stay alike"
    )
    options: MemoOptions

    class Options(MemoOptions):
        """When the attention over far tokens is reused."""

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self._layers: dict[int, AttentionMemo] = {}
        self._rows = 0
        self._skipped = 0

    def serves(self, num_tokens: int) -> bool:
        """Return True where some tokens are far."""
        return far(num_tokens, self.options.near, self.engine.block_size) > 0

    def attend(self, layer: LayerView, rows: DecodeRows) -> Tensor:
        """Attend rows; those whose query is like the remembered one skip their far tokens."""
        found = self._memo(layer, rows).attend(
            rows.query, rows.slots, rows.owners, rows.lens, rows.gather
        )
        self._rows += found.rows
        self._skipped += found.skipped
        return found.out

    def counters(self) -> dict[str, float]:
        """Rows with far tokens, and those of them that reused their attention, over layers."""
        return {"far_rows": self._rows, "reused_rows": self._skipped}

    def _memo(self, layer: LayerView, rows: DecodeRows) -> AttentionMemo:
        memo = self._layers.get(layer.index)
        if memo is None:
            memo = self._layers[layer.index] = AttentionMemo(
                self.options,
                layer.num_heads,
                layer.num_kv_heads,
                layer.head_size,
                rows.scale,
                softcap=rows.softcap,
                align=self.engine.block_size,
                slots=SLOTS,
                device=rows.query.device,
            )
        return memo
