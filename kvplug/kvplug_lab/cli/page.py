"""The demo's page: figures and plots in one self-contained HTML file, no scripts, no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvplug_lab.engine.trial import TrialResult

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --dim: #6b7280; --line: #d7dbe0; --a: #9aa1ab;
        --b: #2563eb; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --dim: #9aa1ab; --line: #363b42;
        --a: #7d8590; --b: #6ea0ff; --paper: #14171a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 58rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem } h2 { font-size: 1.05rem; margin: 2rem 0 .4rem }
p, figcaption { color: var(--dim) } figure { margin: 0 } svg { width: 100%; height: auto }
table { border-collapse: collapse; width: 100% } td, th { padding: .3rem .6rem; text-align: right;
       border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums }
td:first-child, th:first-child { text-align: left }
pre { white-space: pre-wrap; border: 1px solid var(--line); padding: .7rem; border-radius: .3rem }
text { fill: var(--dim); font: 12px system-ui, sans-serif }
.axis { stroke: var(--line) } .a { stroke: var(--a) } .b { stroke: var(--b) }
.series { fill: none; stroke-width: 2 } .cap { stroke: var(--dim); stroke-dasharray: 4 4 }
.name-a { fill: var(--a) } .name-b { fill: var(--b) }
"""

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 900, 300, 56, 34, 14


def _ticks(most: float) -> list[float]:
    """Round numbers from 0 up to ``most``, about five of them."""
    rough = most / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
    return [i * step for i in range(int(most / step) + 1)]


def _plot(
    series: Sequence[tuple[str, str, Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    cap: tuple[float, str] | None = None,
) -> str:
    """An SVG line plot of ``(css class, name, x, y)`` series."""
    most_x = max(max(x, default=1.0) for _, _, x, _ in series) or 1.0
    values = [max(y, default=1.0) for _, _, _, y in series] + ([cap[0]] if cap else [])
    most_y = max(values) * 1.15 or 1.0

    def px(x: float) -> float:
        return LEFT + x / most_x * (WIDTH - LEFT - 10)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - y / most_y * (HEIGHT - BOTTOM - TOP)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)}">']
    for y in _ticks(most_y):
        parts.append(
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - 10}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>'
            f'<text x="{LEFT - 8}" y="{py(y) + 4:.1f}" text-anchor="end">{y:,.0f}</text>'
        )
    for x in _ticks(most_x):
        parts.append(
            f'<text x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:,.0f}</text>'
        )
    parts.append(
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 2}" text-anchor="middle">{escape(x_label)}</text>'
    )
    if cap is not None:
        parts.append(
            f'<line class="cap" x1="{LEFT}" x2="{WIDTH - 10}" y1="{py(cap[0]):.1f}" '
            f'y2="{py(cap[0]):.1f}"/><text x="{WIDTH - 14}" y="{py(cap[0]) - 5:.1f}" '
            f'text-anchor="end">{escape(cap[1])}</text>'
        )
    for row, (css, name, xs, ys) in enumerate(series):
        points = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in zip(xs, ys, strict=True))
        parts.append(f'<polyline class="series {css}" points="{points}"/>')
        parts.append(
            f'<text class="name-{css}" x="{LEFT + 10}" y="{TOP + 14 + 16 * row}">'
            f"{escape(name)}</text>"
        )
    return "".join(parts) + "</svg>"


def demo_page(
    stock: TrialResult,
    kvplug: TrialResult,
    figures: Mapping[str, Mapping[str, float]],
    rows: Mapping[str, tuple[str, str]],
    name: str,
    policies: Sequence[str],
) -> str:
    """The page as text.

    Args:
        stock: The run without kvplug.
        kvplug: The run with it.
        figures: Figures of ``stock`` and ``kvplug``, by name.
        rows: Label and format of each figure shown, by name.
        name: Name of the deployment.
        policies: What each policy did, one line each.
    """

    def lines(what: str, over: str) -> str:
        series = []
        for css, label, result in (("a", "stock vLLM", stock), ("b", name, kvplug)):
            xs = (
                [float(i) for i in range(len(result.steps))]
                if over == "step"
                else [s.seconds for s in result.steps]
            )
            series.append((css, label, xs, [float(getattr(s, what)) for s in result.steps]))
        label = "blocks in use by requests" if what == "held" else "requests running"
        cap = (float(stock.num_blocks), "the pool") if what == "held" else None
        return _plot(series, "engine step" if over == "step" else "seconds", label, cap)

    prompts = [a.prompt_tokens for a in stock.answers]
    table = "".join(
        f"<tr><td>{escape(label)}</td><td>{figures['stock'][key]:{form}}</td>"
        f"<td>{figures['kvplug'][key]:{form}}</td></tr>"
        for key, (label, form) in rows.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>kvplug demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE}</style></head><body>
<h1>The same requests in the same KV memory</h1>
<p>{len(stock.answers)} requests of {min(prompts):,} to {max(prompts):,} tokens on
{stock.num_blocks:,} blocks of {stock.block_size} tokens ({stock.block_bytes / 1024:,.0f} KiB each):
stock vLLM, and <b>{escape(name)}</b> with kvplug, each in a fresh process.</p>
<table><tr><th></th><th>stock vLLM</th><th>{escape(name)}</th></tr>{table}</table>
<h2>Blocks in use by requests, over steps</h2><figure>{lines("held", "step")}</figure>
<h2>Requests running, over time</h2><figure>{lines("running", "seconds")}</figure>
<h2>What each policy did</h2><pre>{escape(chr(10).join(policies))}</pre>
</body></html>
"""
