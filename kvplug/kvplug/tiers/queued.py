"""A tier on a worker: its codec, its two threads and its bounded queues.

Whoever computes hands over chunks and goes on; a writer encodes and stores them, a reader fetches
and decodes them, and both leave outcomes to be collected. A tier that raises, hangs or returns
garbage costs misses, never more.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from kvplug.contract import CorruptPayload, Tier, TierError, TransferCodec
from kvplug.plain_text import CAUSE, one_line
from kvplug.tiers import wire
from kvplug.tiers.causes import cause_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Carried",
    "ChunkRef",
    "Fetched",
    "QueuedTier",
    "Stored",
    "may_carry",
    "require_planes",
]

ROOM = 512 << 20
"""Bytes that may wait to be stored, and bytes that may wait to be taken after they were read."""
BATCH_BYTES = 32 << 20
BATCH_CHUNKS = 256
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0
"""Seconds a tier is left alone after its first failure, and at most."""
PAUSED = "left alone after failures"
CLOSING = 10.0
"""Seconds that a tier has to finish what was accepted, as the engine stops."""

Planes = Mapping[str, "Tensor"]


@dataclass(frozen=True, slots=True)
class ChunkRef:
    """A chunk: its key, the position of its first token, and its tokens."""

    key: bytes
    start: int
    tokens: int


@dataclass(slots=True)
class Stored:
    """Outcome of storing chunks.

    Attributes:
        tier: The tier.
        token: What the order was given with.
        sizes: Bytes of each chunk stored.
        failed: Cause by chunk not stored.
        size: Bytes stored now.
        seconds: Time it took.
        refused: Why the tier itself failed; empty if it did not.
    """

    tier: str
    token: Any
    sizes: dict[bytes, int] = field(default_factory=dict)
    failed: dict[bytes, str] = field(default_factory=dict)
    size: int = 0
    seconds: float = 0.0
    refused: str = ""


@dataclass(slots=True)
class Fetched:
    """Outcome of reading chunks.

    Attributes:
        tier: The tier.
        token: What the order was given with.
        chunks: The chunks read, of one order.
        planes: Planes of each; None for one that is not there.
        failed: Cause by chunk that is not there.
        size: Bytes read.
        seconds: Time it took, decoding included.
        refused: Why the tier itself failed; empty if it did not.
        held: Bytes of the planes.
    """

    tier: str
    token: Any
    chunks: Sequence[ChunkRef]
    planes: list[Planes | None] = field(default_factory=list)
    failed: dict[bytes, str] = field(default_factory=dict)
    size: int = 0
    seconds: float = 0.0
    refused: str = ""
    held: int = 0


@dataclass(slots=True)
class Carried:
    """Outcome of the reading half of a move, where something of it failed.

    Attributes:
        tier: The tier that was read.
        target: The tier that was to get the chunks.
        failed: Cause by chunk that does not arrive there.
        gone: Cause by chunk that the tier turned out not to have.
        refused: Why the tier itself failed; empty if it did not.
    """

    tier: str
    target: str
    failed: dict[bytes, str] = field(default_factory=dict)
    gone: dict[bytes, str] = field(default_factory=dict)
    refused: str = ""


Outcome = Stored | Fetched | Carried


@dataclass(slots=True)
class _Put:
    token: Any
    chunks: Sequence[ChunkRef]
    planes: Callable[[], Sequence[Planes]] | None
    payloads: Sequence[Any] | None
    size: int
    encoded: Callable[[], None] | None


@dataclass(slots=True)
class _Remove:
    keys: Sequence[bytes]


@dataclass(slots=True)
class _Get:
    token: Any
    chunks: Sequence[ChunkRef]
    wanted: Callable[[], bool]


@dataclass(slots=True)
class _Carry:
    keys: Sequence[bytes]
    target: QueuedTier


class QueuedTier:
    """A tier, its codec and its threads.

    Args:
        name: Name of the tier in the deployment.
        tier: The tier, open.
        codec: Codec of what is stored there.
        describe: Makes the header of a chunk under this codec.
        room: Bytes that may wait in either direction.
        log: Takes the first failure of each cause.

    Attributes:
        name: As given.
        tier: As given.
        codec: As given.
        waiting: Bytes that wait to be stored.
    """

    def __init__(
        self,
        name: str,
        tier: Tier,
        codec: TransferCodec,
        describe: Callable[[ChunkRef], wire.ChunkHeader],
        *,
        room: int = ROOM,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.name, self.tier, self.codec = name, tier, codec
        self.waiting = 0
        self._describe = describe
        self._room = room
        self._log = log
        self._logged: set[str] = set()
        self._writes: SimpleQueue[_Put | _Remove | None] = SimpleQueue()
        self._reads: SimpleQueue[_Get | _Carry | None] = SimpleQueue()
        self._outcomes: deque[Outcome] = deque()
        self._held = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._failures = 0
        self._pause_until = 0.0
        self._threads = self._started()

    @property
    def paused(self) -> bool:
        """True while the tier is left alone because it failed."""
        return time.monotonic() < self._pause_until

    # -- orders --------------------------------------------------------------------------------

    def store(
        self,
        chunks: Sequence[ChunkRef],
        planes: Callable[[], Sequence[Planes]],
        size: int,
        token: Any = None,
        encoded: Callable[[], None] | None = None,
    ) -> str:
        """Store chunks some time later.

        Args:
            chunks: The chunks.
            planes: Gives the planes of each; called in the writer's thread, once.
            size: Bytes of the planes.
            token: Comes back with the outcome.
            encoded: Called in the writer's thread once the planes are not needed any more.

        Returns:
            The empty string, or why it is not going to be done.
        """
        return self._accept(_Put(token, chunks, planes, None, size, encoded))

    def forward(
        self, chunks: Sequence[ChunkRef], payloads: Sequence[Any], token: Any = None
    ) -> str:
        """Store chunks that are in the wire format of this tier already; as `store`."""
        size = sum(len(memoryview(one)) for one in payloads)
        return self._accept(_Put(token, chunks, None, payloads, size, None))

    def _accept(self, put: _Put) -> str:
        if self.paused:
            return PAUSED
        with self._changed:
            if self.waiting and self.waiting + put.size > self._room:
                return "queue full"
            self.waiting += put.size
        self._writes.put(put)
        return ""

    def fetch(
        self,
        chunks: Sequence[ChunkRef],
        token: Any = None,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Read chunks some time later; their outcomes may come in parts.

        Args:
            chunks: The chunks.
            token: Comes back with each outcome.
            wanted: Asked before each part; once it says no, nothing more is read.
        """
        self._reads.put(_Get(token, chunks, wanted))

    def carry(self, keys: Sequence[bytes], target: QueuedTier) -> None:
        """Store chunks of this tier in another one some time later; that one says when it is
        done, this one what does not arrive."""
        self._reads.put(_Carry(keys, target))

    def remove(self, keys: Sequence[bytes]) -> None:
        """Remove chunks some time later."""
        self._writes.put(_Remove(keys))

    def outcomes(self) -> list[Outcome]:
        """Take the outcomes since the last call."""
        found: list[Outcome] = []
        with contextlib.suppress(IndexError):
            while True:
                found.append(self._outcomes.popleft())
        return found

    def taken(self, fetched: Fetched) -> None:
        """State that the planes of an outcome are not held any more."""
        with self._changed:
            self._held -= fetched.held
            self._changed.notify_all()

    def close(self) -> None:
        """Finish what was accepted, as far as there is time, and close the tier."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._writes.put(None)
        self._reads.put(None)
        until = time.monotonic() + CLOSING
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            self._log(f"tier {self.name} does not answer; it is left as it is")
            return
        with contextlib.suppress(Exception):
            self.tier.close()

    # -- threads -------------------------------------------------------------------------------

    def _started(self) -> list[threading.Thread]:
        threads = [
            threading.Thread(target=self._serve, args=a, name=f"kvplug {self.name}", daemon=True)
            for a in ((self._writes, self._write), (self._reads, self._read))
        ]
        for thread in threads:
            thread.start()
        return threads

    def _serve(self, queue: SimpleQueue[Any], work: Callable[[Any], None]) -> None:
        while (job := queue.get()) is not None:
            try:
                work(job)
            except BaseException as error:  # a thread that ends would leave requests waiting
                self._fail(*cause_of(error))

    def _write(self, job: _Put | _Remove) -> None:
        if isinstance(job, _Remove):
            try:
                self.tier.remove(list(job.keys))
            except BaseException as error:
                self._fail(*cause_of(error))
            return
        outcome = Stored(self.name, job.token)
        began = time.monotonic()
        try:
            self._put(job, outcome)
        except BaseException as error:
            outcome.refused = self._fail(*cause_of(error))
            for chunk in job.chunks:
                if chunk.key not in outcome.sizes:
                    outcome.failed.setdefault(chunk.key, outcome.refused)
        finally:
            outcome.seconds = time.monotonic() - began
            with self._changed:
                self.waiting -= job.size
            self._outcomes.append(outcome)

    def _put(self, job: _Put, outcome: Stored) -> None:
        payloads = job.payloads
        if payloads is None:
            assert job.planes is not None
            try:
                payloads = [
                    wire.pack(self._describe(chunk), self.codec.encode(planes, chunk.start))
                    for chunk, planes in zip(job.chunks, job.planes(), strict=True)
                ]
            finally:
                if job.encoded is not None:
                    job.encoded()
        for batch in _batches(list(zip(job.chunks, payloads, strict=True))):
            said = self.tier.put([(chunk.key, payload) for chunk, payload in batch])
            if len(said) != len(batch):
                raise TypeError(f"put() answered {len(said)} of {len(batch)}")
            for (chunk, payload), problem in zip(batch, said, strict=True):
                if problem:
                    outcome.failed[chunk.key] = str(problem)
                else:
                    outcome.sizes[chunk.key] = len(memoryview(payload))
                    outcome.size += outcome.sizes[chunk.key]
        self._failures = 0

    def _read(self, job: _Get | _Carry) -> None:
        if isinstance(job, _Carry):
            for first in range(0, len(job.keys), BATCH_CHUNKS):
                if not self._stopping:
                    self._carry(job.keys[first : first + BATCH_CHUNKS], job.target)
            return
        for first in range(0, len(job.chunks), BATCH_CHUNKS):
            chunks = job.chunks[first : first + BATCH_CHUNKS]
            if self._stopping or not job.wanted():
                return
            outcome = Fetched(self.name, job.token, chunks)
            began = time.monotonic()
            try:
                self._get(outcome)
            except BaseException as error:
                outcome.refused = self._fail(*cause_of(error))
            missing = chunks[len(outcome.planes) :]
            for chunk in missing:
                outcome.failed.setdefault(chunk.key, outcome.refused or "not there")
            outcome.planes += [None] * len(missing)
            outcome.seconds = time.monotonic() - began
            self._outcomes.append(outcome)
            with self._changed:
                self._held += outcome.held
                # One part is always let through, however large.
                while self._held > self._room and not self._stopping and job.wanted():
                    self._changed.wait(0.1)

    def _get(self, outcome: Fetched) -> None:
        payloads = self._payloads([chunk.key for chunk in outcome.chunks])
        for chunk, payload in zip(outcome.chunks, payloads, strict=True):
            planes: Planes | None = None
            try:
                if payload is None:
                    outcome.failed[chunk.key] = "not there"
                    outcome.planes.append(None)
                    continue
                header = self._describe(chunk)
                coded = wire.unpack(payload, header)
                decoded = self.codec.decode(coded, header.planes, chunk.start)
                require_planes(decoded, header)
                outcome.size += len(memoryview(payload))
                outcome.held += sum(one.nbytes for one in decoded.values())
                planes = decoded
            except BaseException as error:
                outcome.failed[chunk.key] = self._fault(chunk.key, *cause_of(error))
            outcome.planes.append(planes)

    def _payloads(self, keys: Sequence[bytes]) -> list[Any]:
        self._require_up()
        found = self._got(keys)
        self._failures = 0
        return found

    def _require_up(self) -> None:
        if self.paused:
            raise TierError(PAUSED)

    def _got(self, keys: Sequence[bytes]) -> list[Any]:
        found = self.tier.get(keys)
        if len(found) != len(keys):
            raise TypeError(f"get() answered {len(found)} of {len(keys)}")
        return found

    def _carry(self, keys: Sequence[bytes], target: QueuedTier) -> None:
        outcome = Carried(self.name, target.name)
        same = _form(self.codec) == _form(target.codec)
        try:
            if not may_carry(self.codec, target.codec):
                raise TierError("not exact")
            good: list[ChunkRef] = []
            moved: list[Any] = []
            for key, payload in zip(keys, self._payloads(keys), strict=True):
                if payload is None:
                    outcome.gone[key] = "not there"
                    continue
                try:
                    found = wire.inspect(payload)
                    chunk = ChunkRef(key, found.start, found.tokens)
                    header = self._describe(chunk)
                    coded = wire.unpack(payload, header)
                    if same:
                        moved.append(payload)
                    else:
                        moved.append(self.codec.decode(coded, header.planes, chunk.start))
                    good.append(chunk)
                except BaseException as error:
                    outcome.gone[key] = self._fault(key, *cause_of(error))
            if good and same:
                refused = target.forward(good, moved)
            elif good:
                size = sum(one.nbytes for planes in moved for one in planes.values())
                refused = target.store(good, lambda: moved, size)
            else:
                refused = ""
            outcome.failed = {chunk.key: refused for chunk in good if refused}
        except BaseException as error:
            cause, detail = cause_of(error)
            if cause != "not exact":
                outcome.refused = self._fail(cause, detail)
            outcome.failed = dict.fromkeys(keys, cause)
        outcome.failed |= outcome.gone
        if outcome.failed:
            self._outcomes.append(outcome)

    def _fault(self, key: bytes, cause: str, detail: str) -> str:
        """Say once what is wrong with a payload; the tier is not to blame.

        It is removed: a tier leaves alone what is there, so the chunk could not be stored again.
        """
        self.remove([key])
        self._say(cause, f"tier {self.name} returned what is of no use ({cause}): {detail}")
        return cause

    def _fail(self, cause: str, detail: str) -> str:
        """Leave the tier alone for a while."""
        if cause == PAUSED:
            return cause
        self._failures += 1
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._failures - 1, 16))
        self._pause_until = time.monotonic() + pause
        self._say(cause, f"tier {self.name} failed ({cause}); requests compute instead: {detail}")
        return cause

    def _say(self, cause: str, sentence: str) -> None:
        if cause not in self._logged and len(self._logged) < 64:
            self._logged.add(cause)
            # A server's words are in it.
            self._log(one_line(sentence, CAUSE))


def _form(codec: TransferCodec) -> tuple[str, int, str]:
    return codec.name, codec.version, codec.fingerprint()


def may_carry(codec: TransferCodec, target: TransferCodec) -> bool:
    """Whether chunks can go from one tier to another and lose no more than they have lost.

    Args:
        codec: Codec of the one.
        target: Codec of the other.
    """
    return bool(type(codec).exact) or _form(codec) == _form(target)


def require_planes(planes: Planes, header: wire.ChunkHeader) -> None:
    """Refuse what a codec decoded to other types or shapes than it was asked for."""
    found = {
        name: (str(one.dtype).removeprefix("torch."), tuple(one.shape))
        for name, one in planes.items()
    }
    if found != {name: (p.dtype, tuple(p.shape)) for name, p in header.planes.items()}:
        raise CorruptPayload("decoded planes have other types or shapes")


def _batches(items: list[tuple[ChunkRef, Any]]) -> list[list[tuple[ChunkRef, Any]]]:
    found: list[list[tuple[ChunkRef, Any]]] = []
    size = 0
    for item in items:
        own = len(memoryview(item[1]))
        if not found or size + own > BATCH_BYTES or len(found[-1]) >= BATCH_CHUNKS:
            found.append([])
            size = 0
        found[-1].append(item)
        size += own
    return found
