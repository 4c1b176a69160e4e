"""The books of a deployment's tiers: what is where, what is on its way, what may be done next.

Runs in the scheduler, or in the simulator, without torch and without an engine. It decides nothing
that a policy decides: a tier's order (a prefix-cache policy) names which chunks give way, the
lifecycle policy says what is stored and moved. It makes sure that nothing impossible is ordered:
only what is there moves, one move a chunk at a time, within every tier's bytes, and nothing that is
being loaded goes. A policy that fails is retired; the order that chunks were used in, or storing
all that leaves in the fastest tier, takes its place.
"""

from __future__ import annotations

import math
import operator
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from kvplug.containment import ContainedPolicy, PolicyFailure
from kvplug.contract import (
    Action,
    BlockFact,
    Due,
    EngineView,
    Found,
    Leaving,
    LifecyclePolicy,
    Move,
    PrefixCachePolicy,
    Pressure,
    Released,
    RequestView,
    TierView,
)
from kvplug.counts import Causes
from kvplug.tiers import cost
from kvplug.tiers.admission import Admission
from kvplug.tiers.ghost import GhostList
from kvplug.tiers.links import Health, Link
from kvplug.tiers.returns import WATCHED, Returns
from kvplug.tiers.sessions import Sessions

ENTRIES = 1 << 20
"""Chunks that the book of a tier without a limit of bytes keeps."""

DECLINED = 1 << 16
"""Chunks remembered as not worth storing, so that they are not asked about at every step."""

SHOWN = 4096
"""Candidates of a tier that a plan shows at most."""

FULL = "full"
"""Cause for which a tier does not take what its books have room for."""

REGAINED = 16
"""Bytes stored, for each by which a tier that was full counts as larger again."""

DOWN = frozenset({Action.DEMOTE, Action.COPY})


def order_engine(engine: EngineView, capacity: int, chunk: int) -> EngineView:
    """The view that a tier's order is built with: blocks are chunks, the pool is the tier.

    Args:
        engine: The engine.
        capacity: Bytes of the tier; 0 for no limit.
        chunk: Bytes of a chunk there, estimated.
    """
    chunks = capacity // max(1, chunk) if capacity else ENTRIES
    return replace(engine, num_blocks=max(1, min(chunks, ENTRIES)))


@dataclass
class TierBook:
    """A tier as the books know it.

    Attributes:
        name: Its name in the deployment.
        capacity: Bytes it may hold; 0 for no limit here.
        exact: False if its codec changes KV.
        shared: True if other engines see it.
        durable: True if it outlives the process.
        order: Says which chunk goes first; blocks are chunks, numbered by the books.
        entries: Chunks that the book keeps at most.
    """

    name: str
    capacity: int
    exact: bool
    shared: bool
    durable: bool
    order: PrefixCachePolicy
    entries: int = ENTRIES


@dataclass(slots=True)
class _Copy:
    """A chunk in a tier: its number there, bytes, last use, and whether it was ever read."""

    slot: int
    size: int
    at: float
    read: bool = False
    going: bool = False


@dataclass(slots=True)
class _Coming:
    """A chunk on its way into a tier: from the pool if there is no source."""

    target: int
    size: int
    source: int | None
    action: Action | None


@dataclass(slots=True)
class _Chunk:
    """What is known of a chunk that is in a tier, or on its way into one."""

    tokens: int = 0
    start: int = 0
    parent: bytes = b""
    pins: int = 0
    copies: dict[int, _Copy] = field(default_factory=dict)
    coming: _Coming | None = None


