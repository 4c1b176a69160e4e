"""`adaptive`: each new request is stored as cheaply as measured quality allows."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kvplug.contract import (
    AttendBatch,
    EngineView,
    FormatOptions,
    FormatPolicy,
    LayerView,
    PageLayout,
    PolicyOptions,
    WriteBatch,
)
from kvplug_policies.inner import build_inner, inner_format

DECISIONS = 64
"""Decisions kept for `Adaptive.decisions`."""


class Adaptive(FormatPolicy):
    """Chooses a format per request at run time, by the measured error of each.

    Levels go from the cheapest to the safest format. On sampled layers, the exact K and V of a few
    pages are kept while they live; every so many steps, queries that see such a page attend it
    twice, exactly and from its codes. When the smoothed relative error of a level's outputs leaves
    the bounds, requests that arrive from then on are stored one level safer or cheaper; running
    ones stay as they are, and blocks only match requests of their own level.

    A page is as large as the largest level needs: what a cheaper level saves is bytes read and
    written per step, not capacity.
    """

    name = "adaptive"
    changes = "stores each new request in the cheapest format whose measured error is low enough"
    # Where in a page a token's bytes lie depends on the level, which a move would have to know.
    moves_tokens = False

    class Options(FormatOptions):
        """Levels, bounds and how often to look."""

        levels: list[str | dict[str, Any]] = Field(
            ["rotated", "int8"],
            min_length=2,
            max_length=8,
            description="formats from the cheapest to the safest: a name, or {use: NAME, options}",
        )
        start: int = Field(
            -1, ge=-8, le=7, description="level of the first requests; -1 is the safest"
        )
        low: float = Field(
            0.05,
            gt=0,
            le=1,
            description="relative error of attention outputs below which a cheaper level is tried",
        )
        high: float = Field(
            0.25,
            gt=0,
            le=1,
            description="relative error of attention outputs above which a safer level is taken",
        )
        sample_layers: int = Field(2, ge=1, le=64, description="layers that are sampled")
        sample_every: int = Field(
            8, ge=1, le=1 << 20, description="steps of a layer between two samples"
        )
        shadow_pages: int = Field(
            4, ge=1, le=256, description="pages per sampled layer whose exact K and V are kept"
        )
        patience: int = Field(
            8, ge=1, le=1 << 20, description="samples of a level before it is left, and in its mean"
        )
        retry: int = Field(
            256,
            ge=1,
            le=1 << 30,
            description="samples before a level left for its error is tried again",
        )
        log: str = Field("", description="file to which decisions are appended as JSON lines")

        def inner(self, level: str | dict[str, Any]) -> tuple[type[FormatPolicy], PolicyOptions]:
            """Return the format of a level and its options. Raises ValueError."""
            options = {"use": level} if isinstance(level, str) else dict(level)
            name = options.pop("use", None)
            if name == Adaptive.name:
                raise ValueError("adaptive cannot be one of its own levels")
            if options.get("exact_chunk", self.exact_chunk) != self.exact_chunk:
                raise ValueError("exact_chunk applies to all levels: set it beside `levels`")
            return inner_format(name, options, {"exact_chunk": self.exact_chunk})

        @model_validator(mode="after")
        def _levels_and_bounds_make_sense(self) -> Self:
            for i, level in enumerate(self.levels):
                try:
                    self.inner(level)
                except ValueError as error:
                    raise ValueError(f"level {i}: {error}") from None
            if self.low >= self.high:
                raise ValueError(f"low {self.low} must be below high {self.high}")
            if not -len(self.levels) <= self.start < len(self.levels):
                raise ValueError(f"start {self.start} is not one of the {len(self.levels)} levels")
            return self

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self.levels = [self._build(level, engine) for level in self.options.levels]
        self.current = range(len(self.levels))[self.options.start]
        self.decisions: list[dict[str, Any]] = []
        self._errors: list[list[float]] = [[] for _ in self.levels]
        self._not_before = [0] * len(self.levels)
        self._given = [0] * len(self.levels)
        self._looks = 0
        self._sampled = _spread(engine.layers, self.options.sample_layers)
        self._shadows: dict[int, _Shadow] = {}
        self._of_block: dict[int, Tensor] = {}
        self._measured = [0.0] * (2 * len(self.levels))

    def _build(self, level: str | dict[str, Any], engine: EngineView) -> FormatPolicy:
        found, inner = self.options.inner(level)
        try:
            built = build_inner(found, inner, engine)
        except ValueError as error:
            raise ValueError(f"level {found.name}: {error}") from None
        for layer in engine.layers:
            if built.recent(layer) or built.layout(layer).heads is not None:
                raise ValueError(
                    f"level {found.name} keeps recent tokens or shares heads, which a level cannot"
                )
        return built

    # -- assignment, in the scheduler ----------------------------------------------------------

    def assignments(self) -> Sequence[str]:
        return [f"{self.name}/{level.fingerprint()}" for level in self.levels]

    def assign(self) -> int:
        self._given[self.current] += 1
        return self.current

    def observe(self, signals: Sequence[float]) -> str | None:
        n = len(self.levels)
        for level in range(n):
            total, looks = signals[level], signals[n + level]
            if looks:
                self._looks += int(looks)
                self._errors[level].append(total / looks)
                del self._errors[level][: -self.options.patience]
        seen = self._errors[self.current]
        if len(seen) < self.options.patience:
            return None
        error = sum(seen) / len(seen)
        to = self.current
        if error > self.options.high and self.current + 1 < n:
            to += 1
        elif error < self.options.low and self.current > 0:
            to -= 1
            if self._looks < self._not_before[to]:
                return None
        if to == self.current:
            return None
        return self._move(to, error)

    def _move(self, to: int, error: float) -> str:
        names = [level.name for level in self.levels]
        safer = to > self.current
        bound = self.options.high if safer else self.options.low
        if safer:
            self._not_before[self.current] = self._looks + self.options.retry
        self._errors[to].clear()
        decision: dict[str, Any] = {
            "time": round(time.time(), 3),
            "from": names[self.current],
            "to": names[to],
            "level": to,
            "error": round(error, 6),
            "bound": bound,
            "looks": self._looks,
        }
        self.current = to
        self.decisions.append(decision)
        del self.decisions[:-DECISIONS]
        if self.options.log:
            with Path(self.options.log).open("a", encoding="utf-8") as file:
                file.write(json.dumps(decision) + "\n")
        return (
            f"adaptive: new requests are stored as {decision['to']} instead of {decision['from']}: "
            f"relative error {error:.4f}, {'above high' if safer else 'below low'} {bound:g}"
        )

    def counters(self) -> dict[str, float]:
        found = {f"requests_{i}_{p.name}": float(self._given[i]) for i, p in enumerate(self.levels)}
        for i, (policy, errors) in enumerate(zip(self.levels, self._errors, strict=True)):
            found[f"error_{i}_{policy.name}"] = sum(errors) / len(errors) if errors else 0.0
        found["nonfinite"] = sum(p.counters().get("nonfinite", 0.0) for p in self.levels)
        found |= {"level": float(self.current), "looks": float(self._looks)}
        return found | {"decisions": float(len(self.decisions))}

    # -- pages, on the workers -----------------------------------------------------------------

    def layout(self, layer: LayerView) -> PageLayout:
        layouts = [level.layout(layer) for level in self.levels]
        largest = max(layouts, key=lambda own: own.bytes_per_token_head)
        return PageLayout(
            largest.bytes_per_token_head,
            max(own.key_bits for own in layouts),
            max(own.value_bits for own in layouts),
        )

    def _own_pages(self, level: int, layer: LayerView, cache: Tensor) -> Tensor:
        """The front of each page as a page of the level."""
        size = self.levels[level].layout(layer).bytes_per_token_head
        blocks, heads, tokens, _ = cache.shape
        return cache.as_strided(
            (blocks, heads, tokens, size),
            (cache.stride(0), cache.stride(1), size, 1),
            cache.storage_offset(),
        )

    def _levels_of(self, layer: LayerView, cache: Tensor) -> Tensor:
        """Level of each block, ``[num_blocks]`` int64."""
        found = self._of_block.get(layer.index)
        if found is None or len(found) != len(cache):
            found = torch.zeros(len(cache), dtype=torch.int64, device=cache.device)
            self._of_block[layer.index] = found
        return found

    def write(self, layer: LayerView, batch: WriteBatch, cache: Tensor) -> None:
        of_block = self._levels_of(layer, cache)
        valid = batch.slots >= 0
        size = cache.shape[2]
        blocks = batch.slots.clamp_min(0) // size
        assigned = batch.assigned
        if assigned is None:
            assigned = of_block[blocks]
        begins = valid & (batch.slots % size == 0)
        of_block[blocks[begins]] = assigned[begins]
        for level, policy in enumerate(self.levels):
            mine = valid & (assigned == level)
            if not bool(mine.any()):
                continue
            own = WriteBatch(batch.key[mine], batch.value[mine], batch.slots[mine])
            policy.write(layer, own, self._own_pages(level, layer, cache))
        if layer.index in self._sampled:
            shadow = self._shadows.setdefault(layer.index, _Shadow(self.options.shadow_pages, size))
            shadow.write(batch, valid)

    def read(self, layer: LayerView, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        levels = self._levels_of(layer, cache)[blocks]
        shape = (len(blocks), layer.num_kv_heads, cache.shape[2], layer.head_size)
        key = torch.zeros(shape, device=cache.device)
        value = torch.zeros(shape, device=cache.device)
        for level, policy in enumerate(self.levels):
            mine = (levels == level).nonzero()[:, 0]
            if len(mine):
                own = policy.read(layer, self._own_pages(level, layer, cache), blocks[mine])
                key[mine], value[mine] = own[0].float(), own[1].float()
        return key, value

    def attend(self, layer: LayerView, batch: AttendBatch, cache: Tensor, out: Tensor) -> None:
        of_row = self._levels_of(layer, cache)[batch.block_table[:, 0].long()]
        levels = torch.unique(of_row).tolist()
        for level in levels:
            pages = self._own_pages(level, layer, cache)
            if len(levels) == 1:
                self.levels[level].attend(layer, batch, pages, out)
                continue
            rows = (of_row == level).nonzero()[:, 0]
            tokens, part = _rows_of(batch, rows)
            own = torch.empty_like(out[tokens])
            self.levels[level].attend(layer, part, pages, own)
            out[tokens] = own
        shadow = self._shadows.get(layer.index)
        if shadow is not None:
            shadow.steps += 1
            if shadow.steps % self.options.sample_every == 0:
                self._look(layer, batch, cache, of_row, shadow)

    def _look(
        self,
        layer: LayerView,
        batch: AttendBatch,
        cache: Tensor,
        of_row: Tensor,
        shadow: _Shadow,
    ) -> None:
        """Attend shadowed pages exactly and from their codes, and record the relative error."""
        size, n = cache.shape[2], len(self.levels)
        full = (batch.seq_lens // size).long()
        for block, (key, value, filled) in shadow.pages.items():
            if filled < size:
                continue
            columns = torch.arange(batch.block_table.shape[1], device=cache.device)
            sees = (batch.block_table == block) & (columns < full[:, None])
            rows = sees.any(1).nonzero()[:, 0]
            if not len(rows):
                continue
            row = rows[0]
            query = batch.query[batch.query_start[row + 1].long() - 1].float()
            coded = self.read(layer, cache, torch.tensor([block], device=cache.device))
            exact = _attend_page(query, key.float(), value.float(), batch)
            near = _attend_page(query, coded[0][0].float(), coded[1][0].float(), batch)
            error = float((near - exact).norm() / exact.norm().clamp_min(1e-9))
            level = int(of_row[row])
            self._measured[level] += error
            self._measured[n + level] += 1

    def signals(self) -> Sequence[float] | None:
        if not any(self._measured[len(self.levels) :]):
            return None
        found, self._measured = self._measured, [0.0] * len(self._measured)
        return found


class _Shadow:
    """Exact K and V of a few blocks of one layer.

    Attributes:
        pages: K and V ``[kv_heads, block_size, head_size]`` and tokens filled, by block id.
        steps: Steps of the layer so far.
    """

    def __init__(self, room: int, block_size: int):
        self.room = room
        self.block_size = block_size
        self.pages: dict[int, tuple[Tensor, Tensor, int]] = {}
        self.steps = 0

    def write(self, batch: WriteBatch, valid: Tensor) -> None:
        """Take in a step's tokens: blocks begun in it replace the oldest, others are filled up."""
        size = self.block_size
        slots = batch.slots[valid]
        begun = (slots[slots % size == 0] // size).tolist()
        for block in begun:
            self.pages.pop(block, None)
        for block in begun[-self.room :]:
            shape = (batch.key.shape[1], size, batch.key.shape[2])
            self.pages[block] = (batch.key.new_zeros(shape), batch.value.new_zeros(shape), 0)
        while len(self.pages) > self.room:
            del self.pages[next(iter(self.pages))]
        key, value = batch.key[valid], batch.value[valid]
        for block, (keys, values, filled) in self.pages.items():
            mine = slots // size == block
            count = int(mine.sum())
            if count:
                at = slots[mine] % size
                keys[:, at] = key[mine].transpose(0, 1)
                values[:, at] = value[mine].transpose(0, 1)
                self.pages[block] = (keys, values, max(filled, int(at.max()) + 1))


def _attend_page(query: Tensor, key: Tensor, value: Tensor, batch: AttendBatch) -> Tensor:
    """Attention of one token's queries ``[num_heads, head_size]`` over one page."""
    grouped = query.view(key.shape[0], -1, query.shape[-1])
    logits = grouped @ key.transpose(1, 2) * batch.scale
    if batch.softcap:
        logits = batch.softcap * torch.tanh(logits / batch.softcap)
    return logits.softmax(-1) @ value


def _rows_of(batch: AttendBatch, rows: Tensor) -> tuple[Tensor, AttendBatch]:
    """Some rows of a batch: their tokens in the batch, and a batch of only them."""
    starts = batch.query_start.long()
    widths = (starts[1:] - starts[:-1])[rows]
    first = torch.cumsum(widths, 0) - widths
    of_token = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), widths)
    nth = torch.arange(len(of_token), device=rows.device) - first[of_token]
    tokens = starts[rows][of_token] + nth
    ends = torch.cat([first, first[-1:] + widths[-1:]]).to(batch.query_start.dtype)
    return tokens, AttendBatch(
        query=batch.query[tokens],
        query_start=ends,
        block_table=batch.block_table[rows],
        seq_lens=batch.seq_lens[rows],
        scale=batch.scale,
        max_query_len=batch.max_query_len,
        max_seq_len=batch.max_seq_len,
        key=batch.key[tokens] if batch.key is not None else None,
        value=batch.value[tokens] if batch.value is not None else None,
        softcap=batch.softcap,
    )


def _spread(layers: Sequence[LayerView], count: int) -> frozenset[int]:
    """``count`` layer indices, evenly spread over the model, the first among them."""
    n = len(layers)
    return frozenset(layers[i * n // count].index for i in range(min(count, n)))
