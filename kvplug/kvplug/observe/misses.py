"""Why blocks of a prompt were computed again: one cause for each.

`Misses` is told which cached blocks were evicted, which requests were looked up and admitted, and
what they ended with. It keeps bounded tables of that, and names the cause of every full block of a
prompt that came from no cache. It knows nothing of vLLM: hashes are bytes that depend on all the
text before them, and whether a block is cached is asked.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = ["Again", "FirstMiss", "Lookup", "MissCause", "Misses", "Run", "Source", "blocks_kept"]

ROOT = b""
"""Parent of a text's first block."""

SHARED_AT_ROOT = 4
"""Tokens that two texts must begin with to count as continuations of the same beginning: every
text of a chat template shares the first two or three."""

CHILDREN = 4
"""Latest continuations of a block that are compared."""

CHILDREN_OF_ROOT = 32

TOKENS = 8
"""Tokens that are shown of each text where two differ."""

MIN_BLOCKS = 1024
MAX_BLOCKS = 131_072


class MissCause(StrEnum):
    """Why a full block of a prompt was computed, though the prefix cache is there.

    Attributes:
        NEVER_SEEN: New text: no block of it was computed here before.
        PROMPT_DIFFERS: Text that shared every block before this one went on differently in it. The
            first token that differs is known.
        AFTER_A_DIFFERENCE: The same tokens stood at this place in that text, behind the difference.
        EVICTED: It was cached and evicted, at a known time.
        RESET: It was cached when the prefix cache was reset.
        NOT_YET_COMPUTED: Another request is computing it, or waits to.
        ABANDONED: The request that would have computed it ended first.
        APPROXIMATE: It was computed, but approximately; such KV never enters the prefix cache.
        SALT_OR_ADAPTER: The same tokens under another cache salt, LoRA adapter, image or embedding.
        AFTER_A_GAP: It is cached, but a block before it is not.
        LAST_TOKEN: It is cached, but vLLM computes a prompt's last token, and its whole block with
            it; with EAGLE-like speculation the last matched block.
        WINDOW: Sliding windows or states: the block, or what a hit at its place needs in another
            KV-cache group, is not kept.
        NOT_READ: The request does not read the prefix cache, as for prompt log-probabilities.
        CACHING_OFF: The engine runs without prefix caching.
        FORGOTTEN: It was known, but what became of it is too long ago.
    """

    NEVER_SEEN = "never_seen"
    PROMPT_DIFFERS = "prompt_differs"
    AFTER_A_DIFFERENCE = "after_a_difference"
    EVICTED = "evicted"
    RESET = "reset"
    NOT_YET_COMPUTED = "not_yet_computed"
    ABANDONED = "abandoned"
    APPROXIMATE = "approximate"
    SALT_OR_ADAPTER = "salt_or_adapter"
    AFTER_A_GAP = "after_a_gap"
    LAST_TOKEN = "last_token"
    WINDOW = "window"
    NOT_READ = "not_read"
    CACHING_OFF = "caching_off"
    FORGOTTEN = "forgotten"


class Source(StrEnum):
    """Where a full block of a prompt came from, when the request was admitted."""

    HIT = "hit"
    SEGMENT = "segment"
    TIER = "tier"
    MISSED = "missed"


class Again(StrEnum):
    """Why a request that was admitted before is computed again; counted apart from its prompt."""

    PREEMPTED = "preempted"
    LOAD_FAILED = "load_failed"


@dataclass(frozen=True, slots=True)
class FirstMiss:
    """The first block of a prompt that was missed.

    Attributes:
        block: Its index in the prompt.
        cause: Its cause.
        token: First token that differs from the nearest known text, for `PROMPT_DIFFERS`.
        seconds: Seconds since it was evicted, for `EVICTED`.
        policy: What evicted it; the empty string for vLLM's own order.
        step: Scheduler step of the eviction.
        asked: Tokens of the prompt from `token` on, at most 8.
        known: Tokens of the known text there, at most 8.
    """

    block: int
    cause: MissCause
    token: int | None = None
    seconds: float | None = None
    policy: str = ""
    step: int | None = None
    asked: tuple[int, ...] = ()
    known: tuple[int, ...] = ()

    def sentence(self) -> str:
        """The miss in words."""
        return f"block {self.block}: {self._why()}"

    def _why(self) -> str:
        if self.cause is MissCause.PROMPT_DIFFERS:
            return f"differs from known text at token {self.token}"
        if self.cause is MissCause.EVICTED:
            by = self.policy or "vLLM's own order"
            return f"evicted {self.seconds:.1f} s before, in step {self.step}, by {by}"
        return _WORDS[self.cause]


