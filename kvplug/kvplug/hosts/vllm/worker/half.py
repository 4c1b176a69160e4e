"""The worker half: a loop over the deployment's kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kvplug.deployment import Deployment
from kvplug.hosts.vllm.messages import StepDirectives, StepReport
from kvplug.hosts.vllm.worker.composition import require_plugged
from kvplug.hosts.vllm.worker.kinds import worker_kinds
from kvplug.hosts.vllm.worker.state import drop_worker_state, worker_state


class WorkerHalf:
    """What the connector does on a worker.

    Args:
        deployment: The deployment.
        vllm_config: The engine's config.
        kv_cache_config: Its KV-cache groups, or None.
    """

    def __init__(self, deployment: Deployment, vllm_config: Any, kv_cache_config: Any):
        self._config = vllm_config
        self._state = worker_state(vllm_config)
        self._kinds = worker_kinds(deployment, vllm_config)
        num_groups = len(kv_cache_config.kv_cache_groups) if kv_cache_config else 1
        for kind in self._kinds:
            kind.start(num_groups)

    def register(self, caches: dict[str, Tensor]) -> None:
        """Take the KV caches, by layer name.

        Raises:
            KVPlugError: The worker lacks something the deployment needs.
        """
        context = self._config.compilation_config.static_forward_context
        require_plugged(self._kinds, {name: context[name] for name in caches if name in context})
        for kind in self._kinds:
            kind.register(caches)

    def begin(self, directives: StepDirectives) -> None:
        """Begin a step, before attention metadata is built and anything is written."""
        self._state.rows.begin(directives.rows, directives.names)
        for kind in self._kinds:
            kind.begin(directives)

    def load(self, directives: StepDirectives, requests: Sequence[str] | None) -> None:
        """Fill pages before the forward.

        vLLM's second model runner calls it after the forward of a step whose directives leave
        `StepDirectives.before_forward` unset.

        Args:
            directives: The step's directives.
            requests: Request of each row, in order, where the runner tells.
        """
        if requests is not None:
            self._state.rows.name(requests)
        for kind in self._kinds:
            kind.load(directives)

    def end(self, directives: StepDirectives) -> None:
        """End a step, after the forward."""
        for kind in self._kinds:
            kind.end(directives)

    def report(self) -> StepReport:
        """Return what the kinds did since the last report."""
        report = StepReport()
        for kind in self._kinds:
            kind.report(report)
        return report

    def unfilled(self) -> set[int]:
        """Return ids of blocks whose tokens are not there."""
        return set().union(*(kind.unfilled() for kind in self._kinds))

    def stop(self) -> None:
        """Stop every kind and forget the engine."""
        for kind in self._kinds:
            kind.stop()
        drop_worker_state(self._config)
