"""Records to figures: each metric with the interval that its few samples allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kvplug_lab.fidelity.records import FULL, Record

RESAMPLES = 2000
LEVEL = 0.95

ROUNDING = 1e-4
"""Two programs that do the same differ by less: sums are in another order."""

T_975: tuple[float, ...] = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179),
    *(2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064),
)
"""Student's t at 97.5 % for 1 degree of freedom and up; the last serves beyond."""


@dataclass(frozen=True)
class Metric:
    """One figure of a task.

    Attributes:
        name: What rows carry.
        label: What tables and plots show.
        task: The task it is of.
        higher: Whether more is better.
        form: Format of its value.
        value: A record's own value and, where given, the full cache's record of the same prompt.
        part: Whether the value is 0 or 1, so that the interval is of a proportion.
    """

    name: str
    label: str
    task: str
    higher: bool
    form: str
    value: Callable[[Record, Record], float]
    part: bool = False


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if len(values) else 0.0


def _same(record: Record, full: Record) -> list[bool]:
    return [a == b for a, b in zip(record.ids, full.ids, strict=True)]


def _same_top(record: Record, full: Record) -> float:
    return _mean([a == b for a, b in zip(record.top, full.top, strict=True)])


def _until_it_differs(record: Record, full: Record) -> float:
    same = _same(record, full)
    return (same.index(False) if False in same else len(same)) / max(1, len(same))


def _retrieval(task: str) -> tuple[Metric, Metric]:
    label = task.replace("_", " ")
    return (
        Metric(task, label, task, True, ".0%", lambda r, _: float(all(r.right)), part=True),
        Metric(
            f"{task}_nll",
            f"{label}, nats per token",
            task,
            False,
            ".2f",
            lambda r, _: _mean(r.nll),
        ),
    )


METRICS: tuple[Metric, ...] = (
    Metric("nll", "log-perplexity", "perplexity", False, ".3f", lambda r, _: _mean(r.nll)),
    Metric("added", "added", "perplexity", False, ".3f", lambda r, f: _mean(r.nll) - _mean(f.nll)),
    Metric("kl", "divergence", "perplexity", False, ".3f", lambda r, _: r.kl or 0.0),
    Metric("top1", "same likeliest token", "perplexity", True, ".1%", _same_top),
    Metric("prefix", "greedy prefix", "greedy", True, ".0%", _until_it_differs),
    Metric("agreement", "greedy same", "greedy", True, ".0%", lambda r, f: _mean(_same(r, f))),
    *(
        metric
        for task in ("passkey", "passkey_later", "multikey", "multikey_later")
        for metric in _retrieval(task)
    ),
)

SHOWN = (
    "nll",
    "added",
    "kl",
    "prefix",
    "agreement",
    "passkey",
    "passkey_later",
    "multikey",
    "multikey_later",
)
"""Metrics of the table; the others are in the JSON."""


@dataclass(frozen=True)
class Row:
    """A metric of a variant at a budget.

    Attributes:
        variant: The policy with its options, or the full cache.
        budget: Part of the context asked for, or of bfloat16's bytes.
        metric: Name of the metric.
        value: Mean over the prompts.
        low: Lower end of its 95 % interval.
        high: Upper end.
        prompts: Prompts it is over.
        held: Tokens kept after the eviction, mean over them.
        bytes: Bytes of K and V per token under a format; None for a sequence policy.
    """

    variant: str
    budget: float
    metric: str
    value: float
    low: float
    high: float
    prompts: int
    held: float
    bytes: int | None = None

    def plain(self) -> dict[str, Any]:
        """Convert to JSON types."""
        return asdict(self)


def values(records: Iterable[Record]) -> dict[tuple[str, float, str], dict[str, float]]:
    """Each metric's value by prompt, by variant, budget and metric.

    Raises:
        ValueError: A prompt has no record of the full cache to compare with.
    """
    listed = list(records)
    full = {r.prompt: r for r in listed if r.variant == FULL}
    found: dict[tuple[str, float, str], dict[str, float]] = {}
    for record in listed:
        if record.prompt not in full:
            raise ValueError(f"no record of the full cache for {record.prompt}")
        for metric in METRICS:
            if metric.task == record.task:
                key = (record.variant, record.budget, metric.name)
                found.setdefault(key, {})[record.prompt] = metric.value(record, full[record.prompt])
    return found


