"""``python -m kvplug_lab.fidelity.compare OURS.json THEIRS.json``: compares two programs.

Prints, per pair of a kvplug policy and the other program's version of it, metric and budget, both
values and whether they differ by more than the prompts' own spread. Of formats, which have bytes
and no budget, it prints each pair's bytes and the ratio of its divergences; one file can be both.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kvplug.errors import KVPlugError
from kvplug_lab.fidelity.records import Run
from kvplug_lab.fidelity.report import METRICS, SHOWN, Difference, compare, ratio, values

PAIRS: tuple[tuple[str, str], ...] = (
    ("snapkv", "SnapKVPress"),
    ("pyramidkv", "PyramidKVPress"),
    ("tova", "TOVAPress"),
    ("h2o", "ObservedAttentionPress"),
    ("expected_attention", "ExpectedAttentionPress"),
    ("knorm", "KnormPress"),
    ("keydiff", "KeyDiffPress"),
    ("ada_kv", "AdaKVPress(SnapKVPress)"),
    ("sink_window", "StreamingLLMPress"),
)
"""kvplug's policy and kvpress's version of the same method."""


def differences(
    ours: Run, theirs: Run, pairs: Sequence[tuple[str, str]] = PAIRS
) -> dict[tuple[str, str], list[Difference]]:
    """Every pair that both runs have, by metric and budget.

    Raises:
        KVPlugError: The runs have no pair in common.
    """
    own, other = values(ours.records), values(theirs.records)
    found: dict[tuple[str, str], list[Difference]] = {}
    for a, b in pairs:
        for metric in METRICS:
            for variant, budget, name in own:
                if variant == a and name == metric.name and (b, budget, name) in other:
                    one = compare(own[a, budget, name], other[b, budget, name], metric, budget)
                    found.setdefault((a, b), []).append(one)
    if not found:
        raise KVPlugError(f"no pair of {', '.join(f'{a} and {b}' for a, b in pairs)} in both runs")
    return found


def markdown(found: dict[tuple[str, str], list[Difference]]) -> str:
    """The differences as a Markdown table: a row per pair and budget, a column per metric shown.

    A cell holds our value and theirs, and says so where they differ beyond noise. Log-perplexity is
    left out: its difference is that of what is added to the full cache's.
    """
    names = [name for name in SHOWN if name != "nll"]
    shown = [
        metric
        for metric in METRICS
        if metric.name in names and any(d.metric == metric.name for r in found.values() for d in r)
    ]
    heads = [f"{metric.label} {'↑' if metric.higher else '↓'}" for metric in shown]
    lines = [
        f"| ours / theirs | kept | {' | '.join(heads)} |",
        "|---|---|" + "---|" * len(shown),
    ]
    for (a, b), rows in found.items():
        cells = {(d.budget, d.metric): d for d in rows}
        for budget in sorted({d.budget for d in rows}):
            texts = []
            for metric in shown:
                one = cells.get((budget, metric.name))
                both = f"{one.ours:{metric.form}} / {one.theirs:{metric.form}}" if one else ""
                mark = "" if one is None or one.verdict == "within noise" else f" **{one.verdict}**"
                texts.append(both + mark)
            lines.append(f"| {a} / {b} | {budget:.0%} | {' | '.join(texts)} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class FormatPair:
    """One format against another on the same prompts.

    Attributes:
        ours: The first one's label.
        theirs: The other's.
        bytes: Bytes per token of each.
        ratio: Geometric mean of the ratio of divergences, ours to theirs.
        low: Lower end of its 95 % interval.
        high: Upper end.
        verdict: Of the ratio: ``better``, ``worse`` or ``within noise``.
        differences: Of every metric that both have.
    """

    ours: str
    theirs: str
    bytes: tuple[int, int]
    ratio: float
    low: float
    high: float
    verdict: str
    differences: list[Difference]


def formats(ours: Run, theirs: Run, pairs: Sequence[tuple[str, str]]) -> list[FormatPair]:
    """Every pair of formats that the runs have, whatever bytes they take.

    Raises:
        KVPlugError: The runs have no pair in common.
    """
    own, other = values(ours.records), values(theirs.records)
    sizes = [{r.variant: (r.budget, r.bytes) for r in run.records} for run in (ours, theirs)]
    found = []
    for a, b in pairs:
        if a not in sizes[0] or b not in sizes[1]:
            continue
        (budget, mine), (their_budget, their_bytes) = sizes[0][a], sizes[1][b]
        measured = (a, budget, "kl") in own and (b, their_budget, "kl") in other
        if mine is None or their_bytes is None or not measured:
            continue
        each = [
            (metric, own.get((a, budget, metric.name)), other.get((b, their_budget, metric.name)))
            for metric in METRICS
        ]
        low_to_high = ratio(own[a, budget, "kl"], other[b, their_budget, "kl"])
        verdict = "within noise"
        if low_to_high[1] > 1 or low_to_high[2] < 1:
            verdict = "worse" if low_to_high[1] > 1 else "better"
        found.append(
            FormatPair(
                a,
                b,
                (mine, their_bytes),
                *low_to_high,
                verdict,
                [compare(x, y, metric, budget) for metric, x, y in each if x and y],
            )
        )
    if not found:
        raise KVPlugError(f"no pair of {', '.join(f'{a} and {b}' for a, b in pairs)} in both runs")
    return found


def formats_markdown(found: Sequence[FormatPair]) -> str:
    """The pairs as a Markdown table."""
    names = ("added", "top1", "prefix", "passkey")
    shown = [
        m
        for m in METRICS
        if m.name in names and any(d.metric == m.name for p in found for d in p.differences)
    ]
    heads = [f"{metric.label} {'↑' if metric.higher else '↓'}" for metric in shown]
    lines = [
        f"| ours / theirs | bytes per token | ratio of divergences ↓ | {' | '.join(heads)} |",
        "|---|---|---|" + "---|" * len(shown),
    ]
    for pair in found:
        each = {d.metric: d for d in pair.differences}
        mark = "" if pair.verdict == "within noise" else f" **{pair.verdict}**"
        cells = [f"{pair.ratio:.2f} ({pair.low:.2f} to {pair.high:.2f}){mark}"]
        for metric in shown:
            one = each.get(metric.name)
            both = f"{one.ours:{metric.form}} / {one.theirs:{metric.form}}" if one else ""
            verdict = "" if one is None or one.verdict == "within noise" else f" **{one.verdict}**"
            cells.append(both + verdict)
        sizes = f"{pair.bytes[0]:,} / {pair.bytes[1]:,}"
        lines.append(f"| {pair.ours} / {pair.theirs} | {sizes} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kvplug_lab.fidelity.compare", description=__doc__
    )
    parser.add_argument("ours", type=Path, help="written by kvplug eval --json")
    parser.add_argument("theirs", type=Path, help="written by the other program")
    parser.add_argument(
        "--pairs",
        help="'OURS => THEIRS; ...', the variants to compare; the same methods by default",
    )
    parser.add_argument("--json", type=Path, help="write the differences")
    asked = parser.parse_args(arguments)
    pairs = PAIRS
    if asked.pairs:
        halves = [pair.partition("=>") for pair in asked.pairs.split(";")]
        pairs = tuple((a.strip(), b.strip()) for a, _, b in halves)
    try:
        ours, theirs = Run.load(asked.ours), Run.load(asked.theirs)
        if any(record.bytes is not None for record in ours.records):
            coded = formats(ours, theirs, pairs)
            print(formats_markdown(coded))
            if asked.json is not None:
                plain = [asdict(pair) for pair in coded]
                asked.json.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
            return 0
        found = differences(ours, theirs, pairs)
    except KVPlugError as error:
        print(error, file=sys.stderr)
        return 2
    print(markdown(found))
    if asked.json is not None:
        data = [
            {"ours_variant": a, "theirs_variant": b, **asdict(d)}
            for (a, b), rows in found.items()
            for d in rows
        ]
        asked.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
