"""The connector: kvplug's two-way line through vLLM, and what ``--kv-transfer-config`` turns on.

The scheduler half binds policies to the KV-cache manager and reports; the worker half hands a
step's directives to the metadata builders and to reuse, and returns what they did.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from kvplug.contract import Kind
from kvplug.hosts.vllm import admission
from kvplug.hosts.vllm.messages import (
    ReuseOrders,
    StepDirectives,
    StepReport,
    WorkerCounters,
    unpack_plans,
)
from kvplug.hosts.vllm.metrics import PolicyPromMetrics, PolicyStats
from kvplug.hosts.vllm.scheduler.half import SchedulerHalf
from kvplug.hosts.vllm.worker.reuse import reuse_worker
from kvplug.hosts.vllm.worker.state import drop_worker_state, worker_state


class KVPlugConnector(KVConnectorBase_V1, SupportsHMA):
    """Plugs policies into the engine it is configured on; carries KV where a deployment reuses it.

    Raises:
        DeploymentError: The ``kvplug`` section cannot run on this engine; nothing is bound then.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None):
        super().__init__(vllm_config, role, kv_cache_config)
        self.deployment = admission.deployment_of(vllm_config)
        self.scheduler: SchedulerHalf | None = None
        if role is KVConnectorRole.SCHEDULER:
            self.scheduler = SchedulerHalf(self.deployment, vllm_config, kv_cache_config)
        else:
            self._worker = worker_state(vllm_config)
            self._worker.groups = len(kv_cache_config.kv_cache_groups) if kv_cache_config else 1
            if self.deployment.choice(Kind.REUSE) is not None:
                self._worker.reuse = reuse_worker(self.deployment, vllm_config)

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # -- scheduler -----------------------------------------------------------------------------

    def _half(self) -> SchedulerHalf:
        assert self.scheduler is not None, "called on the worker half"
        return self.scheduler

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._half().bind(kv_cache_manager)

    def on_new_request(self, request: Any) -> None:
        self._half().on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._half().matched(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._half().allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return StepDirectives(*self._half().step(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        report = connector_output.kv_connector_worker_meta
        if report is not None:
            self._half().on_worker_report(report.counters, report.measured, report.failed)
            self._half().on_format_report(
                report.format_failed, report.format_counters, report.signals
            )
            if report.reuse is not None:
                self._half().on_reuse_news(report.reuse)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self._half().on_finished(request, block_ids)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self._half().on_finished(request, block_ids[0] if block_ids else [])

    def take_events(self) -> Iterable[Any]:
        return ()

    # -- worker --------------------------------------------------------------------------------

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Runs before attention metadata is built (V1 model runner)."""
        assert isinstance(kv_connector_metadata, StepDirectives)
        self._worker.set_exempt_tails(kv_connector_metadata.exempt_tails)
        plans = kv_connector_metadata.plans
        self._worker.plans = unpack_plans(*plans) if plans is not None else {}
        self._worker.set_lanes(kv_connector_metadata.lanes)
        orders, reuse = kv_connector_metadata.reuse, self._worker.reuse
        if reuse is not None and orders is not None:
            self._worker.memo_lanes = orders.lanes
            reuse.before(orders)
        elif reuse is not None:
            self._worker.memo_lanes = {}

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        if self._worker.reuse is not None:
            self._worker.reuse.register(kv_caches)

    def _orders(self) -> ReuseOrders | None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepDirectives)
        return metadata.reuse

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        reuse, orders = self._worker.reuse, self._orders()
        if reuse is not None and orders is not None and orders.loads:
            reuse.load(orders)

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        pass

    def wait_for_save(self) -> None:
        reuse, orders = self._worker.reuse, self._orders()
        if reuse is not None and orders is not None:
            reuse.after(orders)

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        worker = self._worker
        counters, worker.counters = worker.counters, WorkerCounters()
        reused = worker.reuse.take_news() if worker.reuse is not None else None
        if not counters.rows and not counters.format_tokens and reused is None:
            return None
        return StepReport(
            counters,
            worker.take_measured(),
            worker.scoring_failed,
            worker.format_failed,
            worker.format_counters(),
            worker.take_signals(),
            reused,
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks a format could not store, or reuse could not fill: vLLM fails the requests that
        hold them, or computes them, as ``kv_load_failure_policy`` says."""
        found = self._worker.unwritten_blocks()
        if self._worker.reuse is not None:
            found |= self._worker.reuse.take_unloaded()
        return found

    # -- both ----------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> PolicyStats | None:
        if self.scheduler is None:
            return None
        news = self.scheduler.news()
        return PolicyStats(data=news) if news else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PolicyStats:
        return PolicyStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PolicyPromMetrics:
        return PolicyPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self.scheduler is not None:
            self.scheduler.stop()
        else:
            if self._worker.reuse is not None:
                self._worker.reuse.close()
            drop_worker_state(self._vllm_config)
