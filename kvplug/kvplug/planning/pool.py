"""What a pool of KV blocks holds: vLLM's arithmetic of pages, groups and blocks, and how many
blocks of them a request takes under each policy."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from kvplug.contract import Window
from kvplug.hosts.pruning import EvictionPlan, Limits
from kvplug.hosts.sizes import cap_blocks, default_prefill_limit, pruned_blocks


@dataclass(frozen=True)
class Page:
    """One layer's page, with the names that vLLM's KV-cache specs have.

    Attributes:
        num_heads: Stored heads.
        block_size: Tokens per block.
        state_content_size_bytes: Bytes of K and V of a token and head.
        page_size_padded: Bytes of the page with what is kept behind its content; None for nothing.
    """

    num_heads: int
    block_size: int
    state_content_size_bytes: int
    page_size_padded: int | None = None

    @property
    def unpadded_page_size_bytes(self) -> int:
        """Bytes of the content."""
        return self.num_heads * self.block_size * self.state_content_size_bytes

    @property
    def page_size_bytes(self) -> int:
        """Bytes of the page."""
        padded = self.page_size_padded
        return self.unpadded_page_size_bytes if padded is None else padded


@dataclass(frozen=True)
class Texts:
    """The requests that a pool is planned for.

    Attributes:
        context: Tokens of a request when it ends, its answer among them; the engine's longest.
        output: Tokens of its answer.
        in_flight: Most tokens scheduled and not yet computed and acknowledged.
    """

    context: int
    output: int
    in_flight: int

    @property
    def prompt(self) -> int:
        """Tokens of a request's prompt."""
        return self.context - self.output


@dataclass(frozen=True)
class Blocks:
    """Blocks of one request in one KV-cache group.

    Attributes:
        admitted: Most at any time: so many must be free for it to be admitted.
        held: Most while it generates.
    """

    admitted: int
    held: int


class Rule(ABC):
    """What the layers of a group keep of a request."""

    @abstractmethod
    def blocks(self, texts: Texts, block_size: int) -> Blocks:
        """Blocks of one request of the texts."""

    @property
    def prunes(self) -> bool:
        """True under a scoring policy."""
        return False

    def limited(self, prefill_limit: int) -> Rule:
        """The rule in an engine whose pool limits prompts to so many blocks."""
        return self


