"""The line between an accelerator and pinned host memory: staging memory, a stream, and events.

Staging memory is taken once. Pinned memory is first touched by the thread that takes it, so that
thread runs on the processors next to the accelerator meanwhile, where Linux says which those are.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

SLOT_BYTES = 32 << 20
"""Bytes of a slot: a copy of so many takes a fraction of a millisecond within a device, and some
over its bus."""

SLOTS = 2
"""Slots each way: one is encoded, or decoded into, while the other is copied."""


class Mark(Protocol):
    """A point in the line's stream."""

    def query(self) -> bool:
        """Tell whether all before it is done."""

    def synchronize(self) -> None:
        """Wait until all before it is done."""


@dataclass(frozen=True, eq=False)
class Slot:
    """Staging memory of one transfer.

    Attributes:
        device: uint8 ``[n]`` on the accelerator.
        host: The same in pinned memory.
        out: Whether it is for chunks that leave.
    """

    device: Tensor
    host: Tensor
    out: bool


class Line(Protocol):
    """The line of one device."""

    def take(self, *, out: bool) -> Slot | None:
        """Take a slot for chunks that leave, or come; None while all are in use."""

    def give_back(self, slot: Slot) -> None:
        """Give a slot back; nothing uses it any more."""

    def after_compute(self) -> contextlib.AbstractContextManager[None]:
        """Work on the line's stream, after all that the computing stream was given so far."""

    def mark(self) -> Mark:
        """Mark what the line's stream was given so far; within `after_compute`."""


class Slots:
    """Slots that are free.

    Args:
        slots: All slots.
    """

    def __init__(self, slots: list[Slot]):
        self._lock = threading.Lock()
        self._free = slots

    def take(self, *, out: bool) -> Slot | None:
        """Take a slot; see `Line.take`."""
        with self._lock:
            for i, slot in enumerate(self._free):
                if slot.out == out:
                    return self._free.pop(i)
        return None

    def give_back(self, slot: Slot) -> None:
        """Give a slot back; see `Line.give_back`."""
        with self._lock:
            self._free.append(slot)


class CudaLine(Slots):
    """The line of a CUDA device.

    Args:
        device: The device.
        slot_bytes: Bytes of a slot.
    """

    def __init__(self, device: torch.device, slot_bytes: int = SLOT_BYTES):
        slots = []
        with near(device):
            for out in (True, False):
                for _ in range(SLOTS):
                    host = torch.zeros(slot_bytes, dtype=torch.uint8, pin_memory=True)
                    staged = torch.empty(slot_bytes, dtype=torch.uint8, device=device)
                    slots.append(Slot(staged, host, out))
        super().__init__(slots)
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def after_compute(self) -> Iterator[None]:
        """Work on the line's stream; see `Line.after_compute`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Mark:
        """Mark a point; see `Line.mark`."""
        found: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        found.record(self._stream)
        return found


def line_of(device: torch.device) -> Line | None:
    """Return the line of a device; None for the CPU, whose pages are host memory themselves."""
    return CudaLine(device) if device.type == "cuda" else None


@contextlib.contextmanager
def near(device: torch.device) -> Iterator[None]:
    """Run this thread on the processors of a device's NUMA node, where Linux says which."""
    wanted = processors(pci_address(device))
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    wanted &= before
    if not wanted:
        yield
        return
    try:
        os.sched_setaffinity(0, wanted)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def pci_address(device: torch.device) -> str:
    """Return a CUDA device's address as Linux writes it, ``0000:3b:00.0``; empty if not known."""
    found: Any = torch.cuda.get_device_properties(device)
    try:
        return f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    except AttributeError:
        return ""


def processors(address: str, root: Path = Path("/sys")) -> set[int]:
    """Return the processors of the NUMA node that a PCI device is on; empty if not known.

    Args:
        address: The device's address.
        root: Where Linux describes the machine.
    """
    try:
        node = int((root / "bus/pci/devices" / address / "numa_node").read_text())
        text = (root / f"devices/system/node/node{node}/cpulist").read_text() if node >= 0 else ""
        found: set[int] = set()
        for part in text.strip().split(","):
            first, _, last = part.partition("-")
            if first:
                found.update(range(int(first), int(last or first) + 1))
        return found
    except (OSError, ValueError):
        return set()
