"""A tier in the accelerator's own memory, as a worker uses tiers.

Chunks never leave the device, so nothing is queued and no thread waits: what is stored is encoded,
and what is fetched is decoded, on the stream that computes, in the order it was asked for.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvplug.contract import Tier, TransferCodec
from kvplug.tiers import wire
from kvplug.tiers.queued import Carried, ChunkRef, Fetched, Outcome, QueuedTier, Stored

Planes = Mapping[str, Tensor]


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
        # No threads: what the parent does in them happens here, in the worker's own.
        self.name, self.tier, self.codec = name, tier, codec
        self.waiting = 0
        self._describe = describe
        self._device = device
        self._log = log
        self._logged: set[str] = set()
        self._outcomes: deque[Outcome] = deque()
        self._jobs: deque[Callable[[], None]] = deque()
        self._stored: dict[bytes, ChunkRef] = {}

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
                self._wrong(type(error).__name__, str(error))
        found = list(self._outcomes)
        self._outcomes.clear()
        return found

    def taken(self, fetched: Fetched) -> None:
        """Do nothing: planes are of the device, and held by nobody else."""

    def close(self) -> None:
        """Release the memory."""
        self._jobs.clear()
        with contextlib.suppress(Exception):
            self.tier.close()

    # -- in the worker's thread ----------------------------------------------------------------

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
                    self.codec.encode(self._here(one), chunk.start)
                    for chunk, one in zip(chunks, planes(), strict=True)
                ]
            finally:
                if encoded is not None:
                    encoded()

        self._put_coded(chunks, coded, token)

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
            said = self.tier.put([(c.key, one) for c, one in zip(chunks, made, strict=True)])
            for chunk, one, problem in zip(chunks, made, said, strict=True):
                if problem:
                    outcome.failed[chunk.key] = str(problem)
                else:
                    size = sum(t.nbytes for t in one.values())
                    outcome.sizes[chunk.key] = size
                    outcome.size += size
                    self._stored[chunk.key] = chunk
        except Exception as error:
            cause = self._wrong(type(error).__name__, str(error))
            outcome.failed = {chunk.key: cause for chunk in chunks}
        outcome.seconds = time.monotonic() - began
        self._outcomes.append(outcome)

    def _fetch(self, chunks: Sequence[ChunkRef], token: Any, wanted: Callable[[], bool]) -> None:
        if not wanted():
            return
        outcome, began = Fetched(self.name, token, chunks), time.monotonic()
        try:
            found = self.tier.get([chunk.key for chunk in chunks])
        except Exception as error:
            cause = self._wrong(type(error).__name__, str(error))
            found = [None] * len(chunks)
            outcome.failed = {chunk.key: cause for chunk in chunks}
        for chunk, coded in zip(chunks, found, strict=True):
            planes: Planes | None = None
            try:
                if coded is None:
                    outcome.failed.setdefault(chunk.key, "not there")
                else:
                    planes = self.codec.decode(coded, self._describe(chunk).planes, chunk.start)
                    outcome.size += sum(t.nbytes for t in coded.values())
                    outcome.held += sum(t.nbytes for t in planes.values())
            except Exception as error:
                outcome.failed[chunk.key] = self._wrong(type(error).__name__, str(error))
            outcome.planes.append(planes)
        outcome.seconds = time.monotonic() - began
        self._outcomes.append(outcome)

    def _carried(self, keys: Sequence[bytes], target: QueuedTier) -> None:
        outcome = Carried(self.name, target.name)
        good: list[ChunkRef] = []
        moved: list[Planes] = []
        try:
            if not type(self.codec).exact and _form(self.codec) != _form(target.codec):
                raise ValueError("not exact")
            for key, coded in zip(keys, self.tier.get(keys), strict=True):
                chunk = self._stored.get(key)
                if coded is None or chunk is None:
                    outcome.gone[key] = "not there"
                    continue
                planes = self.codec.decode(coded, self._describe(chunk).planes, chunk.start)
                # A codec may return views of the slab, whose slot is taken by others next.
                moved.append({name: t.clone() for name, t in planes.items()})
                good.append(chunk)
        except Exception as error:
            cause = str(error) if str(error) == "not exact" else type(error).__name__
            outcome.failed = dict.fromkeys(keys, self._wrong(cause, str(error)))
        else:
            size = sum(t.nbytes for planes in moved for t in planes.values())
            refused = target.store(good, _Off(moved), size) if good else ""
            outcome.failed = {chunk.key: refused for chunk in good if refused}
        outcome.failed |= outcome.gone
        if outcome.failed:
            self._outcomes.append(outcome)

    def _wrong(self, cause: str, detail: str) -> str:
        """Say a cause once."""
        self._say(cause, f"tier {self.name} failed ({cause}); requests compute instead: {detail}")
        return cause

    def _removed(self, keys: Sequence[bytes]) -> None:
        self.tier.remove(list(keys))
        for key in keys:
            self._stored.pop(key, None)


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


def _form(codec: TransferCodec) -> tuple[str, int, str]:
    return codec.name, codec.version, codec.fingerprint()
