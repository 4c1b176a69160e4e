"""``python -m kvplug_lab.figures FOLDER``: draws the figures of the pages from their JSON.

Every ``NAME.json`` of the folder that has a drawing becomes ``NAME.svg``. A drawing is of numbers
alone: `series` says which, and they are written with an id each, so that a test can compare a
drawing with its data. Text and axes have the colour of the page they stand in.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvplug.errors import KVPlugError
from kvplug_lab.fidelity.records import FULL

INK = "#010203"
"""Stands for the page's own colour until the drawing is written."""

BLUE, ORANGE, GREEN, RED, VIOLET, GREY = (
    "#3b8ed0",
    "#e08214",
    "#2a9d8f",
    "#d1495b",
    "#8e6bbf",
    "#8c8c8c",
)
"""Readable on a light page and on a dark one."""

VERDICTS = {"better": GREEN, "worse": RED, "within noise": GREY}


@dataclass(frozen=True)
class Series:
    """Points of one colour in one panel.

    Attributes:
        panel: Index of its panel.
        label: Its name in the legend; empty for none.
        x: Places of the points along the horizontal axis.
        y: Places along the vertical axis.
        low: Lower ends of the horizontal error bars, or of the vertical ones where `upright`.
        high: Upper ends.
        colour: Its colour.
        marker: matplotlib's marker; empty for none.
        line: Whether points are joined.
        upright: Whether error bars are vertical.
    """

    panel: int
    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    colour: str = BLUE
    marker: str = "o"
    line: bool = False
    upright: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: Its heading.
        x: Label of the horizontal axis.
        rows: Names of the places 0, 1, ... from the top; empty for a numeric vertical axis.
        scales: ``linear`` or ``log``, horizontal and vertical.
        y: Label of the vertical axis.
        percent: Whether the horizontal axis is in percent.
        ticks: Places of the marks of the horizontal axis; empty for matplotlib's own.
        mark: Where a line divides the panel; None for nowhere.
    """

    title: str
    x: str = ""
    rows: Sequence[str] = ()
    scales: tuple[str, str] = ("linear", "linear")
    y: str = ""
    percent: bool = False
    ticks: Sequence[float] = ()
    mark: float | None = None


@dataclass(frozen=True)
class Drawing:
    """A figure: what it shows, its panels side by side, and their series."""

    title: str
    panels: Sequence[Panel]
    series: Sequence[Series]
    size: tuple[float, float] = (9.0, 4.0)
    columns: int = 0


# -- what is drawn ---------------------------------------------------------------------------------


def fidelity_policies(data: Any) -> Drawing:
    """Cost of every sequence policy in answers, by budget."""
    metrics = {
        "kl": "divergence, nats",
        "prefix": "greedy prefix",
        "passkey": "passkey, before",
        "passkey_later": "passkey, later",
    }
    value = {(r["variant"], r["budget"], r["metric"]): r["value"] for r in data["summary"]}
    names = sorted(
        {name for name, _, _ in value if name != FULL},
        key=lambda name: (value[name, 0.5, "kl"], name),
    )
    shown = {0.25: (RED, "v"), 0.5: (ORANGE, "s"), 0.75: (BLUE, "o")}
    series = [
        Series(
            panel,
            f"{budget:.0%} kept" if panel == 0 else "",
            [value[name, budget, metric] for name in names],
            range(len(names)),
            colour=colour,
            marker=marker,
        )
        for panel, metric in enumerate(metrics)
        for budget, (colour, marker) in shown.items()
    ]
    panels = [
        Panel(
            title,
            rows=names,
            scales=("log" if metric == "kl" else "linear", "linear"),
            percent=metric != "kl",
            mark=None if metric == "kl" else value[FULL, 1.0, metric],
        )
        for metric, title in metrics.items()
    ]
    return Drawing("What dropping tokens costs in answers", panels, series, (9.4, 4.4))


def fidelity_kvpress(data: Any) -> Drawing:
    """Divergence of every method, kvplug's and kvpress's, by budget."""
    rows = [r for r in data if r["metric"] == "kl"]
    names = list(dict.fromkeys(r["ours_variant"] for r in rows))
    budgets = sorted({r["budget"] for r in rows})
    series = []
    for panel, budget in enumerate(budgets):
        found = {r["ours_variant"]: r for r in rows if r["budget"] == budget}
        for side, colour, marker in (("ours", BLUE, "o"), ("theirs", ORANGE, "D")):
            label = {"ours": "kvplug", "theirs": "kvpress"}[side] if panel == 0 else ""
            x = [found[name][side] for name in names]
            series.append(Series(panel, label, x, range(len(names)), colour=colour, marker=marker))
    panels = [Panel(f"{b:.0%} kept", "divergence, nats", names, ("log", "linear")) for b in budgets]
    return Drawing("Divergence under kvplug and kvpress", panels, series, (10.0, 3.4))


def fidelity_formats(data: Any) -> Drawing:
    """Bytes and divergence of every format, kvplug's and vLLM's."""
    rows = [r for r in data["summary"] if r["metric"] == "kl" and r["variant"] != FULL]
    rows.sort(key=lambda r: r["budget"])
    names = [r["variant"] for r in rows]
    series = []
    for kind, colour, marker in (("kvplug", BLUE, "o"), ("vLLM", ORANGE, "D")):
        own = [
            i
            for i, name in enumerate(names)
            if (kind == "vLLM") == name.startswith(("vllm_", "turboquant_"))
        ]
        bytes_ = [256 * rows[i]["budget"] for i in own]
        series.append(Series(0, kind, bytes_, own, colour=colour, marker=marker))
        # What rounds to 0 has no place on a logarithmic axis.
        own = [i for i in own if rows[i]["value"] > 0]
        series.append(
            Series(
                1,
                "",
                [rows[i]["value"] for i in own],
                own,
                [rows[i]["low"] for i in own],
                [rows[i]["high"] for i in own],
                colour,
                marker,
            )
        )
    panels = [
        Panel("bytes per token and KV head", "bfloat16: 256", names),
        Panel("divergence, with 95 % intervals", "nats", names, ("log", "linear")),
    ]
    return Drawing("Divergence of formats and their bytes", panels, series, (9.0, 5.2))


def fidelity_formats_pairs(data: Any) -> Drawing:
    """Ratio of divergences of kvplug's formats to vLLM's of about as many bytes."""
    names = [f"{r['ours']} / {r['theirs']}" for r in data]
    series = [
        Series(
            0,
            verdict,
            [r["ratio"] for r in data if r["verdict"] == verdict],
            [i for i, r in enumerate(data) if r["verdict"] == verdict],
            [r["low"] for r in data if r["verdict"] == verdict],
            [r["high"] for r in data if r["verdict"] == verdict],
            colour=colour,
        )
        for verdict, colour in VERDICTS.items()
    ]
    panel = Panel("", "ratio of divergences, ours to theirs", names, ("log", "linear"), mark=1.0)
    return Drawing("Formats at about equal bytes", [panel], series, (9.0, 5.0))


def ruler_smollm2(data: Any) -> Drawing:
    """RULER's mean under every policy and budget, and its difference from the full cache."""
    rows = [r for r in data["summary"] if r["metric"] == "ruler"]
    (full,) = (r for r in rows if r["variant"] == FULL)
    names = list(dict.fromkeys(r["variant"] for r in rows if r["variant"] != FULL))
    budgets = sorted({r["budget"] for r in rows if r["variant"] != FULL})
    shown = list(zip(budgets, ((RED, "v"), (ORANGE, "s"), (BLUE, "o")), strict=False))
    series = []
    for i, (budget, (colour, marker)) in enumerate(shown):
        found = {r["variant"]: r for r in rows if r["budget"] == budget}
        own = [found[name] for name in names]
        # Moved apart a little, so that intervals do not hide each other.
        places = [at + 0.24 * (i - (len(shown) - 1) / 2) for at in range(len(names))]
        label = f"{budget:.0%} kept"
        for panel, (value, low, high), scale in (
            (0, ("value", "low", "high"), 1),
            (1, ("difference", "difference_low", "difference_high"), 100),
        ):
            x, lows, highs = ([scale * r[key] for r in own] for key in (value, low, high))
            text = "" if panel else label
            series.append(Series(panel, text, x, places, lows, highs, colour, marker))
    panels = [
        Panel("right answers; dashed: full cache", rows=names, percent=True, mark=full["value"]),
        Panel("difference from the full cache", "points, with 95 % intervals", names, mark=0.0),
    ]
    title = (
        "RULER under sequence policies: right answers at 25 and 50 % of the cache, and how many "
        "points fewer than with the full cache"
    )
    return Drawing(title, panels, series, (9.0, 2.6))


