"""Messages between the scheduler and the workers: directives with a step, reports after it.

Each kind has its own part of either message, named as in the ``kvplug`` section; a kind that has
nothing to say leaves its part None. Ranks do the same work on their own heads and layers, so their
reports are merged part by part before the scheduler sees them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvplug.contract import Fingerprint
from kvplug.hosts.pruning import Eviction


@dataclass(frozen=True, slots=True)
class RowPlan:
    """The scheduler's plan for one request in one KV-cache group and one step.

    Attributes:
        prompt: Tokens of its prompt.
        state: The eviction in force when the step starts, or None.
        evictions: Evictions to make in the step.
    """

    prompt: int
    state: Eviction | None
    evictions: tuple[Eviction, ...]


Plans = dict[tuple[int, int], RowPlan]
"""Plans by KV-cache group of the policy (index of its share) and slot."""


@dataclass
class SequenceDirectives:
    """Work of a sequence policy in a step.

    Attributes:
        exempt: Slots of requests that keep everything, ``[n]`` int32, or None for none.
        rows: Plans of a scoring policy, ``[n, 8]`` int32: group, slot, prompt, number of
            evictions, then at, end, kept and tail of the eviction in force (end 0 for none).
        evictions: Their evictions in the order of the rows, ``[m, 4]`` int32.
        phased: For the second model runner: the plans are those of every row, and the step is
            attended in phases. Otherwise they are those of rows that have something done after it.
    """

    exempt: npt.NDArray[np.int32] | None = None
    rows: npt.NDArray[np.int32] | None = None
    evictions: npt.NDArray[np.int32] | None = None
    phased: bool = False

    def set_plans(self, plans: Plans) -> None:
        """Pack plans as arrays: pickling them costs a tenth of dataclasses."""
        rows, evictions = [], []
        for (group, slot), plan in plans.items():
            s = plan.state
            state = (s.at, s.end, s.kept, s.grown) if s is not None else (0, 0, 0, 0)
            rows.append((group, slot, plan.prompt, len(plan.evictions), *state))
            evictions += [(c.at, c.end, c.kept, c.grown) for c in plan.evictions]
        self.rows = np.array(rows, dtype=np.int32).reshape(-1, 8)
        self.evictions = np.array(evictions, dtype=np.int32).reshape(-1, 4)

    def plans(self) -> Plans:
        """The plans that were packed."""
        if self.rows is None or self.evictions is None:
            return {}
        made = [Eviction(*c) for c in self.evictions.tolist()]
        found: Plans = {}
        taken = 0
        for group, slot, prompt, n, at, end, kept, last in self.rows.tolist():
            state = Eviction(at, end, kept, last) if end else None
            found[group, slot] = RowPlan(prompt, state, tuple(made[taken : taken + n]))
            taken += n
        return found


@dataclass
class FormatDirectives:
    """Assignments of requests, for a format that stores each in its own way.

    Attributes:
        assignments: Slot and assignment of each scheduled request, ``[n, 2]`` int32.
    """

    assignments: npt.NDArray[np.int32]


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
        pieces: Runs to load.
        spans: Spans to recompute.
        number: Number of the order, by which workers report it.
        awaited: True if vLLM schedules the request once workers report it as received; False if
            the same step computes on it.
    """

    request: str
    blocks: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int32]
    pieces: tuple[PieceOrder, ...]
    spans: tuple[tuple[int, int], ...]
    number: int = 0
    awaited: bool = False


@dataclass(frozen=True)
class SaveOrder:
    """A segment to read out of a request's pages.

    Attributes:
        segment: Its id.
        fingerprint: Everything its KV depends on; measures and checksum not known yet.
        tokens: Its token ids, ``[length]`` int32.
        context: The text before it, ``[start]`` int32.
        blocks: Ids of the request's blocks up to the segment's last token, ``[n]`` int64.
        slot: The request's slot, or -1: the request ended.
        session: Session that keeps it, or the empty string.
    """

    segment: str
    fingerprint: Fingerprint
    tokens: npt.NDArray[np.int32]
    context: npt.NDArray[np.int32]
    blocks: npt.NDArray[np.int64]
    slot: int = -1
    session: str = ""


