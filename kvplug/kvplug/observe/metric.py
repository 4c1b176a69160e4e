"""A metric: its name, type, labels and the values they take, and what is measured of it.

Everything here counts since the engine's start: a `Sample` of a counter is its total, one of a
gauge its value now, one of a histogram a `Distribution` of all it has seen. `Increments` finds what
is new; that is what travels to the API server.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import product
from typing import Any, NamedTuple, Protocol

from kvplug.contract import Kind
from kvplug.observe.settings import ObserveSettings
from kvplug.plain_text import label

__all__ = [
    "COUNTERS",
    "GAUGES",
    "HISTOGRAMS",
    "MICROSECONDS",
    "OTHER",
    "SECONDS",
    "Distribution",
    "Increments",
    "Metric",
    "Named",
    "Only",
    "Sample",
    "Type",
    "Values",
    "add_increments",
    "key_of",
]

OTHER = "other"
"""Value of a label for whatever has none of its own."""

COUNTERS, GAUGES, HISTOGRAMS = "counters", "gauges", "histograms"
"""The parts of increments."""

MICROSECONDS = (
    *(1e-6, 2.5e-6, 5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4),
    *(1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1, 1.0),
)
"""Buckets of what takes microseconds, in seconds."""

SECONDS = (
    *(1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0),
)
"""Buckets of what may take seconds, in seconds."""


class Type(StrEnum):
    """Types of metrics, as Prometheus has them."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Values(StrEnum):
    """Values of a label that are those of the deployment.

    Attributes:
        KIND: Kinds of policies.
        POLICY: Names of policies; beside a label of `KIND`, those of that kind.
        TIER: Names of tiers.
        OPEN: Names that a policy makes up; `MAX_OPEN` of a metric at most, and none at the start.
    """

    KIND = "kind"
    POLICY = "policy"
    TIER = "tier"
    OPEN = "open"


RESENT = 60
"""Calls after which gauges travel again, unchanged ones too: an API server that started later than
another one has set them to 0."""

MAX_OPEN = 1024
"""Series of one metric with open labels, of all engines together."""


class Deployed(Protocol):
    """What metrics ask of a deployment, which itself knows what is observed."""

    @property
    def choices(self) -> Mapping[Kind, Sequence[Any]]:
        """Its policies, by kind."""

    @property
    def tiers(self) -> Sequence[Any]:
        """Its tiers."""

    @property
    def guard(self) -> Any:
        """Its ``guard`` key, or None."""

    @property
    def observe(self) -> ObserveSettings:
        """Its ``observe`` key."""


@dataclass(frozen=True)
class Named:
    """What a deployment names.

    Attributes:
        policies: Kind and name of each policy; a tier goes by its own name.
        tiers: Names of the tiers.
    """

    policies: tuple[tuple[str, str], ...] = ()
    tiers: tuple[str, ...] = ()

    @classmethod
    def of(cls, deployment: Deployed) -> Named:
        """Names of a deployment."""
        tiers = tuple(one.name for one in deployment.tiers)
        found = [
            (str(kind), label(choice.policy.name) or choice.policy.__name__)
            for kind, chosen in deployment.choices.items()
            if kind is not Kind.TIERS
            for choice in chosen
        ]
        found += [(str(Kind.TIERS), name) for name in tiers]
        codecs = [one.codec.policy.name for one in deployment.tiers]
        found += [(str(Kind.TRANSFER), name) for name in codecs]
        return cls(tuple(dict.fromkeys(found)), tiers)


@dataclass(frozen=True)
class Only:
    """When a metric is there, beside its kinds.

    Attributes:
        where: In words, for the reference: "there with ...".
        holds: Tells whether it is there in a deployment.
    """

    where: str
    holds: Callable[[Deployed], bool]