def bench(data: Any) -> Drawing:
    """Step time of engines against stock, and microseconds added to a scheduler's step."""
    engines = data["engine_steps"]
    names = list(engines)
    ratio = [engines[name]["ratio"] for name in names]
    series = [
        Series(
            0,
            "",
            [r["median"] for r in ratio],
            range(len(names)),
            [r["low"] for r in ratio],
            [r["high"] for r in ratio],
        )
    ]
    steps = data["scheduler_steps"]
    loads = list(steps)
    sections = list(steps[loads[0]])
    for section, colour in zip(sections, (GREY, BLUE, ORANGE), strict=False):
        found = [steps[load][section]["connector_us"] for load in loads]
        series.append(
            Series(
                1,
                section,
                [float(load) for load in loads],
                [f["median"] for f in found],
                [f["low"] for f in found],
                [f["high"] for f in found],
                colour=colour,
                line=True,
                upright=True,
            )
        )
    panels = [
        Panel("decode step, ratio to stock", "ratio", rows=names, mark=1.0),
        Panel(
            "kvplug's part of a scheduler step",
            "running requests",
            scales=("log", "log"),
            y="microseconds",
        ),
    ]
    return Drawing("What kvplug costs when it is there", panels, series, (9.0, 3.2))


def _gain(data: Any) -> Drawing:
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in data["runs"]:
        runs.setdefault(run["policy"], []).append(run)
    names = list(runs)
    place = {name: i for i, name in enumerate(names)}
    first = [runs[name][0] for name in names]
    series = [
        Series(0, "", [r["requests"] for r in first], range(len(names))),
        Series(1, "", [r["greedy_agreement"] for r in first], range(len(names)), colour=GREEN),
        Series(
            2,
            "",
            [r["ratio"] for name in names for r in runs[name]],
            [place[name] for name in names for _ in runs[name]],
            colour=ORANGE,
        ),
    ]
    panels = [
        Panel("requests running at once, mean", rows=names, mark=first[0]["requests"]),
        Panel("output until it differs from stock's", rows=names, percent=True, mark=1.0),
        Panel("output tokens/s, ratio to stock", rows=names, mark=1.0),
    ]
    return Drawing(
        "What the same KV memory serves", panels, series, (10.0, 0.9 + 0.24 * len(names))
    )


