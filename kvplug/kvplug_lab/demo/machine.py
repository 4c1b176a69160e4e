"""What measured: versions, machine, load, command and date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from dataclasses import dataclass

from kvplug_lab.tune.written import machine


@dataclass(frozen=True)
class Measured:
    """Where and how figures were measured.

    Attributes:
        versions: Version by program.
        machine: Processor and cores, or the accelerator.
        memory_gib: Main memory, in GiB; 0 where the system does not say.
        load: Load averages of one minute, at the beginning, after each round.
        cores: Cores that this process may use.
        command: The command that repeats it.
        date: The day.
        dtype: Type that was computed in.
        model: The model.
    """

    versions: dict[str, str]
    machine: str
    memory_gib: int
    load: list[float]
    cores: int
    command: str
    date: str
    dtype: str
    model: str

    @property
    def busy(self) -> bool:
        """Whether more wanted to run than one engine's threads, so that times are not its own."""
        return max(self.load, default=0.0) > 1.5 * self.cores

    def lines(self) -> list[str]:
        """The footer, a line each."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        memory = f", {self.memory_gib} GiB of memory" if self.memory_gib else ""
        load = " ".join(f"{value:.1f}" for value in self.load)
        return [
            versions,
            f"{self.machine}{memory}; load average {load or 'unknown'}",
            f"{self.model}, computed in {self.dtype}; {self.date}",
            self.command,
        ]


def measured(model: str, dtype: str, load: list[float]) -> Measured:
    """This machine, now.

    Args:
        model: The model's name.
        dtype: Type that was computed in.
        load: Load averages that were seen.
    """
    return Measured(
        versions=versions(),
        machine=machine(),
        memory_gib=_memory(),
        load=load,
        cores=len(os.sched_getaffinity(0)),
        command=shlex.join(["kvplug", *sys.argv[1:]]),
        date=datetime.date.today().isoformat(),
        dtype=dtype,
        model=model,
    )


def versions() -> dict[str, str]:
    """Versions of what took part, by name."""
    from kvplug.hosts.vllm.distribution import vllm_distribution

    found = {}
    for name, distribution in (
        ("kvplug", "kvplug"),
        ("vLLM", vllm_distribution() or "vllm"),
        ("torch", "torch"),
    ):
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["Python"] = platform.python_version()
    return found


def load_average() -> float:
    """Load average of the last minute; 0 where the system has none."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return 0.0


def _memory() -> int:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (OSError, ValueError):
        return 0
