"""Results of a check as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvplug_lab.gpu_check.speed import STEP_TARGET, TARGETS


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of aligned columns: the first left, the others right."""
    cells = [list(heads), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def speed_heads() -> tuple[str, ...]:
    """Heads of the columns of `speed_cells`."""
    return (
        "deployment",
        "tokens/s",
        "of stock",
        "running",
        "KV tokens",
        "blocks freed",
        "decode ms",
        "of stock's",
        "target",
        "runner",
        "graphs",
    )


def speed_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The rows of the part ``speed`` as cells, one list a row."""
    rates = {row["name"]: row["tokens_per_s"] for row in rows if "tokens_per_s" in row}
    found = []
    for row in rows:
        if "tokens_per_s" not in row:
            error = str(row.get("error", "not measured")).splitlines()[0][:60]
            found.append([row["name"], error, *[""] * (len(speed_heads()) - 2)])
            continue
        ratio, decode = row.get("ratio"), row.get("decode_ratio")
        found.append(
            [
                row["name"],
                f"{row['tokens_per_s']:,.0f}" + "*" * bool(row.get("stopped")),
                "" if ratio is None else f"{ratio:.2f}",
                str(row["running"]),
                f"{row['kv_tokens']:,}",
                f"{row['blocks_freed']:,.0f}" if "blocks_freed" in row else "",
                f"{row['decode_ms']:.2f}" if "decode_ms" in row else "",
                "" if decode is None else f"{decode:.3f}",
                target_text(row["name"], rates),
                str(row.get("runner", "")),
                str(row.get("graphs", "")).lower().replace("_", " "),
            ]
        )
    return found


def target_text(name: str, rates: Mapping[str, float]) -> str:
    """What a deployment aims at and what it reached of it; empty where it has no aim.

    Args:
        name: Row.
        rates: Tokens per second by row.
    """
    if name not in TARGETS:
        return ""
    base, aim = TARGETS[name]
    if not rates.get(base):
        return f"{aim:g}x {base}"
    reached = rates[name] / rates[base]
    return f"{reached:.2f} of {aim:g}x {base}: {'met' if reached >= aim else 'below'}"


def summary(data: Mapping[str, Any]) -> str:
    """The results of all parts as text, failures named."""
    lines = []
    for name, part in data["parts"].items():
        rows = part["rows"]
        bad = [row["name"] for row in rows if not row["ok"]]
        state = "ok" if part["ok"] else "FAILED"
        lines.append(f"{name}: {state}, {len(rows)} rows, {part['seconds']:.0f} s")
        if bad:
            lines.append(f"  failed: {', '.join(dict.fromkeys(bad))}")
        if part["error"]:
            lines.append(f"  error: {str(part['error']).splitlines()[0]}")
    speed = data["parts"].get("speed")
    if speed and speed["rows"]:
        lines += ["", table(speed_heads(), speed_cells(speed["rows"]))]
        lines.append(
            "* stopped early. A decode step is one of 8 short requests, from which nothing is "
            f"evicted; it is to cost at most {STEP_TARGET:g} of stock's."
        )
    return "\n".join(lines)