@dataclass(frozen=True)
class Whole(Rule):
    """Every token."""

    def blocks(self, texts: Texts, block_size: int) -> Blocks:
        whole = -(-texts.context // block_size)
        return Blocks(whole, whole)


@dataclass(frozen=True)
class Sliding(Rule):
    """The window of a model's sliding-window layer, as vLLM keeps it.

    Attributes:
        window: Tokens that a query attends, its own among them.
    """

    window: int

    def blocks(self, texts: Texts, block_size: int) -> Blocks:
        def of(in_flight: int) -> int:
            tokens = min(self.window - 1 + in_flight, texts.context)
            return -(-tokens // block_size) + 1

        return Blocks(of(texts.in_flight), of(1))


@dataclass(frozen=True)
class Positional(Rule):
    """A sequence policy's window.

    Attributes:
        window: The rule.
    """

    window: Window

    def blocks(self, texts: Texts, block_size: int) -> Blocks:
        resident = self.window.exact_blocks
        admitted = cap_blocks(resident, texts.in_flight, texts.context, block_size)
        # A block is freed when the step after the one that filled the next is acknowledged.
        return Blocks(admitted, min(resident + 1, -(-texts.context // block_size)))


@dataclass(frozen=True)
class Pruned(Rule):
    """A scoring policy's limits.

    Attributes:
        limits: The limits.
    """

    limits: Limits

    @property
    def prunes(self) -> bool:
        return True

    def limited(self, prefill_limit: int) -> Rule:
        own = self.limits.prefill_limit or prefill_limit
        return replace(self, limits=self.limits.with_prefill_limit(own))

    def blocks(self, texts: Texts, block_size: int) -> Blocks:
        resident = pruned_blocks(self.limits, texts.context)
        admitted = cap_blocks(resident, texts.in_flight, texts.context, block_size)
        return Blocks(admitted, min(self._held(texts, block_size), admitted))

    def _held(self, texts: Texts, block_size: int) -> int:
        plan = EvictionPlan(self.limits, texts.prompt)
        plan.until(texts.context)
        ends = [eviction.at for eviction in plan.evictions[1:]] + [texts.context]
        held = [
            eviction.blocks + -(-end // block_size) - eviction.end
            for eviction, end in zip(plan.evictions, ends, strict=False)
            if end > texts.prompt
        ]
        if not plan.evictions or plan.first > texts.prompt:
            until = min(plan.first, texts.context) if plan.evictions else texts.context
            held.append(-(-until // block_size))
        return max(held)


@dataclass(frozen=True)
class Group:
    """Layers that share block tables.

    Attributes:
        rule: What they keep of a request.
        layers: How many they are; padding not counted.
        block_size: Tokens per block.
    """

    rule: Rule
    layers: int
    block_size: int


@dataclass(frozen=True)
class Pool:
    """The pool of one rank.

    Attributes:
        block_bytes: Bytes of a block, in all layers of the largest group.
        groups: The KV-cache groups.
        blocks: Blocks that the memory has room for, the null block among them.
    """

    block_bytes: int
    groups: tuple[Group, ...]
    blocks: int

    @property
    def usable(self) -> int:
        """Blocks that requests can have."""
        return max(self.blocks - 1, 0)

    @property
    def tokens(self) -> int:
        """Tokens that the pool holds where a request keeps all of them in every group."""
        each = sum(1 / group.block_size for group in self.groups)
        return int(self.usable / each)

    @property
    def token_bytes(self) -> float:
        """Bytes of a token that is kept in every group, tails and padding among them."""
        return sum(self.block_bytes / group.block_size for group in self.groups)

    def request(self, texts: Texts) -> Blocks:
        """Blocks of one request in all groups."""
        found = [group.rule.blocks(texts, group.block_size) for group in self.groups]
        return Blocks(sum(b.admitted for b in found), sum(b.held for b in found))

    def users(self, texts: Texts) -> int:
        """Requests that fit at once when each holds the most that it does while it generates, and
        the last of them can still be admitted. 0 where not one can: vLLM then does not start."""
        one = self.request(texts)
        if one.admitted > self.usable:
            return 0
        return 1 + (self.usable - one.admitted) // max(one.held, 1)


def pool_of(layers: Sequence[tuple[Page, Rule]], kv_bytes: int) -> Pool:
    """Plan the pool of some layers as vLLM does.

    Layers with one rule share a group, whatever their pages; otherwise pages are made equal, and
    layers are split into groups of equally many. (vLLM has a second way for pages of several sizes,
    which a layout with blocks outermost takes; kvplug's deployments do not ask for one.)

    Args:
        layers: Page and rule of each layer.
        kv_bytes: Bytes for the pool.
    """
    if len({rule for _, rule in layers}) == 1:
        size = sum(page.page_size_bytes for page, _ in layers)
        groups: tuple[Group, ...] = (Group(layers[0][1], len(layers), layers[0][0].block_size),)
    else:
        size, groups = _hybrid(layers)
    pruned = sum(group.rule.prunes for group in groups)
    blocks = max(kv_bytes, 0) // size
    if pruned:
        limit = default_prefill_limit(max(blocks - 1, 0), pruned)
        groups = tuple(replace(g, rule=g.rule.limited(limit)) for g in groups)
    return Pool(size, groups, blocks)


def _hybrid(layers: Sequence[tuple[Page, Rule]]) -> tuple[int, tuple[Group, ...]]:
    most = max(page.page_size_bytes for page, _ in layers)
    buckets: dict[Hashable, list[tuple[Page, Rule]]] = {}
    for page, rule in layers:
        size = page.page_size_bytes
        if most % size:
            page = replace(page, page_size_padded=most)
        else:
            page = replace(page, block_size=page.block_size * (most // size))
        buckets.setdefault((page, rule), []).append((page, rule))
    counts = [len(bucket) for bucket in buckets.values()]
    each = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    groups = []
    for bucket in buckets.values():
        page, rule = bucket[0]
        parts = math.ceil(len(bucket) / each)
        groups += [Group(rule, len(bucket[i::parts]), page.block_size) for i in range(parts)]
    return each * most, tuple(groups)
