"""Replays a trace through a pool with tiers below it, whose lines and times are simulated.

The pool is that of `kvplug.hosts.trace.simulator`; below it are the books that an engine keeps
(`kvplug.tiers.hierarchy`), the lifecycle policy and the tiers' orders that a deployment would run.
A chunk is one block of the trace. What the pool's order is about to evict is offered to the books
and stored at once; a request's blocks that follow its pool hit are looked up in the tiers, and
loaded or computed, whichever the policy says. Only time is made up: a transfer takes its line's
latency and its bytes over the line's bandwidth, tiers side by side; prefill takes a time for each
token and for each pair of a query and a key; requests do not wait for each other. Policies are told
these times as measurements and fit them as they would an engine's.

Two ways to store are simulated: on the way out of the pool, and ``eager``, every block of a request
as soon as it is computed, as other offloading does it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from kvplug.contract import (
    Action,
    BlockFact,
    EngineView,
    Found,
    Leaving,
    LifecyclePolicy,
    Move,
    PrefixCachePolicy,
    Released,
    TierView,
)
from kvplug.hosts.trace.simulator import PolicyFailed, Replay, _check
from kvplug.hosts.trace.traces import Trace
from kvplug.tiers.cost import pairs
from kvplug.tiers.hierarchy import Hierarchy, TierBook, order_engine

BuildOrder = Callable[[EngineView], PrefixCachePolicy]
BuildLifecycle = Callable[[EngineView], LifecyclePolicy]


@dataclass(frozen=True)
class SimulatedModel:
    """What a model's KV and its prefill cost.

    Attributes:
        bytes_per_token: Bytes of KV of a token, all layers.
        prefill: Tokens a second that prefill computes of a short prompt.
        quadratic: Context at which attending costs as much as the rest of a token's work; tokens.
    """

    bytes_per_token: int = 131_072
    prefill: float = 10_000.0
    quadratic: float = 24_576.0

    def seconds(self, start: int, tokens: int) -> float:
        """Time to compute ``tokens`` tokens after ``start`` others."""
        return (tokens + pairs(start, tokens) / self.quadratic) / self.prefill


@dataclass(frozen=True)
class SimulatedTier:
    """A tier and its line.

    Attributes:
        name: Its name.
        chunks: Blocks it holds.
        bandwidth: Bytes a second, each way.
        latency: Seconds of a transfer beside its bytes.
        size: Bytes of a chunk there over its bytes in the pool; below 1 for a codec that saves.
        exact: False if its codec changes KV.
    """

    name: str
    chunks: int
    bandwidth: float = 12.5e9
    latency: float = 1e-4
    size: float = 1.0
    exact: bool = True


@dataclass
class TierResult:
    """One replay.

    Attributes:
        trace: Name of the trace.
        capacity: Blocks of the pool.
        references: Blocks referred to.
        pool_hits: Of these, hits of the pool.
        tier_hits: Blocks loaded, by tier.
        passed: Blocks that tiers held and that were computed, because that was faster.
        computed_tokens: Prompt tokens computed.
        prompt_tokens: Prompt tokens.
        stored: Blocks stored from the pool.
        useless: Those that were never loaded.
        written_bytes: Bytes written into tiers, moves between tiers included.
        read_bytes: Bytes loaded into the pool.
        moved: Blocks moved between tiers.
        ttft: (R,) estimated seconds to each request's first token.
        counters: The books' counters.
    """

    trace: str
    capacity: int
    references: int
    pool_hits: int = 0
    tier_hits: dict[str, int] = field(default_factory=dict)
    passed: int = 0
    computed_tokens: int = 0
    prompt_tokens: int = 0
    stored: int = 0
    useless: int = 0
    written_bytes: int = 0
    read_bytes: int = 0
    moved: int = 0
    ttft: list[float] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)

    @property
    def hits(self) -> int:
        """Blocks hit in the pool or a tier."""
        return self.pool_hits + sum(self.tier_hits.values())

    @property
    def hit_rate(self) -> float:
        """Blocks hit in the pool or a tier over blocks referred to."""
        return self.hits / self.references

    @property
    def tier_hit_rate(self) -> float:
        """Blocks loaded from tiers over blocks referred to."""
        return sum(self.tier_hits.values()) / self.references

    @property
    def written_per_hit(self) -> float:
        """Bytes written for each byte loaded; infinite if nothing was loaded."""
        if self.read_bytes:
            return self.written_bytes / self.read_bytes
        return float("inf") if self.written_bytes else 0.0

    @property
    def mean_ttft(self) -> float:
        """Seconds."""
        return float(np.mean(self.ttft))

    @property
    def p95_ttft(self) -> float:
        """Seconds."""
        return float(np.percentile(self.ttft, 95))


class TierReplay(Replay):
    """One trace made ready to be replayed many times with tiers.

    Args:
        trace: The trace.
        model: What its KV and its prefill cost.
    """

    def __init__(self, trace: Trace, model: SimulatedModel):
        super().__init__(trace)
        self.model = model
        self.chunk_bytes = trace.block_size * model.bytes_per_token
        ids = np.arange(trace.num_distinct, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (ids ^ (ids >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        self.keys: list[bytes] = [m.tobytes() * 4 for m in mixed]
        self.block_of = {key: block for block, key in enumerate(self.keys)}

    def run_tiers(
        self,
        pool: PrefixCachePolicy,
        capacity: int,
        tiers: Sequence[SimulatedTier],
        order: BuildOrder,
        lifecycle: BuildLifecycle,
        eager: bool = False,
        step: Callable[[int], None] | None = None,
    ) -> TierResult:
        """Replay the trace once.

        Args:
            pool: The pool's order, a fresh object.
            capacity: Blocks of the pool, at least 1.
            tiers: The tiers, fastest first; none for the pool alone.
            order: Builds each tier's order.
            lifecycle: Builds the lifecycle policy.
            eager: Store what a request computed at its end, and not what is about to be evicted.
            step: Called now and then with the number of requests served since the last call.

        Raises:
            PolicyFailed: A policy raised, or was retired by the books; an engine would go on
                without it, but its figures would not be its own.
        """
        state = _State(self, pool, capacity, tiers, order, lifecycle, eager)
        try:
            for i in range(self.trace.num_requests):
                state.serve(i)
                if step is not None and i % 256 == 255:
                    step(256)
            pool.on_stop()
        except Exception as error:
            raise PolicyFailed(
                f"{self.trace.name} at {capacity} blocks: {type(error).__name__}: {error}"
            ) from error
        if step is not None:
            step(self.trace.num_requests % 256)
        return state.result()

    def requests(self) -> list[list[int]]:
        """The blocks of each request."""
        return self._requests


class _State:
    """A replay under way."""

    def __init__(
        self,
        replay: TierReplay,
        pool: PrefixCachePolicy,
        capacity: int,
        tiers: Sequence[SimulatedTier],
        order: BuildOrder,
        lifecycle: BuildLifecycle,
        eager: bool,
    ):
        trace = replay.trace
        self.replay, self.pool, self.capacity, self.eager = replay, pool, capacity, eager
        self.size = replay.chunk_bytes
        self.now = 0.0
        self.sessions = trace.names_sessions
        engine = replay.engine(capacity)
        self.tiers = {tier.name: tier for tier in tiers}
        books = [
            TierBook(
                tier.name,
                tier.chunks * self._bytes(tier),
                tier.exact,
                False,
                False,
                order(order_engine(engine, tier.chunks, 1)),
            )
            for tier in tiers
        ]
        self.books = Hierarchy(books, lifecycle(engine), lambda: self.now) if books else None
        self.slot_of = [-1] * trace.num_distinct
        self.content = [-1] * capacity
        self.free = list(range(capacity - 1, -1, -1))
        self.uses = [0] * trace.num_distinct
        self.used_at = [0.0] * trace.num_distinct
        self.text: list[bytes] = [b""] * trace.num_distinct
        self.depth = [0] * trace.num_distinct
        self.parent = [-1] * trace.num_distinct
        self.unread: set[int] = set()
        self.written_until = {tier.name: 0.0 for tier in tiers}
        self.found = TierResult(trace.name, capacity, trace.num_references)
        self.found.tier_hits = {tier.name: 0 for tier in tiers}

    def serve(self, number: int) -> None:
        replay, trace, pool = self.replay, self.replay.trace, self.pool
        request, view = replay.requests()[number], replay._views[number]
        self.now = max(self.now, view.arrival)
        if self.books is not None:
            self.books.began(view)
        size, total = trace.block_size, max(1, int(trace.prompt_tokens[number]))
        blocks = request if len(request) <= self.capacity else request[: self.capacity]
        slots = [self.slot_of[c] for c in blocks]
        hit = slots.index(-1) if -1 in slots else len(slots)
        present = [s for s in slots if s >= 0]
        if present:
            pool.on_hit(present)
        loaded, seconds = self._load(blocks[hit:], hit * size, total)
        rest = max(1, total - (hit + loaded) * size)
        computing = replay.model.seconds(total - rest, rest)
        if self.books is not None:
            self.books.computed(rest, pairs(total - rest, rest), computing)
        self.found.ttft.append(seconds + computing)
        self.found.pool_hits += hit
        self.found.computed_tokens += rest
        self.found.prompt_tokens += total
        text = (view.session_id or f"request {number}").encode()
        for i, c in enumerate(blocks):
            self.uses[c] = self.uses[c] + 1 if i < hit + loaded or slots[i] >= 0 else 1
            self.used_at[c], self.text[c], self.depth[c] = self.now, text, i
            self.parent[c] = blocks[i - 1] if i else -1
        self._make_room(slots, present)
        for i, s in enumerate(slots):
            if s < 0:
                s = self.free.pop()
                slots[i] = s
                self.slot_of[blocks[i]] = s
                self.content[s] = blocks[i]
        self._release(number, request, blocks, slots)
        if self.books is not None:
            self.books.unpin([replay.keys[c] for c in blocks[hit : hit + loaded]])
            if self.eager:
                self._store([self._leaving(c, 0.0) for c in reversed(blocks)])
            self._plan(number)

    def result(self) -> TierResult:
        self.found.useless += len(self.unread)
        if self.books is not None:
            self.found.counters = counters = self.books.counters()
            for name, count in counters.items():
                if name.endswith(("order_errors", "lifecycle_errors")) and count:
                    raise PolicyFailed(f"{name}: a policy failed and was retired; see the log")
        return self.found

    # -- loads ---------------------------------------------------------------------------------

    def _load(self, blocks: list[int], start: int, total: int) -> tuple[int, float]:
        """Blocks loaded right after the pool's hit, and the seconds that takes."""
        if self.books is None or not blocks:
            return 0, 0.0
        books = self.books
        keys = [self.replay.keys[c] for c in blocks]
        run: list[str] = []
        for name in books.holders(keys):
            if name is None:
                break
            run.append(name)
        books.asked(keys, len(run))
        if not run:
            return 0, 0.0
        size = self.replay.trace.block_size
        sizes = books.sizes(keys[: len(run)])
        found = Found([size] * len(run), sizes, run, start, total)
        number = books.load(found)
        self.found.passed += len(run) - number
        if not number:
            return 0, 0.0
        books.used(keys[:number])
        books.pin(keys[:number])
        self.unread.difference_update(blocks[:number])
        seconds = 0.0
        for name, tier in self.tiers.items():
            read = sum(s for s, of in zip(sizes[:number], run, strict=False) if of == name)
            if read:
                took = tier.latency + read / tier.bandwidth
                books.measured(name, "read", read, took)
                seconds = max(seconds, took)
                self.found.read_bytes += read
                self.found.tier_hits[name] += run[:number].count(name)
        return number, seconds

    # -- stores and moves ----------------------------------------------------------------------

    def _bytes(self, tier: SimulatedTier) -> int:
        return max(1, int(self.size * tier.size))

    def _leaving(self, block: int, idle: float) -> Leaving:
        size = self.replay.trace.block_size
        parent = self.parent[block]
        return Leaving(
            self.replay.keys[block],
            self.depth[block] * size,
            size,
            uses=self.uses[block],
            idle=idle,
            session=self.sessions,
            parent=self.replay.keys[parent] if parent >= 0 else b"",
            text=self.text[block],
        )

    def _make_room(self, slots: list[int], present: list[int]) -> None:
        gone = len(slots) - len(present) - len(self.free)
        if gone <= 0:
            return
        victims = self.pool.victims(gone)
        _check(victims, gone, self.content, present)
        leaving = [self.content[v] for v in victims]
        if self.books is not None and not self.eager:
            self._store([self._leaving(c, self.now - self.used_at[c]) for c in leaving])
        for v, c in zip(victims, leaving, strict=True):
            self.slot_of[c] = -1
            self.content[v] = -1
        self.pool.on_remove(victims)
        self.free += reversed(victims)

    def _store(self, leaving: list[Leaving]) -> None:
        assert self.books is not None
        largest = max(self._bytes(tier) for tier in self.tiers.values())
        for key, name in self.books.leaving(leaving, largest):
            self._written(name, key)
            block = self.replay.block_of[key]
            self.found.stored += 1
            if block in self.unread:
                self.found.useless += 1
            self.unread.add(block)

    def _written(self, name: str, key: bytes) -> None:
        assert self.books is not None
        tier = self.tiers[name]
        size = self._bytes(tier)
        self.books.put(name, key, size)
        self.found.written_bytes += size
        begins = max(self.now, self.written_until[name])
        self.written_until[name] = begins + size / tier.bandwidth

    def _plan(self, number: int) -> None:
        assert self.books is not None
        for name, tier in self.tiers.items():
            waiting = max(0.0, self.written_until[name] - self.now) * tier.bandwidth
            self.books.queued(name, "write", int(waiting))
        used = (self.capacity - len(self.free)) * self.size
        view = TierView("pool", used, self.capacity * self.size)
        moves: list[Move] = self.books.plan(number, view)
        while moves:
            moved = [m for m in moves if m.action is not Action.DROP]
            for move in moved:
                assert move.target is not None
                self.found.moved += len(move.keys)
                for key in move.keys:
                    self._written(move.target, key)
            # What arrived lets its source go; the policy is not asked again in this step.
            moves = self.books.settle() if moved else []

    # -- the pool's order ----------------------------------------------------------------------

    def _release(
        self, number: int, request: list[int], blocks: list[int], slots: list[int]
    ) -> None:
        facts, view = self.pool.needs, self.replay._views[number]
        keys = self.replay.keys
        output = int(self.replay.trace.output_tokens[number])
        if BlockFact.FINISHED in facts:
            self.pool.on_finished(view, [keys[c] for c in request], output)
        if self.books is not None:
            self.books.finished(view, [keys[c] for c in request], output)
        if not slots:
            return
        ids = slots[::-1]
        self.pool.on_release(
            Released(
                ids,
                list(range(len(ids) - 1, -1, -1)) if BlockFact.POSITION in facts else None,
                [keys[c] for c in reversed(blocks)] if BlockFact.KEY in facts else None,
                view if BlockFact.REQUEST in facts else None,
                [*ids[1:], -1] if BlockFact.PARENT in facts else None,
            )
        )


def with_link(tier: SimulatedTier, gbit: float) -> SimulatedTier:
    """The same tier at the end of a line of ``gbit`` Gbit/s."""
    return replace(tier, bandwidth=gbit * 1e9 / 8)
