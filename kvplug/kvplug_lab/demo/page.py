"""The demo's page: one HTML file that stands alone, without scripts and without a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kvplug_lab.demo.compare import MIB, Row
from kvplug_lab.demo.deployments import Deployment
from kvplug_lab.demo.machine import Measured
from kvplug_lab.demo.sides import Pair
from kvplug_lab.engine.rounds import Round

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 480, 260, 46, 10, 40, 28
LINES = "abcdefgh"
"""Classes of lines, a colour and a dash each; deployments beyond them begin again."""


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: its place in the drawing and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """A line of a plot: its CSS class, its name, the place of the name, and its points."""

    css: str
    name: str
    name_at: float
    points: str


@dataclass(frozen=True)
class Plot:
    """A line plot as it is drawn.

    Attributes:
        title: What it shows, for everybody.
        x_label: Label of the horizontal axis.
        x_ticks: Marks of the horizontal axis.
        y_ticks: Marks of the vertical axis.
        lines: The lines.
        cap: A limit across the plot, or None.
    """

    title: str
    x_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    cap: Tick | None = None
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def plot(
    title: str,
    x_label: str,
    series: Sequence[tuple[str, Sequence[float]]],
    cap: tuple[float, str] | None = None,
) -> Plot:
    """Lay out lines over their index.

    Args:
        title: What it shows.
        x_label: What the index is.
        series: Name and values of each line.
        cap: A limit and its name.
    """
    most_x = max(max(len(values) for _, values in series) - 1, 1)
    most_y = max([max(values, default=0.0) for _, values in series] + ([cap[0]] if cap else []))
    most_y = most_y * 1.1 or 1.0

    def across(x: float) -> float:
        return round(LEFT + x / most_x * (WIDTH - LEFT - RIGHT), 1)

    def up(y: float) -> float:
        return round(HEIGHT - BOTTOM - y / most_y * (HEIGHT - BOTTOM - TOP), 1)

    lines = tuple(
        Line(
            css=LINES[i % len(LINES)],
            name=name,
            name_at=round(LEFT + i * (WIDTH - LEFT - RIGHT) / len(series), 1),
            points=" ".join(f"{across(x)},{up(y)}" for x, y in enumerate(values)),
        )
        for i, (name, values) in enumerate(series)
    )
    return Plot(
        title,
        x_label,
        tuple(Tick(across(x), f"{x:,.0f}") for x in ticks(most_x)),
        tuple(Tick(up(y), f"{y:,.0f}") for y in ticks(most_y)),
        lines,
        Tick(up(cap[0]), cap[1]) if cap else None,
    )


def ticks(most: float) -> list[float]:
    """Round numbers from 0 up to ``most``, about five of them."""
    rough = most / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
    return [i * step for i in range(int(most / step) + 1)]


def page(
    deployments: Sequence[Deployment],
    rounds: Sequence[Round],
    rows: Sequence[Row],
    pairs: Sequence[Pair],
    about: Sequence[str],
    verdicts: Sequence[str],
    policies: Sequence[str],
    measured: Measured,
) -> str:
    """The page as text.

    Args:
        deployments: Stock first.
        rounds: One round of each, for the plots.
        rows: The table.
        pairs: Answers side by side.
        about: What was asked, and of what memory; a paragraph each.
        verdicts: What each deployment came to, a sentence each.
        policies: What each policy did, one line each.
        measured: The footer.
    """
    running = [
        (d.name, [float(step.running) for step in found.steps])
        for d, found in zip(deployments, rounds, strict=True)
    ]
    held = [
        (d.name, [step.held * d.block_bytes / MIB for step in found.steps])
        for d, found in zip(deployments, rounds, strict=True)
    ]
    stock = deployments[0]
    memory = stock.blocks * stock.block_bytes / MIB
    plots = [
        plot("Requests running, over engine steps", "engine step", running),
        plot(
            "KV memory in use by requests, MiB, over engine steps",
            "engine step",
            held,
            (memory, "all of it"),
        ),
    ]
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html.jinja")
    return template.render(
        deployments=deployments,
        rows=rows,
        pairs=pairs,
        about=about,
        verdicts=verdicts,
        plots=plots,
        policies=policies,
        measured=measured,
        MIB=MIB,
    )