_WORDS = {
    MissCause.NEVER_SEEN: "new text",
    MissCause.AFTER_A_DIFFERENCE: "known text, behind another beginning",
    MissCause.RESET: "cached until the prefix cache was reset",
    MissCause.NOT_YET_COMPUTED: "another request was still to compute it",
    MissCause.ABANDONED: "the request that would have computed it ended first",
    MissCause.APPROXIMATE: "computed before, but approximately, so it was not cached",
    MissCause.SALT_OR_ADAPTER: "known tokens under another cache salt, adapter or image",
    MissCause.AFTER_A_GAP: "cached, behind a block that is not",
    MissCause.LAST_TOKEN: "cached, but vLLM computes the block of the last token again",
    MissCause.WINDOW: "a KV-cache group of windows or states did not keep what a hit needs",
    MissCause.NOT_READ: "the request does not read the prefix cache",
    MissCause.CACHING_OFF: "the engine runs without prefix caching",
    MissCause.FORGOTTEN: "known once, but too long ago to say what became of it",
}


@dataclass(slots=True)
class Run:
    """Neighbouring blocks missed by one cause.

    Attributes:
        cause: The cause.
        first: Index of the first block.
        blocks: Number of blocks.
    """

    cause: MissCause
    first: int
    blocks: int


@dataclass(slots=True)
class Lookup:
    """What became of a prompt's full blocks when its request was first admitted.

    Attributes:
        blocks: Full blocks of the prompt.
        sources: Blocks by where they came from; they add up to ``blocks``.
        runs: The missed blocks, in order; they add up to ``sources[Source.MISSED]``.
        first: The first missed block.
        thrashed: Blocks that were evicted less than one pool of evictions ago.
        again: Set where the request had been admitted before; then there are no runs.
    """

    blocks: int
    sources: dict[Source, int] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    first: FirstMiss | None = None
    thrashed: int = 0
    again: Again | None = None

    @property
    def causes(self) -> dict[MissCause, int]:
        """Missed blocks by cause."""
        found: Counter[MissCause] = Counter()
        for run in self.runs:
            found[run.cause] += run.blocks
        return dict(found)


@dataclass(slots=True)
class _Batch:
    """Evictions between two lookups of one step."""

    serial: int
    at: float
    step: int
    policy: str


class _Text:
    """Blocks of one text from ``first`` on.

    Attributes:
        parent: Hash of the block before.
        first: Index of its first block that is kept.
        tokens: Token ids of the blocks.
        hashes: Hashes of the blocks.
        epoch: Resets of the cache before it was computed.
    """

    __slots__ = ("epoch", "first", "hashes", "parent", "tokens")

    def __init__(
        self, parent: bytes, first: int, tokens: array[int], hashes: list[bytes], epoch: int
    ):
        self.parent, self.first, self.epoch = parent, first, epoch
        self.tokens, self.hashes = tokens, hashes


class _Live:
    """A request that was admitted and has not ended."""

    __slots__ = ("computed", "first", "promised", "text")

    def __init__(self, computed: Callable[[], int], first: int):
        self.computed = computed
        self.first = first
        self.promised: list[bytes] = []
        self.text: _Text | None = None


