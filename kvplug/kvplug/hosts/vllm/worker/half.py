"""The worker half: a loop over the deployment's kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from vllm.logger import init_logger

from kvplug.deployment import Deployment
from kvplug.errors import DeploymentError, Refusal
from kvplug.hosts.vllm.admission import SECTION
from kvplug.hosts.vllm.messages import ShadowReport, StepDirectives, StepReport
from kvplug.hosts.vllm.planned import APART
from kvplug.hosts.vllm.spec import PrunedSpec
from kvplug.hosts.vllm.worker.kinds import worker_kinds
from kvplug.hosts.vllm.worker.registered import (
    planned_specs,
    require_own,
    require_registered,
)
from kvplug.hosts.vllm.worker.state import drop_worker_state, worker_state

logger = init_logger("vllm.kvplug")

MIB = 1 << 20
LARGE = 256 * MIB
"""Bytes from which on it is said how to hold less."""


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
        self._deployment = deployment
        self._planned = kv_cache_config
        num_groups = len(kv_cache_config.kv_cache_groups) if kv_cache_config else 1
        for kind in self._kinds:
            # Before the engine's own metadata builders are made.
            kind.held.start_over()
            kind.start(num_groups)

    def register(self, caches: dict[str, Tensor]) -> None:
        """Take the KV caches, by layer name.

        Raises:
            DeploymentError: They are not what the deployment asks for.
            KVPlugError: The worker lacks something the deployment needs.
        """
        context = self._config.compilation_config.static_forward_context
        if (problem := require_own(context, caches)) is not None:
            raise DeploymentError(self._deployment.source, [Refusal(SECTION, problem, APART)])
        require_registered(
            self._kinds, context, caches, self._planned, self._config, self._state.built
        )
        for kind in self._kinds:
            kind.register(caches)
        if self._kinds:
            logger.info("kvplug: %s", self.memory())

    @property
    def held_bytes(self) -> int:
        """Bytes that the kinds hold on this worker beside pages."""
        return sum(kind.held.reserved_bytes + kind.held.late_bytes for kind in self._kinds)

    def memory(self) -> str:
        """Say what the kinds hold on this worker beside pages, once caches are registered."""
        reserved = sum(kind.held.reserved_bytes for kind in self._kinds)
        late = sum(kind.held.late_bytes for kind in self._kinds)
        tails = sum(
            spec.page_size_bytes - spec.unpadded_page_size_bytes
            for spec in planned_specs(self._planned).values()
            if isinstance(spec, PrunedSpec)
        )
        said = f"{reserved / MIB:,.1f} MiB held for requests, taken before memory is measured"
        if reserved >= LARGE:
            said += " (fewer with --max-num-seqs)"
        if tails:
            said += f"; {tails:,} bytes of each block in all layers are kept beside its tokens"
        return said + (f"; {late / MIB:,.1f} MiB taken later" if late else "")

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
        self._state.guard_reports.clear()  # reuse has taken them; nobody else does
        if self._state.likeliest:
            report.shadow = ShadowReport(self._state.likeliest)
            self._state.likeliest = []
        return report

    def unfilled(self) -> set[int]:
        """Return ids of blocks whose tokens are not there."""
        return set().union(*(kind.unfilled() for kind in self._kinds))

    def received(self) -> tuple[set[str], set[str]]:
        """Return requests whose run arrived since last asked, and those it failed to arrive for."""
        each = [kind.received() for kind in self._kinds]
        return set().union(*(r for r, _ in each)), set().union(*(f for _, f in each))

    def stop(self) -> None:
        """Stop every kind and forget the engine."""
        for kind in self._kinds:
            kind.stop()
        drop_worker_state(self._config)
