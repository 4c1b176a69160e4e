"""Counters of reuse."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from kvplug.hosts.vllm.messages import ReuseReport
from kvplug.reuse.plan import ReusePlan


@dataclass
class ReuseCounters:
    """Counters of reuse.

    Attributes:
        segments: Segments stored.
        requests: Requests that took stored tokens.
        approximate_requests: Those of them that are not exact.
        tokens: Tokens taken, not counting those recomputed among them.
        exact_tokens: Those of them that were exact.
        shifted_tokens: Those of them whose keys were re-rotated.
        loaded: Tokens that workers wrote into pages.
        corrected: Those of them that a check corrected on the way.
        computed: Tokens recomputed within runs.
        waited: Times a request waited for the folder.
        drifted: Answers the guard found unlike exact ones.
        plans: Plans made.
        plan_us: Microseconds spent planning, matching and checks included.
        check_us: Those of them in checks.
    """

    segments: int = 0
    requests: int = 0
    approximate_requests: int = 0
    tokens: int = 0
    exact_tokens: int = 0
    shifted_tokens: int = 0
    loaded: int = 0
    corrected: int = 0
    computed: int = 0
    waited: int = 0
    drifted: int = 0
    plans: int = 0
    plan_us: float = 0.0
    check_us: float = 0.0

    def count_run(self, plan: ReusePlan) -> None:
        """Count a run that a request takes."""
        self.requests += 1
        self.approximate_requests += plan.approximate_from is not None
        self.tokens += plan.length - plan.recomputed
        self.exact_tokens += sum(p.length for p in plan.pieces if p.verdict.exact)
        self.shifted_tokens += sum(p.length for p in plan.pieces if p.verdict.shift)

    def count_report(self, report: ReuseReport) -> None:
        """Count what workers loaded and recomputed."""
        self.loaded += report.loaded[0]
        self.corrected += report.loaded[1]
        self.computed += report.computed

    def table(self) -> dict[str, float]:
        """Counters by name, rounded."""
        return {name: round(value) for name, value in asdict(self).items()}
