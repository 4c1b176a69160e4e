"""The closing summary: one line per policy, with its counters and failures."""

from __future__ import annotations

from collections.abc import Sequence

from kvplug.contract import PolicyReport


def summary_lines(reports: Sequence[PolicyReport], steps: int) -> list[str]:
    """Format one line per policy; failures and policies that never acted come first in theirs."""
    lines = [f"kvplug summary after {steps:,} scheduler steps:"]
    if not reports:
        lines.append("  no policy configured; the engine ran as stock")
    for report in reports:
        counts = ", ".join(f"{name} {value:,.0f}" for name, value in report.counters.items())
        exact = "exact" if report.exact else "approximate"
        state = ""
        if report.errors:
            state = f"FAILED {report.errors:,} times, the host's default took over; "
        elif not report.acted:
            state = "NEVER ACTED: configured, but nothing came its way; "
        lines.append(f"  {report.kind}: {report.name} ({exact}): {state}{counts}")
    return lines
