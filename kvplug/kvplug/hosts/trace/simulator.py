"""Replays a trace through the policy objects an engine would run.

The model is the simplest one in which an eviction order can be right or wrong: a
cache of ``capacity`` blocks, requests served one after the other. A request's hit is its longest
cached prefix. Its own blocks are pinned while it is served; what it lacks takes free slots, then
the slots of the policy's victims; at its end all its blocks are released, last block first. Of a
request longer than the cache, the first ``capacity`` blocks are kept. The hit rate is the number
of blocks hit over the number referred to.

A block of the request that is cached behind a gap in its prefix is not a hit, but it is not stored
twice either: it is pinned with the others and released with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvplug.contract import (
    BlockFact,
    EngineView,
    Feature,
    PrefixCachePolicy,
    Released,
    RequestView,
)
from kvplug.errors import KVPlugError
from kvplug.hosts.trace.traces import Trace


class PolicyFailed(KVPlugError):
    """A policy raised, or returned invalid victims; an engine would have retired it here."""

    exit_code = 1


@dataclass(frozen=True)
class ReplayResult:
    """One replay.

    Attributes:
        trace: Name of the trace.
        policy: Label of the policy.
        capacity: Blocks of the cache.
        references: Blocks referred to.
        hits: Blocks hit.
        evicted: Blocks evicted.
    """

    trace: str
    policy: str
    capacity: int
    references: int
    hits: int
    evicted: int

    @property
    def hit_rate(self) -> float:
        """Blocks hit over blocks referred to."""
        return self.hits / self.references


class Replay:
    """One trace prepared to be replayed many times.

    Args:
        trace: The trace.
    """

    def __init__(self, trace: Trace):
        self.trace = trace
        off, ids = trace.off.tolist(), trace.ids.tolist()
        self._requests: list[list[int]] = [ids[a:b] for a, b in pairwise(off)]
        session = trace.session.tolist() if trace.names_sessions else [None] * len(self._requests)
        self._views = [
            RequestView(
                request_id=str(i),
                num_prompt_tokens=tokens,
                session_id=None if name is None else str(name),
                arrival=arrival,
            )
            for i, (tokens, name, arrival) in enumerate(
                zip(trace.prompt_tokens.tolist(), session, trace.arrival.tolist(), strict=True)
            )
        ]

    def engine(self, capacity: int) -> EngineView:
        """The view of the engine that a policy is built with."""
        return EngineView(
            block_size=self.trace.block_size,
            num_blocks=capacity,
            max_model_len=max(map(len, self._requests)) * self.trace.block_size,
            features=frozenset({Feature.PREFIX_CACHING}),
            host="trace",
        )

    def run(
        self,
        policy: PrefixCachePolicy,
        capacity: int,
        label: str | None = None,
        step: Callable[[int], None] | None = None,
    ) -> ReplayResult:
        """Replay the trace once.

        Args:
            policy: A fresh policy object.
            capacity: Blocks of the cache, at least 1.
            label: Name in the result; the policy's own if None.
            step: Called now and then with the number of requests served since the last call.

        Raises:
            PolicyFailed: The policy raised, or returned invalid victims.
        """
        served = 0
        hits = evicted = 0
        try:
            for i, (hit, gone) in enumerate(self._serve(policy, capacity), 1):
                hits += hit
                evicted += gone
                if step is not None and i % 256 == 0:
                    step(256)
                    served = i
            policy.on_stop()
        except Exception as error:
            raise PolicyFailed(
                f"policy {policy.name} failed on {self.trace.name} at {capacity} blocks: "
                f"{type(error).__name__}: {error}"
            ) from error
        if step is not None:
            step(len(self._requests) - served)
        return ReplayResult(
            self.trace.name,
            label or policy.name,
            capacity,
            self.trace.num_references,
            hits,
            evicted,
        )

    def _serve(self, policy: PrefixCachePolicy, capacity: int) -> Iterator[tuple[int, int]]:
        facts = policy.needs
        positions, parents, views, keys, finishes = (
            fact in facts
            for fact in (
                BlockFact.POSITION,
                BlockFact.PARENT,
                BlockFact.REQUEST,
                BlockFact.KEY,
                BlockFact.FINISHED,
            )
        )
        names: list[bytes] | None = None
        if keys or finishes:
            names = [i.to_bytes(8, "little") for i in range(self.trace.num_distinct)]
        slot_of = [-1] * self.trace.num_distinct
        content = [-1] * capacity
        # Popped from the end: the first free slot is 0, as in a pool that was never used.
        free = list(range(capacity - 1, -1, -1))
        depths = list(range(max(map(len, self._requests))))
        outputs = self.trace.output_tokens.tolist()
        for request, view, output in zip(self._requests, self._views, outputs, strict=True):
            blocks = request if len(request) <= capacity else request[:capacity]
            if not blocks:
                if finishes:
                    policy.on_finished(view, [], output)
                yield 0, 0
                continue
            slots = [slot_of[c] for c in blocks]
            if -1 in slots:
                hit = slots.index(-1)
                present = [s for s in slots if s >= 0]
            else:
                hit, present = len(slots), slots
            if present:
                policy.on_hit(present)
            gone = 0
            if len(present) < len(slots):
                gone = len(slots) - len(present) - len(free)
                if gone > 0:
                    victims = policy.victims(gone)
                    _check(victims, gone, content, present)
                    for v in victims:
                        slot_of[content[v]] = -1
                        content[v] = -1
                    policy.on_remove(victims)
                    free += reversed(victims)
                for i, s in enumerate(slots):
                    if s < 0:
                        s = free.pop()
                        slots[i] = s
                        c = blocks[i]
                        slot_of[c] = s
                        content[s] = c
            if finishes and names is not None:
                policy.on_finished(view, [names[c] for c in request], output)
            ids = slots[::-1]
            policy.on_release(
                Released(
                    ids,
                    depths[len(ids) - 1 :: -1] if positions else None,
                    [names[c] for c in reversed(blocks)] if keys and names is not None else None,
                    view if views else None,
                    [*ids[1:], -1] if parents else None,
                )
            )
            yield hit, max(gone, 0)


def _check(victims: Sequence[int], n: int, content: list[int], pinned: list[int]) -> None:
    named = set(victims)
    if len(victims) != n or len(named) != n:
        raise ValueError(f"victims({n}) returned {len(victims)} ids, {len(named)} distinct")
    if not named.isdisjoint(pinned):
        raise ValueError(f"victims({n}) named blocks in use")
    if min(named) < 0 or any(content[v] < 0 for v in named):
        raise ValueError(f"victims({n}) named blocks without content")
