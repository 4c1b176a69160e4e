"""Attention over far tokens, remembered while a request's queries stay alike.

In decode, most of what a query attends lies far back and does not change, and one step's query may
be much like the last one's. So the attention over the far tokens, normalized, and its log-sum-exp
are kept with the query they belong to; while every head's query stays alike, only the tokens after
the far ones are attended, and the two are merged as two parts of one softmax. What is remembered is
exact for the query it was computed for, and an approximation for those after it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from kvplug.contract import Gather, PolicyOptions
from kvplug_kernels.attend_exact import merge_attention

__all__ = ["AttentionMemo", "MemoOptions", "Memoized", "attend_part"]

PART_BYTES = 64 << 20
"""Keys and values gathered at a time; one row may need more."""


class MemoOptions(PolicyOptions):
    """When the attention over far tokens is reused."""

    cosine: float = Field(
        default=0.99,
        gt=0,
        le=1,
        description="least cosine of a query with the remembered one, per head",
    )
    near: int = Field(
        default=256, ge=16, le=1 << 20, description="latest tokens attended at every step"
    )
    every: int = Field(
        default=16,
        ge=1,
        le=4096,
        description="steps after which the far tokens are attended again in any case",
    )


@dataclass(frozen=True)
class Memoized:
    """Result of `AttentionMemo.attend`.

    Attributes:
        out: float32 ``[rows, num_heads, head_size]``.
        rows: Rows that have far tokens: those that could have reused.
        skipped: Those of them that did.
        errors: Relative error of each row that reused, the norm of its output less the full
            attention's over that one's norm, float32 ``[skipped]``; None unless asked for.
    """

    out: Tensor
    rows: int
    skipped: int
    errors: Tensor | None = None


@dataclass(slots=True)
class _Remembered:
    """A slot's memory, its tensors excepted."""

    place: int
    owner: int
    boundary: int
    length: int


