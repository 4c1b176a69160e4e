"""OpenTelemetry spans of requests, exported where vLLM exports its own.

On with ``--otlp-traces-endpoint``. The scheduler's thread notes numbers
(`kvplug.observe.request_spans`); a thread of its own makes spans of them and gives them to the
tracer provider that vLLM made in this process, so endpoint, protocol, sampler and resource are
vLLM's.
"""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from vllm.logger import init_logger
from vllm.tracing import SpanAttributes, extract_trace_context, init_tracer

from kvplug.client_names import request_name
from kvplug.observe.request_spans import RequestSpans, RequestTrace, Span

logger = init_logger("vllm.kvplug")

MOST_WAITING = 4096
"""Requests whose spans wait to be made; of further ones none are."""

INTERVAL = 0.5
"""Seconds between two looks at what waits."""

FLUSH = 5.0
"""Seconds that the engine's end waits for spans to be exported."""

SUFFIX = re.compile(r"-[0-9a-f]{8}$")
"""What vLLM adds to a request's id to make it unique in the engine."""


class SpanExporter:
    """Makes and exports the spans of requests that ended.

    Args:
        endpoint: vLLM's ``--otlp-traces-endpoint``.
        provider: Makes tracers; by default that of the process, made as vLLM makes it if need be.

    Attributes:
        spans: Collects the spans of requests under way.
        dropped: Requests whose spans were not made.
    """

    def __init__(self, endpoint: str, provider: Any = None):
        self.spans = RequestSpans(self._put)
        self.dropped = 0
        self._endpoint = endpoint
        self._provider = provider
        self._tracer: Any = None
        self._waiting: deque[RequestTrace] = deque()
        self._failed = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvplug spans", daemon=True)
        self._thread.start()

    @classmethod
    def of(cls, vllm_config: Any) -> SpanExporter | None:
        """The exporter of an engine; None for one without an endpoint of traces."""
        endpoint = vllm_config.observability_config.otlp_traces_endpoint
        return cls(endpoint) if endpoint else None

    def stop(self) -> None:
        """Export what there is, for at most `FLUSH` seconds. Idempotent."""
        if self._stopping.is_set():
            return
        self.spans.sweep(everything=True)
        self._stopping.set()
        self._thread.join(FLUSH)
        if self._thread.is_alive():
            logger.warning(
                "kvplug: spans could not be exported to %s in %d s", self._endpoint, FLUSH
            )
        if self.dropped:
            logger.warning("kvplug: the spans of %d requests were left out", self.dropped)

    def _put(self, trace: RequestTrace) -> None:
        if len(self._waiting) < MOST_WAITING:
            self._waiting.append(trace)
        else:
            self.dropped += 1

    # -- in the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        last = False
        while not last:
            last = self._stopping.wait(INTERVAL)
            self._contained(self.spans.sweep)
            while self._waiting:
                self._contained(self._make, self._waiting.popleft())
        if self._provider is not None:
            self._contained(self._provider.force_flush)

    def _contained(self, call: Callable[..., Any], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            self.dropped += call == self._make
            if not self._failed:
                self._failed = True
                logger.error("kvplug: spans could not be made: %r", error)

    def _make(self, trace: RequestTrace) -> None:
        from opentelemetry.context import Context
        from opentelemetry.trace import set_span_in_context

        if self._tracer is None:
            self._provider = self._provider or _provider(self._endpoint)
            self._tracer = self._provider.get_tracer("kvplug", version("kvplug"))
        name = trace.request_id
        if not _keeps_ids():
            name = SUFFIX.sub("", name)
        root, epoch = trace.root, trace.epoch
        root.attributes[SpanAttributes.GEN_AI_REQUEST_ID] = request_name(name)
        if trace.left_out:
            root.attributes["kvplug.spans_left_out"] = trace.left_out
        # A context of none: else what is current in this thread would be the parent.
        parent = extract_trace_context(trace.headers) or Context()
        made = self._tracer.start_span(root.name, parent, start_time=root.begin + epoch)
        if made.is_recording():
            made.set_attributes(root.attributes)
            context = set_span_in_context(made, parent)
            for child in root.children:
                self._child(child, context, root, epoch)
        made.end(root.end + epoch)

    def _child(self, span: Span, context: Any, parent: Span, epoch: int) -> None:
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        made = self._tracer.start_span(span.name, context, start_time=span.begin + epoch)
        made.set_attributes(span.attributes)
        if span.failed:
            made.set_status(Status(StatusCode.ERROR, span.failed))
        if span.children:
            inner = set_span_in_context(made, context)
            for child in span.children:
                self._child(child, inner, span, epoch)
        # One that is not done when the request has ended, and does not get done, ends with it.
        made.end(max(span.begin, span.end or parent.end) + epoch)


def _provider(endpoint: str) -> Any:
    """The process's provider of tracers."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        init_tracer("kvplug", endpoint)
    return trace.get_tracer_provider()


def _keeps_ids() -> bool:
    """True where vLLM was told not to make request ids unique."""
    return os.environ.get("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "0") not in ("", "0")
