"""Foresight: evict the block whose best wait promises the fewest reuses per second.

An eviction order for a serving engine, not for a generic cache. When a request ends, its text is
divided into runs of blocks with the same prospects, and each run is described by what the engine
knows about it:

- how many turns its conversation had: a request that reaches the end of what an earlier one left
  is its next turn, whether or not sessions are named;
- how often these very blocks were used before, also before their last eviction;
- how far they stand before the point where the request left the known prefix, or behind it: what
  many texts share or what this one alone contains;
- how long the text is, how much of it is new, how much was generated;
- the pause since the conversation's last turn, and how many requests its session made;
- whether it is the end of the text, and the priority.

From those features `NextUseModel` learns, while serving, when such blocks are used again and how
often they never are, evicted or not. A run's worth is the best rate of reuse any further wait for
it offers. It falls and rises with age: a conversation is worth more at the time its next turn is
due than right after its last, and a run that will hardly be used again goes first even though it is
the newest: it passes the cache by. Only leaves of the prefix tree are evicted, as in `tree`,
since a block without the blocks before it is of no use.

Nothing is learned offline, and nothing is kept but a bounded memory of past blocks. Without
sessions, requests, keys or parents it learns from what remains; with nothing learned it is LRU
among leaves.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import groupby, pairwise
from math import log2, sqrt

from pydantic import Field

from kvplug.contract import (
    BlockFact,
    EngineView,
    PolicyOptions,
    PrefixCachePolicy,
    Released,
    RequestView,
)
from kvplug_policies.next_use import NextUseModel

_SIZES = (8, 12, 19, 4, 40, 30, 89, 26, 13, 9)
"""Values of each feature of a run, in the order `Foresight._read` gives them."""

_MANY_USES = 45
_FARTHEST = 9
_BLOCKS_A_SESSION = 8


def steps(value: float, per_octave: float, highest: int) -> int:
    """``value`` on a logarithmic scale, rounded: 0 for 0, at most ``highest``."""
    return min(round(per_octave * log2(value + 1)), highest)


def boundaries(length: int, known: int) -> list[int]:
    """Divide a text of ``length`` blocks, ``known`` of them seen before, into runs.

    Runs double in size with their distance from the end of the known prefix, on both sides, up
    to 512 blocks away; the last block stands alone.
    """
    ends = {0, length, max(length - 1, 0)}
    for doubling in range(_FARTHEST):
        away = (1 << doubling) - 1
        ends.add(known - away)
        ends.add(known + away)
    return sorted(e for e in ends if 0 <= e <= length)


class Text:
    """Facts about a request: its arrival, its prompt in blocks, its turn."""

    __slots__ = ("arrival", "prompt", "turn")

    def __init__(self, arrival: float, prompt: int, turn: int):
        self.arrival = arrival
        self.prompt = prompt
        self.turn = turn


class Run:
    """Consecutive blocks of one text with the same expected reuse.

    Attributes:
        text: The request they were last part of.
        thing: The model's number for their features.
        uses: Requests that used them so far, at most `_MANY_USES`.
        serial: Order of creation; the head of a text comes after its end.
        age: Age bin they have reached.
        awaited: Blocks of the run that are remembered and were not used again.
        blocks: Ids that were released, deepest last; those no longer in the run are skipped.
        candidates: Number of candidates among them.
        worth: Index at its age; what its entry in the heap was made with.
        doubtful: True if the worth must be recomputed.
        parked: Whether its deepest candidate has a cached child, so that none may go.
    """

    __slots__ = (
        "age",
        "awaited",
        "blocks",
        "candidates",
        "doubtful",
        "parked",
        "serial",
        "text",
        "thing",
        "uses",
        "worth",
    )

    def __init__(self, text: Text, thing: int, uses: int, serial: int, awaited: int):
        self.text = text
        self.thing = thing
        self.uses = uses
        self.serial = serial
        self.age = 0
        self.awaited = awaited
        self.blocks: list[int] = []
        self.candidates = 0
        self.worth = 0.0
        self.doubtful = False
        self.parked = False


Entry = tuple[float, int, Run]


class Foresight(PrefixCachePolicy):
    """Least expected reuse per second of waiting, leaves first.

    O(log n) per run of blocks and O(1) per block, amortized; about 500 bytes per cached or
    remembered block.
    """

    name = "foresight"
    needs = frozenset({BlockFact.REQUEST, BlockFact.KEY, BlockFact.PARENT, BlockFact.FINISHED})
    paper = "ours: hazards of reuse learned online, Gittins index, leaves of the prefix tree first"

    class Options(PolicyOptions):
        """Options of `Foresight`."""

        memory: int = Field(
            1 << 19,
            ge=1,
            le=1 << 27,
            description="blocks, cached or evicted, tracked until their next use to learn from it; "
            "never fewer than twice the pool",
        )
        half_life: int = Field(
            200_000,
            ge=1_000,
            le=10**9,
            description="observations after which earlier ones count half",
        )

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self._block_size = engine.block_size
        self._model = NextUseModel(_SIZES, self.options.half_life)
        self._limit = max(self.options.memory, 2 * engine.num_blocks)
        self._memory: OrderedDict[bytes | int, Run] = OrderedDict()
        self._sessions: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._now = 0.0
        self._timed = False
        self._finished: str | None = None
        self._serial = 0
        self._ages: list[deque[Run]] = [deque() for _ in self._model.edges[1:]]
        self._buried = 0
        self._heap: list[Entry] = []
        self._doubtful: list[Run] = []
        self._parked: dict[int, Run] = {}
        self._holding: dict[int, Run] = {}
        # By block id.
        self._run_of: list[Run | None] = []
        self._parent: list[int] = []
        self._parent_life: list[int] = []
        self._children: list[int] = []
        self._life: list[int] = []
        self._lives = 0

    # -- what the host reports -----------------------------------------------------------------

    def on_finished(
        self, request: RequestView, keys: Sequence[bytes], num_output_tokens: int
    ) -> None:
        self._pass_time(request)
        self._read(request, keys, num_output_tokens)
        self._finished = request.request_id

    def on_release(self, released: Released) -> None:
        ids, request = released.ids, released.request
        keys: Sequence[bytes | int] = ids if released.keys is None else released.keys
        if request is None or request.request_id != self._finished:
            self._pass_time(request)
            self._read(request, keys[::-1], 0)
        self._grow(max(ids, default=-1))
        self._link(ids, released.parents)
        memory, run_of = self._memory, self._run_of
        for block, key in zip(reversed(ids), reversed(keys), strict=True):
            run = memory.get(key)
            if run is None:
                self._read(request, [key], 0)
                run = memory[key]
            before = run_of[block]
            if before is not None:
                self._leave(block, before)
            run_of[block] = run
            run.blocks.append(block)
            run.candidates += 1
            if run.candidates == 1:
                self._holding[run.serial] = run
                self._doubt(run)
            elif run.parked:
                self._unpark(run)

    def on_hit(self, ids: Sequence[int]) -> None:
        run_of = self._run_of
        for block in ids:
            if block < len(run_of):
                run = run_of[block]
                if run is not None:
                    self._leave(block, run)

    def on_remove(self, ids: Sequence[int]) -> None:
        run_of, memory = self._run_of, self._memory
        for block in ids:
            if block >= len(run_of):
                continue
            run = run_of[block]
            if run is not None:
                self._leave(block, run)
            self._unlink(block)
            self._life[block] = self._children[block] = 0
            known = memory.pop(block, None)
            if known is not None:
                self._forget_one(known)

    def victims(self, n: int) -> list[int]:
        self._appraise()
        heap = self._heap
        plan = _Plan()
        back: list[Entry] = []
        while len(plan.chosen) < n:
            while heap and _stale(heap[0]):
                heappop(heap)
            if heap and not (plan.freed and plan.freed[0] < heap[0]):
                entry = heappop(heap)
                if not self._park_if_blocked(entry[2], plan):
                    back.append(entry)
                    self._choose(entry[2], n, plan)
            elif plan.freed:
                self._choose(heappop(plan.freed)[2], n, plan)
            elif not self._force(plan):
                break
        for entry in back:
            heappush(heap, entry)
        return plan.chosen

    # -- which go together ---------------------------------------------------------------------

    def _choose(self, run: Run, n: int, plan: _Plan) -> None:
        """Choose from the deep end of a run until one is blocked or another run comes free."""
        blocks, run_of = run.blocks, self._run_of
        at = plan.at.get(run.serial, len(blocks) - 1)
        while at >= 0 and len(plan.chosen) < n:
            block = blocks[at]
            if run_of[block] is run and block not in plan.taken:
                if self._children[block] > plan.relief.get(block, 0):
                    plan.blocked[run.serial] = run
                    break
                if self._take(block, plan):
                    heappush(plan.freed, (run.worth, run.serial, run))
                    at -= 1
                    break
            at -= 1
        plan.at[run.serial] = at

    def _take(self, block: int, plan: _Plan) -> bool:
        """Choose a block; whether that freed the run of its parent."""
        plan.chosen.append(block)
        plan.taken.add(block)
        parent = self._parent[block]
        if parent < 0 or self._life[parent] != self._parent_life[block]:
            return False
        relief = plan.relief[parent] = plan.relief.get(parent, 0) + 1
        if self._children[parent] > relief or parent in plan.taken:
            return False
        run = self._run_of[parent]
        if run is None or not (run.parked or run.serial in plan.blocked):
            return False
        plan.blocked.pop(run.serial, None)
        heappush(plan.freed, (run.worth, run.serial, run))
        return True

    def _park_if_blocked(self, run: Run, plan: _Plan) -> bool:
        """Take a run out of the order until its deepest candidate has no cached child."""
        blocks, run_of = run.blocks, self._run_of
        while run_of[blocks[-1]] is not run:
            blocks.pop()
        if not self._children[blocks[-1]] or plan.relief.get(blocks[-1]):
            return False
        run.parked = True
        self._parked[run.serial] = run
        return True

    def _force(self, plan: _Plan) -> bool:
        """Choose a block with a cached child, which only happens where that child is in use."""
        for run in sorted((*self._parked.values(), *plan.blocked.values()), key=_by_serial):
            for block in reversed(run.blocks):
                if self._run_of[block] is run and block not in plan.taken:
                    plan.blocked.pop(run.serial, None)
                    self._take(block, plan)
                    heappush(plan.freed, (run.worth, run.serial, run))
                    return True
        return False

    def _unpark(self, run: Run) -> None:
        run.parked = False
        del self._parked[run.serial]
        heappush(self._heap, (run.worth, run.serial, run))

    def _link(self, ids: Sequence[int], parents: Sequence[int] | None) -> None:
        """Note the parent of each block; without that fact, the next block released with it."""
        if parents is None:
            parents = [*ids[1:], -1]
        self._grow(max(parents, default=-1))
        life, children = self._life, self._children
        for block in ids:
            if not life[block]:
                self._lives += 1
                life[block] = self._lives
        for block, parent in zip(ids, parents, strict=True):
            if parent == block:
                parent = -1
            if parent >= 0 and not life[parent]:
                self._lives += 1
                life[parent] = self._lives
            if parent != self._parent[block] or (
                parent >= 0 and life[parent] != self._parent_life[block]
            ):
                self._unlink(block)
                if parent >= 0:
                    self._parent[block] = parent
                    self._parent_life[block] = life[parent]
                    children[parent] += 1

    def _unlink(self, block: int) -> None:
        parent = self._parent[block]
        self._parent[block] = -1
        if parent >= 0 and self._life[parent] == self._parent_life[block]:
            self._children[parent] -= 1
            if not self._children[parent]:
                run = self._run_of[parent]
                if run is not None and run.parked:
                    self._unpark(run)

    def _leave(self, block: int, run: Run) -> None:
        """Take a block out of the candidates."""
        self._run_of[block] = None
        run.candidates -= 1
        if run.parked:
            self._unpark(run)
        if not run.candidates:
            del self._holding[run.serial]
            if not run.awaited:
                self._bury(run)

    def _grow(self, block: int) -> None:
        more = block + 1 - len(self._run_of)
        if more > 0:
            self._run_of += [None] * more
            self._parent += [-1] * more
            self._parent_life += [0] * more
            self._children += [0] * more
            self._life += [0] * more

    # -- what they are worth -------------------------------------------------------------------

    def _doubt(self, run: Run) -> None:
        if not run.doubtful:
            run.doubtful = True
            self._doubtful.append(run)

    def _appraise(self) -> None:
        """Find the worth of candidates that are new or have reached another age."""
        doubtful = [run for run in self._doubtful if run.candidates]
        for start in range(0, len(doubtful), 1024):
            runs = doubtful[start : start + 1024]
            worth = self._model.indices([r.thing for r in runs], [r.age for r in runs])
            for run, value in zip(runs, worth.tolist(), strict=True):
                run.worth = value
                if not run.parked:
                    heappush(self._heap, (value, run.serial, run))
        for run in self._doubtful:
            run.doubtful = False
        self._doubtful.clear()
        if len(self._heap) > 4 * len(self._holding) + 1024:
            self._heap = [(r.worth, r.serial, r) for r in self._holding.values() if not r.parked]
            heapify(self._heap)

    # -- what is learned -----------------------------------------------------------------------

    def _pass_time(self, request: RequestView | None) -> None:
        """Set the clock: by arrivals if there are any, else by releases."""
        if request is not None:
            if not self._timed:
                self._timed = True
                self._now = request.arrival
            self._now = max(self._now, request.arrival)
        elif not self._timed:
            self._now += 1
        edges, model, now = self._model.edges, self._model, self._now
        for age, runs in enumerate(self._ages[:-1]):
            end = edges[age + 1]
            while runs and runs[0].text.arrival + end <= now:
                run = runs.popleft()
                if run.awaited:
                    model.waited(run.thing, age, end - edges[age], False, sqrt(run.awaited))
                elif not run.candidates:
                    self._buried -= 1
                    continue
                run.age = age + 1
                self._ages[age + 1].append(run)
                if run.candidates:
                    self._doubt(run)
        if self._buried > len(self._memory) + 1024:
            self._sweep()

    def _read(self, request: RequestView | None, keys: Sequence[bytes | int], output: int) -> None:
        """Learn from what a text reused, and await the next use of all its blocks."""
        if not keys:
            return
        memory = self._memory
        now = self._now if request is None else min(request.arrival, self._now)
        before = [memory.get(key) for key in keys]
        known = before.index(None) if None in before else len(keys)
        turn, pause = 0, -1.0
        if known:
            last = before[known - 1]
            assert last is not None
            if known >= last.text.prompt - 1:
                turn, pause = last.text.turn + 1, max(now - last.text.arrival, 0.0)
        asked, since = self._session(request, now)
        if pause < 0:
            pause = since
        self._reused(before, now)
        prompt, priority = len(keys), 0
        if request is not None:
            prompt = min(prompt, request.num_prompt_tokens // max(self._block_size, 1))
            priority = min(max(request.priority, -4), 4)
        text = Text(now, prompt, turn)
        whole = (
            steps(len(keys), 2, 39),
            steps(len(keys) - known, 1.5, 29),
            output // 2 if output < 128 else 64 + steps(output / 128 - 1, 3, 24),
            0 if pause < 0 else 1 + steps(4 * pause, 1.5, 24),
            steps(asked, 1.5, 12),
            priority + 4,
        )
        # Last block first, as blocks are released: of equals the later block is evicted first.
        for start, end, uses in reversed(_runs(before, known)):
            ahead = known - start
            place = (
                _FARTHEST - min(ahead.bit_length(), _FARTHEST)
                if ahead > 0
                else _FARTHEST + min((1 - ahead).bit_length(), _FARTHEST)
            )
            part = (min(turn, 7), steps(uses, 2, 11), place, 2 * (end == len(keys)) + (ahead <= 0))
            self._serial += 1
            thing = self._model.describe(part + whole)
            run = Run(text, thing, min(uses + 1, _MANY_USES), self._serial, end - start)
            for key in keys[start:end]:
                memory[key] = run
                memory.move_to_end(key)
            self._ages[0].append(run)
        while len(memory) > self._limit:
            self._forget_one(memory.popitem(last=False)[1])

    def _reused(self, before: Sequence[Run | None], now: float) -> None:
        """Blocks remembered in these runs are used again."""
        edges, model = self._model.edges, self._model
        for run, same in groupby(before):
            if run is None:
                continue
            count = len(list(same))
            left = max(run.awaited - count, 0)
            weight = sqrt(run.awaited) - sqrt(left) if left else sqrt(count)
            spent = min(max(now - run.text.arrival, 0.0), edges[run.age + 1]) - edges[run.age]
            model.waited(run.thing, run.age, max(spent, 0.0), True, weight)
            run.awaited = left
            if not left and not run.candidates:
                self._bury(run)

    def _session(self, request: RequestView | None, now: float) -> tuple[int, float]:
        """Requests the session made before, and seconds since the last; 0 and -1 if none."""
        if request is None or request.session_id is None:
            return 0, -1.0
        asked, last = self._sessions.get(request.session_id, (0, now + 1))
        self._sessions[request.session_id] = (asked + 1, now)
        self._sessions.move_to_end(request.session_id)
        if len(self._sessions) > self._limit // _BLOCKS_A_SESSION:
            self._sessions.popitem(last=False)
        return asked, max(now - last, -1.0)

    def _forget_one(self, run: Run) -> None:
        """The next use of one of its blocks is not awaited any more."""
        run.awaited -= 1
        if not run.awaited and not run.candidates:
            self._bury(run)

    def _bury(self, run: Run) -> None:
        """Nothing depends on a run any more; it leaves its queue of ages when it is met there."""
        self._model.forget(run.thing)
        self._buried += 1

    def _sweep(self) -> None:
        """Drop the buried from the queues of ages."""
        for age, runs in enumerate(self._ages):
            self._ages[age] = deque(r for r in runs if r.awaited or r.candidates)
        for run in self._doubtful:
            run.doubtful = run.candidates > 0
        self._doubtful = [run for run in self._doubtful if run.candidates]
        self._buried = 0


@dataclass
class _Plan:
    """Victims that `Foresight.victims` has chosen so far, treated as evicted.

    Attributes:
        chosen: Blocks, first victim first.
        taken: The same.
        relief: Children chosen, by parent.
        freed: Runs that may go on because a child of theirs was chosen, in order.
        at: Where to go on in a run, by serial.
        blocked: Runs met whose next block has a cached child, by serial.
    """

    chosen: list[int] = field(default_factory=list)
    taken: set[int] = field(default_factory=set)
    relief: dict[int, int] = field(default_factory=dict)
    freed: list[Entry] = field(default_factory=list)
    at: dict[int, int] = field(default_factory=dict)
    blocked: dict[int, Run] = field(default_factory=dict)


def _stale(entry: Entry) -> bool:
    worth, _, run = entry
    return run.worth != worth or run.parked or not run.candidates


def _by_serial(run: Run) -> int:
    return run.serial


def _runs(before: Sequence[Run | None], known: int) -> list[tuple[int, int, int]]:
    """Start, end and earlier uses of each run of a text whose blocks were last in these runs."""
    uses = [0 if run is None else run.uses for run in before]
    found: list[tuple[int, int, int]] = []
    for start, end in pairwise(boundaries(len(before), known)):
        for times, same in groupby(uses[start:end]):
            stop = start + len(list(same))
            found.append((start, stop, times))
            start = stop
    return found