def prefix_cache(data: Any) -> Drawing:
    """Hit rates of eviction orders on four traces, between LRU and the offline optimum."""
    shown = {"min": (INK, "MIN"), "foresight": (RED, "foresight"), "lru": (BLUE, "lru")}
    shown |= {"arc": (ORANGE, "arc"), "lfu:half_life=100000": (VIOLET, "lfu, half-life")}
    traces = list(dict.fromkeys(r["trace"] for r in data))
    orders = dict.fromkeys(r["policy"] for r in data)
    ordered = [name for name in orders if name not in shown] + list(reversed(shown))
    series = []
    for panel, trace in enumerate(traces):
        for name in ordered:
            own = [r for r in data if r["trace"] == trace and r["policy"] == name]
            colour, label = shown.get(name, (GREY, ""))
            series.append(
                Series(
                    panel,
                    label if panel == 0 else "",
                    [1.0, 2.0, 5.0, 10.0],
                    [100 * r["hit_rate"] for r in own],
                    colour=colour,
                    marker="o" if name in shown else "",
                    line=True,
                )
            )
    panels = [
        Panel(
            trace,
            "capacity, % of blocks",
            ticks=(1, 2, 5, 10),
            scales=("log", "linear"),
            y="hit rate, %" if i == 0 else "",
        )
        for i, trace in enumerate(traces)
    ]
    return Drawing("Hit rates of eviction orders", panels, series, (9.4, 3.4))


