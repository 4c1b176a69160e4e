"""What the scheduler measures on its way to the log line and to Prometheus.

What streamed answers say travels with it (`kvplug.hosts.vllm.answers`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import prometheus_client
from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.logger import init_logger

from kvplug import __version__
from kvplug.contract import Kind
from kvplug.deployment import Deployment
from kvplug.hosts.vllm import compat
from kvplug.hosts.vllm.admission import read_deployment
from kvplug.hosts.vllm.answers import ANSWERS, SAID
from kvplug.hosts.vllm.shadow import ERRANDS
from kvplug.hosts.vllm.shadow_orders import SHADOW
from kvplug.observe.catalogue import BUILD_INFO, POLICY_INFO, catalogue
from kvplug.observe.metric import (
    COUNTERS,
    GAUGES,
    HISTOGRAMS,
    MAX_OPEN,
    OTHER,
    Metric,
    Named,
    Type,
    Values,
    add_increments,
    key_of,
)
from kvplug.plain_text import label

logger = init_logger("vllm.kvplug")

_TYPES: dict[Type, Any] = {
    Type.COUNTER: Counter,
    Type.GAUGE: Gauge,
    Type.HISTOGRAM: Histogram,
}

_exported: list[Any] = []
"""What this process has registered; a further engine of it begins anew, as vLLM's metrics do."""


@dataclass
class PolicyStats(KVConnectorStats):
    """Increments of one interval (`kvplug.observe.metric.Increments`).

    Under `SAID` stands what requests that ended in it say, by their ids; under `SHADOW` an order of
    the guard's.
    """

    data: dict[str, Any] = field(default_factory=dict)

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        said = other.data.get(SAID)
        if said:
            self.data[SAID] = self.data.get(SAID, {}) | said
        if order := other.data.get(SHADOW):
            self.data[SHADOW] = order
        more = {k: v for k, v in other.data.items() if k not in (SAID, SHADOW)}
        add_increments(self.data, more)
        return self

    def reduce(self) -> dict[str, int | float]:
        """Counters of the interval, for vLLM's log line."""
        found: dict[str, int | float] = {}
        for key, amount in self.data.get(COUNTERS, {}).items():
            name, *labels = key.split("\t")
            found[f"{name}{{{','.join(labels)}}}" if labels else name] = round(amount, 6)
        return found

    def is_empty(self) -> bool:
        return not self.data


class Exposition:
    """Series of metrics in this process.

    Args:
        metrics: The metrics; those that are not in the deployment are left out.
        deployment: The deployment.
        metric_types: Classes to make them of, by the class of ``prometheus_client`` they stand for.
        labelnames: Labels of all of them: model and engine.
        per_engine_labelvalues: Their values, by engine.
    """

    def __init__(
        self,
        metrics: Iterable[Metric],
        deployment: Deployment,
        metric_types: Mapping[Any, Any],
        labelnames: Sequence[str],
        per_engine_labelvalues: Mapping[int, Sequence[object]],
    ):
        self._named = Named.of(deployment)
        self._engines = per_engine_labelvalues
        self._metrics: dict[str, Metric] = {}
        self._families: dict[str, Any] = {}
        self._series: dict[tuple[int, str], Any] = {}
        self._open: dict[str, int] = {}
        for metric in metrics:
            if not metric.is_in(deployment):
                continue
            self._metrics[metric.name] = metric
            self._families[metric.name] = _family(metric, metric_types, labelnames)
            if metric.seeded:
                for labels in metric.series(self._named):
                    for engine in per_engine_labelvalues:
                        made = self._make(metric, engine, labels)
                        if metric.type is Type.GAUGE:
                            # Of several server processes, those that never set it do not show it.
                            made.set(0)

    def add(self, increments: Mapping[str, Any], engine: int = 0) -> None:
        """Add increments to their series; what is none of a series is left out."""
        for key, amount in increments.get(COUNTERS, {}).items():
            found = self._find(engine, key, Type.COUNTER)
            if found is not None and math.isfinite(amount) and amount > 0:
                found.inc(amount)
        for key, value in increments.get(GAUGES, {}).items():
            found = self._find(engine, key, Type.GAUGE)
            if found is not None and math.isfinite(value):
                found.set(value)
        for key, buckets in increments.get(HISTOGRAMS, {}).items():
            found = self._find(engine, key, Type.HISTOGRAM)
            if found is not None:
                bounds = self._metrics[key.split("\t")[0]].buckets
                for at, count, total in buckets:
                    _observe(found, bounds, int(at), int(count), total)

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        """Set a gauge of every engine."""
        for engine in self._engines:
            self.add({GAUGES: {key_of(metric, labels): value}}, engine)

    def _find(self, engine: int, key: str, type: Type) -> Any:
        found = self._series.get((engine, key))
        if found is not None:
            return found if self._metrics[key.split("\t")[0]].type is type else None
        name, *given = key.split("\t")
        metric = self._metrics.get(name)
        if metric is None or metric.type is not type or len(given) != len(metric.labels):
            return None
        labels = tuple(map(label, given))
        if not metric.is_open:
            labels = tuple(map(_closed, metric.labels.values(), labels))
            if metric.seeded or labels not in set(metric.series(self._named)):
                return self._series.get((engine, key_of(metric, labels)))
        elif not all(labels) or self._open.get(name, 0) >= MAX_OPEN:
            return None
        known = self._series.get((engine, key_of(metric, labels)))
        if known is not None:
            return known
        self._open[name] = self._open.get(name, 0) + 1
        return self._make(metric, engine, labels)

    def _make(self, metric: Metric, engine: int, labels: tuple[str, ...]) -> Any:
        made = self._families[metric.name].labels(*self._engines[engine], *labels)
        self._series[engine, key_of(metric, labels)] = made
        return made


