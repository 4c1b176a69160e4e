"""A tier in the accelerator's own memory, as a worker uses tiers.

Chunks never leave the device, so nothing is queued and no thread waits: what is stored is encoded,
and what is fetched is decoded, on the stream that computes, in the order it was asked for. The
tier and its codec run in the worker's own thread, so each call of them is contained.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvplug.containment import ON_WORKER, Contained, PolicyFailure
from kvplug.contract import CorruptPayload, Tier, TierError, TransferCodec
from kvplug.tiers import wire
from kvplug.tiers.causes import cause_of
from kvplug.tiers.queued import (
    Carried,
    ChunkRef,
    Fetched,
    Outcome,
    QueuedTier,
    Stored,
    may_carry,
    require_planes,
)

Planes = Mapping[str, Tensor]

LATE = "too slow"
"""Cause of a call that was interrupted at its deadline."""


class DeviceShelf(QueuedTier):
    """A tier whose chunks are on the device; has the methods of `QueuedTier`.

    Args:
        name: Name of the tier in the deployment.
        tier: The tier, open.
        codec: Codec of what is stored there.
        describe: Makes the header of a chunk under this codec.
        device: The device.
        log: Takes the first failure of each cause.
    """

    def __init__(
        self,
        name: str,
        tier: Tier,
        codec: TransferCodec,
        describe: Callable[[ChunkRef], wire.ChunkHeader],
        device: torch.device,
        *,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__(name, tier, codec, describe, log=log)
        self._device = device
        self._jobs: deque[Callable[[], None]] = deque()
        self._stored: dict[bytes, ChunkRef] = {}
        self._contained = Contained(tier, ON_WORKER, f"tier {name}")

    # -- orders --------------------------------------------------------------------------------

    def store(
        self,
        chunks: Sequence[ChunkRef],
        planes: Callable[[], Sequence[Planes]],
        size: int,
        token: Any = None,
        encoded: Callable[[], None] | None = None,
    ) -> str:
        """Store chunks, when the worker next looks for outcomes; see `QueuedTier.store`."""
        self._jobs.append(partial(self._store, chunks, planes, token, encoded))
        return ""

    def forward(
        self, chunks: Sequence[ChunkRef], payloads: Sequence[Any], token: Any = None
    ) -> str:
        """Store chunks that are in the wire format; see `QueuedTier.forward`."""

        def coded() -> list[dict[str, Tensor]]:
            pairs = zip(chunks, payloads, strict=True)
            return [wire.unpack(payload, self._describe(chunk)) for chunk, payload in pairs]

        self._jobs.append(partial(self._put_coded, chunks, coded, token))
        return ""

    def fetch(
        self,
        chunks: Sequence[ChunkRef],
        token: Any = None,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Read chunks, when the worker next looks for outcomes; see `QueuedTier.fetch`."""
        self._jobs.append(partial(self._fetch, chunks, token, wanted))

    def carry(self, keys: Sequence[bytes], target: QueuedTier) -> None:
        """Store chunks of this tier in another one; see `QueuedTier.carry`."""
        self._jobs.append(partial(self._carried, keys, target))

    def remove(self, keys: Sequence[bytes]) -> None:
        """Remove chunks, after what was asked for before."""
        self._jobs.append(partial(self._removed, keys))

    def outcomes(self) -> list[Outcome]:
        """Do what was asked for, and take the outcomes; in the worker's thread."""
        while self._jobs:
            job = self._jobs.popleft()
            try:
                job()
            except Exception as error:
                self._fail(*cause_of(error))
        return super().outcomes()

    def taken(self, fetched: Fetched) -> None:
        """Do nothing: planes are of the device, and held by nobody else."""

    def close(self) -> None:
        """Release the memory."""
        self._jobs.clear()
        with contextlib.suppress(TierError):
            self._ask(self.tier.close)

    # -- in the worker's thread ----------------------------------------------------------------

    def _started(self) -> list[threading.Thread]:
        # What the parent does in threads happens here, in the worker's own.
        return []

    def _ask(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call the tier or the codec.

        Raises:
            TierError: It failed, whatever it raised, or was interrupted at its deadline.
        """
        try:
            answer, failed = self._contained.run(_answered, call, arguments)
        except PolicyFailure as failure:
            late = failure.cause.startswith("no answer within")
            cause = LATE if late else failure.cause.partition(":")[0]
            raise TierError(cause, failure.cause) from None
        if failed is not None:
            cause, detail = failed
            raise TierError(cause, detail.removeprefix(cause).lstrip(": "))
        return answer

    def _store(
        self,
        chunks: Sequence[ChunkRef],
        planes: Callable[[], Sequence[Planes]],
        token: Any,
        encoded: Callable[[], None] | None,
    ) -> None:
        def coded() -> list[dict[str, Tensor]]:
            try:
                return [
                    self._ask(self._encoded, one, chunk.start)
                    for chunk, one in zip(chunks, planes(), strict=True)
                ]
            finally:
                if encoded is not None:
                    encoded()

        self._put_coded(chunks, coded, token)

    def _encoded(self, planes: Planes, start: int) -> dict[str, Tensor]:
        return dict(self.codec.encode(self._here(planes), start))

    def _here(self, planes: Planes) -> dict[str, Tensor]:
        return {name: t.to(self._device, non_blocking=True) for name, t in planes.items()}

    def _put_coded(
        self,
        chunks: Sequence[ChunkRef],
        coded: Callable[[], list[dict[str, Tensor]]],
        token: Any,
    ) -> None:
        outcome, began = Stored(self.name, token), time.monotonic()
        try:
            made = coded()
            self._require_up()
            items = [(c.key, one) for c, one in zip(chunks, made, strict=True)]
            said = self._ask(lambda: [str(one or "") for one in self._said(items)])
            self._failures = 0
            for chunk, one, problem in zip(chunks, made, said, strict=True):
                if problem:
                    outcome.failed[chunk.key] = problem
                else:
                    size = sum(t.nbytes for t in one.values())
                    outcome.sizes[chunk.key] = size
                    outcome.size += size
                    self._stored[chunk.key] = chunk
        except CorruptPayload as error:
            # What another tier handed on; this one is not to blame.
            outcome.failed = {chunk.key: cause_of(error)[0] for chunk in chunks}
        except Exception as error:
            outcome.refused = self._fail(*cause_of(error))
            outcome.failed = {chunk.key: outcome.refused for chunk in chunks}
        outcome.seconds = time.monotonic() - began
        self._outcomes.append(outcome)

    def _said(self, items: Sequence[tuple[bytes, Any]]) -> Sequence[Any]:
        said = self.tier.put(items)
        if len(said) != len(items):
            raise TypeError(f"put() answered {len(said)} of {len(items)}")
        return said

    def _got(self, keys: Sequence[bytes]) -> list[Any]:
        found: list[Any] = self._ask(lambda: list(QueuedTier._got(self, list(keys))))
        return found

    def _planes(self, chunk: ChunkRef, coded: Any, failed: dict[bytes, str]) -> Planes | None:
        """Planes of a chunk; or None, and why among those that failed.

        Raises:
            TierError: The codec had no answer in time, and would have none for the next chunk.
        """
        try:
            planes: Planes = self._ask(self._decoded, chunk, coded)
        except TierError as error:
            if error.cause == LATE:
                raise
            failed[chunk.key] = self._fault(chunk.key, error.cause, str(error))
            return None
        return planes

    def _decoded(self, chunk: ChunkRef, coded: Any) -> dict[str, Tensor]:
        """Planes of a chunk; in a call that is contained."""
        header = self._describe(chunk)
        planes = dict(self.codec.decode(coded, header.planes, chunk.start))
        # Nothing else stands between a codec and the pages: what is here has no checksum.
        require_planes(planes, header)
        return planes

    def _fetch(self, chunks: Sequence[ChunkRef], token: Any, wanted: Callable[[], bool]) -> None:
        if not wanted():
            return
        outcome, began = Fetched(self.name, token, chunks), time.monotonic()
        try:
            for chunk, coded in zip(chunks, self._payloads([c.key for c in chunks]), strict=True):
                if coded is None:
                    outcome.failed[chunk.key] = "not there"
                    outcome.planes.append(None)
                    continue
                planes = self._planes(chunk, coded, outcome.failed)
                if planes is not None:
                    outcome.size += sum(t.nbytes for t in coded.values())
                    outcome.held += sum(t.nbytes for t in planes.values())
                outcome.planes.append(planes)
        except Exception as error:
            outcome.refused = self._fail(*cause_of(error))
        for chunk in chunks[len(outcome.planes) :]:
            outcome.failed[chunk.key] = outcome.refused
            outcome.planes.append(None)
        outcome.seconds = time.monotonic() - began
        self._outcomes.append(outcome)

    def _carried(self, keys: Sequence[bytes], target: QueuedTier) -> None:
        outcome = Carried(self.name, target.name)
        good: list[ChunkRef] = []
        moved: list[Planes] = []
        try:
            if not may_carry(self.codec, target.codec):
                raise TierError("not exact")
            for key, coded in zip(keys, self._payloads(keys), strict=True):
                chunk = self._stored.get(key)
                if coded is None or chunk is None:
                    outcome.gone[key] = "not there"
                    continue
                planes = self._planes(chunk, coded, outcome.gone)
                if planes is not None:
                    # A codec may return views of the slab, whose slot is taken by others next.
                    moved.append({name: t.clone() for name, t in planes.items()})
                    good.append(chunk)
        except Exception as error:
            cause, detail = cause_of(error)
            if cause != "not exact":
                outcome.refused = self._fail(cause, detail)
            outcome.failed = dict.fromkeys(keys, cause)
        else:
            size = sum(t.nbytes for planes in moved for t in planes.values())
            refused = target.store(good, _Off(moved), size) if good else ""
            outcome.failed = {chunk.key: refused for chunk in good if refused}
        outcome.failed |= outcome.gone
        if outcome.failed:
            self._outcomes.append(outcome)

    def _removed(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self._stored.pop(key, None)
        self._ask(self.tier.remove, list(keys))


def _answered(
    call: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[Any, tuple[str, str] | None]:
    """What a call returned, or the words for which it refused."""
    try:
        return call(*arguments), None
    except (TierError, CorruptPayload) as error:
        return None, cause_of(error)


class _Off:
    """Gives planes in host memory, in the thread of whoever stores them there.

    Args:
        planes: Planes on the device, as far as the stream that computes will have made them.
    """

    def __init__(self, planes: list[Planes]):
        self._planes = planes
        self._made: Any = None
        if planes and next(iter(planes[0].values())).is_cuda:
            self._made = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._made.record()

    def __call__(self) -> list[Planes]:
        planes, self._planes = self._planes, []
        if self._made is not None:
            self._made.synchronize()
        return [{name: t.cpu() for name, t in one.items()} for one in planes]