class _Shelf:
    """One tier's copies, its order and its lines.

    Args:
        number: Its place among the tiers, the fastest first.
        book: The tier.
        info: Tells a chunk's index in its text, and its parent.
    """

    def __init__(self, number: int, book: TierBook, info: Callable[[bytes], tuple[int, bytes]]):
        self.number = number
        self.book = book
        self.read, self.write = Link(), Link()
        self.health = Health()
        self.used = self.reserved = self.going = 0
        self.limit = book.capacity
        self.counts: Counter[str] = Counter()
        self.order = ContainedPolicy(book.order)
        self.facts: frozenset[BlockFact] = frozenset()
        self.retired = False
        self._info = info
        self.keys: OrderedDict[bytes, _Copy] = OrderedDict()
        """Copies, the one used longest ago first."""
        self.of_slot: dict[int, bytes] = {}
        self._free: list[int] = []
        self._released: list[bytes] = []
        try:
            self.facts = self.order.run(_facts, book.order)
        except PolicyFailure as failure:
            self._retire(failure)

    @property
    def room(self) -> int:
        """Bytes that may still be taken; an unlimited tier has as much as anything needs."""
        if not self.book.capacity:
            return 1 << 62
        return self.limit - self.used - self.reserved

    def full(self, size: int) -> None:
        """Take note that ``size`` more bytes were not taken, though the books have room for them.

        Some of a tier can be full before all of it is, and would stay so if nothing went: the part
        of a worker with more layers than others, or a medium that others fill. So it counts as no
        larger than what it holds, until more is stored again.
        """
        if self.book.capacity:
            self.limit = min(self.limit, max(self.used, size))

    def took(self, size: int) -> None:
        """Take note that ``size`` bytes were stored."""
        self.limit = min(self.book.capacity, self.limit + size // REGAINED)

    def view(self, now: float) -> TierView:
        book, down = self.book, self.health.down(now)
        return TierView(
            book.name,
            max(0, self.used + self.reserved - self.going),
            self.limit,
            book.exact,
            book.shared,
            book.durable,
            self.read.view(down),
            self.write.view(down),
        )

    # -- copies --------------------------------------------------------------------------------

    def add(self, key: bytes, size: int, at: float) -> _Copy:
        slot = self._free.pop() if self._free else len(self.of_slot)
        self.of_slot[slot] = key
        copy = self.keys[key] = _Copy(slot, size, at)
        self.used += size
        self._released.append(key)
        return copy

    def drop(self, key: bytes) -> _Copy:
        copy = self.keys.pop(key)
        self.used -= copy.size
        if copy.going:
            self.going -= copy.size
        else:
            self._tell("on_remove", [copy.slot])
        del self.of_slot[copy.slot]
        self._free.append(copy.slot)
        return copy

    def leave(self, keys: Sequence[bytes]) -> None:
        """Take copies out of the order: they stay readable until they arrived elsewhere."""
        for key in keys:
            copy = self.keys[key]
            copy.going = True
            self.going += copy.size
        self._tell("on_remove", [self.keys[key].slot for key in keys])

    def stay(self, key: bytes) -> None:
        """Put a copy back into the order: its move failed."""
        copy = self.keys[key]
        if copy.going:
            copy.going = False
            self.going -= copy.size
            self._released.append(key)

    def touch(self, keys: Sequence[bytes], at: float) -> None:
        """Report that a text's chunks were used, given in text order."""
        slots = []
        for key in keys:
            copy = self.keys[key]
            copy.at = at
            self.keys.move_to_end(key)
            if not copy.going:
                slots.append(copy.slot)
        if slots:
            self._tell("on_hit", slots)
            self._released += [key for key in reversed(keys) if not self.keys[key].going]

    # -- the order -----------------------------------------------------------------------------

    def victims(self, size: int, busy: Callable[[bytes], bool]) -> list[bytes]:
        """Chunks that go first, of at least ``size`` bytes together where there are as many."""
        # A policy may want to see more than there is.
        size = min(size, self.used)
        if not self.keys or size <= 0:
            return []
        mean = max(1, self.used // len(self.keys))
        found: list[bytes] = []
        wanted, candidates = -(-size // mean), None
        while True:
            if self.retired or candidates is None or len(candidates) < wanted:
                candidates = self._first(wanted)
            found, total = [], 0
            for key in candidates:
                if busy(key):
                    continue
                found.append(key)
                total += self.keys[key].size
                if total >= size:
                    return found
            if len(candidates) < wanted or wanted >= SHOWN:
                return found
            wanted = min(2 * wanted, SHOWN)

    def _first(self, n: int) -> list[bytes]:
        """The first ``n`` in the order, or all there are."""
        if not self.retired:
            self._flush()
        n = min(n, sum(1 for _ in islice(self._staying(), n)))
        if not self.retired and n:
            try:
                slots: list[int] = self.order.run(self._ask, n)
                return [self.of_slot[slot] for slot in slots]
            except PolicyFailure as failure:
                self._retire(failure)
        return list(islice(self._staying(), n))

    def _staying(self) -> Iterable[bytes]:
        return (key for key, copy in self.keys.items() if not copy.going)

    def _ask(self, n: int) -> list[int]:
        """Ask the order, and check its answer: distinct copies that are there."""
        victims = self.book.order.victims(n)
        slots = [operator.index(slot) for slot in islice(victims, n + 1)]
        if len(slots) != n or len(set(slots)) != n:
            raise ValueError(f"victims({n}) returned {len(slots)} ids, {len(set(slots))} distinct")
        for slot in slots:
            if self.keys[self.of_slot[slot]].going:
                raise KeyError(slot)
        return slots

    def _flush(self) -> None:
        """Report new copies, in one batch."""
        pending, self._released = self._released, []
        self._release(pending)

    def _release(self, keys: Sequence[bytes]) -> None:
        if self.retired or not keys:
            return
        # A chunk that came, or came back, and went since is not there to be released.
        here = [key for key in dict.fromkeys(keys) if key in self.keys and not self.keys[key].going]
        if not here:
            return
        start = 0
        for end in range(1, len(here) + 1):
            # A batch is one text's, last chunk first: each is the next one's child.
            if end == len(here) or self._info(here[end - 1])[1] != here[end]:
                self._report("on_release", self._batch(here[start:end]))
                start = end

    def _batch(self, keys: list[bytes]) -> Released:
        facts, info = self.facts, self._info
        parents: list[int] | None = None
        if BlockFact.PARENT in facts:
            slots = (self.keys.get(info(key)[1]) for key in keys)
            parents = [-1 if copy is None else copy.slot for copy in slots]
        return Released(
            [self.keys[key].slot for key in keys],
            [info(key)[0] for key in keys] if BlockFact.POSITION in facts else None,
            keys if BlockFact.KEY in facts else None,
            None,
            parents,
        )

    def _tell(self, verb: str, slots: list[int]) -> None:
        if not self.retired and slots:
            self._flush()
            self._report(verb, slots)

    def _report(self, verb: str, what: Any) -> None:
        if self.retired:
            return
        try:
            self.order.call(verb, what)
        except PolicyFailure as failure:
            self._retire(failure)

    def _retire(self, failure: PolicyFailure) -> None:
        self.retired = True
        self._released.clear()
        self.counts["order_errors"] += 1
        self.order.log("failed and is retired; chunks leave in the order of their use", failure)


class Hierarchy:
    """The books of all tiers of a deployment, fastest first.

    A move is a copy: a worker that is told to demote, copy or promote reads the source and stores
    in the target, no more. The source is dropped by a `Move` of its own, after the target's `put`
    was reported. Drops are to be carried out before the stores that are ordered after them: their
    bytes are counted as free from then on.

    Args:
        books: The tiers.
        lifecycle: Decides what is stored and moved.
        clock: Seconds; never goes back.
        ghosts: Chunks remembered after they went.

    Attributes:
        lifecycle: As given.
        prefill: Speed of prefill, as measured.
        ghosts: The ghost list.
        fallen_back: Causes for which policies were retired, by what they are.
    """

    def __init__(
        self,
        books: Sequence[TierBook],
        lifecycle: LifecyclePolicy,
        clock: Callable[[], float] = time.monotonic,
        ghosts: GhostList | None = None,
    ):
        names = [book.name for book in books]
        if not books or len(set(names)) != len(names):
            raise ValueError(f"tiers need names of their own, got {names}")
        self.lifecycle = lifecycle
        self.prefill = cost.Prefill()
        self.ghosts = ghosts if ghosts is not None else GhostList()
        self._clock = clock
        self._contained = ContainedPolicy(lifecycle)
        self._retired = False
        self._shelves = [_Shelf(i, book, self._info) for i, book in enumerate(books)]
        self._of_name = {shelf.book.name: shelf for shelf in self._shelves}
        self._chunks: dict[bytes, _Chunk] = {}
        self._declined: OrderedDict[bytes, None] = OrderedDict()
        self._returns: Returns | None = None
        self._admission: Admission | None = None
        self._sessions = Sessions()
        self._orders: list[Move] = []
        self._counts: Counter[str] = Counter()
        self._seconds = {"loading_seconds": 0.0, "loading_saved_seconds": 0.0}
        self._causes = Causes()

    # -- on the way out ------------------------------------------------------------------------

    def leaving(self, chunks: Sequence[Leaving], size: int) -> list[tuple[bytes, str]]:
        """Choose what is stored of chunks that are about to be evicted from the pool.

        A chunk that is in a tier or on its way into one is not stored again; one that was turned
        away is not asked about again until a request asks for it.

        Args:
            chunks: The chunks, first to be evicted first.
            size: Bytes of a chunk in a tier, estimated.

        Returns:
            Keys and names of tiers, in the order given; each counts as on its way until `put` or
            `lost` says what became of it.
        """
        now = self._clock()
        fresh, again, held = [], set(), []
        for chunk in chunks:
            if chunk.key in self._chunks:
                held.append(chunk)
            elif chunk.key not in self._declined and chunk.key not in again:
                again.add(chunk.key)
                fresh.append(chunk)
        self._left_again(held, now)
        if not fresh:
            return []
        fresh = self._estimated(fresh, size)
        stored = []
        for chunk, name in zip(fresh, self._choose(fresh, now), strict=True):
            shelf = None if name is None else self._room_for(self._of_name[name], size, now)
            if shelf is None:
                self._decline(chunk.key)
                continue
            entry = _Chunk(chunk.tokens, chunk.start, chunk.parent)
            entry.coming = _Coming(shelf.number, size, None, None)
            self._chunks[chunk.key] = entry
            shelf.reserved += size
            shelf.counts["ordered"] += 1
            stored.append((chunk.key, shelf.book.name))
        return stored

    def keep(self, tier: str, chunks: Sequence[Leaving], size: int) -> list[bytes]:
        """Order chunks that stay in the pool to be stored in one tier as well: a checkpoint.

        Nothing there gives way to them but what its order names, and no policy is asked.

        Args:
            tier: Its name.
            chunks: The chunks.
            size: Bytes of a chunk in a tier, estimated.

        Returns:
            Keys of those to store now; they count as on their way. The others are there already,
            are on their way somewhere, or do not fit.
        """
        shelf = self._of_name[tier]
        if shelf.health.down(self._clock()):
            return []
        kept = []
        for chunk in chunks:
            entry = self._chunks.get(chunk.key)
            if entry is not None and (entry.coming or shelf.number in entry.copies):
                continue
            if not self._make_room(shelf, size):
                break
            # What made room may have been all that was known of it.
            entry = self._chunks.get(chunk.key)
            if entry is None:
                entry = _Chunk(chunk.tokens, chunk.start, chunk.parent)
                self._chunks[chunk.key] = entry
            entry.coming = _Coming(shelf.number, size, None, None)
            shelf.reserved += size
            shelf.counts["kept"] += 1
            kept.append(chunk.key)
        return kept

    def put(self, tier: str, key: bytes, size: int) -> None:
        """Take note that a tier holds a chunk: it was stored there, or found there.

        Args:
            tier: Its name.
            key: The chunk's key.
            size: Bytes it takes.
        """
        shelf, now = self._of_name[tier], self._clock()
        chunk = self._chunks.setdefault(key, _Chunk())
        coming = chunk.coming
        source = None
        if coming is not None and coming.target == shelf.number:
            chunk.coming = None
            shelf.reserved -= coming.size
            shelf.counts["stored"] += 1
            shelf.counts["stored_bytes"] += size
            shelf.took(size)
            source = coming
        if shelf.number in chunk.copies:
            self._forget(shelf, key)
        chunk.copies[shelf.number] = shelf.add(key, size, now)
        self._declined.pop(key, None)
        shelf.health.worked()
        if source is not None and source.source is not None:
            self._arrived(key, chunk, source)
        # A payload may be larger than estimated, and a folder may hold more than its quota allows.
        self._make_room(shelf, 0)
        limit = shelf.book.entries
        if len(shelf.keys) > limit:
            self._drop(shelf, shelf.victims(1, self._busy)[:1], "displaced")

    def lost(self, tier: str, key: bytes, cause: str) -> None:
        """Take note that a tier does not hold a chunk: it was not stored, or is not there any more.

        Args:
            tier: Its name.
            key: The chunk's key.
            cause: A few words, the same for the same cause; counted.
        """
        shelf, chunk = self._of_name[tier], self._chunks.get(key)
        if chunk is None:
            return
        coming = chunk.coming
        if coming is not None and coming.target == shelf.number:
            self._cancel(key, chunk)
            shelf.counts["failed"] += 1
            if cause == FULL:
                shelf.full(coming.size)
        elif shelf.number in chunk.copies:
            self._forget(shelf, key)
            shelf.counts["lost"] += 1
        else:
            return
        self._causes.add(f"{tier}: {cause}")
        self._bury(key, chunk, held=False)

    # -- requests ------------------------------------------------------------------------------

    def holders(self, keys: Sequence[bytes]) -> list[str | None]:
        """Name the fastest tier that holds each chunk and may be asked; None for no tier."""
        now = self._clock()
        up = [not shelf.health.down(now) for shelf in self._shelves]
        found: list[str | None] = []
        for key in keys:
            chunk = self._chunks.get(key)
            best = None
            if chunk is not None and chunk.copies:
                best = min((i for i in chunk.copies if up[i]), default=None)
            found.append(None if best is None else self._shelves[best].book.name)
        return found

    def sizes(self, keys: Sequence[bytes]) -> list[int]:
        """Bytes of each chunk in the tier that `holders` names; 0 for none."""
        found = []
        for key, name in zip(keys, self.holders(keys), strict=True):
            copy = self._of_name[name].keys.get(key) if name is not None else None
            found.append(0 if copy is None else copy.size)
        return found

    def keys(self, tier: str) -> list[bytes]:
        """Keys of the chunks that a tier holds, the one used longest ago first."""
        return list(self._of_name[tier].keys)

    def used(self, keys: Sequence[bytes]) -> None:
        """Take note that a request loads chunks, for the orders of all tiers that hold them."""
        now = self._clock()
        for shelf in self._shelves:
            here = [key for key in keys if key in shelf.keys]
            for key in here:
                if not shelf.keys[key].read:
                    shelf.keys[key].read = True
                    shelf.counts["useful"] += 1
            if here:
                shelf.counts["used"] += len(here)
                shelf.touch(here, now)
        if not self._retired and keys:
            try:
                self._contained.call("on_used", tuple(keys))
            except PolicyFailure as failure:
                self._retire(failure)

    def pin(self, keys: Sequence[bytes]) -> None:
        """Keep chunks where they are until `unpin`: they are being loaded."""
        for key in keys:
            if (chunk := self._chunks.get(key)) is not None:
                chunk.pins += 1

    def unpin(self, keys: Sequence[bytes]) -> None:
        """Let chunks go again; each call answers one of `pin` with the same keys."""
        for key in keys:
            chunk = self._chunks.get(key)
            if chunk is not None and chunk.pins:
                chunk.pins -= 1
                self._bury(key, chunk, held=False)

    def asked(self, keys: Sequence[bytes], found: int) -> None:
        """Take note of what a request asked for right after what the pool held.

        Args:
            keys: Its chunks, in text order.
            found: Those of them, counted from the first, that tiers hold.
        """
        self._counts["asked"] += len(keys)
        self._counts["found"] += found
        if self._returns is not None and self._admission is not None:
            for key in keys:
                self._returns.asked(key)
                self._admission.asked(key)
        missed = keys[found:]
        self._counts["returned"] += self.ghosts.missed(missed)
        for key in missed:
            self._declined.pop(key, None)

    def began(self, request: RequestView) -> None:
        """Take note of a new request; its session, if it names one, has returned."""
        if request.session_id:
            self._sessions.began(request.session_id, self._clock())

    def finished(self, request: RequestView, keys: Sequence[bytes], num_output_tokens: int) -> None:
        """Take note of a request's end, and tell the orders that ask for it.

        Args:
            request: The request.
            keys: All chunks of its text, in text order.
            num_output_tokens: Tokens it generated.
        """
        if request.session_id:
            self._sessions.ended(request.session_id, keys, self._clock())
        keys = tuple(keys)
        for shelf in self._shelves:
            if BlockFact.FINISHED in shelf.facts and not shelf.retired:
                try:
                    shelf.order.call("on_finished", request, keys, num_output_tokens)
                except PolicyFailure as failure:
                    shelf._retire(failure)

    def load(self, found: Found) -> int:
        """Decide how many of the chunks found are loaded; the rest is computed."""
        return self.decide(found)[0]

    def decide(self, found: Found) -> tuple[int, Found]:
        """Decide as `load` does, and return what it was decided on: both sides' seconds."""
        links = {name: shelf.view(self._clock()).read for name, shelf in self._of_name.items()}
        prefill = self.prefill
        start, total = found.start, found.total
        # Tuples: what a policy is shown is read again after it was asked.
        found = replace(
            found,
            tokens=tuple(found.tokens),
            sizes=tuple(found.sizes),
            tiers=tuple(found.tiers),
            prefill=found.prefill or prefill.speed(start, total - start),
            loading=tuple(cost.loading(found.sizes, found.tiers, links)),
            computing=tuple(cost.computing(prefill, start, total, found.tokens)),
            wait=prefill.seconds(0, found.ahead) if found.ahead else 0.0,
        )
        number = len(found.tokens)
        if not self._retired:
            try:
                number = self._contained.run(self._ask_load, found)
            except PolicyFailure as failure:
                self._retire(failure)
        self._count_load(found, number)
        return number, found

    # -- moves ---------------------------------------------------------------------------------

    def plan(self, step: int, pool: TierView, waiting: int = 0, running: int = 0) -> list[Move]:
        """Return the moves to make now, checked; drops that made room stand first.

        Args:
            step: Scheduler step.
            pool: The engine's pool.
            waiting: Requests that wait.
            running: Requests that run.
        """
        orders, self._orders = self._orders, []
        if self._retired:
            return orders
        now = self._clock()
        tiers = tuple(shelf.view(now) for shelf in self._shelves)
        try:
            wanted: list[int] = self._contained.run(self._wanted, tiers)
            candidates: dict[str, list[bytes]] = {}
            sizes: dict[str, list[int]] = {}
            for shelf, size in zip(self._shelves, wanted, strict=True):
                keys = shelf.victims(size, self._busy) if size else []
                candidates[shelf.book.name] = keys
                sizes[shelf.book.name] = [shelf.keys[key].size for key in keys]
            pressure = Pressure(
                step,
                now,
                pool,
                tiers,
                candidates,
                sizes,
                waiting,
                running,
                self.ghosts.thrash,
                self._due(now),
            )
            moves: list[Move] = self._contained.run(self._ask_plan, pressure)
        except PolicyFailure as failure:
            self._retire(failure)
            return orders
        for move in moves:
            orders += self._checked(move, now)
        made, self._orders = self._orders, []
        return made + orders

    def settle(self) -> list[Move]:
        """Return the drops that have become due since `plan`, without asking the policy."""
        orders, self._orders = self._orders, []
        return orders

    def promote(self, keys: Sequence[bytes]) -> list[Move]:
        """Order what a waiting request needs to be brought to the fastest tier that has room.

        Args:
            keys: Its chunks, in text order. Those in the fastest tier, on their way or nowhere
                are passed over.
        """
        now, moves = self._clock(), []
        by_source: dict[str, list[bytes]] = {}
        for key, name in zip(keys, self.holders(keys), strict=True):
            if name is not None and name != self._shelves[0].book.name:
                by_source.setdefault(name, []).append(key)
        for name, chosen in by_source.items():
            move = Move(Action.PROMOTE, chosen, name, self._shelves[0].book.name)
            moves += self._checked(move, now)
        made, self._orders = self._orders, []
        return made + moves

    # -- what was measured ---------------------------------------------------------------------

    def measured(self, tier: str, direction: str, size: int, seconds: float) -> None:
        """Take note of a transfer: ``"read"`` or ``"write"``, bytes, and seconds it took."""
        shelf = self._of_name[tier]
        (shelf.read if direction == "read" else shelf.write).add(size, seconds)
        shelf.health.worked()

    def computed(self, tokens: int, attended: float, seconds: float) -> None:
        """Take note of a prefill step; see `kvplug.tiers.cost.Prefill.add`."""
        self.prefill.add(tokens, attended, seconds)

    def queued(self, tier: str, direction: str, size: int) -> None:
        """Say how many bytes wait to be read or written."""
        shelf = self._of_name[tier]
        (shelf.read if direction == "read" else shelf.write).queued = max(0, size)

    def failed(self, tier: str, cause: str) -> None:
        """Take note that a tier could not be asked: it is left alone for a growing while."""
        shelf = self._of_name[tier]
        shelf.health.failed(self._clock())
        shelf.counts["errors"] += 1
        self._causes.add(f"{tier}: {cause}")

    def reset(self) -> None:
        """Forget all: what is stored stands for other computations than the engine's now."""
        for key, chunk in list(self._chunks.items()):
            if chunk.coming is not None:
                self._cancel(key, chunk)
            for number in list(chunk.copies):
                self._forget(self._shelves[number], key)
        self._chunks.clear()
        self._declined.clear()
        self._orders.clear()

    def views(self) -> dict[str, TierView]:
        """The tiers as policies see them, by name, fastest first."""
        now = self._clock()
        return {name: shelf.view(now) for name, shelf in self._of_name.items()}

    def counters(self) -> dict[str, float]:
        """Counters by name: those of a tier begin with its name."""
        found: dict[str, float] = {name: float(n) for name, n in self._counts.items()}
        found |= self._seconds
        found |= {"ghosts": len(self.ghosts), "thrash": self.ghosts.thrash}
        found["prefill_tokens_per_second"] = self.prefill.speed(0, 1024)
        for shelf in self._shelves:
            name = shelf.book.name
            found[f"{name}_chunks"] = len(shelf.keys)
            found[f"{name}_bytes"] = shelf.used
            found[f"{name}_read_bandwidth"] = shelf.read.bandwidth
            found[f"{name}_write_bandwidth"] = shelf.write.bandwidth
            found |= {f"{name}_{what}": float(n) for what, n in shelf.counts.items()}
        return found

    def own_counters(self) -> dict[str, float]:
        """What the lifecycle policy counts by itself; nothing once it is retired."""
        return {} if self._retired else self._contained.counters()

    def causes(self) -> dict[str, int]:
        """Failures by tier and cause."""
        return dict(self._causes)

    def causes_by_tier(self) -> dict[str, Counter[str]]:
        """Failures by cause, of each tier that has any."""
        found: dict[str, Counter[str]] = {}
        names = sorted(self._of_name, key=len, reverse=True)
        for text, count in self._causes.items():
            # A cause has no colon, in which the name of the tier would end.
            name = next((name for name in names if text.startswith(f"{name} ")), "")
            if name:
                found.setdefault(name, Counter())[text.removeprefix(f"{name} ")] += count
        return found

    def is_down(self, tier: str) -> bool:
        """True while a tier is left alone after failures."""
        return self._of_name[tier].health.down(self._clock())

    @property
    def retired(self) -> bool:
        """True once the lifecycle policy failed, and is not asked any more."""
        return self._retired

    def order_retired(self, tier: str) -> bool:
        """True once the policy of a tier's order failed, and is not asked any more."""
        return self._of_name[tier].retired

    # -- the lifecycle policy ------------------------------------------------------------------

    def _due(self, now: float) -> tuple[Due, ...]:
        """What sessions about to return need from below the fastest tier, by where it is."""
        found = []
        first = self._shelves[0].book.name
        for keys in self._sessions.due(now):
            self._counts["sessions_due"] += 1
            below: dict[str, list[bytes]] = {}
            for key, name in zip(keys, self.holders(keys), strict=True):
                if name is not None and name != first:
                    below.setdefault(name, []).append(key)
            probability = self._sessions.probability
            found += [Due(each, name, probability) for name, each in below.items()]
        return tuple(found)

    def _estimated(self, chunks: list[Leaving], size: int) -> list[Leaving]:
        """Say of each chunk how often its like came back, and whether its store pays."""
        if self._returns is None or self._admission is None:
            capacities = [shelf.book.capacity for shelf in self._shelves]
            held = sum(capacities) // max(1, size) if all(capacities) else 0
            self._returns = Returns(2 * held if held else WATCHED)
            self._admission = Admission(held)
        found = []
        for chunk in chunks:
            misses = self.ghosts.misses(chunk.key)
            returns = self._returns.left(chunk, misses)
            # Not `replace`, which costs as much as all the rest.
            chunk = Leaving(
                chunk.key,
                chunk.start,
                chunk.tokens,
                chunk.uses,
                chunk.idle,
                misses,
                returns if chunk.returns is None else chunk.returns,
                chunk.session,
                chunk.priority,
                chunk.parent,
                chunk.text,
                self._admission.left(chunk, misses),
                size,
                self.prefill.typical(chunk.tokens),
            )
            found.append(chunk)
        return found

    def _choose(self, leaving: Sequence[Leaving], now: float) -> Sequence[str | None]:
        tiers = tuple(shelf.view(now) for shelf in self._shelves)
        if not self._retired:
            try:
                chosen: list[str | None] = self._contained.run(self._ask_store, leaving, tiers)
                return chosen
            except PolicyFailure as failure:
                self._retire(failure)
        first = next((s.book.name for s in self._shelves if not s.health.down(now)), None)
        return [first] * len(leaving)

    def _ask_store(self, leaving: Sequence[Leaving], tiers: Sequence[TierView]) -> list[str | None]:
        chosen = list(islice(self.lifecycle.store(tuple(leaving), tiers), len(leaving) + 1))
        if len(chosen) != len(leaving):
            raise ValueError(f"store of {len(leaving)} chunks returned {len(chosen)} tiers")
        for name in chosen:
            if name is not None and name not in self._of_name:
                raise ValueError(f"store named {name!r}, which is no tier of the deployment")
        return chosen

    def _wanted(self, tiers: Sequence[TierView]) -> list[int]:
        return [max(0, operator.index(self.lifecycle.wants(tier))) for tier in tiers]

    def _ask_plan(self, pressure: Pressure) -> list[Move]:
        moves = []
        for move in islice(self.lifecycle.plan(pressure), SHOWN):
            action, keys = Action(move.action), list(islice(move.keys, SHOWN))
            if not all(type(key) is bytes for key in keys):
                raise TypeError("plan: keys of chunks must be bytes")
            source = self._of_name[move.source].number
            target = None if move.target is None else self._of_name[move.target].number
            if action is Action.DROP:
                wrong = target is not None
            elif target is None:
                wrong = True
            else:
                wrong = (source < target) != (action in DOWN) or source == target
            if wrong:
                raise ValueError(f"plan: {action} from {move.source} to {move.target}")
            moves.append(Move(action, keys, move.source, move.target))
        return moves

    def _ask_load(self, found: Found) -> int:
        number = operator.index(self.lifecycle.load(found, self.views()))
        if not 0 <= number <= len(found.tokens):
            raise ValueError(f"load of {len(found.tokens)} chunks returned {number}")
        return number

    def _retire(self, failure: PolicyFailure) -> None:
        self._retired = True
        self._counts["lifecycle_errors"] += 1
        self._contained.log(
            "failed and is retired; all that leaves is stored in the fastest tier", failure
        )

    # -- books ---------------------------------------------------------------------------------

    def _checked(self, move: Move, now: float) -> list[Move]:
        """What of a move can be made, ordered in the books."""
        source = self._of_name[move.source]
        here = []
        for key in dict.fromkeys(move.keys):
            chunk = self._chunks.get(key)
            copy = source.keys.get(key)
            if chunk is None or copy is None or copy.going or chunk.coming is not None:
                continue
            if chunk.pins and move.action in (Action.DROP, Action.DEMOTE):
                continue
            here.append(key)
        if move.action is Action.DROP:
            self._drop(source, here, "dropped")
            return []
        assert move.target is not None
        target = self._of_name[move.target]
        if target.health.down(now) or source.health.down(now):
            return []
        if target.book.exact and not source.book.exact:
            self._counts["refused_inexact"] += len(here)
            return []
        chosen = []
        for key in here:
            chunk, size = self._chunks[key], source.keys[key].size
            if target.number in chunk.copies:
                if move.action is Action.DEMOTE:
                    self._drop(source, [key], "demoted")
                continue
            displacing = move.action in DOWN
            if not (self._make_room(target, size) if displacing else target.room >= size):
                target.counts["no_room"] += 1
                continue
            chunk.coming = _Coming(target.number, size, source.number, move.action)
            target.reserved += size
            chosen.append(key)
        if move.action is Action.DEMOTE:
            source.leave(chosen)
        if not chosen:
            return []
        source.counts[f"{move.action}_ordered"] += len(chosen)
        return [Move(move.action, chosen, move.source, move.target)]

    def _arrived(self, key: bytes, chunk: _Chunk, came: _Coming) -> None:
        """Finish a move: the source of a demoted chunk goes, unless it is being loaded."""
        assert came.source is not None
        source = self._shelves[came.source]
        done = f"{came.action}d" if came.action != Action.COPY else "copied"
        source.counts[done] += 1
        source.counts[f"{done}_bytes"] += came.size
        if came.action is not Action.DEMOTE or came.source not in chunk.copies:
            return
        if chunk.pins:
            source.stay(key)
        else:
            self._remove(source, [key])

    def _left_again(self, leaving: Sequence[Leaving], now: float) -> None:
        """Chunks that tiers hold leave the pool: what used them there counts for the orders."""
        for shelf in self._shelves:
            used = []
            for chunk in reversed(leaving):
                copy = shelf.keys.get(chunk.key)
                if copy is not None and now - chunk.idle > copy.at + 1e-6:
                    used.append(chunk.key)
            if used:
                shelf.touch(used, now)

    def _room_for(self, shelf: _Shelf, size: int, now: float) -> _Shelf | None:
        """The tier that takes a chunk from the pool: a full one's next, before anything goes."""
        for lower in self._shelves[shelf.number :]:
            if lower.room >= size and not lower.health.down(now):
                lower.counts["overflow"] += lower is not shelf
                return lower
        if not shelf.health.down(now) and self._make_room(shelf, size):
            return shelf
        shelf.counts["no_room"] += 1
        return None

    def _make_room(self, shelf: _Shelf, size: int) -> bool:
        """Drop what goes first until ``size`` bytes fit; False if they cannot."""
        lacking = size - shelf.room
        if lacking <= 0:
            return True
        if size > shelf.book.capacity:
            return False
        self._drop(shelf, shelf.victims(lacking, self._busy), "displaced")
        return shelf.room >= size

    def _busy(self, key: bytes) -> bool:
        chunk = self._chunks[key]
        return chunk.pins > 0 or chunk.coming is not None

    def _drop(self, shelf: _Shelf, keys: Sequence[bytes], why: str) -> None:
        """Give copies up: order it, and remember what is nowhere any more."""
        if not keys:
            return
        shelf.counts[why] += len(keys)
        self._remove(shelf, keys)

    def _remove(self, shelf: _Shelf, keys: Sequence[bytes]) -> None:
        self._orders.append(Move(Action.DROP, list(keys), shelf.book.name))
        for key in keys:
            chunk = self._chunks[key]
            self._forget(shelf, key)
            self._bury(key, chunk, held=True)

    def _forget(self, shelf: _Shelf, key: bytes) -> None:
        copy = shelf.drop(key)
        if not copy.read:
            shelf.counts["useless"] += 1
        self._chunks[key].copies.pop(shelf.number, None)

    def _cancel(self, key: bytes, chunk: _Chunk) -> None:
        """A chunk does not arrive; its source stays what it was."""
        coming, chunk.coming = chunk.coming, None
        assert coming is not None
        self._shelves[coming.target].reserved -= coming.size
        if coming.source is not None and coming.source in chunk.copies:
            self._shelves[coming.source].stay(key)

    def _bury(self, key: bytes, chunk: _Chunk, held: bool) -> None:
        """Forget a chunk that is nowhere; the ghost list remembers it."""
        if not chunk.copies and chunk.coming is None and not chunk.pins:
            del self._chunks[key]
            self.ghosts.add((key,), held)

    def _decline(self, key: bytes) -> None:
        self._counts["declined"] += 1
        self._declined[key] = None
        self.ghosts.add((key,), held=False)
        if len(self._declined) > DECLINED:
            self._declined.popitem(last=False)

    def _info(self, key: bytes) -> tuple[int, bytes]:
        chunk = self._chunks[key]
        return (chunk.start // chunk.tokens if chunk.tokens else 0), chunk.parent

    def _count_load(self, found: Found, number: int) -> None:
        self._counts["loads"] += number > 0
        self._counts["loaded_tokens"] += sum(found.tokens[:number])
        self._counts["computed_instead"] += sum(found.tokens[number:])
        if found.loading and found.computing and math.isfinite(found.loading[number]):
            self._seconds["loading_seconds"] += found.loading[number]
            self._seconds["loading_saved_seconds"] += found.computing[0] - found.computing[number]


def _facts(order: PrefixCachePolicy) -> frozenset[BlockFact]:
    return frozenset(BlockFact(fact) for fact in order.needs)
