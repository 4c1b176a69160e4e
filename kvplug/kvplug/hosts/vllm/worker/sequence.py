"""Scoring sequence policies on a worker: what attention sees, and the evictions themselves.

A step's rows are brought into phases at the positions where the scheduler's plan evicts. In each
layer the backend's own kernel attends one phase, the policy scores the resident tokens of the rows
that reach an eviction, the survivors move together inside the request's own blocks, and the next
phase sees the result. So what a token sees depends on its position alone, wherever a prompt was
chunked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport

from kvplug.contract import Kind, ScoringPolicy
from kvplug.hosts.pruning import Limits
from kvplug.hosts.vllm.engine import layer_limits, share_groups
from kvplug.hosts.vllm.messages import Plans, StepDirectives, StepReport
from kvplug.hosts.vllm.spec import PrunedSpec
from kvplug.hosts.vllm.worker.evictions import RECALL_QUERIES, EvictionLog, LayerEvictions
from kvplug.hosts.vllm.worker.kind import KindWorker, Origin
from kvplug.hosts.vllm.worker.phases import FLUSH, Phase, StepPlanner
from kvplug.hosts.vllm.worker.residents import LayerResidents
from kvplug.hosts.vllm.worker.steps import (
    Attend,
    AttendCall,
    AttentionStep,
    Build,
    BuildCall,
    MetadataStep,
)


class ScoringWorker(KindWorker):
    """A scoring sequence policy on a worker.

    Args:
        policy: The policy.
        origin: Source and key of the policy in its deployment, for messages.

    Attributes:
        block_size: Tokens per block.
        ring: Queries remembered per request and layer.
        groups: Shares of the policy's layers; a group's number is its index.
        layers: State of each layer, by layer name.
        plans: Plans of the step.
        log: What the policy did since the last report.
    """

    kind = Kind.SEQUENCE
    supports_update_block_table = False

    def __init__(self, policy: ScoringPolicy, origin: Origin):
        super().__init__(origin)
        self.policy = policy
        self.block_size = policy.engine.block_size
        self.ring = ring_size(policy)
        self.groups = share_groups(policy)
        self.layers: dict[str, LayerEvictions] = {}
        self.plans: Plans = {}
        self.log = EvictionLog(policy)
        self._limits = [layer_limits(policy, layer) for layer in policy.engine.layers]

    # -- layers --------------------------------------------------------------------------------

    def rule(self, index: int) -> Limits:
        return self._limits[index]

    def customize_spec(self, spec: Any, rule: Any, stock: type[Any]) -> Any:
        from vllm.v1.kv_cache_interface import replace_as

        policy = self.policy
        self.check_block_size(spec, stock, policy.name)
        # A prefix-cache hit would bring tokens without the attention they received so far.
        shared = (
            0 if policy.wants_cumulative_attention else min(own.protected for own in self._limits)
        )
        return replace_as(
            spec,
            PrunedSpec,
            limits=rule,
            exact_tokens=shared * self.block_size,
            in_flight_tokens=policy.engine.max_in_flight_tokens,
            max_tokens=policy.engine.max_model_len,
        )

    def check_impl(self, impl: Any) -> None:
        self.check_distances(impl, self.policy.name)

    def metadata_steps(
        self, spec: Any, vllm_config: Any, device: torch.device
    ) -> Sequence[MetadataStep]:
        if not isinstance(spec, PrunedSpec):
            return ()
        return (Phases(self, spec, device),)

    def cudagraph_support(self, spec: Any, inner: AttentionCGSupport) -> AttentionCGSupport:
        # The number of phases differs from step to step.
        return AttentionCGSupport.NEVER

    def attention_step(self) -> AttentionStep:
        return PhasedAttention(self)

    def layer(self, impl: Any, layer: Any) -> LayerEvictions:
        """Return the state of a layer, made on first use."""
        found = self.layers.get(layer.layer_name)
        if found is None:
            from vllm.model_executor.models.utils import extract_layer_index

            view = self.policy.engine.layers[extract_layer_index(layer.layer_name)]
            softcap = float(getattr(impl, "logits_soft_cap", 0) or 0)
            residents = LayerResidents(self.policy, view, self.ring, float(impl.scale), softcap)
            group = self.groups.index(self.policy.share(view))
            found = LayerEvictions(residents, group, self.log)
            self.layers[layer.layer_name] = found
        return found

    # -- steps ---------------------------------------------------------------------------------

    def begin(self, directives: StepDirectives) -> None:
        self.plans = directives.sequence.plans() if directives.sequence is not None else {}

    def report(self, into: StepReport) -> None:
        into.sequence = self.log.take()


def ring_size(policy: ScoringPolicy) -> int:
    """Queries remembered per request and layer."""
    return max(
        policy.observation,
        FLUSH if policy.wants_cumulative_attention else 0,
        RECALL_QUERIES if policy.options.on_demand else 0,
    )


class Phases(MetadataStep):
    """Splits a step's metadata into phases; they ride on the metadata of the first."""

    def __init__(self, kind: ScoringWorker, spec: PrunedSpec, device: torch.device):
        self._kind = kind
        self._planner = StepPlanner(spec, kind.groups.index(spec.limits.share), device)

    def build(self, inner: Build, call: BuildCall) -> Any:
        kind, planner, common = self._kind, self._planner, call.common
        phases = None
        if kind.plans:
            phases = planner.parts(common, call.slots.tolist(), kind.plans)
        if phases is None:
            return inner(call)
        whole = len(phases) == 1
        built = []
        for parts in phases:
            phase = Phase(inner(call.on(planner.common_of(common, parts, whole))), None)
            if not whole:
                spans = [
                    torch.arange(p.first_token, p.first_token + p.end - p.start) for p in parts
                ]
                phase.tokens = torch.cat(spans).to(planner.device)
            if kind.ring:
                remembered = planner.remembered(parts, kind.ring)
                if remembered is not None:
                    phase.remember_from, phase.remember_at = remembered
            if kind.policy.wants_cumulative_attention:
                phase.flushes = planner.flushes(common, parts, kind.ring)
            phase.decisions = planner.decisions(common, parts)
            kind.log.counts.rows += len(parts)
            kind.log.counts.evictions += sum(len(d.slots) for d in phase.decisions)
            built.append(phase)
        first = built[0].metadata
        first.kvplug_phases = built
        first.kvplug_slot_mapping = common.slot_mapping
        return first


class PhasedAttention(AttentionStep):
    """Attends phase by phase, and evicts between them."""

    def __init__(self, kind: ScoringWorker):
        self._kind = kind

    def attend(self, inner: Attend, call: AttendCall) -> Tensor:
        phases = getattr(call.metadata, "kvplug_phases", None)
        if not phases:
            return inner(call)
        layer = self._kind.layer(call.impl, call.layer)
        residents = layer.residents
        residents.open(call.impl, call.layer, call.cache)
        residents.forget(call.metadata.kvplug_slot_mapping)
        for phase in phases:
            if phase.tokens is None:
                inner(replace(call, metadata=phase.metadata))
            else:
                part = call.on_tokens(phase.tokens, phase.metadata)
                inner(part)
                call.output[phase.tokens] = part.output
            for flush in phase.flushes:
                residents.flush(call.query, flush)
            if phase.remember_from is not None:
                residents.remember(call.query, phase.remember_from, phase.remember_at)
            for decision in phase.decisions:
                layer.decide(decision)
        return call.output
