"""Records to figures: each metric with the interval that its few samples allow, and each variant's
difference from the full cache on the same prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from kvplug_lab.fidelity.records import FULL, Record

RESAMPLES = 9999

LEAST_STRATUM = 8
"""Fewest prompts of a task that are resampled by themselves."""

LEVEL = 0.95

ROUNDING = 1e-4
"""Two programs that do the same differ by less: sums are in another order."""


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
        group: The group that it is a mean of; empty for a metric of one task.
        against: Whether the value is a comparison with the full cache already.
    """

    name: str
    label: str
    task: str
    higher: bool
    form: str
    value: Callable[[Record, Record], float]
    part: bool = False
    group: str = ""
    against: bool = False


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
    Metric(
        "added",
        "added",
        "perplexity",
        False,
        ".3f",
        lambda r, f: _mean(r.nll) - _mean(f.nll),
        against=True,
    ),
    Metric("kl", "divergence", "perplexity", False, ".3f", lambda r, _: r.kl or 0.0, against=True),
    Metric("top1", "same likeliest token", "perplexity", True, ".1%", _same_top, against=True),
    Metric("prefix", "greedy prefix", "greedy", True, ".0%", _until_it_differs, against=True),
    Metric(
        "agreement",
        "greedy same",
        "greedy",
        True,
        ".0%",
        lambda r, f: _mean(_same(r, f)),
        against=True,
    ),
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
        difference: Mean difference from the full cache on the same prompts; None for the full cache
            and for what is a comparison with it already.
        difference_low: Lower end of its 95 % interval, a paired BCa bootstrap over the prompts.
        difference_high: Upper end.
        p: Two-sided p-value of no difference, Holm-corrected over all rows that have one.
        verdict: ``better`` or ``worse`` where the interval leaves 0 out, ``within noise`` else.
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
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None
    verdict: str = ""

    def plain(self) -> dict[str, Any]:
        """Convert to JSON types; what is unbounded is null."""
        found = asdict(self)
        for key in ("difference_low", "difference_high"):
            if found[key] is not None and not math.isfinite(found[key]):
                found[key] = None
        return found


def metrics_of(records: Sequence[Record]) -> list[Metric]:
    """The metrics that records have: those of `METRICS`, a score for each task whose answers are
    scored, and each group's mean over its tasks."""
    tasks = list(dict.fromkeys(record.task for record in records))
    scored: dict[str, dict[str, None]] = {}
    for record in records:
        if record.score is not None:
            scored.setdefault(record.group, {})[record.task] = None
    found = [metric for metric in METRICS if metric.task in tasks]
    for group, own in scored.items():
        label = f"{group}, {len(own)} task{'s' if len(own) > 1 else ''}"
        found.append(Metric(group, label, "", True, ".1%", _own_score, group=group))
        for task in own:
            found.append(Metric(task, task.replace("_", " "), task, True, ".1%", _own_score))
    return found


def _own_score(record: Record, _: Record) -> float:
    return record.score or 0.0


def values(records: Iterable[Record]) -> dict[tuple[str, float, str], dict[str, float]]:
    """Each metric's value by prompt, by variant, budget and metric.

    Raises:
        ValueError: A prompt has no record of the full cache to compare with.
    """
    listed = list(records)
    full = {r.prompt: r for r in listed if r.variant == FULL}
    by_task: dict[str, list[Metric]] = {}
    by_group: dict[str, Metric] = {}
    for metric in metrics_of(listed):
        if metric.group:
            by_group[metric.group] = metric
        else:
            by_task.setdefault(metric.task, []).append(metric)
    found: dict[tuple[str, float, str], dict[str, float]] = {}
    for record in listed:
        if record.prompt not in full:
            raise ValueError(f"no record of the full cache for {record.prompt}")
        own = by_task.get(record.task, [])
        for metric in (by_group[record.group], *own) if record.group else own:
            key = (record.variant, record.budget, metric.name)
            found.setdefault(key, {})[record.prompt] = metric.value(record, full[record.prompt])
    return found


def summarise(records: Sequence[Record]) -> list[Row]:
    """Every metric of every variant and budget, with intervals, in the order of the records."""
    held: dict[tuple[str, float, str], list[float]] = {}
    size = {(record.variant, record.budget): record.bytes for record in records}
    for record in records:
        for task in {record.task, record.group}:
            held.setdefault((record.variant, record.budget, task), []).append(record.held)
    metrics = {metric.name: metric for metric in metrics_of(records)}
    task_of = {record.prompt: record.task for record in records}
    found = values(records)
    rows, tested = [], []
    for (variant, budget, name), by_prompt in found.items():
        metric = metrics[name]
        strata = _strata(by_prompt, task_of)
        scored = metric.part or metric.value is _own_score
        low, high = interval(*strata) if scored else bootstrap(*strata)
        tokens = held[variant, budget, metric.group or metric.task]
        row = Row(
            variant,
            budget,
            name,
            _mean([_mean(each) for each in strata]),
            low,
            high,
            len(by_prompt),
            _mean(tokens),
            size[variant, budget],
        )
        full = found.get((FULL, 1.0, name))
        if variant != FULL and full is not None and not metric.against:
            differences = {prompt: value - full[prompt] for prompt, value in by_prompt.items()}
            rows.append(_against(row, _strata(differences, task_of), metric))
            tested.append((len(rows) - 1, p_value(list(differences.values()))))
        else:
            rows.append(row)
    for (at, _), p in zip(tested, holm([p for _, p in tested]), strict=True):
        rows[at] = replace(rows[at], p=p)
    return rows