def summarise(records: Sequence[Record]) -> list[Row]:
    """Every metric of every variant and budget, with intervals, in the order of the records."""
    held: dict[tuple[str, float, str], list[float]] = {}
    size = {(record.variant, record.budget): record.bytes for record in records}
    for record in records:
        held.setdefault((record.variant, record.budget, record.task), []).append(record.held)
    metrics = {metric.name: metric for metric in METRICS}
    rows = []
    for (variant, budget, name), by_prompt in values(records).items():
        metric, each = metrics[name], list(by_prompt.values())
        low, high = wilson(each) if metric.part else bootstrap(each)
        tokens = held[variant, budget, metric.task]
        about = (len(each), _mean(tokens), size[variant, budget])
        rows.append(Row(variant, budget, name, _mean(each), low, high, *about))
    return rows


def wilson(hits: Sequence[float]) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion, of values 0 and 1."""
    n, z = len(hits), 1.959964
    p = _mean(hits)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(each: Sequence[float]) -> tuple[float, float]:
    """Percentile-bootstrap 95 % interval of a mean; resamples are the same on every call."""
    data = np.asarray(each, dtype=float)
    picks = np.random.default_rng(0).integers(0, len(data), (RESAMPLES, len(data)))
    low, high = np.quantile(data[picks].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """One variant against another on the same prompts.

    Attributes:
        metric: Name of the metric.
        budget: Part of the context kept.
        ours: The first one's mean.
        theirs: The other's.
        low: Lower end of the 95 % interval of the paired difference, ours minus theirs.
        high: Upper end.
        verdict: ``better``, ``worse`` or ``within noise``, of ours.
    """

    metric: str
    budget: float
    ours: float
    theirs: float
    low: float
    high: float
    verdict: str


def compare(
    ours: dict[str, float], theirs: dict[str, float], metric: Metric, budget: float
) -> Difference:
    """Compare two variants' values by prompt; the interval is of the paired difference.

    Raises:
        ValueError: They have no prompt in common.
    """
    common = [name for name in ours if name in theirs]
    if not common:
        raise ValueError(f"{metric.name}: no prompt in common")
    differences = [ours[name] - theirs[name] for name in common]
    low, high = _sign_flips(differences) if metric.part else _student(differences)
    gain = (low, high) if metric.higher else (-high, -low)
    verdict = "better" if gain[0] > 0 else "worse" if gain[1] < 0 else "within noise"
    if abs(_mean(differences)) < ROUNDING:
        verdict = "within noise"
    return Difference(
        metric.name,
        budget,
        _mean([ours[name] for name in common]),
        _mean([theirs[name] for name in common]),
        low,
        high,
        verdict,
    )


def ratio(ours: dict[str, float], theirs: dict[str, float]) -> tuple[float, float, float]:
    """Geometric mean of the ratios by prompt, ours to theirs, and its 95 % interval.

    For what is positive and differs in size from prompt to prompt, as divergences do: one prompt
    that is hard for everybody does not decide it.

    Raises:
        ValueError: They have no prompt in common, or a value is not positive.
    """
    common = [name for name in ours if name in theirs]
    if not common:
        raise ValueError("no prompt in common")
    if any(ours[name] <= 0 or theirs[name] <= 0 for name in common):
        raise ValueError("ratios are of positive values")
    logs = [math.log(ours[name] / theirs[name]) for name in common]
    low, high = _student(logs)
    return math.exp(_mean(logs)), math.exp(low), math.exp(high)


def _student(differences: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of a mean difference; of one prompt alone it is unbounded."""
    n, mean = len(differences), _mean(differences)
    if n == 1:
        return -math.inf, math.inf
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    half = T_975[min(n - 2, len(T_975) - 1)] * spread
    return mean - half, mean + half


def _sign_flips(differences: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean of differences -1, 0 and 1 (Agresti and Min's for matched pairs):
    half a pair is added to either side, so that few or no differences are no certainty."""
    up, down = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    n = len(differences) + 2
    mean = (up - down) / n
    spread = math.sqrt(max(0.0, (up + down + 1) / n - mean * mean) / n) * 1.959964
    return mean - spread, mean + spread
