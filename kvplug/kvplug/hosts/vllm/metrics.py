"""Policy counters on their way to the log line and to Prometheus."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.metrics.utils import create_metric_per_engine


@dataclass
class PolicyStats(KVConnectorStats):
    """Counter increments of one interval: ``{"kind:policy:counter": amount}``."""

    data: dict[str, float] = field(default_factory=dict)

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, amount in other.data.items():
            self.data[name] = self.data.get(name, 0) + amount
        return self

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not self.data


class PolicyPromMetrics(KVConnectorPromMetrics):
    """``vllm:kvplug_policy_total{kind, policy, counter}``."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counter = self._counter_cls(
            name="vllm:kvplug_policy",
            documentation="Counters of each kvplug policy.",
            labelnames=[*labelnames, "kind", "policy", "counter"],
        )
        self._children: dict[tuple[int, str], Any] = {}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, amount in transfer_stats_data.items():
            child = self._children.get((engine_idx, name))
            if child is None:
                values = {engine_idx: [*self.per_engine_labelvalues[engine_idx], *name.split(":")]}
                child = create_metric_per_engine(self._counter, values)[engine_idx]
                self._children[engine_idx, name] = child
            child.inc(amount)
