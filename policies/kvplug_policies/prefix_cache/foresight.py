"""Foresight: give up the block whose best wait promises the fewest reuses per second.

An eviction order for a serving engine, not for a generic cache. When a request ends, its text is
cut into runs of blocks that have the same prospects, and each run is described by what the engine
knows about it:

- how many turns its conversation had: a request that reaches the end of what an earlier one left
  is its next turn, whether or not sessions are named;
- how often these very blocks were used before, also before their last eviction;
- how far they stand before the point where the request left the known prefix, or behind it: what
  many texts share against what this one alone said;
- how long the text is, how much of it is new, how much was generated;
- the pause since the conversation's last turn, and how many requests its session made;
- whether it is the end of the text, and the priority.

From those features `ReuseModel` learns, while serving, when such blocks are used again and how
often they never are, evicted or not. A run's worth is the best rate of reuse any further wait for
it offers. It falls and rises with age: a conversation is worth more at the time its next turn is
due than right after its last, and a run that will hardly be used again goes first even though it is
the newest: it passes the cache by. Only leaves of the prefix tree are given up, as in `tree`,
since a block without the blocks before it is of no use.

Nothing is learned offline, and nothing is kept but a bounded memory of past blocks. Without
sessions, requests, keys or parents it learns from what remains; with nothing learned it is LRU
among leaves.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from math import log2
from typing import cast

from pydantic import Field

from kvplug.contract import (
    BlockFact,
    EngineView,
    Feature,
    PolicyOptions,
    PrefixCachePolicy,
    Released,
    RequestView,
)
from kvplug_policies.reuse_model import ReuseModel

_TURNS, _USES, _LENGTH, _NEW, _PLACE, _OUTPUT, _PAUSE, _SESSION, _TAIL, _PRIORITY = range(10)
_SIZES = (8, 12, 40, 30, 19, 90, 26, 14, 4, 9)
_MANY_USES = 45
_FARTHEST = 9
_REFRESH = 64


def steps(value: float, per_octave: float, highest: int) -> int:
    """``value`` on a logarithmic scale, rounded: 0 for 0, at most ``highest``."""
    return min(round(per_octave * log2(value + 1)), highest)


class Text:
    """What is remembered of a request whose blocks are: its turn, length and time."""

    __slots__ = ("arrival", "length", "turn")

    def __init__(self, arrival: float, length: int, turn: int):
        self.arrival = arrival
        self.length = length
        self.turn = turn


class Run:
    """Consecutive blocks of one text with the same prospects.

    Attributes:
        text: The request they were last part of.
        kind: Their features, as the model numbers them.
        uses: Requests that used them so far, at most `_MANY_USES`.
        serial: Order of creation, tail of a text before its head.
        bin: Age bin they have reached.
        awaited: Blocks of the run that are remembered and were not used again.
        blocks: Ids that were let go, deepest first; those not in the run any more are skipped.
        held: Candidates among them.
        worth: Index its entry in the heap was made with.
        parked: Whether its deepest candidate has a cached child, so that none may go.
    """

    __slots__ = (
        "awaited",
        "bin",
        "blocks",
        "held",
        "kind",
        "parked",
        "serial",
        "text",
        "uses",
        "worth",
    )

    def __init__(self, text: Text, kind: int, uses: int, serial: int, awaited: int):
        self.text = text
        self.kind = kind
        self.uses = uses
        self.serial = serial
        self.bin = 0
        self.awaited = awaited
        self.blocks: list[int] = []
        self.held = 0
        self.worth = 0.0
        self.parked = False


class Foresight(PrefixCachePolicy):
    """Least expected reuse per second of waiting, leaves first.

    O(log n) per run of blocks, O(1) per block; about 400 bytes per cached or remembered block.
    """

    name = "foresight"
    changes = "which cached block is evicted first; outputs stay the same"
    requires = frozenset({Feature.PREFIX_CACHING})
    needs = frozenset({BlockFact.REQUEST, BlockFact.KEY, BlockFact.PARENT, BlockFact.FINISHED})
    paper = "ours: Cox hazards of reuse, learned online, ranked by Gittins index over prefix leaves"

    class Options(PolicyOptions):
        """Knobs of `Foresight`."""

        memory: int = Field(
            1 << 19,
            ge=1,
            le=1 << 27,
            description="blocks, cached or evicted, whose next use is awaited to learn from it; "
            "never fewer than twice the pool",
        )
        half_life: int = Field(
            200_000,
            ge=1_000,
            le=10**9,
            description="observations after which what was learned counts half",
        )

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        knobs = cast(Foresight.Options, options)
        self._model = ReuseModel(_SIZES, knobs.half_life)
        self._memory_limit = max(knobs.memory, 2 * engine.num_blocks)
        self._memory: OrderedDict[bytes | int, Run] = OrderedDict()
        self._sessions: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._now = 0.0
        self._timed = False
        self._told: str | None = None
        self._serial = 0
        self._ages: list[deque[Run]] = [deque() for _ in self._model.edges[:-1]]
        self._dead = 0
        self._alive = 0
        self._run_of: list[Run | None] = []
        self._parent: list[tuple[int, int]] = []
        self._children: list[int] = []
        self._life: list[int] = []
        self._lives = 0
        self._heap: list[tuple[float, int, Run]] = []
        self._parked: dict[int, Run] = {}
        self._holding: dict[int, Run] = {}
        self._until_refresh = _REFRESH

    # -- what the host tells -------------------------------------------------------------------

    def on_finished(
        self, request: RequestView, keys: Sequence[bytes], num_output_tokens: int
    ) -> None:
        self._pass_time(request)
        self._read(request, keys, num_output_tokens)
        self._told = request.request_id

    def on_release(self, released: Released) -> None:
        ids, request = released.ids, released.request
        keys: Sequence[bytes | int] = ids if released.keys is None else released.keys
        if request is None or request.request_id != self._told:
            self._pass_time(request)
            self._read(request, keys[::-1], 0)
        self._grow(max(ids, default=-1))
        memory, run_of = self._memory, self._run_of
        for block, key in zip(ids, keys, strict=True):
            run = memory.get(key)
            if run is None or run.text.arrival < 0:
                self._read(request, [key], 0)
                run = memory[key]
            before = run_of[block]
            if before is not None:
                self._leave(block, before)
            run_of[block] = run
            run.blocks.append(block)
            run.held += 1
            if run.held == 1:
                self._enter(run)
        self._link(ids, released.parents)
        self._until_refresh -= 1
        if self._until_refresh <= 0:
            self._refresh()

    def on_hit(self, ids: Sequence[int]) -> None:
        run_of = self._run_of
        for block in ids:
            if block < len(run_of):
                run = run_of[block]
                if run is not None:
                    self._leave(block, run)

    def on_remove(self, ids: Sequence[int]) -> None:
        run_of = self._run_of
        for block in ids:
            if not 0 <= block < len(run_of):
                continue
            run = run_of[block]
            if run is not None:
                self._leave(block, run)
            self._unlink(block)
            self._life[block] = self._children[block] = 0
            known = self._memory.pop(block, None)
            if known is not None:
                self._stop_waiting(known)

    def victims(self, n: int) -> list[int]:
        heap, run_of, children = self._heap, self._run_of, self._children
        chosen: list[int] = []
        taken: set[int] = set()
        relief: dict[int, int] = {}
        used: list[tuple[float, int, Run]] = []
        freed: list[tuple[float, int, Run]] = []
        at: dict[int, int] = {}
        stuck: dict[int, Run] = {}
        while len(chosen) < n:
            while heap and (heap[0][2].worth != heap[0][0] or heap[0][2].parked or not heap[0][2].held):
                heappop(heap)
            if freed and (not heap or freed[0] < heap[0]):
                entry = heappop(freed)
            elif heap:
                entry = heappop(heap)
                run = entry[2]
                worth = self._worth(run)
                if worth > run.worth:
                    run.worth = worth
                    heappush(heap, (worth, run.serial, run))
                    continue
                used.append(entry)
            else:
                break
            run = entry[2]
            ...
        return chosen
