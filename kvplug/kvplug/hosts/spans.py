"""Evicted tokens that can come back: spans in host memory, found again by their summaries.

A span is `SPAN` neighbouring evicted tokens of one KV head. Its summary, the element-wise least and
greatest key, bounds from above how strongly any query can attend to a token of it (Quest,
arXiv 2406.10774). At a decision, spans whose bound exceeds what the median kept token reaches are
fetched back as candidates; the policy's own score then says whether they stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SPAN = 16
"""Tokens of a span."""


@dataclass
class Tokens:
    """Tokens of each KV head, in host memory or on their way back.

    Attributes:
        keys: ``[kv_heads, n, head_size]``.
        values: The same shape.
        positions: Position of each in the text, ``[kv_heads, n]`` int32.
        totals: Cumulative attention of each, ``[kv_heads, n]`` float32, or None.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    totals: Tensor | None

    def take(self, index: Tensor) -> Tokens:
        """The tokens at ``index``, ``[kv_heads, m]`` int64."""
        wide = index[..., None].expand(-1, -1, self.keys.shape[2])
        return Tokens(
            self.keys.gather(1, wide),
            self.values.gather(1, wide),
            self.positions.gather(1, index),
            self.totals.gather(1, index) if self.totals is not None else None,
        )

    def to(self, device: torch.device) -> Tokens:
        """The same on another device."""
        return Tokens(
            self.keys.to(device),
            self.values.to(device),
            self.positions.to(device),
            self.totals.to(device) if self.totals is not None else None,
        )

    @staticmethod
    def cat(parts: list[Tokens]) -> Tokens:
        """One after another."""
        totals = [p.totals for p in parts if p.totals is not None]
        return Tokens(
            torch.cat([p.keys for p in parts], 1),
            torch.cat([p.values for p in parts], 1),
            torch.cat([p.positions for p in parts], 1),
            torch.cat(totals, 1) if len(totals) == len(parts) else None,
        )


class SpanStore:
    """The evicted spans of one request in one layer.

    Args:
        limit: Most tokens kept per KV head; the longest stored go first.
    """

    def __init__(self, limit: int):
        self.limit = limit // SPAN * SPAN
        self.tokens: Tokens | None = None
        self._low: Tensor | None = None
        self._high: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.tokens is None else self.tokens.keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values stored."""
        return 0 if self.tokens is None else 2 * self.tokens.keys.nbytes

    def put(self, evicted: Tokens) -> None:
        """Store evicted tokens; a remainder shorter than a span is dropped, oldest text first."""
        n = evicted.keys.shape[1]
        order = evicted.positions.argsort(1)[:, n % SPAN :].long()
        evicted = evicted.take(order).to(torch.device("cpu"))
        merged = evicted if self.tokens is None else Tokens.cat([self.tokens, evicted])
        surplus = merged.keys.shape[1] - self.limit
        if surplus > 0:
            index = torch.arange(surplus, merged.keys.shape[1])
            merged = merged.take(index.expand(merged.keys.shape[0], -1))
        self._keep(merged)

    def _keep(self, tokens: Tokens) -> None:
        self.tokens = tokens
        heads, n, size = tokens.keys.shape
        spans = tokens.keys.float().view(heads, n // SPAN, SPAN, size)
        self._low, self._high = spans.amin(2), spans.amax(2)

    def needed(self, queries: Tensor, kept: Tensor, most: int) -> tuple[Tokens, Tensor] | None:
        """Take out the spans the latest queries need most.

        Args:
            queries: ``[n, num_heads, head_size]``.
            kept: Keys kept now, ``[kv_heads, m, head_size]``.
            most: Most tokens to take per KV head.

        Returns:
            The tokens, on the device of ``queries``, and which of them are needed, ``[kv_heads,
            n]`` bool: heads take equally many, so some take spans they do not need. None when no
            head needs any.
        """
        if self.tokens is None or not len(self):
            return None
        heads, _, size = self.tokens.keys.shape
        grouped = queries.float().cpu().permute(1, 0, 2).reshape(heads, -1, size)
        assert self._low is not None and self._high is not None
        positive, negative = grouped.clamp_min(0), grouped.clamp_max(0)
        bound = positive @ self._high.transpose(1, 2) + negative @ self._low.transpose(1, 2)
        reached = (grouped @ kept.float().cpu().transpose(1, 2)).amax(1).median(1).values
        best = bound.amax(1)
        wanted = best > reached[:, None]
        spans = min(most // SPAN, int(wanted.sum(1).max()), best.shape[1])
        if not spans:
            return None
        chosen = best.topk(spans, dim=1).indices
        need = wanted.gather(1, chosen).repeat_interleave(SPAN, 1)
        index = (chosen[..., None] * SPAN + torch.arange(SPAN)).flatten(1)
        found = self.tokens.take(index)
        others = torch.ones(heads, len(self), dtype=torch.bool).scatter_(1, index, False)
        left = others.nonzero()[:, 1].view(heads, -1)
        if left.shape[1]:
            self._keep(self.tokens.take(left))
        else:
            self.tokens = self._low = self._high = None
        return found.to(queries.device), need.to(queries.device)