def reuse_rag(data: Any) -> Drawing:
    """Time to first token and perplexity when documents are reused."""
    rows = data["rows"]
    names = [r["variant"] for r in rows]
    fast = [(i, r["speedup"]) for i, r in enumerate(rows) if r["speedup"]]
    series = [
        Series(
            0,
            "",
            [s["median"] for _, s in fast],
            [i for i, _ in fast],
            [s["low"] for _, s in fast],
            [s["high"] for _, s in fast],
        ),
        Series(1, "", [r["perplexity"] for r in rows], range(len(rows)), colour=GREEN),
        Series(
            2,
            "",
            [r["pass_keys"] / r["pass_keys_asked"] for r in rows],
            range(len(rows)),
            colour=RED,
        ),
    ]
    panels = [
        Panel("stock's time to first token by it", rows=names, mark=1.0),
        Panel("perplexity", rows=names, mark=rows[0]["perplexity"]),
        Panel("pass keys found", rows=names, percent=True),
    ]
    return Drawing("Documents in any order", panels, series, (10.0, 3.2))


def reuse_calibration(data: Any) -> Drawing:
    """Divergence of every way to reuse, and the tokens it computes again."""
    rows = [r for r in data["effects"] if r["divergence"] > 0]
    names = [r["reuse"] for r in rows]
    series = []
    for name, colour in (("own sink", RED), ("shared prefix", BLUE)):
        own = [i for i, r in enumerate(rows) if r["reuse"].startswith(name)]
        found = [rows[i] for i in own]
        series += [
            Series(0, name, [r["computed"] for r in found], own, colour=colour),
            Series(
                1,
                "",
                [r["divergence"] for r in found],
                own,
                [r["divergence"] - r["error"] for r in found],
                [r["divergence"] + r["error"] for r in found],
                colour,
            ),
        ]
    panels = [
        Panel("tokens computed again", rows=names, percent=True),
        Panel("divergence, with standard errors", "nats", names, ("log", "linear")),
    ]
    return Drawing("What recomputation buys", panels, series, (9.0, 5.4))


def calibrate(data: Any) -> Drawing:
    """Divergence that each format alone causes in each layer, and the choice."""
    layers = data["layers"]
    names = list(layers[0]["formats"])
    series = [
        Series(
            0,
            name,
            [r["layer"] for r in layers if r["formats"][name]["divergence"] > 0],
            [
                r["formats"][name]["divergence"]
                for r in layers
                if r["formats"][name]["divergence"] > 0
            ],
            colour=colour,
            marker="",
            line=True,
        )
        for name, colour in zip(names, (GREY, RED, BLUE, VIOLET, ORANGE), strict=False)
    ]
    series.append(
        Series(
            0,
            "chosen",
            [r["layer"] for r in layers],
            [r["formats"][r["chosen"]]["divergence"] for r in layers],
            colour=INK,
        )
    )
    panel = Panel("", "layer", scales=("linear", "log"), y="divergence, nats")
    return Drawing("Which format each layer gets", [panel], series, (9.0, 3.8))


DRAWINGS: dict[str, Callable[[Any], Drawing]] = {
    "fidelity_policies": fidelity_policies,
    "fidelity_kvpress": fidelity_kvpress,
    "fidelity_formats": fidelity_formats,
    "fidelity_formats_pairs": fidelity_formats_pairs,
    "ruler_smollm2": ruler_smollm2,
    "bench": bench,
    "gain_policies": _gain,
    "gain_formats": _gain,
    "prefix_cache": prefix_cache,
    "reuse_rag": reuse_rag,
    "reuse_calibration": reuse_calibration,
    "calibrate": calibrate,
}
"""Name of a file to what is drawn of it."""


