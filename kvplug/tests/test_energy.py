"""Energy of accelerators, read from a stand-in of NVML."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from pytest import LogCaptureFixture

from kvplug.observe import energy
from kvplug.observe.energy import EnergyMeter


class Nvml:
    """NVML with a counter of millijoules a device."""

    def __init__(self, *millijoules: int):
        self.counters = list(millijoules)
        self.asked: list[int] = []
        self.fails = ""

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802 - NVML's own name
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        if self.fails:
            raise RuntimeError(self.fails)
        self.asked.append(handle)
        return self.counters[handle]


def test_energy_of_the_engines_devices_is_added_up_from_its_start() -> None:
    nvml = Nvml(5_000, 70_000, 900_000)
    meter = EnergyMeter(nvml, [0, 2])
    assert meter.joules == 0.0
    nvml.counters = [5_500, 99_000, 902_000]
    meter.read()
    assert meter.joules == 2.5
    nvml.counters[2] += 1_000
    meter.read()
    assert meter.joules == 3.5
    assert set(nvml.asked) == {0, 2}


def test_a_counter_that_began_anew_takes_nothing_back() -> None:
    nvml = Nvml(5_000)
    meter = EnergyMeter(nvml, [0])
    nvml.counters = [6_000]
    meter.read()
    nvml.counters = [200]
    meter.read()
    assert meter.joules == 1.2


def test_there_is_no_meter_without_devices_a_package_or_a_counter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert EnergyMeter.found([], Nvml(1)) is None
    nvml = Nvml(1)
    nvml.fails = "Not Supported"
    assert EnergyMeter.found([0], nvml) is None
    assert EnergyMeter.found([3], Nvml(1)) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.load_nvml() is None and EnergyMeter.found([0]) is None


def test_nvml_that_fails_later_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: LogCaptureFixture
) -> None:
    monkeypatch.setattr(energy, "INTERVAL", 0.001)
    nvml: Any = Nvml(1_000)
    meter = EnergyMeter.found([0], nvml)
    assert meter is not None and meter._thread is not None
    nvml.fails = "GPU is lost"
    meter._thread.join(60.0)
    assert not meter._thread.is_alive()
    meter.stop()
