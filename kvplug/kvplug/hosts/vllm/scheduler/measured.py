"""What is measured in the scheduler process, and what of it is new."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from vllm.logger import init_logger

from kvplug.hosts.vllm.scheduler.kind import KindScheduler
from kvplug.observe.catalogue import ACTS, FALLBACKS, HOOK_SECONDS, REPORTED, RETIRED, Hook
from kvplug.observe.metric import Increments, Sample

logger = init_logger("vllm.kvplug")

SAMPLED = 0.5
"""Seconds between two looks at what was measured, while requests are under way."""


class Measured(Protocol):
    """Something that is measured in the scheduler."""

    def samples(self) -> Iterable[Sample]:
        """Totals, values and distributions since the start."""


class OfKinds:
    """What kinds measure, and what their reports say.

    Args:
        kinds: The kinds.
    """

    def __init__(self, kinds: Sequence[KindScheduler]):
        self._kinds = kinds

    def samples(self) -> Iterator[Sample]:
        """What every policy reports, then what its kind measures."""
        for kind in self._kinds:
            for report in kind.reports():
                named = report.kind, report.name
                yield ACTS.of(report.acted, *named)
                yield FALLBACKS.of(report.errors, *named)
                yield RETIRED.of(float(report.retired), *named)
                for name, value in report.own.items():
                    yield REPORTED.of(value, *named, name)
            yield from kind.samples()


class HookTimes:
    """Times of vLLM's calls in the scheduler."""

    def __init__(self) -> None:
        self._seconds = {hook: HOOK_SECONDS.distribution() for hook in Hook}

    def add(self, hook: Hook, since: float) -> None:
        """Count a call that began at a time of `time.perf_counter`."""
        self._seconds[hook].add(time.perf_counter() - since)

    def samples(self) -> Iterator[Sample]:
        """Times by hook."""
        for hook, seconds in self._seconds.items():
            yield HOOK_SECONDS.of(seconds, str(hook))


class Measurements:
    """Asks what is measured for samples, and finds what is new in them.

    Attributes:
        measured: What is asked; one that fails is taken out.
    """

    def __init__(self) -> None:
        self.measured: list[Measured] = []
        self._new = Increments()
        self._due = 0.0

    def increments(self, busy: bool) -> dict[str, Any]:
        """What is new (`Increments`); empty while nothing is due.

        Args:
            busy: True if it may wait for `SAMPLED`, as there will be a later call.
        """
        now = time.monotonic()
        if busy and now < self._due:
            return {}
        self._due = now + SAMPLED
        return self._new.of(self._samples())

    def _samples(self) -> Iterator[Sample]:
        for one in list(self.measured):
            try:
                yield from list(one.samples())
            except Exception as error:
                self.measured.remove(one)
                name = type(one).__name__
                logger.error("kvplug: %s is not measured any more: %r", name, error, exc_info=error)