# -- drawing ---------------------------------------------------------------------------------------


def draw(drawing: Drawing, name: str) -> str:
    """A drawing as SVG. Series ``i`` has the id ``NAME-i``."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 10.5,
        "axes.titlesize": 10.5,
        **{key: INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor")},
        **{key: INK for key in ("xtick.color", "ytick.color", "legend.labelcolor")},
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=drawing.size, layout="constrained")
        axes = figure.subplots(1, len(drawing.panels), squeeze=False)[0]
        for i, (panel, axis) in enumerate(zip(drawing.panels, axes, strict=True)):
            _axes(axis, panel, shared=i > 0 and panel.rows == drawing.panels[0].rows)
        for i, one in enumerate(drawing.series):
            _series(axes[one.panel], one, f"{name}-{i}")
        handles: list[Any] = []
        labels: list[str] = []
        for axis in axes:
            more, texts = axis.get_legend_handles_labels()
            handles, labels = handles + more, labels + texts
        if labels:
            figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1, flags=re.DOTALL)
    end = svg.index(">") + 1
    lines = f"{svg[:end]}\n<title>{drawing.title}</title>{svg[end:]}".splitlines()
    return "\n".join(line.rstrip() for line in lines if line.strip()) + "\n"


def _axes(axis: Any, panel: Panel, shared: bool) -> None:
    from matplotlib.ticker import NullFormatter, PercentFormatter

    axis.set_title(panel.title)
    axis.set_xlabel(panel.x)
    axis.set_ylabel(panel.y)
    axis.set_xscale(panel.scales[0])
    axis.set_yscale(panel.scales[1])
    for log, one in zip(panel.scales, (axis.xaxis, axis.yaxis), strict=True):
        if log == "log":
            one.set_minor_formatter(NullFormatter())
    axis.grid(color=GREY, alpha=0.3, linewidth=0.5)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if panel.rows:
        axis.set_yticks(range(len(panel.rows)), [] if shared else list(panel.rows))
        axis.set_ylim(len(panel.rows) - 0.5, -0.5)
    if panel.percent:
        axis.set_xlim(-0.04, 1.04)
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    if panel.ticks:
        axis.set_xticks(panel.ticks, [f"{tick:g}" for tick in panel.ticks])
    if panel.mark is not None:
        axis.axvline(panel.mark, color=GREY, linestyle="--", linewidth=1)


def _series(axis: Any, one: Series, gid: str) -> None:
    if one.low:
        middle = one.y if one.upright else one.x
        # An interval that was not measured is a point.
        ends = [
            (0.0 if low is None else max(0.0, m - low), 0.0 if high is None else max(0.0, high - m))
            for m, low, high in zip(middle, one.low, one.high, strict=True)
        ]
        errors = tuple(zip(*ends, strict=True))
        bars = {"yerr": errors} if one.upright else {"xerr": errors}
        axis.errorbar(one.x, one.y, **bars, fmt="none", ecolor=one.colour, elinewidth=0.8)
    (drawn,) = axis.plot(
        one.x,
        one.y,
        color=one.colour,
        marker=one.marker or None,
        markersize=5,
        linewidth=1.2 if one.line else 0,
        linestyle="-" if one.line else "none",
        label=one.label or None,
    )
    drawn.set_gid(gid)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what a folder has data for."""
    parser = argparse.ArgumentParser(prog="python -m kvplug_lab.figures", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with the JSON files")
    folder: Path = parser.parse_args(arguments).folder
    try:
        for name, shown in DRAWINGS.items():
            data = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            (folder / f"{name}.svg").write_text(draw(shown(data), name), encoding="utf-8")
            print(folder / f"{name}.svg")
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(
            KVPlugError(f"{folder / name}.json: {type(error).__name__}: {error}"), file=sys.stderr
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
