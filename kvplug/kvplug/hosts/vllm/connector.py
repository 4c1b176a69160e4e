"""The connector: kvplug's two-way line through vLLM, and what ``--kv-transfer-config`` turns on.

It only delegates. In the scheduler process to `SchedulerHalf`, in a worker to `WorkerHalf`; each is
a loop over one object per kind. `messages` has what travels between the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter
from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from kvplug.deployment import Deployment
from kvplug.errors import DeploymentError, Refusal
from kvplug.hosts.vllm.admission import SECTION, deployment_of
from kvplug.hosts.vllm.answers import SAID
from kvplug.hosts.vllm.messages import StepDirectives, StepReport
from kvplug.hosts.vllm.metrics import PolicyPromMetrics, PolicyStats
from kvplug.hosts.vllm.planned import APART
from kvplug.hosts.vllm.scheduler.half import SchedulerHalf
from kvplug.hosts.vllm.shadow_orders import SHADOW
from kvplug.hosts.vllm.worker.half import WorkerHalf
from kvplug.observe.catalogue import Hook


class KVPlugConnector(KVConnectorBase_V1, SupportsHMA):
    """Plugs policies into the engine it is configured on; carries KV where a deployment reuses it.

    Raises:
        DeploymentError: The ``kvplug`` section cannot run on this engine; nothing is bound then.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None):
        super().__init__(vllm_config, role, kv_cache_config)
        self.deployment = deployment_of(vllm_config)
        self.scheduler: SchedulerHalf | None = None
        self.worker: WorkerHalf | None = None
        if role is KVConnectorRole.SCHEDULER:
            _require_own_worker(self.deployment, vllm_config)
            self.scheduler = SchedulerHalf(self.deployment, vllm_config, kv_cache_config)
        else:
            self.worker = WorkerHalf(self.deployment, vllm_config, kv_cache_config)

    def configures(self, transfer: Any) -> bool:
        """True if the connector was made for a config's ``kv_transfer_config``."""
        return self._vllm_config.kv_transfer_config is transfer

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """Asked by vLLM from 0.33 on. Segments are in host memory, and a reset comes before sleep;
        what keeps more on the device is refused with ``--enable-sleep-mode`` by name."""
        return True

    # -- scheduler -----------------------------------------------------------------------------

    @property
    def _scheduler(self) -> SchedulerHalf:
        assert self.scheduler is not None, "called on the worker half"
        return self.scheduler

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._scheduler.bind(kv_cache_manager)

    def on_new_request(self, request: Any) -> None:
        began = perf_counter()
        self._scheduler.on_new_request(request)
        self._scheduler.times.add(Hook.NEW_REQUEST, began)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        began = perf_counter()
        found = self._scheduler.matched(request, num_computed_tokens)
        self._scheduler.times.add(Hook.MATCHED, began)
        return found, bool(found) and self._scheduler.awaits_loads

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        began = perf_counter()
        self._scheduler.allocated(request, blocks, num_external_tokens)
        self._scheduler.times.add(Hook.ALLOCATED, began)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        began = perf_counter()
        directives = self._scheduler.step(scheduler_output)
        self._scheduler.times.add(Hook.STEP, began)
        return directives

    def update_connector_output(self, connector_output: Any) -> None:
        report = connector_output.kv_connector_worker_meta
        if report is not None:
            began = perf_counter()
            self._scheduler.on_report(report)
            self._scheduler.times.add(Hook.REPORT, began)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self._finished(request, block_ids)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self._finished(request, block_ids[0] if block_ids else [])

    def _finished(self, request: Any, blocks: list[int]) -> dict[str, Any] | None:
        began = perf_counter()
        said = self._scheduler.finished(request, blocks)
        self._scheduler.times.add(Hook.FINISHED, began)
        return said

    def take_events(self) -> Iterable[Any]:
        return self._scheduler.take_events()

    def reset_cache(self) -> bool | None:
        """Drop all stored KV: vLLM's ``reset_prefix_cache(reset_connector=True)``, before new
        weights are used or when the engine goes to sleep."""
        return self._scheduler.reset()

    # -- worker --------------------------------------------------------------------------------

    @property
    def _worker(self) -> WorkerHalf:
        assert self.worker is not None, "called on the scheduler half"
        return self.worker

    def _directives(self) -> StepDirectives:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepDirectives)
        return metadata

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Runs before attention metadata is built on vLLM's first model runner, and after that,
        but before the forward, on the second."""
        assert isinstance(kv_connector_metadata, StepDirectives)
        self._worker.begin(kv_connector_metadata)

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self._worker.register(kv_caches)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._worker.load(self._directives(), kwargs.get("request_ids"))

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        pass

    def wait_for_save(self) -> None:
        self._worker.end(self._directives())

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        report: StepReport = self._worker.report()
        return report if report else None

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Requests that vLLM kept waiting until their run was loaded, and those of them that it
        computes because that failed."""
        received, failed = self._worker.received()
        return KVConnectorTransferResults(finished_recving=received, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks a format could not store, or reuse could not fill: vLLM fails the requests that
        hold them, or computes them, as ``kv_load_failure_policy`` says."""
        return self._worker.unfilled()

    # -- both ----------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> PolicyStats | None:
        if self.scheduler is None:
            return None
        began = perf_counter()
        data: dict[str, Any] = self.scheduler.increments()
        if said := self.scheduler.take_said():
            data[SAID] = said
        if order := self.scheduler.shadow_order():
            data[SHADOW] = order
        self.scheduler.times.add(Hook.STATS, began)
        return PolicyStats(data=data) if data else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PolicyStats:
        return PolicyStats(data={k: v for k, v in (data or {}).items() if k not in (SAID, SHADOW)})

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
        if self.worker is not None:
            self.worker.stop()


def _require_own_worker(deployment: Deployment, vllm_config: Any) -> None:
    """Check that a worker in the scheduler's process has the engine's connector.

    Raises:
        DeploymentError: It has that of another engine, as vLLM keeps one per process.
    """
    if not has_kv_transfer_group():  # workers have processes of their own
        return
    other = get_kv_transfer_group()
    own = vllm_config.kv_transfer_config
    if isinstance(other, KVPlugConnector) and other.configures(own):
        return
    raise DeploymentError(
        deployment.source,
        [
            Refusal(
                SECTION,
                f"another engine of this process has the worker's connector "
                f"({type(other).__name__}), and vLLM keeps one per process.",
                APART,
            )
        ],
    )
