"""Serves waves of requests on an engine in this process, one timed step after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EngineStep:
    """One step of an engine.

    Attributes:
        outputs: What it returned.
        seconds: Time it took.
        cpu_seconds: CPU time it took, all threads of this process.
    """

    outputs: Sequence[Any]
    seconds: float
    cpu_seconds: float


def waves(numbers: Iterable[int]) -> list[list[int]]:
    """Indices of requests, by wave and in its order.

    Args:
        numbers: Number of the wave of each request.
    """
    found: dict[int, list[int]] = {}
    for i, number in enumerate(numbers):
        found.setdefault(number, []).append(i)
    return [found[number] for number in sorted(found)]


def stepped(
    engine: Any, requests: Iterable[Sequence[int]], add: Callable[[Sequence[int]], None]
) -> Iterator[EngineStep]:
    """Serve waves, each once all of the wave before have finished.

    Args:
        engine: The ``LLMEngine``, its core in this process.
        requests: Indices of the requests of each wave.
        add: Adds the requests of a wave to the engine, under their indices as ids.
    """
    for wave in requests:
        add(wave)
        while engine.has_unfinished_requests():
            before, cpu_before = time.perf_counter(), time.process_time()
            outputs = engine.step()
            seconds = time.perf_counter() - before
            yield EngineStep(outputs, seconds, time.process_time() - cpu_before)


def index_of(request_output: Any) -> int:
    """Index of the request that an output is of; vLLM appends to ids."""
    return int(request_output.request_id.split("-")[0])


def stated(request_output: Any) -> dict[str, Any] | None:
    """kvplug's part of an output, or None."""
    params = request_output.kv_transfer_params
    found: dict[str, Any] | None = params.get("kvplug") if params else None
    return found
