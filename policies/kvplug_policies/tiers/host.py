"""Host memory of the worker's own process: the tier next to the accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any

from pydantic import Field

from kvplug.contract import Size, Tier, TierError, TierOptions, TierPlace, TierUsage


class HostMemory(Tier):
    """Keeps payloads in memory, up to a number of bytes.

    What is full stays full until the host of the policies removes something: the order in which
    chunks leave is the deployment's.
    """

    name = "host"
    changes = "stores KV that leaves the engine's pool in host memory"

    class Options(TierOptions):
        """Options of ``host``.

        Attributes:
            size: Bytes of one engine's chunks, of all its workers together.
        """

        size: Size = Field(
            ge=1 << 20, description="bytes of host memory for one engine, all its workers together"
        )

    options: Options

    def open(self, place: TierPlace) -> None:
        self._lock = Lock()
        self._held: dict[bytes, memoryview] = {}
        self._used = 0
        self._capacity = self.options.size // place.world * len(place.ranks)
        self._closed = False

    def put(self, items: Sequence[tuple[bytes, Any]]) -> list[str]:
        answers = []
        for key, payload in items:
            given = memoryview(payload).cast("B")
            kept = given if given.readonly else memoryview(bytes(given))
            with self._lock:
                if self._closed:
                    raise TierError("closed")
                if key in self._held:
                    answers.append("")
                elif self._used + len(kept) > self._capacity:
                    answers.append("full")
                else:
                    self._held[key] = kept
                    self._used += len(kept)
                    answers.append("")
        return answers

    def get(self, keys: Sequence[bytes]) -> list[Any]:
        with self._lock:
            return [self._held.get(key) for key in keys]

    def has(self, keys: Sequence[bytes]) -> list[bool]:
        with self._lock:
            return [key in self._held for key in keys]

    def remove(self, keys: Sequence[bytes]) -> None:
        with self._lock:
            for key in keys:
                gone = self._held.pop(key, None)
                if gone is not None:
                    self._used -= len(gone)

    def usage(self) -> TierUsage:
        with self._lock:
            return TierUsage(len(self._held), self._used, self._capacity)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._held.clear()
            self._used = 0
