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

from kvplug.containment import ON_WORKER, PolicyFailure
from kvplug.contract import ResidentView, ScoringPolicy
from kvplug.hosts.pruning import finite, given_scores, keep_best, own_view
from kvplug.hosts.sizes import RECALL_QUERIES
from kvplug.hosts.spans import SpanStore, Tokens
from kvplug.hosts.torch_state import TorchPolicy
from kvplug.hosts.vllm.messages import SequenceReport
from kvplug.hosts.vllm.worker.phases import AttentionFlush, EvictionDecision
from kvplug.hosts.vllm.worker.residents import LayerResidents, Residents
from kvplug_kernels.compact_kv import plan_moves
from kvplug_kernels.move_tokens.vectorized import put_beside
from kvplug_kernels.plan_survivors import plan_survivors

logger = init_logger("vllm.kvplug")

MAX_MEASURED = 1024
"""Numbers that a policy may measure of a row."""

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
        self.contained = TorchPolicy(policy, ON_WORKER, logger)
        self._settled_after = settled_after
        self._reports = 0
        self._pending: deque[Measurement] = deque()
        self.counts = SequenceReport()
        self.failed: str | None = None
        self._measured: dict[tuple[int, int, int], tuple[npt.NDArray[np.float64], int]] = {}

    def fail(self, failure: PolicyFailure) -> None:
        """Retire the policy: from now on the latest tokens are kept."""
        self.failed = failure.cause
        self.contained.log(
            "failed and is retired; from now on the latest tokens are kept instead", failure
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
        self.rules = residents.rules
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
        if not self.rules.on_demand:
            self.evict(decision)
            return
        for row in decision.rows():
            self.evict_with_recall(row)

    def evict(self, decision: EvictionDecision) -> None:
        """Decide what survives, and move it together."""
        found = self.residents.look(decision.resident, decision)
        scores = self._scores(found.view, decision)
        self._move_together(decision, found, found.positions.float() if scores is None else scores)

    def _move_together(self, decision: EvictionDecision, found: Residents, scores: Tensor) -> None:
        source = plan_survivors(
            scores,
            found.positions,
            decision.num_tokens,
            candidates=decision.candidates,
            count=decision.count,
            sink=self.rules.sink,
            recent=self.rules.recent,
        )
        beside = self.residents.beside(found.positions, found.totals)
        self.residents.pages.relocate(found.table, source, beside)

    def rehearse(self, decision: EvictionDecision) -> None:
        """Run what an eviction runs, so that its kernels are compiled before a request needs them.

        Writes to the decision's blocks, which must be nobody's. A policy that fails is left to fail
        on real tokens, where its failure is counted.
        """
        found = self.residents.look(decision.resident, decision)
        contained = TorchPolicy(self.policy, ON_WORKER, logger)
        try:
            scores = contained.run(given_scores, self.policy, found.view)
        except PolicyFailure:
            return
        self._move_together(decision, found, scores)

    def evict_with_recall(self, decision: EvictionDecision) -> None:
        """Evict from one row whose evicted tokens stay in host memory and may be recalled."""
        (slot,) = decision.slots
        resident, candidates, count = decision.resident, decision.candidates, decision.count
        began = time.perf_counter()
        looked = self.residents.look(resident, decision)
        view, table, blocks = looked.view, looked.table, looked.table.long()
        if not bool(resident.mixed[0]):
            self._stores.pop(slot, None)
        store = self._stores.setdefault(slot, SpanStore(self.rules.on_demand))
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
        shown = own_view(view)
        scores = self._scores(shown, decision)
        if scores is None:
            scores = view.positions.float()
        ranked = replace(view, num_tokens=decision.num_tokens)
        keep = keep_best(self.rules, ranked, finite(scores), candidates, count, unwanted)
        plan = plan_moves(keep, count)
        source = plan.long()
        size = self.rules.block_size
        row, head, place, origin = self._moved(source)
        self.residents.pages.write(
            head, blocks[row, place // size], place % size,
            mine.keys[head, origin], mine.values[head, origin],
        )  # fmt: skip
        put_beside(
            table,
            plan[None],
            self.residents.beside(view.positions, view.cumulative_attention),
        )
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

    def _scores(self, view: ResidentView, decision: EvictionDecision) -> Tensor | None:
        """What the policy scores; None where it failed, now or before."""
        if self._log.failed is None:
            try:
                scores, measured = self._log.contained.run(self._asked, view)
            except PolicyFailure as failure:
                self._log.fail(failure)
            else:
                if measured is not None:
                    self._log.measure(decision, self._group, measured)
                found: Tensor = scores
                return found
        self._log.counts.fallbacks += len(decision.slots)
        return None

    def _asked(self, view: ResidentView) -> tuple[Tensor, Tensor | None]:
        """The policy's scores, and what it measures, as ``[rows, n]`` float64."""
        scores = given_scores(self.policy, view)
        if not self.rules.resizes:
            return scores, None
        scores = finite(scores)
        measured: Any = self.policy.measure(view, scores.clone())
        if measured is None:
            return scores, None
        rows, device = len(view.positions), view.positions.device
        if type(measured) is not Tensor or measured.dim() != 2 or measured.shape[0] != rows:
            raise ValueError(f"measure must return a tensor of {rows} rows, got {measured!r}")
        if measured.shape[1] > MAX_MEASURED or measured.device != device:
            raise ValueError(
                f"measure must return at most {MAX_MEASURED} numbers a row, on {device}"
            )
        return scores, measured.detach().double()