class AttentionMemo:
    """Remembers the far attention of one layer's requests.

    A row reuses what its slot remembers if it belongs to the same owner, fewer than ``every``
    tokens have come since, and for every query head ``q . r >= cosine * max(|q|, |r|)**2`` with
    the remembered query ``r``: then the cosine is at least that, and neither is much longer than
    the other, which the cosine alone would not see. Else the far tokens are those older than the
    latest ``near`` when the row is attended, they are attended again, and remembered. Tokens that
    grow older meanwhile are attended at every step until then.

    Memory is bounded by ``slots``: beyond, what was used longest ago is forgotten.

    Args:
        options: When a query is alike.
        num_heads: Query heads.
        num_kv_heads: KV heads; query head ``h`` reads head ``h // (num_heads // num_kv_heads)``.
        head_size: Elements of a query, key or value.
        scale: Factor of the logits.
        softcap: Bound of the logits, 0 for none.
        align: The number of far tokens is a multiple of it: the block size of pages.
        slots: Maximum number of slots remembered.
        device: Where the queries are.
    """

    def __init__(
        self,
        options: MemoOptions,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        scale: float,
        *,
        softcap: float = 0.0,
        align: int = 1,
        slots: int = 256,
        device: torch.device | str = "cpu",
    ):
        self.options = options
        self.scale = scale
        self.softcap = softcap
        self.align = align
        self.slots = slots
        self._kv_heads = num_kv_heads
        self._shape = (num_heads, head_size)
        self._known: OrderedDict[int, _Remembered] = OrderedDict()
        self._free: list[int] = []
        self._query = torch.zeros((0, num_heads, head_size), device=device)
        self._out = torch.zeros_like(self._query)
        self._lse = self._query.new_zeros((0, num_heads))

    def __len__(self) -> int:
        """Number of slots remembered."""
        return len(self._known)

    def far(self, length: int) -> int:
        """Number of far tokens of a text: all but the latest ``near``, in whole ``align``."""
        return far(length, self.options.near, self.align)

    def release(self, slot: int) -> None:
        """Forget a slot; one that is not known is no error."""
        found = self._known.pop(slot, None)
        if found is not None:
            self._free.append(found.place)

    def clear(self) -> None:
        """Forget every slot."""
        for slot in list(self._known):
            self.release(slot)

    def attend(
        self,
        query: Tensor,
        slots: Sequence[int],
        owners: Sequence[int],
        lens: Sequence[int],
        gather: Gather,
        *,
        audit: bool = False,
    ) -> Memoized:
        """Attend one query of each row.

        A row whose merged output is not finite is attended in full, and its slot forgotten.

        Args:
            query: ``[rows, num_heads, head_size]``, rotated like the keys.
            slots: Slot of each row, distinct.
            owners: Number of the request that has each slot; another one's memory is never used.
            lens: Tokens of each row, its query's own among them; at least one.
            gather: Reads the rows' keys and values.
            audit: Whether to attend rows that reuse in full as well, to tell their error.
        """
        rows = len(slots)
        wide = query.float()
        if rows == 0:
            return Memoized(wide, 0, 0, wide.new_zeros(0) if audit else None)
        alike = self._alike(wide, slots, owners, lens)
        starts = [
            self._known[slots[i]].boundary if alike[i] else self.far(lens[i]) for i in range(rows)
        ]
        fresh = [i for i in range(rows) if starts[i] > 0 and not alike[i]]
        again = [i for i in range(rows) if alike[i]]
        out, lse = self._attend(wide, list(range(rows)), starts, list(lens), gather)
        near_out, near_lse = out.clone(), lse
        far_out, far_lse = torch.zeros_like(out), torch.full_like(lse, float("-inf"))
        if again:
            places = [self._known[slots[i]].place for i in again]
            far_out[again], far_lse[again] = self._out[places], self._lse[places]
        if fresh:
            zero = [0] * len(fresh)
            found = self._attend(wide, fresh, zero, [starts[i] for i in fresh], gather)
            far_out[fresh], far_lse[fresh] = found
            self._remember(fresh, wide, *found, slots, owners, starts, lens)
        if fresh or again:
            merge_attention(far_out, far_lse, near_out, near_lse, out)
        broken = self._broken(out, again)
        if broken:
            zero = [0] * len(broken)
            full = self._attend(wide, broken, zero, [lens[i] for i in broken], gather)
            out[broken] = full[0]
            for i in broken:
                self.release(slots[i])
            again = [i for i in again if i not in set(broken)]
        errors = self._errors(wide, out, again, lens, gather) if audit else None
        return Memoized(out, len(fresh) + len(again) + len(broken), len(again), errors)

    def _alike(
        self, query: Tensor, slots: Sequence[int], owners: Sequence[int], lens: Sequence[int]
    ) -> list[bool]:
        """Find the rows that may reuse their slots' memory."""
        found = [False] * len(slots)
        asked: list[int] = []
        places: list[int] = []
        for i, slot in enumerate(slots):
            known = self._known.get(slot)
            if known is None:
                continue
            if known.owner != owners[i] or lens[i] <= known.length:
                self.release(slot)
            elif lens[i] - known.length < self.options.every:
                self._known.move_to_end(slot)
                asked.append(i)
                places.append(known.place)
        if not asked:
            return found
        # In float64 a bound of 1 means the same query, and not one within float32's rounding.
        now, then = query[asked].double(), self._query[places].double()
        longest = torch.maximum(now.square().sum(-1), then.square().sum(-1))
        alike = ((now * then).sum(-1) >= self.options.cosine * longest).all(-1)
        for i, yes in zip(asked, alike.tolist(), strict=True):
            found[i] = yes
        return found

    def _remember(
        self,
        rows: list[int],
        query: Tensor,
        out: Tensor,
        lse: Tensor,
        slots: Sequence[int],
        owners: Sequence[int],
        starts: Sequence[int],
        lens: Sequence[int],
    ) -> None:
        # More rows than slots: the last of them are remembered.
        kept = range(max(len(rows) - self.slots, 0), len(rows))
        places = []
        for at in kept:
            i = rows[at]
            self.release(slots[i])
            place = self._place()
            places.append(place)
            self._known[slots[i]] = _Remembered(place, owners[i], starts[i], lens[i])
        self._query[places] = query[[rows[at] for at in kept]]
        self._out[places] = out[kept.start :]
        self._lse[places] = lse[kept.start :]

    def _place(self) -> int:
        if not self._free:
            if len(self._known) >= self.slots:
                self.release(next(iter(self._known)))
            else:
                self._grow()
        return self._free.pop()

    def _grow(self) -> None:
        size = self._query.shape[0]
        room = min(max(2 * size, 8), self.slots)
        for name in ("_query", "_out", "_lse"):
            held = getattr(self, name)
            grown = held.new_zeros((room, *held.shape[1:]))
            grown[:size] = held
            setattr(self, name, grown)
        self._free.extend(range(room - 1, size - 1, -1))

    def _broken(self, out: Tensor, again: list[int]) -> list[int]:
        if not again:
            return []
        fine = out[again].flatten(1).isfinite().all(-1).tolist()
        return [i for i, good in zip(again, fine, strict=True) if not good]

    def _errors(
        self, query: Tensor, out: Tensor, rows: list[int], lens: Sequence[int], gather: Gather
    ) -> Tensor:
        if not rows:
            return out.new_zeros(0)
        full, _ = self._attend(query, rows, [0] * len(rows), [lens[i] for i in rows], gather)
        right = torch.linalg.vector_norm(full.flatten(1), dim=-1)
        off = torch.linalg.vector_norm((out[rows] - full).flatten(1), dim=-1)
        return torch.div(off, right.clamp_min(1e-30))

    def _attend(
        self,
        query: Tensor,
        rows: list[int],
        starts: Sequence[int],
        ends: Sequence[int],
        gather: Gather,
    ) -> tuple[Tensor, Tensor]:
        """Attention of some rows over some of their tokens, and its log-sum-exp."""
        out = query.new_zeros((len(rows), *self._shape))
        lse = query.new_full((len(rows), self._shape[0]), float("-inf"))
        widest = max((b - a for a, b in zip(starts, ends, strict=True)), default=0)
        if widest <= 0:
            return out, lse
        step = max(PART_BYTES // (8 * widest * self._shape[1] * self._kv_heads), 1)
        for low in range(0, len(rows), step):
            part = slice(low, low + step)
            key, value = gather(rows[part], starts[part], ends[part])
            held = [b - a for a, b in zip(starts[part], ends[part], strict=True)]
            out[part], lse[part] = attend_part(
                query[rows[part]],
                key,
                value,
                torch.tensor(held, device=query.device),
                self.scale,
                self.softcap,
            )
        return out, lse


def far(length: int, near: int, align: int) -> int:
    """Number of tokens older than the latest ``near`` of ``length``, in whole ``align``."""
    return max(length - near, 0) // align * align


def attend_part(
    query: Tensor, key: Tensor, value: Tensor, held: Tensor, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attention of one query a row over the first tokens it is given.

    Args:
        query: ``[rows, num_heads, head_size]``.
        key: ``[rows, kv_heads, n, head_size]``.
        value: The same shape.
        held: Tokens of each row, int64 ``[rows]``, at most ``n``; what lies beyond is not looked
            at.
        scale: Factor of the logits.
        softcap: Bound of the logits, 0 for none.

    Returns:
        float32 output ``[rows, num_heads, head_size]``, normalized, and log-sum-exp of the logits
        ``[rows, num_heads]``; 0 and -inf for a row of no token.
    """
    rows, heads, size = query.shape
    kv_heads, n = key.shape[1:3]
    grouped = (query.float() * scale).view(rows, kv_heads, heads // kv_heads, size)
    logits = grouped @ key.float().mT
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    beyond = torch.arange(n, device=query.device) >= held[:, None]
    values = value.float()
    if bool(beyond.any()):
        logits = logits.masked_fill(beyond[:, None, None], float("-inf"))
        values = values.masked_fill(beyond[:, None, :, None], 0.0)
    lse = logits.logsumexp(-1)
    shown = torch.where(lse == float("-inf"), 0.0, lse)
    out = (logits - shown[..., None]).exp() @ values
    return out.view(rows, heads, size), lse.view(rows, heads)