class Sample(NamedTuple):
    """A value of one series.

    Attributes:
        metric: The metric.
        value: Total of a counter, value of a gauge, all that a histogram has seen.
        labels: Values of the metric's labels, in its order.
    """

    metric: Metric
    value: float | Distribution
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Metric:
    """A quantity, and all series of it that there may be.

    Attributes:
        name: Its whole name: ``kvplug_``, then what is measured, then its base unit
            (``_seconds``, ``_bytes``, ``_ratio``); a counter ends with ``_total``.
        type: Its type.
        help: What it is, a sentence.
        labels: Values by label: a tuple of them all, or those that the deployment names.
        kinds: It is there where the deployment has a policy of one of these; empty for everywhere.
        only: Further condition, or None.
        buckets: Upper bounds of a histogram's buckets, ascending, without infinity.
        formula: How it is computed, for the reference; empty where the help says it all.
        seeded: Whether all series are there at 0 from the start.
        group: Heading in the reference.
    """

    name: str
    type: Type
    help: str
    labels: Mapping[str, tuple[str, ...] | Values] = field(default_factory=dict)
    kinds: tuple[Kind, ...] = ()
    only: Only | None = None
    buckets: tuple[float, ...] = ()
    formula: str = ""
    seeded: bool = True
    group: str = ""

    def of(self, value: float | Distribution, *labels: str) -> Sample:
        """A sample of one of its series.

        Args:
            value: The total, the value, or the distribution.
            labels: Values of its labels, in order.
        """
        return Sample(self, value, labels)

    def distribution(self) -> Distribution:
        """An empty distribution over its buckets."""
        return Distribution(self.buckets)

    def is_in(self, deployment: Deployed) -> bool:
        """True if the metric is there in a deployment."""
        kinds = not self.kinds or any(deployment.choices.get(kind) for kind in self.kinds)
        return kinds and (self.only is None or self.only.holds(deployment))

    @property
    def is_open(self) -> bool:
        """True if a label has values that nobody knows before."""
        return Values.OPEN in self.labels.values()

    def series(self, named: Named) -> Iterator[tuple[str, ...]]:
        """All values of its labels that there may be, open ones left out."""
        if self.is_open:
            return
        kinds = {str(kind) for kind in self.kinds}
        policies = [(k, n) for k, n in named.policies if not kinds or k in kinds]
        pairs = any(values is Values.KIND for values in self.labels.values())
        domains: list[list[tuple[str, ...]]] = []
        for values in self.labels.values():
            if values is Values.KIND:
                with_policy = Values.POLICY in self.labels.values()
                one = policies if with_policy else [(k,) for k, _ in policies]
                domains.append([*dict.fromkeys(one)])
            elif values is Values.POLICY:
                # Named together with its kind.
                if not pairs:
                    domains.append([*dict.fromkeys((n,) for _, n in policies)])
            elif values is Values.TIER:
                domains.append([(name,) for name in named.tiers])
            else:
                domains.append([(value,) for value in values])
        for parts in product(*domains):
            yield tuple(value for part in parts for value in part)


class Distribution:
    """How many values fell into each bucket, and their sums.

    Args:
        bounds: Upper bounds of the buckets, ascending, infinity left out.

    Attributes:
        bounds: As given.
        counts: Values of each bucket; the last is of those above all bounds.
        sums: Their sums.
    """

    __slots__ = ("bounds", "counts", "sums")

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sums = [0.0] * (len(bounds) + 1)

    def add(self, value: float) -> None:
        """Count a value."""
        at = bisect_left(self.bounds, value)
        self.counts[at] += 1
        self.sums[at] += value

    @property
    def count(self) -> int:
        """All values."""
        return sum(self.counts)

    @property
    def sum(self) -> float:
        """Their sum."""
        return sum(self.sums)


def key_of(metric: Metric, labels: tuple[str, ...]) -> str:
    """Key of a series in increments: the metric's name and the labels' values."""
    return "\t".join((metric.name, *labels))


class Increments:
    """Finds what is new in samples since the samples before."""

    def __init__(self) -> None:
        self._values: dict[tuple[Metric, tuple[str, ...]], float] = {}
        self._seen: dict[str, tuple[list[int], list[float]]] = {}
        self._calls = 0

    def of(self, samples: Iterable[Sample]) -> dict[str, Any]:
        """Increments by part and key.

        Counters have the amount that their total grew by, and none where it did not; gauges their
        value, where it is another one, and now and then anyway (`RESENT`); histograms
        ``[bucket, count, sum]`` for each bucket with new values.
        """
        counters: dict[str, float] = {}
        gauges: dict[str, float] = {}
        histograms: dict[str, list[list[float]]] = {}
        self._calls += 1
        if self._calls % RESENT == 0:
            gone = [at for at in self._values if at[0].type is Type.GAUGE]
            for at in gone:
                del self._values[at]
        values = self._values
        for metric, value, labels in samples:
            if isinstance(value, Distribution):
                key = key_of(metric, labels)
                if new := self._new_of(key, value):
                    histograms[key] = new
                continue
            at = metric, labels
            before = values.get(at, 0.0)
            # Most of them, most of the time.
            if value == before or not math.isfinite(value):
                continue
            if metric.type is Type.GAUGE:
                gauges[key_of(metric, labels)] = value
            elif value > before:
                # A counter cannot go down; an attempt would end the API server's handler.
                counters[key_of(metric, labels)] = value - before
            else:
                continue
            values[at] = value
        parts = {COUNTERS: counters, GAUGES: gauges, HISTOGRAMS: histograms}
        return {name: part for name, part in parts.items() if part}

    def _new_of(self, key: str, value: Distribution) -> list[list[float]]:
        counts, sums = self._seen.get(key) or ([0] * len(value.counts), [0.0] * len(value.sums))
        if counts == value.counts:
            return []
        new = [
            [i, now - counts[i], value.sums[i] - sums[i]]
            for i, now in enumerate(value.counts)
            if now > counts[i]
        ]
        if new:
            self._seen[key] = (list(value.counts), list(value.sums))
        return new


def add_increments(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Add later increments to earlier ones, in place."""
    for part, found in other.items():
        mine = into.setdefault(part, {})
        for key, value in found.items():
            if part == GAUGES or key not in mine:
                mine[key] = value
            elif part == COUNTERS:
                mine[key] += value
            else:
                mine[key] = [*mine[key], *value]