def _closed(values: tuple[str, ...] | Values, value: str) -> str:
    """A label's value, or `OTHER` where the set has that and not the value."""
    known = isinstance(values, Values) or value in values or OTHER not in values
    return value if known else OTHER


def _family(metric: Metric, metric_types: Mapping[Any, Any], labelnames: Sequence[str]) -> Any:
    more: dict[str, Any] = {}
    if metric.type is Type.HISTOGRAM:
        more["buckets"] = list(metric.buckets)
    elif metric.type is Type.GAUGE:
        # Of several server processes, one gets a step's statistics.
        more["multiprocess_mode"] = "mostrecent"
    made = metric_types[_TYPES[metric.type]](
        name=metric.name,
        documentation=metric.help,
        labelnames=[*labelnames, *metric.labels],
        **more,
    )
    _exported.append(made)
    return made


def _observe(series: Any, bounds: Sequence[float], at: int, count: int, total: float) -> None:
    """Add values of one bucket, of which only the number and the sum are known.

    Their mean is in the bucket too, so a histogram that is told the mean as often counts the same.
    """
    if not 0 <= at <= len(bounds) or not 0 < count < 1 << 20 or not math.isfinite(total):
        return
    low = math.nextafter(bounds[at - 1], math.inf) if at else -math.inf
    high = bounds[at] if at < len(bounds) else math.inf
    mean = min(max(total / count, low), high)
    for _ in range(count):
        series.observe(mean)


def _declared(deployment: Deployment) -> Iterable[tuple[str, str, bool]]:
    """Kind and name of each policy, and whether it is exact."""
    for kind, chosen in deployment.choices.items():
        if kind is not Kind.TIERS:
            for choice in chosen:
                yield str(kind), label(choice.policy.name), choice.policy.exact is True
    for one in deployment.tiers:
        codec = one.codec.policy
        yield str(Kind.TIERS), one.name, one.tier.policy.exact and codec.exact
        yield str(Kind.TRANSFER), codec.name, codec.exact


def _forget_earlier() -> None:
    """Take what an earlier engine of the process registered out of the registry."""
    while _exported:
        with suppress(KeyError):
            prometheus_client.REGISTRY.unregister(_exported.pop())


class PolicyPromMetrics(KVConnectorPromMetrics):
    """The catalogue's metrics that a deployment has, one series for each value of their labels."""

    _failed = False

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        _forget_earlier()
        self.deployment = read_deployment(vllm_config)
        self.exposition = Exposition(
            catalogue().values(), self.deployment, metric_types, labelnames, per_engine_labelvalues
        )
        self.exposition.set(BUILD_INFO, 1, __version__, compat.version())
        for kind, name, exact in _declared(self.deployment):
            self.exposition.set(POLICY_INFO, 1, kind, name, str(exact).lower())
        # Of several server processes, one gets a step's statistics.
        ANSWERS.connected = vllm_config.parallel_config._api_process_count == 1

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add increments to their series.

        Raises nothing: it runs in the API server's output handler, which would end.
        """
        try:
            for request_id, said in transfer_stats_data.get(SAID, {}).items():
                ANSWERS.put(request_id, said)
            if order := transfer_stats_data.get(SHADOW):
                ERRANDS.put(order, engine_idx, len(self.per_engine_labelvalues))
            self.exposition.add(transfer_stats_data, engine_idx)
        except Exception as error:
            if not self._failed:
                self._failed = True
                logger.error("kvplug: metrics could not be exported: %r", error)
