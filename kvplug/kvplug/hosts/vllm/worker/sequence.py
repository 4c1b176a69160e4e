"""Scoring sequence policies on a worker: what attention sees, and the evictions themselves.

On vLLM's first model runner a step's rows are brought into phases at the positions where the
scheduler's plan evicts. In each layer the backend's own kernel attends one phase, the policy scores
the resident tokens of the rows that reach an eviction, the survivors move together inside the
request's own blocks, and the next phase sees the result. So what a token sees depends on its
position alone, wherever a prompt was chunked.

On the second runner decode steps are replayed as CUDA graphs. An eviction at the end of a step is
made after it, in all layers at once, and `in_force` shows what it left from the next step on: the
same, as nothing reads the pages in between. A step with an eviction inside a chunk is attended in
phases as on the first runner; it is never replayed whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport

from kvplug.contract import Kind, LayerView, ScoringPolicy
from kvplug.hosts.pruning import Limits, Rules
from kvplug.hosts.sizes import query_ring, tail_fields
from kvplug.hosts.vllm.engine import layer_limits
from kvplug.hosts.vllm.messages import Plans, StepDirectives, StepReport
from kvplug.hosts.vllm.spec import PrunedSpec
from kvplug.hosts.vllm.worker.after_step import (
    MOST_TOKENS,
    FoldedLayer,
    LayerGroup,
    fold_layers,
)
from kvplug.hosts.vllm.worker.evictions import (
    SETTLED_AFTER,
    EvictionLog,
    LayerEvictions,
)
from kvplug.hosts.vllm.worker.in_force import (
    BuiltStep,
    EvictionsInForce,
    InForce,
    reserve_in_force,
)
from kvplug.hosts.vllm.worker.kind import KindWorker, Origin
from kvplug.hosts.vllm.worker.layers import layer_view, softcap_of
from kvplug.hosts.vllm.worker.metadata import to_device
from kvplug.hosts.vllm.worker.page_tails import with_tail
from kvplug.hosts.vllm.worker.phases import Phase, RowPart, StepPlanner
from kvplug.hosts.vllm.worker.query_rings import Geometry, QueryRings
from kvplug.hosts.vllm.worker.residents import MASS_ELEMENTS, LayerResidents
from kvplug.hosts.vllm.worker.rows import StepRows
from kvplug.hosts.vllm.worker.steps import (
    Attend,
    AttendCall,
    AttentionStep,
    Build,
    BuildCall,
    MetadataStep,
)

logger = init_logger("vllm.kvplug")

WORK_BYTES = 48
"""Bytes that a decision takes for a token of a head: position, score, order, and where it goes."""


class SecondRunner:
    """What a worker on vLLM's second model runner is by its limits, and the rows of its steps.

    Args:
        vllm_config: The engine's config.
        rows: Rows of the step.

    Attributes:
        config: As given.
        rows: As given.
        num_slots: Slots of requests.
        max_rows: Most rows of a step, padding included.
        max_tokens: Most tokens of a step, padding included.
    """

    def __init__(self, vllm_config: Any, rows: StepRows):
        scheduler = vllm_config.scheduler_config
        captured = int(vllm_config.compilation_config.max_cudagraph_capture_size or 0)
        self.config = vllm_config
        self.rows = rows
        self.num_slots = int(scheduler.max_num_seqs)
        self.max_rows = max(self.num_slots, captured)
        self.max_tokens = max(int(scheduler.max_num_batched_tokens), captured)


class ScoringWorker(KindWorker):
    """A scoring sequence policy on a worker.

    Args:
        policy: The policy.
        origin: Source and key of the policy in its deployment, for messages.
        second: The second model runner, or None on the first.

    Attributes:
        rules: What the policy declared.
        block_size: Tokens per block.
        ring: Queries remembered per request and layer.
        groups: Shares of the policy's layers; a group's number is its index.
        layers: State of each layer, by layer name.
        plans: Plans of the step.
        log: What the policy did since the last report.
        rings: Latest queries by slot, on the second runner; None where none are remembered.
        tails: Whether the engine's pages have tails; see `page_tails`.
    """

    kind = Kind.SEQUENCE
    supports_update_block_table = False

    def __init__(self, policy: ScoringPolicy, origin: Origin, second: SecondRunner | None = None):
        super().__init__(origin)
        self.policy = policy
        self.rules = Rules.of(policy)
        self.second = second
        self.block_size = policy.engine.block_size
        self.ring = query_ring(policy)
        self._limits = [layer_limits(policy, layer) for layer in policy.engine.layers]
        self.groups = sorted({limits.share for limits in self._limits})
        self.layers: dict[str, LayerEvictions | FoldedLayer] = {}
        self.plans: Plans = {}
        self.log = EvictionLog(policy, SETTLED_AFTER if second is not None else 0)
        self.tails = False
        self.rings: QueryRings | None = None
        if second is not None and self.ring:
            self.rings = QueryRings(self.ring, second.num_slots, self.held)
        self._queries: dict[str, Tensor] = {}
        self._folded: dict[int, list[LayerGroup]] = {}
        self._in_force: dict[int, EvictionsInForce] = {}
        self._built: dict[tuple[str, ...], BuiltStep] = {}
        self._phased = False

    # -- layers --------------------------------------------------------------------------------

    def rule(self, index: int) -> Limits:
        return self._limits[index]

    def customize_spec(self, spec: Any, rule: Any, stock: type[Any]) -> Any:
        from vllm.v1.kv_cache_interface import replace_as

        policy = self.policy
        self.check_block_size(spec, stock, policy.name)
        # A prefix-cache hit would bring tokens without the attention they received so far.
        shared = 0 if self.rules.cumulative else min(own.protected for own in self._limits)
        own = replace_as(
            spec,
            PrunedSpec,
            limits=rule,
            exact_tokens=shared * self.block_size,
            in_flight_tokens=policy.engine.max_in_flight_tokens,
            max_tokens=policy.engine.max_model_len,
        )
        return with_tail(own, tail_fields(self.rules.cumulative))

    def layouts(self, inner: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        from vllm.v1.kv_cache_layout import KVCacheLayout

        # A page's tail lies behind all of its content; vLLM's own preference comes first.
        own = (
            KVCacheLayout.LBNHC,
            KVCacheLayout.LBHNC,
            KVCacheLayout.BLNHC,
            KVCacheLayout.BLHNC,
        )
        return own if inner is None else tuple(x for x in inner if x in own)

    def check_impl(self, impl: Any) -> None:
        self.check_distances(impl, self.policy.name)

    def metadata_steps(
        self, spec: Any, vllm_config: Any, device: torch.device
    ) -> Sequence[MetadataStep]:
        if not isinstance(spec, PrunedSpec):
            return ()
        self.tails = spec.page_size_padded is not None
        group = self.groups.index(spec.limits.share)
        planner = StepPlanner(spec, group, self.ring, device)
        second = self.second
        if second is None:
            return (Phases(self, planner),)
        if group not in self._in_force:
            self._in_force[group] = EvictionsInForce(second.num_slots, device, self.held, group)
        step = InForce(
            planner,
            self._in_force[group],
            self._built,
            max_rows=second.max_rows,
            max_tokens=second.max_tokens,
            num_slots=second.num_slots,
            held=self.held,
            name=group,
        )
        return (step,)

    def cudagraph_support(self, spec: Any, inner: AttentionCGSupport) -> AttentionCGSupport:
        if self.second is None:
            # The number of phases differs from step to step.
            return AttentionCGSupport.NEVER
        # A step with a prefill may have phases.
        uniform = AttentionCGSupport.UNIFORM_BATCH
        return uniform if inner is AttentionCGSupport.ALWAYS else inner

    def loaded(self, name: str, layer: Any, dtype: torch.dtype, vllm_config: Any) -> None:
        """Take memory for the queries of a full-attention layer, and for its group's tables."""
        if layer.sliding_window is not None:
            return
        device = torch.device(vllm_config.device_config.device)
        geometry = Geometry(int(layer.num_heads), int(layer.head_size), dtype)
        slots = int(vllm_config.scheduler_config.max_num_seqs)
        if self.second is None:
            if self.ring and name not in self._queries:
                shape = (slots * self.ring, geometry.num_heads, geometry.head_size)
                self.held.reserve(name, prod(shape), dtype, device)
                self._queries[name] = self.held.take(name, shape, dtype, device)
            return
        if self.rings is not None:
            context = vllm_config.compilation_config.static_forward_context
            full = [x for x in context.values() if getattr(x, "sliding_window", 0) is None]
            self.rings.add(name, geometry, len(full), device)
        group = self.groups.index(self._limits[layer_view(self.policy, name).index].share)
        reserve_in_force(
            self.held,
            group,
            num_slots=slots,
            max_rows=self.second.max_rows,
            max_tokens=self.second.max_tokens if self.ring else 0,
            width=-(-self.policy.engine.max_model_len // self.block_size),
            device=device,
        )

    def attention_step(self) -> AttentionStep:
        return PhasedAttention(self)

    def register(self, caches: dict[str, Tensor]) -> None:
        """Fold the layers of each KV-cache group, on the second runner."""
        if self.second is None:
            return
        config = self.second.config
        context = config.compilation_config.static_forward_context
        members: dict[int, dict[str, tuple[Any, LayerView, Tensor]]] = {}
        limits: dict[int, Limits] = {}
        for name, cache in caches.items():
            layer = context.get(name)
            if layer is None:
                continue
            spec = layer.attn_backend.customize_spec(layer.get_kv_cache_spec(config))
            if isinstance(spec, PrunedSpec):
                group = self.groups.index(spec.limits.share)
                limits[group] = spec.limits
                own = members.setdefault(group, {})
                own[name] = (layer, layer_view(self.policy, name), cache)
        self.layers.clear()
        for group, layers in members.items():
            folded = fold_layers(
                self.policy, self.log, group, layers, self.ring, self.rings, self.tails
            )
            self._folded[group] = folded
            for some in folded:
                for index, name in enumerate(some.names):
                    self.layers[name] = some.layer(index)
                if some.fold.cache.device.type != "cpu":
                    some.rehearse(limits[group], self.policy.engine.max_model_len)

    def layer(self, impl: Any, layer: Any) -> LayerEvictions | FoldedLayer:
        """Return the state of a layer, made on first use on the first runner."""
        found = self.layers.get(layer.layer_name)
        if found is None:
            view = layer_view(self.policy, layer.layer_name)
            residents = LayerResidents(
                self.policy, view, self.ring, float(impl.scale), softcap_of(impl), self.tails
            )
            residents.queries = self._queries.get(layer.layer_name)
            group = self.groups.index(self._limits[view.index].share)
            found = LayerEvictions(residents, group, self.log)
            self.layers[layer.layer_name] = found
        return found

    # -- steps ---------------------------------------------------------------------------------

    def begin(self, directives: StepDirectives) -> None:
        own = directives.sequence
        self.plans = own.plans() if own is not None else {}
        self._phased = own is not None and own.phased

    def load(self, directives: StepDirectives) -> None:
        """Attend the step in phases where evictions fall inside it, on the second runner."""
        if self.second is None or not self._phased:
            return
        counted: dict[int, list[Phase]] = {}
        for step in self._built.values():
            planner, parts = step.planner, self._parts(step)
            if parts is not None:
                phases = list(self.phases(planner, step.built.call.common, parts))
                step.put_phases(phases)
                counted[planner.group] = [phase for _, phase in phases]
        for group in counted.values():
            self.count(group)

    def end(self, directives: StepDirectives) -> None:
        """Evict after the step, on the second runner, and let it be in force from now on."""
        if self.second is None:
            return
        rows = self.second.rows
        # A group has a builder for each number of query heads, and one set of evictions.
        once = {step.planner.group: step for step in self._built.values()}
        for group, step in once.items():
            step.evictions.settle(rows.runner_slots, rows.requests)
            if not self._phased:
                self._after(step)
            for (own, slot), plan in self.plans.items():
                named = rows.named.get(slot)
                if own == group and named is not None:
                    # As planned, not as remembered: a preempted request starts over.
                    latest = plan.evictions[-1] if plan.evictions else plan.state
                    step.evictions.put(named.runner_slot, latest)
        self._built.clear()

    def phases(
        self, planner: StepPlanner, common: Any, parts: list[list[RowPart]]
    ) -> Iterator[tuple[Any, Phase]]:
        """Yield the common metadata of each phase, and the phase without its metadata."""
        whole = len(parts) == 1
        for own in parts:
            phase = Phase(None, None)
            if not whole:
                spans = [torch.arange(p.first_token, p.first_token + p.end - p.start) for p in own]
                phase.tokens = to_device(torch.cat(spans), planner.device)
            if self.ring:
                remembered = planner.remembered(own)
                if remembered is not None:
                    phase.remember_from, phase.remember_at = remembered
            if self.rules.cumulative:
                phase.flushes = planner.flushes(common, own)
            phase.decisions = planner.decisions(common, own)
            phase.rows = len(own)
            yield planner.common_of(common, own, whole), phase

    def count(self, phases: Sequence[Phase]) -> None:
        """Count the rows and evictions of a step's phases."""
        self.log.counts.rows += sum(phase.rows for phase in phases)
        self.log.counts.evictions += sum(len(d.slots) for p in phases for d in p.decisions)

    def _parts(self, step: BuiltStep) -> list[list[RowPart]] | None:
        """Rows of each phase of the second runner's step, or None where no row has a plan."""
        assert self.second is not None
        if not self.plans:
            return None
        common, rows = step.built.call.common, self.second.rows
        slots = [-1] * int(common.num_reqs)
        for slot, named in rows.named.items():
            slots[named.row] = slot
        return step.planner.parts(common, slots, self.plans, rows.runner_slots)

    def _after(self, step: BuiltStep) -> None:
        """Make what a step that was attended whole brought about."""
        common, planner = step.built.call.common, step.planner
        phases = self._parts(step)
        if phases is None:
            return
        (rows,) = phases
        parts = [part for part in rows if part.plan is not None]
        folded = self._folded[planner.group]
        planner.layers = max(layers.fold.num_layers for layers in folded)
        if self.rules.cumulative:
            for flush in planner.flushes(common, parts, settled=True):
                for layers in folded:
                    layers.flush(flush)
        decisions = planner.decisions(common, parts)
        for decision in decisions:
            for layers in folded:
                layers.decide(decision)
        self.log.counts.rows += len(parts)
        self.log.counts.evictions += sum(len(d.slots) for d in decisions)

    def report(self, into: StepReport) -> None:
        into.sequence = self.log.take()

    @property
    def workspace(self) -> int:
        """Bytes that a decision takes for a moment, about: see `MOST_TOKENS`, `MASS_ELEMENTS`."""
        heads = max((layer.num_kv_heads for layer in self.policy.engine.layers), default=1)
        tokens = max(MOST_TOKENS, self.policy.engine.max_model_len)
        masses = 2 * 4 * MASS_ELEMENTS if self.ring else 0
        return tokens * heads * WORK_BYTES + masses


class Phases(MetadataStep):
    """Splits a step's metadata into phases; they ride on the metadata of the first."""

    def __init__(self, kind: ScoringWorker, planner: StepPlanner):
        self._kind = kind
        self._planner = planner

    def build(self, inner: Build, call: BuildCall) -> Any:
        kind, planner, common = self._kind, self._planner, call.common
        parts = None
        if kind.plans:
            parts = planner.parts(common, call.slots.tolist(), kind.plans)
        if parts is None:
            return inner(call)
        # Of several phases only one can have the schedule that FlashAttention's builder keeps.
        fast = call.fast or len(parts) > 1
        built = []
        for own, phase in kind.phases(planner, common, parts):
            phase.metadata = inner(replace(call.on(own), fast=fast))
            built.append(phase)
        kind.count(built)
        first = built[0].metadata
        first.kvplug_phases = built
        return first


class PhasedAttention(AttentionStep):
    """Attends phase by phase, and evicts between them."""

    def __init__(self, kind: ScoringWorker):
        self._kind = kind

    def attend(self, inner: Attend, call: AttendCall) -> Tensor:
        phases = getattr(call.metadata, "kvplug_phases", None)
        if not phases:
            out = inner(call)
            if call.metadata is None:
                # vLLM measures in this run what it has left for pages.
                torch.empty(self._kind.workspace, dtype=torch.uint8, device=call.query.device)
            places = getattr(call.metadata, "kvplug_places", None)
            if places is not None and self._kind.rings is not None:
                self._kind.rings.write(call.layer.layer_name, call.query, places)
            return out
        layer = self._kind.layer(call.impl, call.layer)
        layer.open(call.impl, call.layer, call.cache)
        for phase in phases:
            if phase.tokens is None:
                inner(replace(call, metadata=phase.metadata))
            else:
                part = call.on_tokens(phase.tokens, phase.metadata)
                inner(part)
                call.output[phase.tokens] = part.output
            for flush in phase.flushes:
                layer.flush(call.query, flush)
            if phase.remember_from is not None:
                layer.remember(call.query, phase.remember_from, phase.remember_at)
            for decision in phase.decisions:
                layer.decide(decision)
        return call.output