@dataclass
class ReuseDirectives:
    """Work of reuse in a step.

    Attributes:
        loads: Runs to write before the forward.
        left: Segments that ended requests leave, to read before anything is written.
        saves: Segments that the step completes, to read after the forward.
        drop: Segments to forget; runs that the step loads still find theirs.
        delete: Segments whose files go too.
        fetch: Segments to bring back from the folder, and the approximate reuses behind each.
        generation: Resets of the store so far.
    """

    loads: list[LoadOrder] = field(default_factory=list)
    left: list[SaveOrder] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)
    drop: list[str] = field(default_factory=list)
    delete: list[str] = field(default_factory=list)
    fetch: dict[str, int] = field(default_factory=dict)
    generation: int = 0

    def __bool__(self) -> bool:
        return any(value for name, value in vars(self).items() if name != "generation")


@dataclass
class AttentionDirectives:
    """Requests that an attention policy serves in a step.

    Attributes:
        requests: Slot and owner of each, ``[n, 2]`` int32. The owner's number changes when another
            request takes the slot, and when the request starts over.
    """

    requests: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class ChunkStore:
    """A chunk to store.

    Attributes:
        tier: The tier.
        key: Its key.
        start: Position of its first token in its text.
        blocks: Ids of its blocks.
    """

    tier: str
    key: bytes
    start: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChunkLoad:
    """The run of chunks that one request takes.

    Attributes:
        request: Its id.
        number: Number of the order, by which workers report it.
        start: Position of the first token.
        keys: Keys of the chunks, in text order.
        tiers: Tier of each.
        blocks: Ids of the blocks, all chunks' in order, ``[n]`` int64.
        seconds: Time after which it counts as failed.
    """

    request: str
    number: int
    start: int
    keys: tuple[bytes, ...]
    tiers: tuple[str, ...]
    blocks: npt.NDArray[np.int64]
    seconds: float


@dataclass(frozen=True, slots=True)
class ChunkMove:
    """Chunks that are stored in another tier as well, or dropped.

    Attributes:
        action: What is done, as `Action` names it.
        source: The tier they are in.
        target: The tier they are stored in; None for a drop.
        keys: Their keys.
    """

    action: str
    source: str
    target: str | None
    keys: tuple[bytes, ...]


@dataclass
class TiersDirectives:
    """Work of tiers in a step.

    Attributes:
        stores: Chunks to store, read before anything is written.
        loads: Runs to load while their requests wait.
        moves: Chunks to drop, before anything is stored, and to store in other tiers.
        generation: Resets so far; a load of an earlier one has failed.
    """

    stores: list[ChunkStore] = field(default_factory=list)
    loads: list[ChunkLoad] = field(default_factory=list)
    moves: list[ChunkMove] = field(default_factory=list)
    generation: int = 0

    def __bool__(self) -> bool:
        return bool(self.stores or self.loads or self.moves)


@dataclass
class StepDirectives(KVConnectorMetadata):
    """Directives of one step.

    Attributes:
        rows: For the first model runner, names the rows of attention metadata: a block and the
            slot of the request that writes it, ``[n, 2]`` int32. They are the block each scheduled
            request writes last in each KV-cache group, and those it may turn out to write last when
            draft tokens are rejected. A block that is being written belongs to one request alone.
            None where no kind needs slots.
        names: Slot of each request that a part names, for the second model runner, which learns
            the requests of rows, but not the blocks they write.
        before_forward: True if a part must be done before the forward: runs are loaded, or it must
            reach the second runner with the requests of rows.
        sequence: Part of the sequence kind.
        format: Part of the format kind.
        reuse: Part of the reuse kind.
        attention: Part of the attention kind.
        tiers: Part of the tiers.
    """

    rows: npt.NDArray[np.int32] | None = None
    sequence: SequenceDirectives | None = None
    format: FormatDirectives | None = None
    reuse: ReuseDirectives | None = None
    attention: AttentionDirectives | None = None
    tiers: TiersDirectives | None = None
    names: dict[str, int] = field(default_factory=dict)
    before_forward: bool = False


class Part(Protocol):
    """One kind's part of a report."""

    def merge(self, other: Self) -> None:
        """Add the same part of another rank's report of the same step."""


