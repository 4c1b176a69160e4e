"""What travels between the scheduler and the workers: directives with a step, reports after it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvplug.contract import Fingerprint
from kvplug.hosts.pruning import Cut


@dataclass
class StepDirectives(KVConnectorMetadata):
    """What the scheduler tells the workers for one step.

    Attributes:
        exempt_tails: Ids of the blocks that requests which keep everything write in this step,
            ``[n]`` int32, or None when there are none.
        plans: Rows of a scoring policy and their cuts, as `pack_plans` packs them, or None.
        lanes: The block each scheduled request writes last, its lane and its assignment, ``[n, 3]``
            int32, for a format that treats requests apart; None else.
        reuse: What reuse is to do in the step, or None.
    """

    exempt_tails: npt.NDArray[np.int32] | None = None
    plans: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]] | None = None
    lanes: npt.NDArray[np.int32] | None = None
    reuse: ReuseOrders | None = None


@dataclass
class StepReport(KVConnectorWorkerMetadata):
    """What a worker did in one step. Ranks do the same work, so counts are merged by maximum;
    what they measured differs by head and layer, and is summed.

    Attributes:
        counters: What it counted.
        measured: What a scoring policy measured, as `WorkerState.take_measured` gives it.
        failed: Why the scoring policy was retired there, or None.
        format_failed: Why the format policy failed first there, or None.
        format_counters: What the format policy counted itself since it was built.
        signals: What the format policy measured, added up over ranks.
        reuse: What reuse did, or None.
    """

    counters: WorkerCounters
    measured: npt.NDArray[np.float64] | None = None
    failed: str | None = None
    format_failed: str | None = None
    format_counters: dict[str, float] = field(default_factory=dict)
    signals: list[float] | None = None
    reuse: ReuseNews | None = None

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, StepReport)
        mine = asdict(self.counters)
        self.counters = WorkerCounters(
            **{k: max(mine[k], v) for k, v in asdict(other.counters).items()}
        )
        self.measured = merge_measured(self.measured, other.measured)
        self.failed = self.failed or other.failed
        self.format_failed = self.format_failed or other.format_failed
        for name, value in other.format_counters.items():
            self.format_counters[name] = max(self.format_counters.get(name, value), value)
        if self.signals is None or other.signals is None:
            self.signals = other.signals if self.signals is None else self.signals
        else:
            self.signals = [a + b for a, b in zip(self.signals, other.signals, strict=True)]
        if self.reuse is not None and other.reuse is not None:
            self.reuse.merge(other.reuse)
        self.reuse = self.reuse or other.reuse
        return self


@dataclass
class WorkerCounters:
    """What the worker did since it was last asked.

    Attributes:
        rows: Attention rows compacted.
        split_rows: Rows added by splitting prefill chunks.
        cuts: Requests cut by score, counted once per KV-cache group.
        fallbacks: Decisions made by position, per layer, because the policy had failed.
        fetched_tokens: Dropped tokens that came back from host memory, per layer and KV head.
        on_demand_us: Microseconds spent on decisions with dropped tokens kept in host memory.
        format_tokens: Tokens written in a format, once per layer.
        format_errors: Times a format failed to write, attend or read.
    """

    rows: int = 0
    split_rows: int = 0
    cuts: int = 0
    fallbacks: int = 0
    fetched_tokens: int = 0
    on_demand_us: int = 0
    format_tokens: int = 0
    format_errors: int = 0


@dataclass(frozen=True, slots=True)
class RowPlan:
    """The scheduler's plan for one row of one step.

    Attributes:
        lane: Small number of its own per request, for what the worker remembers of it.
        prompt: Tokens of its prompt.
        state: The cut in force when the step starts, or None.
        cuts: Cuts to make in the step.
    """

    lane: int
    prompt: int
    state: Cut | None
    cuts: tuple[Cut, ...]


def pack_plans(plans: dict[int, RowPlan]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Plans by tail block as two arrays, for the way to the workers.

    Returns:
        Rows ``[n, 8]``: tail block, lane, prompt, number of cuts, then at, end, kept and tail of
        the cut in force (end 0 for none); and the cuts, ``[m, 4]``, in the order of the rows.
    """
    rows, cuts = [], []
    for tail, plan in plans.items():
        state = plan.state
        held = (state.at, state.end, state.kept, state.tail) if state is not None else (0, 0, 0, 0)
        rows.append((tail, plan.lane, plan.prompt, len(plan.cuts), *held))
        cuts += [(c.at, c.end, c.kept, c.tail) for c in plan.cuts]
    return (
        np.array(rows, dtype=np.int32).reshape(-1, 8),
        np.array(cuts, dtype=np.int32).reshape(-1, 4),
    )


def unpack_plans(rows: npt.NDArray[np.int32], cuts: npt.NDArray[np.int32]) -> dict[int, RowPlan]:
    """What `pack_plans` packed."""
    made = [Cut(*c) for c in cuts.tolist()]
    plans, taken = {}, 0
    for tail, lane, prompt, n, at, end, kept, last in rows.tolist():
        state = Cut(at, end, kept, last) if end else None
        plans[tail] = RowPlan(lane, prompt, state, tuple(made[taken : taken + n]))
        taken += n
    return plans


