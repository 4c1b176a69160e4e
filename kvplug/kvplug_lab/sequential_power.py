"""Answers that the shadow's test needs, on numbers drawn at random.

``python -m kvplug_lab.sequential_power`` draws streams of divergences of a mean that is so many
times the bound, of three shapes, and prints how many answers pass until requests are made exact:
median and 90th percentile, from the beginning and after harmless answers. A mean equal to the bound
shows the test's error.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from scipy import stats

from kvplug.reuse.settings import ShadowSettings
from kvplug.shadow.sequential import MeanTest

HARMLESS = 0.2
"""Mean of harmless divergences, as a share of the bound."""

Draw = Callable[[random.Random, float], float]

SHAPES: dict[str, Draw] = {
    "all alike": lambda rng, mean: mean,
    "spread": lambda rng, mean: rng.betavariate(2, 2 / mean - 2),
    "all or nothing": lambda rng, mean: float(rng.random() < mean),
}
"""How divergences of a mean are drawn."""


def answers_needed(
    draw: Draw, mean: float, harmless: int, settings: ShadowSettings, seed: int, most: int
) -> int | None:
    """Answers until the test rejects, harmless ones before them not counted; None for more than
    ``most``."""
    rng = random.Random(seed)
    test = MeanTest(settings.max_divergence, settings.alpha, "above", changes=True)
    for _ in range(harmless):
        test.add(draw(rng, settings.max_divergence * HARMLESS))
    for count in range(1, most + 1):
        if test.add(draw(rng, mean)):
            return count
    return None


def main(
    streams: Annotated[int, typer.Option(help="Streams of each row.")] = 200,
    harmless: Annotated[int, typer.Option(help="Harmless answers before, of the second pair.")] = (
        1000
    ),
    most: Annotated[int, typer.Option(help="Longest stream, in answers.")] = 2000,
) -> None:
    """Print the table."""
    settings = ShadowSettings()
    table = Table()
    for name in ("mean / bound", "divergences", "made exact", "median", "90%"):
        table.add_column(name, justify="right" if name != "divergences" else "left")
    for name in (f"after {harmless:,}: median", "90%"):
        table.add_column(name, justify="right")
    for times in (1, 2, 4, 10):
        for shape, draw in SHAPES.items():
            mean = times * settings.max_divergence
            cells = []
            for before in (0, harmless):
                found = [
                    answers_needed(draw, mean, before, settings, seed, most)
                    for seed in range(streams)
                ]
                done = [n for n in found if n is not None]
                if not before:
                    made = stats.binomtest(len(done), streams).proportion_ci(method="wilson")
                    part = f"{len(done) / streams:.1%}"
                    cells.append(f"{part} ({made.low:.1%} to {made.high:.1%})")
                if len(done) < streams:
                    cells += ["", ""]
                    continue
                median, ninth = np.quantile(done, (0.5, 0.9))
                cells += [f"{median:.0f}", f"{ninth:.0f}"]
            table.add_row(str(times), shape, *cells)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
