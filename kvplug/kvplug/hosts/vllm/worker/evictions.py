"""Evictions in one layer, and the log of what a scoring policy did."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.logger import init_logger

from kvplug.contract import ResidentView, ScoringPolicy
from kvplug.hosts.pruning import choose, keep_best
from kvplug.hosts.spans import SpanStore, Tokens
from kvplug.hosts.vllm.messages import SequenceReport
from kvplug.hosts.vllm.worker.phases import AttentionFlush, EvictionDecision
from kvplug.hosts.vllm.worker.residents import LayerResidents
from kvplug_kernels.compact_kv import plan_moves

logger = init_logger("vllm.kvplug")

RECALL_QUERIES = 8
"""Latest queries that decide which evicted tokens are recalled from host memory."""


SETTLED_AFTER = 2
"""Reports after which the host reads what a step measured without waiting for the device."""


@dataclass
class Measurement:
    """What some rows measured, on its way from the device.

    Attributes:
        due: Number of the report it goes into.
        slots: The scheduler's slot of each row.
        at: Tokens of its text computed.
        group: Number of the KV-cache group.
        values: ``[rows, n]`` float64.
        copied: Event after which they are on the host; None where they need not be waited for.
    """

    due: int
    slots: list[int]
    at: list[int]
    group: int
    values: Tensor
    copied: torch.cuda.Event | None


class EvictionLog:
    """Counts, measurements and failure of a scoring policy on a worker.

    Args:
        policy: The policy.
        settled_after: Reports that measurements are held back for, so that nothing waits for the
            device; the same number for every measurement, as ranks must agree.

    Attributes:
        counts: Counts since the last report.
        failed: Cause the policy was retired for, or None.
    """

    def __init__(self, policy: ScoringPolicy, settled_after: int = 0):
        self._policy = policy
        self._settled_after = settled_after
        self._reports = 0
        self._pending: deque[Measurement] = deque()
        self.counts = SequenceReport()
        self.failed: str | None = None
        self._measured: dict[tuple[int, int, int], tuple[npt.NDArray[np.float64], int]] = {}

    def fail(self, error: Exception) -> None:
        """Retire the policy: from now on the latest tokens are kept."""
        self.failed = f"{type(error).__name__}: {error}"
        logger.error(
            "sequence policy %r failed and is retired; from now on the latest tokens are kept "
            "instead: %s",
            self._policy.name,
            self.failed,
            exc_info=error,
        )

    def measure(self, decision: EvictionDecision, group: int, values: Tensor) -> None:
        """Take what one layer of a group measured at a decision, ``[rows, n]``."""
        values, copied = values.double(), None
        if values.is_cuda and self._settled_after:
            on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = on_host.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        due = self._reports + self._settled_after
        self._pending.append(Measurement(due, decision.slots, decision.at, group, values, copied))

    def _add_measured(self, one: Measurement) -> None:
        if one.copied is not None:
            one.copied.synchronize()
        rows = one.values.cpu().numpy()
        for slot, at, row in zip(one.slots, one.at, rows, strict=True):
            key = (slot, one.group, at)
            sums, layers = self._measured.get(key, (np.zeros_like(row), 0))
            self._measured[key] = (sums + row, layers + 1)

    def take(self) -> SequenceReport | None:
        """Return what happened since the last report, or None for nothing."""
        while self._pending and self._pending[0].due <= self._reports:
            self._add_measured(self._pending.popleft())
        self._reports += 1
        if not self.counts.rows and not self._measured:
            return None
        report, self.counts = self.counts, SequenceReport()
        report.measured = self._take_measured()
        report.failed = self.failed
        return report

    def _take_measured(self) -> npt.NDArray[np.float64] | None:
        if not self._measured:
            return None
        rows = [(*key, layers, *sums) for key, (sums, layers) in self._measured.items()]
        self._measured.clear()
        return np.array(rows, dtype=np.float64)


class LayerEvictions:
    """Evictions in one layer.

    Args:
        residents: The layer's resident tokens.
        group: Number of the layer's group: the index of its share.
        log: The policy's log.
    """

    def __init__(self, residents: LayerResidents, group: int, log: EvictionLog):
        self.residents = residents
        self.policy = residents.policy
        self._group = group
        self._log = log
        self._stores: dict[int, SpanStore] = {}

    def open(self, impl: Any, layer: Any, cache: Tensor) -> None:
        """Open the layer's pages, on first use and when the cache has moved."""
        self.residents.open(impl, layer, cache)

    def remember(self, query: Tensor, tokens: Tensor, places: Tensor) -> None:
        """Keep the queries of some tokens for later evictions."""
        self.residents.remember(query, tokens, places)

    def flush(self, query: Tensor, flush: AttentionFlush) -> None:
        """Bring the cumulative attention of some rows up to date."""
        self.residents.flush(query, flush)

    def decide(self, decision: EvictionDecision) -> None:
        """Make one eviction, row by row where evicted tokens can be recalled."""
        if not self.policy.options.on_demand:
            self.evict(decision)
            return
        for row in decision.rows():
            self.evict_with_recall(row)

    def evict(self, decision: EvictionDecision) -> None:
        """Decide what survives, and move it together."""
        resident, count = decision.resident, decision.count
        view = self.residents.view(resident, decision)
        keep = self._choose(view, decision, decision.candidates, count)
        self._move_together(decision, view, keep)

    def _move_together(self, decision: EvictionDecision, view: ResidentView, keep: Tensor) -> None:
        source = plan_moves(keep, decision.count)
        self.residents.pages.relocate(decision.resident.blocks, source)
        self.residents.put(decision.resident, source.long(), view)

    def rehearse(self, decision: EvictionDecision) -> None:
        """Run what an eviction runs, so that its kernels are compiled before a request needs them.

        Writes to the decision's blocks, which must be nobody's. A policy that fails is left to fail
        on real tokens, where its failure is counted.
        """
        view = self.residents.view(decision.resident, decision)
        try:
            keep, _ = choose(self.policy, view, decision.candidates, decision.count)
        except Exception:
            return
        self._move_together(decision, view, keep)

    def evict_with_recall(self, decision: EvictionDecision) -> None:
        """Evict from one row whose evicted tokens stay in host memory and may be recalled."""
        (slot,) = decision.slots
        resident, candidates, count = decision.resident, decision.candidates, decision.count
        began = time.perf_counter()
        view = self.residents.view(resident, decision)
        if not bool(resident.mixed[0]):
            self._stores.pop(slot, None)
        store = self._stores.setdefault(slot, SpanStore(self.policy.options.on_demand))
        mine = Tokens(
            view.keys[0],
            view.values[0],
            view.positions[0],
            view.cumulative_attention[0] if view.cumulative_attention is not None else None,
        )
        queries = self.residents.latest_queries(decision, min(self.residents.ring, RECALL_QUERIES))
        found = store.needed(queries[0], mine.keys, count // 4)
        unwanted = None
        if found is not None:
            back, needed = found
            mine = self._insert(mine, back, candidates)
            view = self._dense_view(view, mine)
            unwanted = torch.zeros(mine.positions.shape, dtype=torch.bool, device=needed.device)
            unwanted[:, candidates : candidates + needed.shape[1]] = ~needed
            candidates += needed.shape[1]
            self._log.counts.recalled_tokens += int(needed.sum())
        keep = self._choose(view, decision, candidates, count, unwanted)
        source = plan_moves(keep, count).long()
        size = self.policy.engine.block_size
        row, head, place, origin = self._moved(source)
        self.residents.pages.write(
            head, resident.blocks[row, place // size], place % size,
            mine.keys[head, origin], mine.values[head, origin],
        )  # fmt: skip
        self.residents.put(resident, source, view)
        heads = keep.shape[1]
        gone = torch.ones(heads, candidates, dtype=torch.bool, device=keep.device)
        gone.scatter_(1, keep[0].long(), False)
        store.put(mine.take(gone.nonzero()[:, 1].view(heads, -1)))
        self._log.counts.recall_us += round((time.perf_counter() - began) * 1e6)

    def _insert(self, mine: Tokens, back: Tokens, at: int) -> Tokens:
        """``back`` as further candidates, before the block being filled."""
        n = mine.keys.shape[1]
        index = torch.arange(n, device=mine.keys.device).expand(mine.keys.shape[0], -1)
        if mine.totals is None:
            back.totals = None
        return Tokens.cat([mine.take(index[:, :at]), back, mine.take(index[:, at:])])

    def _dense_view(self, view: ResidentView, mine: Tokens) -> ResidentView:
        return replace(
            view,
            count=mine.keys.shape[1],
            positions=mine.positions[None],
            key_pages=mine.keys[None],
            value_pages=mine.values[None],
            block_table=torch.zeros_like(view.block_table[:, :1]),
            cumulative_attention=mine.totals[None] if mine.totals is not None else None,
        )

    def _moved(self, source: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row, KV head and place of each survivor that moves, and the index it comes from."""
        places = torch.arange(source.shape[2], device=source.device)
        row, head, place = torch.nonzero(source != places, as_tuple=True)
        return row, head, place, source[row, head, place]

    def _choose(
        self,
        view: ResidentView,
        decision: EvictionDecision,
        candidates: int,
        count: int,
        unwanted: Tensor | None = None,
    ) -> Tensor:
        if self._log.failed is None:
            try:
                keep, scores = choose(self.policy, view, candidates, count, unwanted)
                if self.policy.resizes:
                    self._measure(view, scores, decision)
                return keep
            except Exception as error:
                self._log.fail(error)
        self._log.counts.fallbacks += len(decision.slots)
        newest = view.positions.float()
        return keep_best(self.policy, view, newest, candidates, count, unwanted)

    def _measure(self, view: ResidentView, scores: Tensor, decision: EvictionDecision) -> None:
        measured = self.policy.measure(view, scores)
        if measured is not None:
            self._log.measure(decision, self._group, measured)