class Misses:
    """Names the cause of every missed block.

    Args:
        num_blocks: Blocks of the engine's pool.
        block_size: Tokens of a block.
        caching: False where the engine runs without prefix caching.
        windowed: True if a KV-cache group does not keep every block that it computed.
        limit: Blocks that each table remembers; from the pool's size if None.
        clock: Seconds, for the time of evictions.

    Attributes:
        step: Scheduler step that evictions are stamped with.
        policy: Name of what evicts at present; the empty string for vLLM's own order.
        sources: Full blocks of prompts by where they came from.
        causes: Missed blocks by cause; they add up to ``sources[Source.MISSED]``.
        again: Blocks computed again by requests that were admitted before.
        thrashed: Blocks evicted and computed again within one pool of evictions.
        evictions: Cached blocks evicted.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        caching: bool = True,
        windowed: bool = False,
        limit: int | None = None,
        clock: Callable[[], float] = time.time,
    ):
        self.block_size = block_size
        self.limit = blocks_kept(num_blocks) if limit is None else limit
        self.step = 1
        self.policy = ""
        self.sources: Counter[Source] = Counter()
        self.causes: Counter[MissCause] = Counter()
        self.again: Counter[Again] = Counter()
        self.thrashed = 0
        self.evictions = 0
        self._pool = num_blocks
        self._caching = caching
        self._windowed = windowed
        self._clock = clock
        self._batch: _Batch | None = None
        self._ghosts: OrderedDict[bytes, _Batch] = OrderedDict()
        self._dropped = _Filter(self.limit)
        self._unhashed: OrderedDict[bytes, MissCause] = OrderedDict()
        self._promised: dict[bytes, _Live] = {}
        self._texts: deque[_Text] = deque()
        self._text_blocks = 0
        self._children: dict[bytes, _Text | tuple[_Text, ...]] = {}
        self._of: dict[bytes, _Text] = {}
        self._epoch = 0
        self._live: dict[str, _Live] = {}

    # -- the pool ------------------------------------------------------------------------------

    def evicted(self, block_hash: bytes) -> None:
        """Take note that a cached block lost its content."""
        batch = self._batch
        if batch is None:
            batch = _Batch(self.evictions, self._clock(), self.step, self.policy)
            self._batch = batch
        self.evictions += 1
        ghosts = self._ghosts
        ghosts[block_hash] = batch
        ghosts.move_to_end(block_hash)
        if len(ghosts) > self.limit:
            self._dropped.add(ghosts.popitem(last=False)[0])

    def reset(self) -> None:
        """Take note that the prefix cache was reset."""
        self._epoch += 1
        self._batch = None

    def next_step(self, step: int) -> None:
        """Begin a scheduler step."""
        self.step = step
        self._batch = None

    # -- requests ------------------------------------------------------------------------------

    def looked_up(self) -> int:
        """Take note of a lookup; returns what `admitted` is given to tell what was evicted before
        it from what it evicted itself."""
        self._batch = None
        return self.evictions

    def admitted(
        self,
        request_id: str,
        tokens: Sequence[int],
        hashes: Sequence[bytes],
        *,
        prompt_tokens: int,
        served: int,
        loaded: int = 0,
        loaded_from: Source = Source.TIER,
        serial: int,
        cached: Callable[[int], bool],
        computed: Callable[[], int],
        reads: bool = True,
        preempted: bool = False,
    ) -> Lookup:
        """Take note that a request that was looked up was given its blocks.

        Args:
            request_id: The request.
            tokens: Its tokens so far.
            hashes: Hashes of its full blocks.
            prompt_tokens: Tokens of its prompt.
            served: Tokens that the prefix cache had.
            loaded: Tokens after them that are loaded.
            loaded_from: Where those come from.
            serial: What `looked_up` returned.
            cached: Says of a block by its index whether another one with its content is cached now.
            computed: Says how many of its tokens are computed; asked until it has ended.
            reads: False if the request does not read the prefix cache.
            preempted: True if it was preempted before.
        """
        size = self.block_size
        known = self._live.get(request_id)
        if known is not None:
            return self._admitted_again(len(tokens) // size, hashes, served + loaded, preempted)
        full = min(prompt_tokens // size, len(hashes)) if self._caching else prompt_tokens // size
        hit = min(served // size, full)
        have = min((served + loaded) // size, full)
        found = Lookup(full)
        for source, blocks in (
            (Source.HIT, hit),
            (loaded_from, have - hit),
            (Source.MISSED, full - have),
        ):
            found.sources[source] = blocks
            self.sources[source] += blocks
        live = self._live[request_id] = _Live(computed, hit)
        new = full
        if have < full:
            new = self._classify(
                found, tokens, hashes, have, full, serial, cached, reads, have > hit
            )
            for cause, blocks in found.causes.items():
                self.causes[cause] += blocks
        if self._caching and hit < full:
            self._remember(live, tokens, hashes, full, new)
        return found

    def ended(
        self,
        request_id: str,
        tokens: Sequence[int],
        hashes: Sequence[bytes],
        hashed: int,
    ) -> None:
        """Forget a request that ended.

        Args:
            request_id: The request.
            tokens: Its tokens.
            hashes: Hashes of its full blocks.
            hashed: Blocks up to the last one that is in the prefix cache.
        """
        live = self._live.pop(request_id, None)
        if live is None:
            return
        promised = self._promised
        for one in live.promised:
            if promised.get(one) is live:
                del promised[one]
        if not self._caching:
            return
        done = min(live.computed() // self.block_size, len(hashes))
        if not self._windowed:
            self._note_unhashed(hashes[max(hashed, live.first) : done], MissCause.APPROXIMATE)
        last = live.first + len(live.promised)
        self._note_unhashed(hashes[max(done, live.first) : last], MissCause.ABANDONED)
        # The answer is part of the next turn's prompt.
        first = live.first if live.text is None else live.text.first + len(live.text.hashes)
        if done > first:
            self._add(self._text(tokens, hashes, first, done), hashes, done)

    # -- causes --------------------------------------------------------------------------------

    def _admitted_again(
        self, full: int, hashes: Sequence[bytes], have: int, preempted: bool
    ) -> Lookup:
        again = Again.PREEMPTED if preempted else Again.LOAD_FAILED
        first = have // self.block_size
        found = Lookup(full, {Source.MISSED: max(0, full - first)}, again=again)
        self.again[again] += found.sources[Source.MISSED]
        for one in hashes[first:]:
            ghost = self._ghosts.pop(one, None)
            if ghost is not None and self.evictions - ghost.serial <= self._pool:
                found.thrashed += 1
        self.thrashed += found.thrashed
        return found

    def _classify(
        self,
        found: Lookup,
        tokens: Sequence[int],
        hashes: Sequence[bytes],
        first: int,
        full: int,
        serial: int,
        cached: Callable[[int], bool],
        reads: bool,
        gap: bool,
    ) -> int:
        """Name the cause of each block from ``first`` on; returns the first that is new here."""
        if not self._caching or not reads:
            cause = MissCause.NOT_READ if self._caching else MissCause.CACHING_OFF
            found.runs.append(Run(cause, first, full - first))
            found.first = FirstMiss(first, cause)
            return first
        block = first
        while block < full:
            one = hashes[block]
            ghost = self._ghosts.get(one)
            facts: FirstMiss | None = None
            if (ghost is not None and ghost.serial >= serial) or cached(block):
                cause = self._cached(block, gap, tokens)
            elif ghost is not None:
                cause = MissCause.EVICTED
                if found.first is None:
                    ago = max(0.0, self._clock() - ghost.at)
                    facts = FirstMiss(
                        block, cause, seconds=ago, policy=ghost.policy, step=ghost.step
                    )
                if serial - ghost.serial <= self._pool:
                    found.thrashed += 1
                del self._ghosts[one]
            elif (held := self._held(block, one)) is not None:
                cause = held
            else:
                break
            gap = gap or cause not in (MissCause.LAST_TOKEN, MissCause.WINDOW)
            self._count(found, block, cause, facts)
            block += 1
        self.thrashed += found.thrashed
        return self._new(found, tokens, hashes, block, full) if block < full else full

    def _cached(self, block: int, gap: bool, tokens: Sequence[int]) -> MissCause:
        if gap:
            return MissCause.AFTER_A_GAP
        if not self._windowed or (block + 1) * self.block_size >= len(tokens):
            return MissCause.LAST_TOKEN
        return MissCause.WINDOW

    def _held(self, block: int, one: bytes) -> MissCause | None:
        """The cause of a block that is promised, or was computed and not cached."""
        owner = self._promised.get(one)
        if owner is not None:
            if owner.computed() < (block + 1) * self.block_size:
                return MissCause.NOT_YET_COMPUTED
            return MissCause.WINDOW if self._windowed else MissCause.APPROXIMATE
        return self._unhashed.pop(one, None)

    def _new(
        self,
        found: Lookup,
        tokens: Sequence[int],
        hashes: Sequence[bytes],
        block: int,
        full: int,
    ) -> int:
        """Name causes from a block on that neither the pool nor any table of blocks knows; returns
        the first block that is new.

        A hash depends on all the text before, so nothing behind a new block can be known.
        """
        size = self.block_size
        while block < full:
            one = hashes[block]
            known = self._of.get(one)
            if known is not None:
                lost = MissCause.RESET if known.epoch < self._epoch else MissCause.FORGOTTEN
                self._count(found, block, lost)
            elif one in self._dropped:
                self._count(found, block, MissCause.FORGOTTEN)
            else:
                break
            block += 1
        new = block
        if block == full:
            return new
        own = _ids(tokens[block * size : full * size])
        nearest = self._diverge(found, own, self._continuations(hashes, block), block)
        block += 1
        if nearest is not None:
            text, cause = nearest
            last = min(full, text.first + len(text.tokens) // size)
            theirs = text.tokens[(new - text.first) * size :]
            while block < last:
                at = (block - new) * size
                same = own[at : at + size] == theirs[at : at + size]
                self._count(found, block, cause if same else MissCause.NEVER_SEEN)
                block += 1
        if block < full:
            self._count(found, block, MissCause.NEVER_SEEN, blocks=full - block)
        return new

    def _continuations(self, hashes: Sequence[bytes], block: int) -> tuple[_Text, ...]:
        texts = self._children.get(hashes[block - 1] if block else ROOT, ())
        return (texts,) if isinstance(texts, _Text) else texts

    def _diverge(
        self, found: Lookup, own: array[int], texts: tuple[_Text, ...], block: int
    ) -> tuple[_Text, MissCause] | None:
        """Count a new block; returns the text that goes on most like it, and the cause of blocks
        behind it that have their tokens in common with that text."""
        size = self.block_size
        best, shared = None, -1
        for text in reversed(texts):
            at = (block - text.first) * size
            same = _shared(own[:size], text.tokens[at : at + size])
            if same > shared:
                best, shared = text, same
        if best is None or not own or (block == 0 and shared < min(SHARED_AT_ROOT, size)):
            self._count(found, block, MissCause.NEVER_SEEN)
            return None
        if shared == size:
            self._count(found, block, MissCause.SALT_OR_ADAPTER)
            return best, MissCause.SALT_OR_ADAPTER
        at = (block - best.first) * size + shared
        facts = FirstMiss(
            block,
            MissCause.PROMPT_DIFFERS,
            token=block * size + shared,
            asked=tuple(own[shared : shared + TOKENS]),
            known=tuple(best.tokens[at : at + TOKENS]),
        )
        self._count(found, block, MissCause.PROMPT_DIFFERS, facts)
        return best, MissCause.AFTER_A_DIFFERENCE

    def _count(
        self,
        found: Lookup,
        block: int,
        cause: MissCause,
        facts: FirstMiss | None = None,
        blocks: int = 1,
    ) -> None:
        if found.first is None:
            found.first = facts or FirstMiss(block, cause)
        if found.runs and found.runs[-1].cause is cause:
            found.runs[-1].blocks += blocks
        else:
            found.runs.append(Run(cause, block, blocks))

    # -- tables --------------------------------------------------------------------------------

    def _remember(
        self, live: _Live, tokens: Sequence[int], hashes: Sequence[bytes], full: int, new: int
    ) -> None:
        """Remember what a request brings; from block ``new`` on no text has it."""
        live.promised = list(hashes[live.first : full])
        self._promised.update(dict.fromkeys(live.promised, live))
        live.text = self._text(tokens, hashes, live.first, full)
        self._add(live.text, hashes, new)

    def _text(self, tokens: Sequence[int], hashes: Sequence[bytes], first: int, last: int) -> _Text:
        last = min(last, first + self.limit)
        parent = hashes[first - 1] if first else ROOT
        ids = _ids(tokens[first * self.block_size : last * self.block_size])
        return _Text(parent, first, ids, list(hashes[first:last]), self._epoch)

    def _add(self, text: _Text, hashes: Sequence[bytes], new: int) -> None:
        first, last = text.first, text.first + len(text.hashes)
        children = self._children
        for block in range(first, min(new + 1, last)):
            parent = hashes[block - 1] if block else ROOT
            before = children.get(parent)
            if before is None:
                children[parent] = text
            else:
                most = CHILDREN if block else CHILDREN_OF_ROOT
                others = (before,) if isinstance(before, _Text) else before
                children[parent] = (*others[1 - most :], text)
        children.update(dict.fromkeys(hashes[max(new, first) : last - 1], text))
        self._of.update(dict.fromkeys(text.hashes, text))
        self._texts.append(text)
        self._text_blocks += len(text.hashes)
        while self._text_blocks > self.limit:
            self._drop(self._texts.popleft())

    def _drop(self, text: _Text) -> None:
        self._text_blocks -= len(text.hashes)
        children = self._children
        for one in text.hashes:
            if self._of.get(one) is text:
                del self._of[one]
        for parent in (text.parent, *text.hashes[:-1]):
            texts = children.get(parent)
            if texts is text:
                del children[parent]
            elif isinstance(texts, tuple) and text in texts:
                left = tuple(one for one in texts if one is not text)
                children[parent] = left if len(left) > 1 else left[0]

    def _note_unhashed(self, hashes: Sequence[bytes], cause: MissCause) -> None:
        table = self._unhashed
        for one in hashes:
            if one not in self._ghosts:
                table[one] = cause
                table.move_to_end(one)
        while len(table) > self.limit:
            self._dropped.add(table.popitem(last=False)[0])


class _Filter:
    """Which keys the tables have dropped, about: of ``size`` keys it takes 1 in 400 that it was not
    given for one that it was, and it forgets those before the latest ``size`` to ``2 * size``.

    A Bloom filter of two generations, 4 probes in 16 bits a key.
    """

    def __init__(self, size: int):
        self._size = size
        self._bits = 16 * size
        self._added = 0
        self._now = bytearray(2 * size)
        self._before = bytearray(2 * size)

    def add(self, key: bytes) -> None:
        if self._added == self._size:
            self._before, self._now, self._added = self._now, bytearray(2 * self._size), 0
        self._added += 1
        for bit in self._probes(key):
            self._now[bit >> 3] |= 1 << (bit & 7)

    def __contains__(self, key: bytes) -> bool:
        probes = self._probes(key)
        return any(
            all(bits[bit >> 3] >> (bit & 7) & 1 for bit in probes)
            for bits in ((self._now, self._before) if self._added else (self._before,))
        )

    def _probes(self, key: bytes) -> list[int]:
        first, step = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:16], "little") | 1
        return [(first + n * step) % self._bits for n in range(4)]


def blocks_kept(num_blocks: int) -> int:
    """Blocks that each table remembers for a pool of ``num_blocks``: twice its size, between
    `MIN_BLOCKS` and `MAX_BLOCKS`."""
    return max(MIN_BLOCKS, min(2 * num_blocks, MAX_BLOCKS))


def _ids(tokens: Sequence[int]) -> array[int]:
    """Token ids in 4 bytes each; nothing where they are none, so that nothing is compared."""
    try:
        return array("i", tokens)
    except (OverflowError, TypeError):
        return array("i")


def _shared(one: array[int], other: array[int]) -> int:
    """Length of the common beginning of two short texts."""
    if one == other:
        return len(one)
    return next(
        (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
