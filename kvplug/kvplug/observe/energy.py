"""Energy that an engine's accelerators have used, from NVML where that is there."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger("vllm.kvplug")

INTERVAL = 1.0
"""Seconds between two readings."""


def load_nvml() -> Any:
    """NVML, ready for use; None where the package or a driver is missing."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        return None
    return pynvml


class EnergyMeter:
    """Adds up what devices have used since it was made.

    NVML counts whole boards, whoever uses them. Readings are taken in a thread, so nobody waits
    for a driver.

    Args:
        nvml: The module ``pynvml`` after ``nvmlInit``, or what behaves like it.
        devices: Indices of the devices, as NVML counts them.

    Raises:
        Exception: A device has no counter of energy (those before Volta), or there is none of that
            index.
    """

    def __init__(self, nvml: Any, devices: Sequence[int]):
        self._nvml = nvml
        self._handles = [nvml.nvmlDeviceGetHandleByIndex(one) for one in devices]
        self._last = [self._read(handle) for handle in self._handles]
        self._millijoules = 0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def found(cls, devices: Sequence[int], nvml: Any = None) -> EnergyMeter | None:
        """A meter that reads by itself; None where NVML or its counters are missing."""
        nvml = load_nvml() if nvml is None else nvml
        if nvml is None or not devices:
            return None
        try:
            meter = cls(nvml, devices)
        except Exception as error:
            logger.info("kvplug: NVML counts no energy here: %s", error)
            return None
        meter._thread = threading.Thread(target=meter._run, name="kvplug energy", daemon=True)
        meter._thread.start()
        return meter

    @property
    def joules(self) -> float:
        """Joules used since the meter was made, as of the last reading."""
        return self._millijoules / 1000

    def read(self) -> None:
        """Take a reading. A counter that fell began anew: its driver was loaded again.

        Raises:
            Exception: NVML failed.
        """
        for i, handle in enumerate(self._handles):
            now = self._read(handle)
            self._millijoules += now - self._last[i] if now >= self._last[i] else now
            self._last[i] = now

    def stop(self) -> None:
        """Take no more readings. Idempotent."""
        self._stopping.set()

    def _read(self, handle: Any) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle))

    def _run(self) -> None:
        while not self._stopping.wait(INTERVAL):
            try:
                self.read()
            except Exception as error:
                logger.error("kvplug: energy is not read any more: %s", error)
                return
