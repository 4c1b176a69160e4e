"""The picture of a simulation: hit rate against capacity, one panel a trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvplug.hosts.trace.simulator import ReplayResult

MOST_TICKS = 8
"""Up to this many capacities are each named on the axis."""


def draw(path: Path, traces: Sequence[Sequence[ReplayResult]], lines: Sequence[str]) -> None:
    """Draw results with matplotlib.

    Args:
        path: Image to write; its ending says the format.
        traces: Results of each trace, one panel each.
        lines: Labels drawn as the black lines the others are read against.
    """
    from matplotlib.figure import Figure

    columns = min(2, len(traces))
    rows = -(-len(traces) // columns)
    figure = Figure(figsize=(6.4 * columns, 4.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for panel in panels[len(traces) :]:
        panel.set_axis_off()
    styles = dict(zip(lines, ("--", "-", ":", "-."), strict=False))
    for panel, results in zip(panels, traces, strict=False):
        by_label: dict[str, list[ReplayResult]] = {}
        for result in results:
            by_label.setdefault(result.policy, []).append(result)
        for label, found in by_label.items():
            found.sort(key=lambda r: r.capacity)
            sizes, rates = [r.capacity for r in found], [r.hit_rate for r in found]
            if label in styles:
                panel.plot(
                    sizes, rates, styles[label], color="black", marker=".", label=label.upper()
                )
            else:
                panel.plot(sizes, rates, marker="o", markersize=4, linewidth=0.8, label=label)
        panel.set_title(results[0].trace)
        sizes = sorted({r.capacity for r in results})
        panel.set_xscale("log")
        if len(sizes) <= MOST_TICKS:
            panel.minorticks_off()
            panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
        panel.set_xlabel("capacity, blocks")
        panel.set_ylabel("hit rate")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    figure.savefig(path, dpi=150)