def _strata(by_prompt: dict[str, float], task_of: dict[str, str]) -> list[list[float]]:
    """Values by task: prompts of a task are drawn among themselves."""
    found: dict[str, list[float]] = {}
    for prompt, value in by_prompt.items():
        found.setdefault(task_of[prompt], []).append(value)
    return list(found.values())


def _against(row: Row, differences: Sequence[Sequence[float]], metric: Metric) -> Row:
    """A row with its difference from the full cache."""
    mean = _mean([_mean(each) for each in differences])
    low, high = paired(*differences)
    verdict = _verdict(mean, low, high, metric.higher)
    return replace(row, difference=mean, difference_low=low, difference_high=high, verdict=verdict)


def _verdict(mean: float, low: float, high: float, higher: bool) -> str:
    if low <= 0 <= high or abs(mean) < ROUNDING:
        return "within noise"
    return "better" if (mean > 0) is higher else "worse"


def wilson(hits: Sequence[float]) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion, of values 0 and 1."""
    found = stats.binomtest(round(sum(hits)), len(hits)).proportion_ci(LEVEL, "wilson")
    return float(found.low), float(found.high)


def bootstrap(*strata: Sequence[float]) -> tuple[float, float]:
    """BCa-bootstrap 95 % interval of a mean, or of the mean of several samples' means.

    Each sample is resampled by itself where all have `LEAST_STRATUM` values; else they are drawn
    from together, which is wider: two or three values show too little of their spread. Resamples
    are the same on every call. Where nothing varies the interval is the mean alone.
    """
    data = [np.asarray(each, dtype=float) for each in strata]
    if min(len(each) for each in data) < LEAST_STRATUM:
        whole = sum(len(each) for each in data)
        data = [np.concatenate([each * whole / (len(data) * len(each)) for each in data])]
    if all(np.ptp(each) == 0 for each in data):
        mean = float(np.mean([each[0] for each in data]))
        return mean, mean

    def mean_of_means(*samples: Any, axis: int) -> Any:
        return sum(np.mean(each, axis=axis) for each in samples) / len(samples)

    found = stats.bootstrap(
        data,
        mean_of_means,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def interval(*strata: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean score: `bootstrap`, but Wilson's of one sample of 0 and 1, and where
    all are 0 or all are 1."""
    values = [value for each in strata for value in each]
    yes_or_no = all(value in (0, 1) for value in values)
    if yes_or_no and (len(strata) == 1 or np.ptp(values) == 0):
        return wilson(values)
    return bootstrap(*strata)


def paired(*differences: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean difference: `bootstrap`; of one prompt alone it is unbounded.

    Where every prompt of yes or no has the same difference, which a bootstrap takes for certain,
    it is Agresti and Min's for matched pairs.
    """
    values = [value for each in differences for value in each]
    if len(values) == 1:
        return -math.inf, math.inf
    if np.ptp(values) == 0 and abs(values[0]) in (0, 1):
        low, high = _sign_flips(values)
        return max(-1.0, low), min(1.0, high)
    return bootstrap(*differences)


def p_value(differences: Sequence[float]) -> float:
    """Two-sided p-value of differences that are symmetric around 0.

    Of differences -1, 0 and 1 the exact sign test, which is McNemar's; else Wilcoxon's signed-rank
    test, in which no difference is split between both sides.
    """
    moved = [d for d in differences if d]
    if not moved:
        return 1.0
    if all(abs(d) == 1 for d in moved):
        return float(stats.binomtest(sum(d > 0 for d in moved), len(moved)).pvalue)
    return float(stats.wilcoxon(differences, zero_method="zsplit").pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: each value as it is rejected at a family-wise level."""
    order = np.argsort(p_values, kind="stable")
    found, highest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[at]))
        found[at] = highest
    return found


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
    low, high = _sign_flips(differences) if metric.part else student(differences)
    verdict = _verdict(_mean(differences), low, high, metric.higher)
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
    low, high = student(logs)
    return math.exp(_mean(logs)), math.exp(low), math.exp(high)


def student(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of a mean; of one value alone it is unbounded."""
    if len(values) == 1:
        return -math.inf, math.inf
    if np.ptp(values) == 0:
        return values[0], values[0]
    low, high = stats.t.interval(LEVEL, len(values) - 1, np.mean(values), stats.sem(values))
    return float(low), float(high)


def _sign_flips(differences: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean of differences -1, 0 and 1 (Agresti and Min's for matched pairs):
    half a pair is added to either side, so that few or no differences are no certainty."""
    up, down = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    n = len(differences) + 2
    mean = (up - down) / n
    spread = math.sqrt(max(0.0, (up + down + 1) / n - mean * mean) / n) * stats.norm.ppf(
        0.5 + LEVEL / 2
    )
    return mean - spread, mean + spread