def merge_measured(
    one: npt.NDArray[np.float64] | None, other: npt.NDArray[np.float64] | None
) -> npt.NDArray[np.float64] | None:
    """What two ranks measured, as one: their layers and sums added up, by lane and group."""
    if one is None or other is None:
        return one if other is None else other
    rows = np.concatenate([one, other])
    keys, index = np.unique(rows[:, :2], axis=0, return_inverse=True)
    sums = np.zeros((len(keys), rows.shape[1] - 2))
    np.add.at(sums, index.reshape(-1), rows[:, 2:])
    return np.concatenate([keys, sums], axis=1)


@dataclass(frozen=True)
class PieceOrder:
    """A run of a stored segment to write into pages.

    Attributes:
        segment: Its id.
        offset: First token of the segment that is used.
        length: Tokens used.
        start: Position in the request of the first of them.
        exact: Whether every check called it exact.
        shift: Positions its keys are rotated by.
        confidence: What a check estimated, or None.
    """

    segment: str
    offset: int
    length: int
    start: int
    exact: bool
    shift: int
    confidence: float | None


@dataclass(frozen=True)
class LoadOrder:
    """The run one request takes.

    Attributes:
        request: Its id.
        blocks: Ids of its blocks, ``[n]`` int64.
        tokens: Its token ids up to the end of the run, ``[end]`` int32.
        pieces: What is loaded.
        spans: What is computed anew.
    """

    request: str
    blocks: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int32]
    pieces: tuple[PieceOrder, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class SaveOrder:
    """A segment to read out of a request's pages.

    Attributes:
        segment: Its id.
        fingerprint: What its KV depends on; measures and checksum not known yet.
        tokens: Its token ids, ``[length]`` int32.
        context: The text before it, ``[start]`` int32.
        blocks: Ids of the request's blocks up to the segment's last token, ``[n]`` int64.
        tail: The block the request writes last in the step, or -1: the request ended.
        session: Session that keeps it, or the empty string.
    """

    segment: str
    fingerprint: Fingerprint
    tokens: npt.NDArray[np.int32]
    context: npt.NDArray[np.int32]
    blocks: npt.NDArray[np.int64]
    tail: int = -1
    session: str = ""


@dataclass
class ReuseOrders:
    """What the scheduler tells the workers of one step.

    Attributes:
        loads: Runs to write before the forward.
        left: Segments that ended requests leave, to read before anything is written.
        saves: Segments that the step completes, to read after the forward.
        drop: Segments to forget; runs that the step loads still find theirs.
        delete: Segments whose files go too.
        fetch: Segments to bring back from the folder.
        lanes: Lane of each request that may memoize attention, by the block it writes last.
    """

    loads: list[LoadOrder] = field(default_factory=list)
    left: list[SaveOrder] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)
    drop: list[str] = field(default_factory=list)
    delete: list[str] = field(default_factory=list)
    fetch: list[str] = field(default_factory=list)
    lanes: dict[int, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(vars(self).values())


@dataclass
class ReuseNews:
    """What a worker did since last asked. Ranks are merged: a segment is there once all have it.

    Attributes:
        saved: Measures of each segment stored.
        written: Segments whose file is complete.
        fetched: Segments that came back from the folder.
        failed: Segments that are not there, with the cause.
        computed: Tokens computed anew.
        loaded: Tokens loaded, and those of them that were corrected on the way.
        guard: ``(request, entropy, log-probability)`` of watched answers.
        memo: Decode rows that far attention was asked for, and those that reused it.
        unloaded: Requests whose run could not be loaded; vLLM computes it.
        errors: Exceptions on the way.
        error: The first of them.
        counts: Ranks that stored each segment.
    """

    saved: dict[str, dict[str, float]] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    computed: int = 0
    loaded: tuple[int, int] = (0, 0)
    guard: list[tuple[str, float, float]] = field(default_factory=list)
    memo: tuple[int, int] = (0, 0)
    unloaded: list[str] = field(default_factory=list)
    errors: int = 0
    error: str = ""
    counts: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(
            self.saved
            or self.written
            or self.fetched
            or self.failed
            or self.computed
            or self.loaded[0]
            or self.guard
            or self.memo[0]
            or self.errors
        )

    def merge(self, other: ReuseNews) -> None:
        """Add what another rank said of the same step."""
        for name, values in other.saved.items():
            own = self.saved.get(name, values)
            self.saved[name] = {k: (v + own.get(k, v)) / 2 for k, v in values.items()}
        # Both lists may name a segment twice then; the scheduler counts ranks.
        self.written += other.written
        self.fetched += other.fetched
        self.failed |= other.failed
        for name, count in other.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        self.computed = max(self.computed, other.computed)
        self.loaded = max(self.loaded, other.loaded)
        self.guard = self.guard or other.guard
        self.memo = max(self.memo, other.memo)
        self.unloaded += other.unloaded
        self.errors += other.errors
        self.error = self.error or other.error