@dataclass
class SequenceReport:
    """Work that a sequence policy did on a worker.

    Attributes:
        rows: Attention rows compacted.
        split_rows: Rows added by splitting prefill chunks.
        evictions: Requests evicted from by score, counted once per KV-cache group.
        fallbacks: Decisions made by position, per layer, because the policy had failed.
        recalled_tokens: Evicted tokens that came back from host memory, per layer and KV head.
        recall_us: Microseconds spent on decisions with evicted tokens kept in host memory.
        measured: Measurements of a scoring policy, ``[evictions, 4 + n]`` float64: slot, group,
            tokens computed, layers, sums over layers; or None.
        failed: Cause the scoring policy was retired for, or None.
    """

    rows: int = 0
    split_rows: int = 0
    evictions: int = 0
    fallbacks: int = 0
    recalled_tokens: int = 0
    recall_us: int = 0
    measured: npt.NDArray[np.float64] | None = None
    failed: str | None = None

    def merge(self, other: SequenceReport) -> None:
        """Take the larger count of each, and add up measurements."""
        for name in COUNTS:
            setattr(self, name, max(getattr(self, name), getattr(other, name)))
        self.measured = merge_measured(self.measured, other.measured)
        self.failed = self.failed or other.failed


COUNTS = ("rows", "split_rows", "evictions", "fallbacks", "recalled_tokens", "recall_us")


@dataclass
class FormatReport:
    """Work that a format did on a worker.

    Attributes:
        tokens: Tokens written, once per layer.
        errors: Failures to write, attend or read.
        failed: Cause of the first of them, or None.
        counters: The policy's own counters since it was built.
        signals: The policy's measurements, added up over ranks, or None.
        unwritten: Blocks whose tokens could not be stored.
    """

    tokens: int = 0
    errors: int = 0
    failed: str | None = None
    counters: dict[str, float] = field(default_factory=dict)
    signals: list[float] | None = None
    unwritten: set[int] = field(default_factory=set)

    def merge(self, other: FormatReport) -> None:
        """Take the larger count of each, and add up signals."""
        self.unwritten |= other.unwritten
        self.tokens = max(self.tokens, other.tokens)
        self.errors = max(self.errors, other.errors)
        self.failed = self.failed or other.failed
        for name, value in other.counters.items():
            self.counters[name] = max(self.counters.get(name, value), value)
        if self.signals is None or other.signals is None:
            self.signals = other.signals if self.signals is None else self.signals
        else:
            self.signals = [a + b for a, b in zip(self.signals, other.signals, strict=True)]


@dataclass
class AttentionReport:
    """Work that an attention policy did on a worker.

    Attributes:
        rows: Decode rows it attended, once per layer.
        failed: Cause it was retired for, or None.
        counters: The policy's own counters since it was built.
    """

    rows: int = 0
    failed: str | None = None
    counters: dict[str, float] = field(default_factory=dict)

    def merge(self, other: AttentionReport) -> None:
        """Take the larger count of each."""
        self.rows = max(self.rows, other.rows)
        self.failed = self.failed or other.failed
        for name, value in other.counters.items():
            self.counters[name] = max(self.counters.get(name, value), value)


@dataclass
class ReuseReport:
    """Work that reuse did on a worker. A segment is stored once all ranks have stored it.

    Attributes:
        saved: Measures of each segment stored.
        written: Segments whose file is complete.
        fetched: Segments that came back from the folder.
        failed: Segments that are not there, with the cause.
        computed: Tokens recomputed.
        loaded: Tokens loaded, and those of them that were corrected on the way.
        guard: ``(request, entropy, log-probability)`` of watched answers.
        unloaded: Requests whose run could not be loaded; vLLM computes it.
        filled: Ranks that loaded the run of each order, by its number.
        adapted: Host seconds that its keys were rotated, corrected or computed for, where they
            were.
        errors: Exceptions on the way.
        error: The first of them.
        counts: Ranks that stored each segment.
        reloaded: The model's weights were loaded again.
    """

    saved: dict[str, dict[str, float]] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    computed: int = 0
    loaded: tuple[int, int] = (0, 0)
    guard: list[tuple[str, float, float]] = field(default_factory=list)
    unloaded: list[str] = field(default_factory=list)
    filled: dict[int, int] = field(default_factory=dict)
    adapted: dict[int, float] = field(default_factory=dict)
    errors: int = 0
    error: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    reloaded: bool = False

    def __bool__(self) -> bool:
        return bool(
            self.saved
            or self.written
            or self.fetched
            or self.failed
            or self.computed
            or self.loaded[0]
            or self.guard
            or self.unloaded
            or self.filled
            or self.errors
            or self.reloaded
            or self.unloaded
        )

    def merge(self, other: ReuseReport) -> None:
        """Add another rank's report of the same step."""
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
        self.unloaded += other.unloaded
        for number, ranks in other.filled.items():
            self.filled[number] = self.filled.get(number, 0) + ranks
        for number, seconds in other.adapted.items():
            self.adapted[number] = max(self.adapted.get(number, 0.0), seconds)
        self.errors += other.errors
        self.error = self.error or other.error
        self.reloaded |= other.reloaded


