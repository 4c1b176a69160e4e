"""A tier that fails in whatever way a test asks for, and a codec that changes KV."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from kvplug import hookimpl
from kvplug.contract import (
    EngineView,
    Found,
    PlaneShape,
    PolicyOptions,
    TierError,
    TierPlace,
    TierView,
    TransferCodec,
)
from kvplug.registry import PolicyRegistry
from kvplug.tiers import links, queued
from kvplug_policies.lifecycle.watermarks import Watermarks
from kvplug_policies.tiers.disk import Disk
from kvplug_policies.tiers.host import HostMemory

SOON, LATE = 0.3, 60.0
"""Seconds in which a load must be made until a tier has hung, and in which the rest must be: a
machine may be busy."""


class Faulty(HostMemory):
    """Memory whose reads fail in a given order, each in its own way; after that they are right."""

    name = "faulty"

    class Options(HostMemory.Options):
        """Options of `Faulty`."""

        reads: list[str] = Field(default=[], description="what goes wrong at reads, in order")
        writes: list[str] = Field(default=[], description="what goes wrong at writes, in order")
        rank: int = Field(-1, ge=-1, description="rank on which it does; -1 for all")

    options: Options

    def open(self, place: TierPlace) -> None:
        from kvplug.hosts.vllm.scheduler import tiers

        super().open(place)
        own = self.options.rank in (-1, place.rank)
        self._reads = list(self.options.reads) if own else []
        self._writes = list(self.options.writes) if own else []
        if "hang" in self.options.reads:
            tiers.LOAD_SECONDS = SOON
        # A test asks again and again; nobody leaves the tier alone meanwhile.
        queued.FIRST_PAUSE = queued.LONGEST_PAUSE = 0.001
        links.FIRST_PAUSE = links.LONGEST_PAUSE = 0.001

    def put(self, items: Sequence[tuple[bytes, Any]]) -> list[str]:
        fault = self._writes.pop(0) if self._writes else ""
        if fault == "raise":
            raise RuntimeError("no such medium")
        if fault == "full":
            return ["full"] * len(items)
        return super().put(items)

    def get(self, keys: Sequence[bytes]) -> list[Any]:
        from kvplug.hosts.vllm.scheduler import tiers

        found = super().get(keys)
        fault = self._reads.pop(0) if self._reads and any(found) else ""
        if fault == "raise":
            raise TierError("refused", "as the test asks")
        if fault == "exit":
            raise SystemExit(1)
        if fault == "hang":
            # The next loads wait for this one.
            tiers.LOAD_SECONDS = LATE
            time.sleep(3 * SOON)
        if fault == "forget":
            found = [None] * len(found)
        if fault == "short":
            found = found[:-1]
        if fault == "garbage":
            found[0] = b"garbage"
        if fault == "strange":
            found[0] = 17
        if fault == "flip":
            damaged = bytearray(found[-1])
            damaged[-5] ^= 4
            found[-1] = bytes(damaged)
        if fault == "swap" and len(found) > 1:
            found[0], found[1] = found[1], found[0]
        return found


class Dying(Disk):
    """A folder whose engine is killed while it writes."""

    name = "dying"

    class Options(Disk.Options):
        """Options of `Dying`."""

        chunks: int = Field(0, ge=0, description="chunks after which it is killed; 0 for never")

    options: Options

    def open(self, place: TierPlace) -> None:
        super().open(place)
        self._left = self.options.chunks

    def put(self, items: Sequence[tuple[bytes, Any]]) -> list[str]:
        for i in range(len(items)):
            self._left -= 1
            if not self._left:
                super().put(items[:i])
                os.kill(os.getpid(), signal.SIGKILL)
        return super().put(items)


class Loads(Watermarks):
    """Loads whatever is there, however long a tier takes to say so: on a busy machine a small model
    may seem to compute faster."""

    name = "loads"

    def __init__(self, options: PolicyOptions, engine: EngineView):
        from kvplug.hosts.vllm.scheduler import tiers_lookup

        super().__init__(options, engine)
        tiers_lookup.SECONDS = tiers_lookup.LISTING_SECONDS = LATE

    def load(self, found: Found, tiers: Mapping[str, TierView]) -> int:
        return len(found.tokens)


class Rounded(TransferCodec):
    """Keeps half of the bits."""

    name = "rounded"
    exact = False
    changes = "values are rounded to half precision"

    def encode(self, planes: Mapping[str, Tensor], start: int) -> dict[str, Tensor]:
        return {name: plane.to(torch.bfloat16) for name, plane in planes.items()}

    def decode(
        self, coded: Mapping[str, Tensor], shapes: Mapping[str, PlaneShape], start: int
    ) -> dict[str, Tensor]:
        return {name: one.to(getattr(torch, shapes[name].dtype)) for name, one in coded.items()}


@hookimpl
def kvplug_register_policies(registry: PolicyRegistry) -> None:
    registry.add(Faulty)
    registry.add(Loads)
    registry.add(Dying)
    registry.add(Rounded)
