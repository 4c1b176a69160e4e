"""The picture of an evaluation: each metric against the budget, one panel a metric."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvplug_lab.fidelity.records import FULL
from kvplug_lab.fidelity.report import Metric, Row

MARKS = "os^vD<>pPX*h"


def draw(path: Path, rows: Sequence[Row], metrics: Sequence[Metric]) -> None:
    """Draw with matplotlib; bars are 95 % intervals, the dashed line is the full cache.

    Args:
        path: Image to write; its ending says the format.
        rows: What `kvplug_lab.fidelity.report.summarise` gave.
        metrics: What to draw; log-perplexity is left out beside what is added to it.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    # Passages differ more from each other than policies do: what a policy adds is drawn instead.
    shown = [m for m in metrics if m.name != "nll"]
    variants = list(dict.fromkeys(r.variant for r in rows if r.variant != FULL))
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    across = min(2, len(shown))
    down = -(-len(shown) // across)
    figure = Figure(figsize=(6.2 * across, 3.4 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel().tolist()
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    apart = 0.0025
    for metric, panel in zip(shown, panels, strict=False):
        for i, variant in enumerate(variants):
            found = sorted(
                (r for r in rows if r.variant == variant and r.metric == metric.name),
                key=lambda r: r.budget,
            )
            # Moved apart a little, so that intervals do not hide each other.
            places = [r.budget + (i - (len(variants) - 1) / 2) * apart for r in found]
            errors = (
                [max(0.0, r.value - r.low) for r in found],
                [max(0.0, r.high - r.value) for r in found],
            )
            panel.errorbar(
                places,
                [r.value for r in found],
                yerr=errors,
                color=colours[i % len(colours)],
                marker=MARKS[i % len(MARKS)],
                markersize=4,
                linewidth=1,
                elinewidth=0.5,
                label=variant,
            )
        full = next((r for r in rows if r.variant == FULL and r.metric == metric.name), None)
        if full is not None:
            panel.axhline(full.value, color="black", linestyle="--", linewidth=1, label=FULL)
        panel.set_title(f"{metric.label} ({'higher' if metric.higher else 'lower'} is better)")
        coded = any(r.bytes is not None for r in rows)
        panel.set_xlabel(f"part of {'bfloat16 bytes' if coded else 'the context'} kept")
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(path, dpi=120)