@dataclass
class ShadowReport:
    """Next-token distributions of watched answers and of shadows, on the first rank.

    Attributes:
        likeliest: Request, ids of its likeliest tokens, their log-probabilities; one per output
            token, in order.
    """

    likeliest: list[tuple[str, tuple[int, ...], tuple[float, ...]]] = field(default_factory=list)

    def merge(self, other: ShadowReport) -> None:
        """Take what the one rank reports that reports any."""
        self.likeliest = self.likeliest or other.likeliest


@dataclass
class TiersReport:
    """Work of tiers on a worker. Something is done with a chunk once all ranks have done it.

    Attributes:
        stored: Ranks that stored a chunk in a tier, and their bytes.
        failed: Chunks that were not stored in a tier, with the cause.
        gone: Chunks that are not in a tier, with the cause.
        loaded: Ranks that loaded the run of each order, by its number.
        unloaded: Orders whose run could not be loaded, with the cause.
        measured: Transfers: tier, ``read`` or ``write``, bytes, seconds.
        queued: Bytes that wait to be stored, by tier.
        down: Tiers that failed, with the cause.
        errors: Exceptions of the worker itself.
        error: The first of them.
        reloaded: The model's weights were loaded again.
    """

    stored: dict[tuple[str, bytes], tuple[int, int]] = field(default_factory=dict)
    failed: dict[tuple[str, bytes], str] = field(default_factory=dict)
    gone: dict[tuple[str, bytes], str] = field(default_factory=dict)
    loaded: dict[int, int] = field(default_factory=dict)
    unloaded: dict[int, str] = field(default_factory=dict)
    measured: list[tuple[str, str, int, float]] = field(default_factory=list)
    queued: dict[str, int] = field(default_factory=dict)
    down: dict[str, str] = field(default_factory=dict)
    errors: int = 0
    error: str = ""
    reloaded: bool = False

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def merge(self, other: TiersReport) -> None:
        """Add another rank's report of the same step."""
        for at, (ranks, size) in other.stored.items():
            before = self.stored.get(at, (0, 0))
            self.stored[at] = before[0] + ranks, before[1] + size
        for number, ranks in other.loaded.items():
            self.loaded[number] = self.loaded.get(number, 0) + ranks
        self.failed |= other.failed
        self.gone |= other.gone
        self.unloaded |= other.unloaded
        self.measured += other.measured
        for tier, size in other.queued.items():
            self.queued[tier] = max(size, self.queued.get(tier, 0))
        self.down |= other.down
        self.errors += other.errors
        self.error = self.error or other.error
        self.reloaded |= other.reloaded


def merge_measured(
    one: npt.NDArray[np.float64] | None, other: npt.NDArray[np.float64] | None
) -> npt.NDArray[np.float64] | None:
    """Merge two ranks' measurements: layers and sums added up, by slot, group and position."""
    if one is None or other is None:
        return one if other is None else other
    rows = np.concatenate([one, other])
    keys, index = np.unique(rows[:, :3], axis=0, return_inverse=True)
    sums = np.zeros((len(keys), rows.shape[1] - 3))
    np.add.at(sums, index.reshape(-1), rows[:, 3:])
    return np.concatenate([keys, sums], axis=1)


@dataclass
class StepReport(KVConnectorWorkerMetadata):
    """Report of one step, by kind.

    Attributes:
        sequence: Part of the sequence kind.
        format: Part of the format kind.
        reuse: Part of the reuse kind.
        attention: Part of the attention kind.
        tiers: Part of the tiers.
        shadow: Part of the guard's shadow.
    """

    sequence: SequenceReport | None = None
    format: FormatReport | None = None
    reuse: ReuseReport | None = None
    attention: AttentionReport | None = None
    tiers: TiersReport | None = None
    shadow: ShadowReport | None = None

    def __bool__(self) -> bool:
        return any(getattr(self, f.name) is not None for f in fields(self))

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, StepReport)
        for f in fields(self):
            mine: Any = getattr(self, f.name)
            theirs: Any = getattr(other, f.name)
            if mine is None:
                setattr(self, f.name, theirs)
            elif theirs is not None:
                mine.merge(theirs)
        return self
