"""The accelerator's own memory, beside the pool: coded chunks a copy within the device away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from threading import Lock
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from kvplug.contract import Size, Tier, TierError, TierOptions, TierPlace, TierUsage

ALIGNMENT = 16


class _Part(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    at: int


class DeviceMemory(Tier):
    """Keeps coded chunks in one slab of the accelerator's memory, in slots of one size.

    The slab is taken while the model is loaded, so that vLLM makes the pool out of what is left. A
    slot is as large as the first chunk that comes.
    """

    name = "device"
    on_device = True
    changes = "stores coded KV that leaves the engine's pool in the accelerator's memory beside it"

    class Options(TierOptions):
        """Options of ``device``.

        Attributes:
            size: Bytes of accelerator memory of one engine, of all its workers together.
        """

        size: Size = Field(
            ge=1 << 20, description="bytes of accelerator memory, all workers of an engine together"
        )

    options: Options

    _memory: Tensor | None = None

    def hold(self, memory: Tensor) -> None:
        """Take the slab, uint8 ``[n]``; before `open`, which makes one without it."""
        self._memory = memory

    def open(self, place: TierPlace) -> None:
        self._lock = Lock()
        self._held: dict[bytes, tuple[int, int, tuple[_Part, ...]]] = {}
        self._capacity = self.options.size // place.world * len(place.ranks)
        self._slot = 0
        self._free: list[int] = []
        self._closed = False
        if place.rank >= 0 and self._memory is None:
            self._memory = torch.zeros(self._capacity, dtype=torch.uint8, device=place.device)

    def put(self, items: Sequence[tuple[bytes, Any]]) -> list[str]:
        """Store chunks: tensors by name, on the device; or bytes, which are copied there."""
        with self._lock:
            if self._closed:
                raise TierError("closed")
            return [self._put(key, payload) for key, payload in items]

    def _put(self, key: bytes, payload: Any) -> str:
        assert self._memory is not None, "only workers store"
        if key in self._held:
            return ""
        tensors = payload if isinstance(payload, Mapping) else {"": _as_tensor(payload)}
        parts, at = [], 0
        for name, tensor in tensors.items():
            parts.append(_Part(name, tensor.dtype, tuple(tensor.shape), at))
            at += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if not self._slot:
            self._slot = max(at, ALIGNMENT)
            self._free = list(range(self._memory.numel() // self._slot))[::-1]
        if at > self._slot:
            return "larger than a slot"
        if not self._free:
            return "full"
        slot = self._free.pop()
        found = tuple(parts)
        for part in found:
            self._view(slot, part).copy_(tensors[part.name], non_blocking=True)
        self._held[key] = (slot, sum(t.nbytes for t in tensors.values()), found)
        return ""

    def _view(self, slot: int, part: _Part) -> Tensor:
        assert self._memory is not None
        begin = slot * self._slot + part.at
        size = prod(part.shape) * part.dtype.itemsize
        return self._memory[begin : begin + size].view(part.dtype).view(part.shape)

    def get(self, keys: Sequence[bytes]) -> list[Any]:
        """Return chunks as they were given: views of the slab, good until they are removed."""
        with self._lock:
            return [self._found(key) for key in keys]

    def _found(self, key: bytes) -> Any:
        if key not in self._held:
            return None
        slot, _, parts = self._held[key]
        found = {part.name: self._view(slot, part) for part in parts}
        return found[""].cpu().numpy().tobytes() if list(found) == [""] else found

    def has(self, keys: Sequence[bytes]) -> list[bool]:
        with self._lock:
            return [key in self._held for key in keys]

    def remove(self, keys: Sequence[bytes]) -> None:
        with self._lock:
            for key in keys:
                gone = self._held.pop(key, None)
                if gone is not None:
                    self._free.append(gone[0])

    def usage(self) -> TierUsage:
        with self._lock:
            used = len(self._held) * self._slot
            return TierUsage(len(self._held), used, self._capacity)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._held.clear()
            self._free.clear()
            self._memory = None


def _as_tensor(payload: Any) -> Tensor:
    return torch.frombuffer(bytearray(memoryview(payload).cast("B")), dtype=torch.uint8)
