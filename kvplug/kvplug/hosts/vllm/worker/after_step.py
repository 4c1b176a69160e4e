"""Evictions after a step of vLLM's second model runner, in all layers of a group at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvplug.contract import LayerView, ScoringPolicy
from kvplug.hosts.pruning import FLUSH, Eviction, EvictionPlan, Limits, layout
from kvplug.hosts.vllm.worker.evictions import EvictionLog, LayerEvictions
from kvplug.hosts.vllm.worker.folded import Fold, chunks
from kvplug.hosts.vllm.worker.layers import softcap_of
from kvplug.hosts.vllm.worker.metadata import to_device
from kvplug.hosts.vllm.worker.phases import AttentionFlush, EvictionDecision, ResidentBlocks
from kvplug.hosts.vllm.worker.query_rings import QueryRings
from kvplug.hosts.vllm.worker.residents import LayerResidents

MOST_TOKENS = 1 << 17
"""Resident tokens of rows and layers that a policy is shown at once: it bounds the memory that
decisions take beside the cache."""

REHEARSED_TOKENS = 1 << 15
"""Longest prompt whose eviction is compiled before the first request."""


def rehearsed(limits: Limits, num_tokens: int) -> list[tuple[Eviction | None, Eviction]]:
    """Evictions of the shapes to compile for, each with the one in force before it.

    Kernels are compiled by powers of two of what a policy is shown.

    Args:
        limits: Limits of the layers.
        num_tokens: Tokens of the longest text.
    """
    size = limits.block_size
    made: list[tuple[Eviction | None, Eviction]] = []
    generating = EvictionPlan(limits.with_prefill_limit(0), 1)
    first = generating.next_at
    if first + limits.interval * size <= num_tokens:
        generating.until(first + limits.interval * size)
        made.append((generating.evictions[0], generating.evictions[1]))
    prompt = size
    while prompt < num_tokens:
        prompt = min(2 * prompt, num_tokens)
        plan = EvictionPlan(limits.with_prefill_limit(0), prompt)
        if plan.next_at == prompt:
            plan.until(prompt)
            made.append((None, plan.evictions[0]))
    return made


class LayerGroup:
    """Layers of one KV-cache group that are decided together.

    Args:
        fold: Their caches.
        names: Their names, in the order of the fold.
        residents: Their resident tokens, opened on the fold.
        evictions: Their evictions.
        rings: Their remembered queries, or None for none.
    """

    def __init__(
        self,
        fold: Fold,
        names: Sequence[str],
        residents: LayerResidents,
        evictions: LayerEvictions,
        rings: QueryRings | None,
    ):
        self.fold = fold
        self.names = tuple(names)
        self.residents = residents
        self.evictions = evictions
        device = fold.cache.device
        firsts = [rings.first(name) if rings is not None else 0 for name in names]
        self._starts = to_device(firsts, device, torch.int64)
        if rings is not None:
            residents.queries = rings.all_like(names[0])

    def flush(self, flush: AttentionFlush) -> None:
        """Bring cumulative attention up to date from remembered queries, in every layer."""
        for layers in self._parts(flush.resident.tokens * flush.resident.rows):
            self.residents.flush(None, self.fold.flush(flush, layers, self._starts))

    def decide(self, decision: EvictionDecision) -> None:
        """Make one eviction in every layer."""
        for layers in self._parts(decision.resident.tokens * len(decision.slots)):
            self.evictions.decide(self.fold.decision(decision, layers, self._starts))

    def rehearse(self, limits: Limits, num_tokens: int) -> None:
        """Compile what evictions run, on the null block: for generating requests and for prompts.

        Args:
            limits: Limits of the layers.
            num_tokens: Tokens of the longest text.
        """
        device = self.fold.cache.device
        size = limits.block_size
        for last, eviction in rehearsed(limits, min(num_tokens, REHEARSED_TOKENS)):
            found = layout(last, eviction, limits.protected, size)
            row = [0, last.end if last is not None else 0, eviction.at, 0, *found.blocks]
            numbers = to_device([row], device, torch.int32)
            resident = ResidentBlocks(
                torch.zeros((1, max(found.blocks) + 1), dtype=torch.int32, device=device),
                numbers[:, 0],
                numbers[:, 4:],
                numbers[:, 1],
                found.tokens,
            )
            shown = to_device([eviction.at] * self.fold.num_layers, device, torch.int32)
            decision = EvictionDecision(
                resident,
                found.candidates * size,
                found.survivors * size,
                [0],
                [eviction.at],
                numbers[:, 2],
                shown,
                shown,
                numbers[:, 3],
            )
            layers = next(iter(self._parts(found.tokens)))  # the rest of the layers run the same
            if self.evictions.rules.cumulative:
                queries = to_device([[eviction.at - FLUSH, eviction.at, 0]], device, torch.int32)
                flush = AttentionFlush(resident, None, None, None, FLUSH, queries)
                self.residents.flush(None, self.fold.flush(flush, layers, self._starts))
            self.evictions.rehearse(self.fold.decision(decision, layers, self._starts))

    def layer(self, index: int) -> FoldedLayer:
        """Return one of the layers, for evictions inside its own attention."""
        return FoldedLayer(self, range(index, index + 1), self._starts)

    def _parts(self, tokens: int) -> Iterable[range]:
        return chunks(self.fold.num_layers, tokens, MOST_TOKENS)


class FoldedLayer:
    """One layer of a fold; what `LayerEvictions` is to a layer by itself.

    Args:
        folded: The layers.
        layers: The layer.
        starts: Where each layer's queries start, ``[num_layers]`` int64.
    """

    def __init__(self, folded: LayerGroup, layers: range, starts: Tensor):
        self._folded = folded
        self._layers = layers
        self._starts = starts

    def open(self, impl: Any, layer: Any, cache: Tensor) -> None:
        """Do nothing: the fold is open since the caches were allocated."""

    def remember(self, query: Tensor, tokens: Tensor, places: Tensor) -> None:
        """Keep the queries of some tokens for later evictions."""
        queries = self._folded.residents.queries
        assert queries is not None, "allocated for every slot while the model was loaded"
        queries[places + self._starts[self._layers.start]] = query[tokens]

    def flush(self, query: Tensor, flush: AttentionFlush) -> None:
        """Bring the cumulative attention of some rows up to date."""
        folded = self._folded.fold.flush(flush, self._layers, self._starts)
        self._folded.residents.flush(query, folded)

    def decide(self, decision: EvictionDecision) -> None:
        """Make one eviction."""
        folded = self._folded.fold.decision(decision, self._layers, self._starts)
        self._folded.evictions.decide(folded)


def fold_layers(
    policy: ScoringPolicy,
    log: EvictionLog,
    group: int,
    layers: dict[str, tuple[Any, LayerView, Tensor]],
    ring: int,
    rings: QueryRings | None,
    tails: bool = False,
) -> list[LayerGroup]:
    """Fold the layers of one KV-cache group where their caches allow it, and open their pages.

    Args:
        policy: The policy.
        log: Its log.
        group: Number of the KV-cache group.
        layers: vLLM's layer, its view and its cache, by name.
        ring: Queries remembered per slot.
        rings: The remembered queries, or None for none.
        tails: Whether pages have tails; see `page_tails`.
    """
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, (layer, view, cache) in layers.items():
        impl = layer.impl
        # A format may store each layer in its own way, and then reads and writes one at a time.
        own = name if impl.kvplug_pages(layer, cache) is not None else ""
        softcap = softcap_of(impl)
        queries = rings.all_like(name).data_ptr() if rings is not None else 0
        like = view if policy.layerwise else replace(view, index=0)
        key = (like, float(impl.scale), softcap, queries, own, cache.shape)
        alike.setdefault(key, []).append(name)
    made = []
    for (_, scale, softcap, *_), names in alike.items():
        names.sort(key=lambda name: layers[name][2].data_ptr())
        whole = Fold.of([layers[name][2] for name in names])
        # Caches in several allocations are decided one by one.
        for some in [names] if whole is not None else [[name] for name in names]:
            layer, view, cache = layers[some[0]]
            fold = whole or Fold.of([cache])
            assert fold is not None, "one cache folds"
            residents = LayerResidents(policy, view, ring, scale, softcap, tails)
            residents.open(layer.impl, layer, fold.cache)
            evictions = LayerEvictions(residents, group, log)
            made.append(LayerGroup(fold, some, residents, evictions, rings))
    return made
