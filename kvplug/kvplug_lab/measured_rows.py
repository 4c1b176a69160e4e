"""``python -m kvplug_lab.measured_rows``: puts the figures of the pages that say what a deployment
costs into the package, where ``kvplug plan`` reads them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvplug.planning.prices import FILE
from kvplug_lab.fidelity.records import FULL
from kvplug_lab.gpu_check.speed import ROWS

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"
FIDELITY = ("fidelity_formats", "fidelity_policies")
METRICS = ("added", "kl", "top1", "prefix", "agreement", "passkey", "multikey")
SPEED = ("ratio", "tokens_per_s", "running")


def rows(figures: Path) -> list[dict[str, Any]]:
    """Read the figures.

    Args:
        figures: Folder of their JSON files.

    Returns:
        Measurements, each with the fields of `kvplug.planning.prices.Price`.
    """
    sources = _read(figures, "sources")
    found: list[dict[str, Any]] = []
    for name in FIDELITY:
        found += _fidelity(_read(figures, name), sources[name])
    return found + list(_speed(_read(figures, "gpu"), sources["gpu"]))


def _read(figures: Path, name: str) -> Any:
    return json.loads((figures / f"{name}.json").read_text(encoding="utf-8"))


def _fidelity(data: Any, source: Any) -> list[dict[str, Any]]:
    about = data["about"]
    found: dict[tuple[str, float], dict[str, Any]] = {}
    for one in data["summary"]:
        if one["variant"] == FULL or one["metric"] not in METRICS or one["value"] is None:
            continue
        key = one["variant"], one["budget"]
        row = found.setdefault(
            key,
            {
                "name": one["variant"],
                "what": "fidelity",
                # Of a format it is the part of the bytes, and every token is kept.
                "budget": None if one["bytes"] else one["budget"],
                "values": {},
                "model": about["model"],
                "context": about["context"],
                **_source(source),
            },
        )
        row["values"][one["metric"]] = one["value"]
    return [row for row in found.values() if "added" in row["values"]]


def _speed(data: Any, source: Any) -> Iterator[dict[str, Any]]:
    load = data["load"]
    for one in data["parts"]["speed"]["rows"]:
        if not one["ok"]:
            continue
        section, _ = ROWS[one["name"]]
        sequence = (section or {}).get("sequence", {})
        budget = sequence.get("budget") or sum(sequence.get(k, 0) for k in ("sink", "window"))
        yield {
            "name": one["name"],
            "what": "speed",
            "budget": budget or None,
            "values": {metric: one[metric] for metric in SPEED if metric in one},
            "model": "Llama-3.2-3B's geometry",
            "context": load["prompt"] + load["output"],
            **_source(source),
        }


def _source(source: Any) -> dict[str, str]:
    return {key: source[key] for key in ("machine", "date", "command")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the rows."""
    parser = argparse.ArgumentParser(prog="python -m kvplug_lab.measured_rows", description=__doc__)
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder of the figures")
    parser.add_argument("--to", type=Path, default=FILE, help="file to write")
    asked = parser.parse_args(arguments)
    lines = ",\n  ".join(json.dumps(row) for row in rows(asked.figures))
    asked.to.write_text(f'{{\n "rows": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
