"""Times of requests, as the scheduler sees them.

The scheduler's process sees every request of its engine, whichever API server took it, and offline
as well; a logger of statistics in the API servers sees a part, and one that is installed switches
statistics on for engines that have nothing to do with kvplug. What the scheduler does not see is
the way of a token to the client: the API server's detokenizing and sending.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

from kvplug.deployment import Deployment
from kvplug.errors import DeploymentError, Refusal
from kvplug.hosts.vllm.admission import SECTION
from kvplug.observe.catalogue import LATENCY_REQUESTS, TPOT_SECONDS, TTFT_SECONDS
from kvplug.observe.latency import TPOT, TTFT, LatencyWindows, UnusableBaseline
from kvplug.observe.metric import Sample

logger = init_logger("vllm.kvplug")

INTERVAL = 5.0
"""Seconds between two computations of the quantiles while requests are under way."""

IDLE_INTERVAL = 0.25
"""The same once none is: nobody asks later."""

METRICS = {TTFT: TTFT_SECONDS, TPOT: TPOT_SECONDS}


class LatencyWatch:
    """Follows requests from their arrival to their end.

    Args:
        windows: Takes the times.
        file: Where full baselines are kept; empty for nowhere.
        wall: Seconds since 1970, as in a request's ``arrival_time``.
        clock: Seconds; only differences matter.
    """

    def __init__(
        self,
        windows: LatencyWindows,
        file: str = "",
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.windows = windows
        self._file = file
        self._wall = wall
        self._clock = clock
        self._awaited: dict[str, Any] = {}
        self._scheduled: set[str] = set()
        self._first: dict[str, float] = {}
        self._writer: threading.Thread | None = None
        self._failed = False
        self._samples: Sequence[Sample] = ()
        self._computed = -math.inf
        self._added = 0

    @classmethod
    def of(cls, deployment: Deployment, vllm_config: Any) -> LatencyWatch:
        """The watch of an engine, with the baseline of an earlier one where it keeps that.

        Raises:
            DeploymentError: The file of the baseline cannot be used.
        """
        settings = deployment.observe
        windows = LatencyWindows(
            settings.baseline_requests,
            settings.latency_window,
            str(vllm_config.model_config.model),
        )
        file = settings.baseline_file
        index = int(vllm_config.parallel_config.data_parallel_index)
        if file and index:
            file = f"{file}.{index}"
        try:
            if file and windows.load(file):
                logger.info("kvplug: latencies are compared with the baseline in %s", file)
        except UnusableBaseline as error:
            key = f"{SECTION}.observe.baseline_file"
            refusal = Refusal(key, f"{error.problem}.", error.fix, deployment.lines.get(key))
            raise DeploymentError(deployment.source, [refusal]) from error
        found = cls(windows, file)
        found._added = -1  # a baseline is to be seen before the first request
        return found

    def on_new_request(self, request: Any) -> None:
        """Follow a request; not one without tokens to generate, nor a session of many inputs."""
        try:
            if not self._failed and request.sampling_params is not None and not request.resumable:
                self._awaited[request.request_id] = request
        except Exception as error:
            self._give_up(error)

    def step(self, output: Any) -> None:
        """Take note of the requests that a step begins."""
        for new in output.scheduled_new_reqs:
            if new.req_id in self._awaited:
                self._scheduled.add(new.req_id)

    def outputs(self) -> None:
        """The tokens of a step are there: count the first ones. Looks at nobody else."""
        if not self._scheduled:
            return
        try:
            for request_id in list(self._scheduled):
                if self._awaited[request_id].num_output_tokens:
                    self._answered(request_id)
        except Exception as error:
            self._give_up(error)

    def finished(self, request: Any) -> None:
        """Count a request that ended; with two tokens or more, what each but the first took."""
        try:
            self._finish(request)
        except Exception as error:
            self._give_up(error)

    def samples(self) -> Sequence[Sample]:
        """The quantiles of all windows, as of the last few seconds."""
        passed = self._clock() - self._computed
        idle = not self._awaited and not self._first
        new = self.windows.added != self._added
        if (
            new and passed >= (IDLE_INTERVAL if idle else INTERVAL)
        ) or INTERVAL <= passed < math.inf:
            self._computed, self._added = self._clock(), self.windows.added
            found = [
                METRICS[q.measure].of(
                    0.0 if math.isnan(q.seconds) else q.seconds,
                    *(str(q.percentile), q.window, q.prompt),
                )
                for q in self.windows.quantiles()
            ]
            found += [
                LATENCY_REQUESTS.of(count, window, prompt)
                for window, prompt, count in self.windows.requests()
            ]
            self._samples = found
        return self._samples

    def _finish(self, request: Any) -> None:
        request_id = request.request_id
        if request_id in self._scheduled and request.num_output_tokens:
            self._answered(request_id)
        self._awaited.pop(request_id, None)
        self._scheduled.discard(request_id)
        first = self._first.pop(request_id, None)
        if first is not None and request.num_output_tokens > 1:
            seconds = (self._clock() - first) / (request.num_output_tokens - 1)
            self._count(TPOT, request, seconds)

    def _answered(self, request_id: str) -> None:
        request = self._awaited.pop(request_id)
        self._scheduled.discard(request_id)
        self._first[request_id] = self._clock()
        self._count(TTFT, request, max(0.0, self._wall() - request.arrival_time))

    def _count(self, measure: str, request: Any, seconds: float) -> None:
        if self.windows.add(measure, request.num_prompt_tokens, seconds) and self._file:
            text = self.windows.dump()
            # Not here: a file may be on the other side of a network.
            self._writer = threading.Thread(target=_write, args=(self._file, text), daemon=True)
            self._writer.start()

    def _give_up(self, error: Exception) -> None:
        if not self._failed:
            logger.error("kvplug: latencies are not counted any more: %r", error)
        self._failed = True
        for kept in (self._awaited, self._scheduled, self._first):
            kept.clear()

    def stop(self) -> None:
        """Wait a little for a baseline that is being written."""
        if self._writer is not None:
            self._writer.join(5.0)


_writing = threading.Lock()


def _write(file: str, text: str) -> None:
    """Replace a file by another one, whole."""
    path = Path(file)
    part = path.with_name(f".{path.name}.part")
    try:
        with _writing:
            part.write_text(text, encoding="utf-8")
            part.replace(path)
    except OSError as error:
        logger.error("kvplug: the baseline could not be written to %s: %s", file, error)
    else:
        logger.info("kvplug: a baseline of latencies was written to %s", file)
