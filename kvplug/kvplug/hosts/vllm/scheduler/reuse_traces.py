"""Spans of runs that requests take of stored segments, and of segments stored."""

from __future__ import annotations

from collections.abc import Sequence

from kvplug.hosts.vllm.messages import ReuseReport, SaveOrder
from kvplug.hosts.vllm.scheduler.reuse_requests import ReusingRequest
from kvplug.observe.request_spans import RequestSpans
from kvplug.reuse.plan import ReusePlan

MEDIUM = "memory"
"""Where segments are when they are loaded, and as they are stored: the workers' memory."""


class ReuseTraces:
    """Notes loads and stores of segments in the spans of their requests.

    Args:
        spans: Takes them.
        token_bytes: Bytes of a token in all layers and ranks, as it is stored.
    """

    def __init__(self, spans: RequestSpans, token_bytes: int):
        self._spans = spans
        self._token_bytes = token_bytes

    def loads(self, reusing: ReusingRequest, plan: ReusePlan, number: int) -> None:
        """A run was ordered for a request."""
        tokens = sum(p.length for p in plan.pieces)
        self._spans.open(
            reusing.request.request_id,
            ("run", number),
            "kvplug.load",
            {
                "kvplug.medium": MEDIUM,
                "kvplug.tokens": tokens,
                "kvplug.bytes": tokens * self._token_bytes,
                "kvplug.segments": len(plan.pieces),
                "kvplug.exact": plan.approximate_from is None,
            },
        )

    def loaded(
        self, reusing: ReusingRequest, number: int, seconds: float = 0.0, failed: str = ""
    ) -> None:
        """It is there, or failed; so many host seconds of the load went into adapting it."""
        plan = reusing.taken
        if plan is None:
            return
        shifted = sum(p.length for p in plan.pieces if p.verdict.shift)
        about = {"kvplug.shifted_tokens": shifted, "kvplug.recomputed_tokens": plan.recomputed}
        adapted = ("kvplug.adapt", seconds, about) if seconds or any(about.values()) else None
        self._spans.close(("run", number), failed=failed, child=adapted)

    def saves(self, reusing: ReusingRequest, orders: Sequence[SaveOrder]) -> None:
        """Segments of a request were ordered to be stored."""
        for order in orders:
            tokens = len(order.tokens)
            self._spans.open(
                reusing.request.request_id,
                ("segment", order.segment),
                "kvplug.save",
                {
                    "kvplug.medium": MEDIUM,
                    "kvplug.segment": order.segment,
                    "kvplug.tokens": tokens,
                    "kvplug.bytes": tokens * self._token_bytes,
                },
            )

    def saved(self, report: ReuseReport) -> None:
        """Workers have stored segments, or could not."""
        for name in report.saved:
            self._spans.close(("segment", name))
        for name, cause in report.failed.items():
            self._spans.close(("segment", name), failed=cause)
