"""What the scheduler's thread takes to note what is traced and timed, in microseconds.

python integration_tests/observed_cost.py
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace

from opentelemetry.sdk.trace import TracerProvider

from kvplug.hosts.vllm.scheduler.latency import LatencyWatch
from kvplug.hosts.vllm.tracing import SpanExporter
from kvplug.observe.latency import LatencyWindows
from kvplug.observe.request_spans import RequestSpans, RequestTrace

REQUESTS = 5_000
STEPS = 100_000
CHECKS = [(stage, 1, 2, "exact", "") for stage in ("structure", "position", "mask")]


def each(what: str, times: int, call: Callable[[int], object]) -> None:
    """Print the microseconds of CPU time of a call, the best of three rounds."""
    rounds = []
    for _ in range(3):
        began = time.thread_time()
        for i in range(times):
            call(i)
        rounds.append((time.thread_time() - began) / times)
    print(f"{what:<55} {1e6 * min(rounds):8.2f} us")


def main() -> None:
    traces: deque[RequestTrace] = deque(maxlen=1000)
    spans = RequestSpans(traces.append)

    def traced(number: int) -> None:
        name = f"cmpl-{number}"
        spans.began(name, None, 1000)
        begin = spans.looking(name)
        for segment in ("a", "b"):
            spans.checked(name, segment, 100, CHECKS)
        spans.looked_up(name, begin, 32, 200, "segment")
        spans.allocated(name)
        spans.open(name, ("run", number), "kvplug.load", {"kvplug.tokens": 200})
        spans.close(("run", number))
        for segment in ("c", "d"):
            spans.open(name, (segment, number), "kvplug.save", {"kvplug.segment": segment})
            spans.close((segment, number))
        spans.ended(name, {"kvplug.exact": True})

    each("spans of a request: a lookup, 6 checks, 3 orders", REQUESTS, traced)

    exporter = SpanExporter("nowhere", TracerProvider())
    each(
        "the same, as OpenTelemetry's in the other thread",
        1000,
        lambda i: exporter._make(traces[i]),
    )
    exporter.stop()

    windows = LatencyWindows(100, 300.0)
    watch = LatencyWatch(windows)

    def timed(number: int) -> None:
        request = SimpleNamespace(
            request_id=f"cmpl-{number}",
            sampling_params=object(),
            resumable=False,
            arrival_time=time.time(),
            num_prompt_tokens=1000,
            num_output_tokens=0,
        )
        watch.on_new_request(request)
        watch.step(SimpleNamespace(scheduled_new_reqs=[SimpleNamespace(req_id=request.request_id)]))
        request.num_output_tokens = 1
        watch.outputs()
        request.num_output_tokens = 40
        watch.finished(request)

    each("times of a request, from arrival to end", REQUESTS, timed)
    idle = SimpleNamespace(scheduled_new_reqs=[])

    def step(_: int) -> None:
        watch.step(idle)
        watch.outputs()

    each("times, in a step that begins no request", STEPS, step)
    each("quantiles of all windows, every few seconds", 100, lambda _: list(windows.quantiles()))


if __name__ == "__main__":
    main()
