"""When tokens of a running request are evicted and which survive: shared by every host of a
scoring policy.

A request's text is laid out in logical blocks. A `Eviction` is a position of the text at which the
blocks before it shrink to the few that hold the tokens worth keeping. Evictions follow from the
policy's options, the prompt's length and positions alone, so the side that owns the blocks and the
side that owns the tensors agree on them without messages, whatever the chunks of a prompt.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvplug.contract import LayerView, ResidentView, ScoringPolicy
from kvplug_kernels.select_top import select_top

MAX_SHARE = 16
"""Largest share of a budget that a layer can have."""

FLUSH = 32
"""Queries collected before cumulative attention is brought up to date."""


SETTLED_TOKENS = 16
"""Tokens after which a measurement decides sizes: by then it has reached the scheduler, however
many steps that runs ahead, so the size of an eviction depends on the text alone."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a scoring policy declares, read once: what it declares later changes nothing.

    Attributes:
        sink: First tokens that are always kept.
        recent: Latest tokens that are always kept.
        observation: Latest queries that it is shown.
        cumulative: Whether it is shown cumulative attention.
        on_demand: Evicted tokens kept in host memory.
        resizes: Whether it changes budgets at run time.
        block_size: Tokens per block.
    """

    sink: int
    recent: int
    observation: int
    cumulative: bool
    on_demand: int
    resizes: bool
    block_size: int

    @classmethod
    def of(cls, policy: ScoringPolicy) -> Rules:
        """Read what a policy declares."""
        options = policy.options
        return cls(
            sink=options.sink,
            recent=options.recent,
            observation=int(policy.observation),
            cumulative=bool(policy.wants_cumulative_attention),
            on_demand=options.on_demand,
            resizes=bool(policy.resizes),
            block_size=policy.engine.block_size,
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one group of layers with equal shares, in blocks.

    Attributes:
        block_size: Tokens per block.
        budget: Tokens kept (int), or the part of the prompt (float), before `share`.
        share: The group's part of the budget.
        always: Tokens kept whatever their score: sinks and recent ones.
        interval: Blocks generated between two evictions.
        protected: Leading blocks that other requests may share, never written by an eviction.
        prefill_limit: Blocks allocated to a prompt before tokens inside it are evicted; 0 for no
            limit.
    """

    block_size: int
    budget: int | float
    share: float
    always: int
    interval: int
    protected: int
    prefill_limit: int = 0

    @classmethod
    def of(
        cls, policy: ScoringPolicy, layer: LayerView, block_size: int, prefill_limit: int = 0
    ) -> Limits:
        """Derive the limits that a policy sets for a layer.

        Args:
            policy: The policy.
            layer: A layer of the group.
            block_size: Tokens per block.
            prefill_limit: Blocks allocated to a prompt before tokens inside it are evicted,
                where the policy's ``prefill`` is 0; 0 for no limit.

        Raises:
            ValueError: The layer's share is none, or its budget is smaller than what is always
                kept.
        """
        options, share = policy.options, policy.share(layer)
        if type(share) not in (int, float) or not 0 < share <= MAX_SHARE:
            raise ValueError(
                f"share of layer {layer.index} must be above 0 and at most {MAX_SHARE}, "
                f"got {share!r}"
            )
        interval = -(-options.interval // block_size)
        if isinstance(options.budget, int):
            least = -(-math.ceil(options.budget * share) // block_size) * block_size
            if least < options.sink + options.recent:
                raise ValueError(
                    f"layer {layer.index} keeps {least} tokens (budget {options.budget} x share "
                    f"{share:g}), less than sink + recent = {options.sink + options.recent}"
                )
        return cls(
            block_size=block_size,
            budget=options.budget,
            share=share,
            always=options.sink + options.recent,
            interval=interval,
            protected=max(interval, -(-options.shared // block_size)),
            prefill_limit=-(-options.prefill // block_size) if options.prefill else prefill_limit,
        )

    def with_prefill_limit(self, prefill_limit: int) -> Limits:
        """Return a copy with another `prefill_limit`."""
        return replace(self, prefill_limit=prefill_limit)

    def kept(self, num_prompt_tokens: int) -> int:
        """Blocks kept of a request; never fewer than sinks and recent tokens fill."""
        budget = self.budget
        tokens = budget if isinstance(budget, int) else budget * num_prompt_tokens
        return max(1, -(-max(math.ceil(tokens * self.share), self.always) // self.block_size))

    def spared(self, num_prompt_tokens: int) -> int:
        """Full blocks below which a text is never pruned: it fits the budget of an equal share, or
        its survivors would have to be written where other requests read."""
        within = self.budget // self.block_size if isinstance(self.budget, int) else 0
        return max(self.protected + self.kept(num_prompt_tokens), within + 1)

    def most(self, num_tokens: int) -> int:
        """Most blocks allocated to a request of up to ``num_tokens``, those in flight not counted,
        if evictions inside its prompt come as early as they can."""
        whole = -(-num_tokens // self.block_size)
        return min(whole, self.spared(num_tokens) + self.interval + 1)


@dataclass(frozen=True, slots=True)
class Eviction:
    """An eviction: the blocks that a request keeps from a position on.

    Kept afterwards: logical blocks ``[protected, protected + kept)`` and ``[end - grown, ...)``.
    They carry the survivors of everything before block ``end``; blocks from ``end`` on are whole.

    Attributes:
        at: Tokens computed when tokens are evicted.
        end: Full blocks it covers.
        kept: Blocks of survivors after the protected ones.
        grown: Blocks of survivors before block ``end``: where a budget grew.
    """

    at: int
    end: int
    kept: int
    grown: int = 0

    @property
    def blocks(self) -> int:
        """Blocks of survivors."""
        return self.kept + self.grown


class EvictionPlan:
    """The evictions of one request in one group of layers, scheduled as far as needed.

    Args:
        limits: The group's limits.
        num_prompt_tokens: Tokens of the prompt.
        resize: Blocks to keep at an eviction while generating, given the blocks kept before; for
            policies that change budgets at run time.
    """

    def __init__(
        self,
        limits: Limits,
        num_prompt_tokens: int,
        resize: Callable[[int], int] | None = None,
    ):
        self.limits = limits
        self.num_prompt_tokens = num_prompt_tokens
        self.kept = limits.kept(num_prompt_tokens)
        self.spared = limits.spared(num_prompt_tokens)
        least = self.spared + limits.interval
        self.prefill_limit = max(limits.prefill_limit, least) if limits.prefill_limit else 0
        self.evictions: list[Eviction] = []
        self._resize = resize
        self._next = self._after(None)

    def until(self, tokens: int) -> None:
        """Schedule every eviction up to a position."""
        while self._next.at <= tokens:
            eviction = self._next
            last = self.evictions[-1] if self.evictions else None
            if self._resize is not None and eviction.at > self.num_prompt_tokens:
                eviction = self._resized(eviction, last)
            self.evictions.append(eviction)
            self._next = self._after(eviction)

    def between(self, start: int, end: int) -> tuple[Eviction | None, Sequence[Eviction]]:
        """Return the eviction in force at ``start`` and those in ``(start, end]``."""
        self.until(end)
        first = bisect_right(self.evictions, start, key=lambda eviction: eviction.at)
        last = bisect_right(self.evictions, end, key=lambda eviction: eviction.at)
        return self.evictions[first - 1] if first else None, self.evictions[first:last]

    @property
    def next_at(self) -> int:
        """Position of the first eviction that is not scheduled yet."""
        return self._next.at

    @property
    def first(self) -> int:
        """Position of the first eviction."""
        return self.evictions[0].at if self.evictions else self._next.at

    def _after(self, last: Eviction | None) -> Eviction:
        limits, prompt, size = self.limits, self.num_prompt_tokens, self.limits.block_size
        at, end, blocks = (last.at, last.end, last.blocks) if last else (0, 0, 0)
        if at < prompt:
            forced = end + self.prefill_limit - blocks
            if self.prefill_limit and forced * size < prompt:
                room = (
                    self.prefill_limit
                    - limits.protected
                    - max(limits.interval, self.prefill_limit // 4)
                )
                return Eviction(forced * size, forced, max(self.kept, room))
            full = prompt // size
            if full >= self.spared and (full > end or blocks > self.kept):
                return Eviction(prompt, full, self.kept)
        full = self.spared if last is None else end + limits.interval
        return Eviction(full * size, full, *self._split(last, self.kept))

    def _split(self, last: Eviction | None, blocks: int) -> tuple[int, int]:
        """Split survivors into those at the front and at the end of what an eviction covers: blocks
        freed in the middle cannot be allocated again, so a growing budget keeps the newest ones."""
        kept = blocks if last is None else min(blocks, last.kept)
        return kept, blocks - kept

    def _resized(self, eviction: Eviction, last: Eviction | None) -> Eviction:
        assert self._resize is not None
        before = last.blocks if last is not None else self.kept
        held = (
            before + eviction.end - last.end
            if last is not None
            else eviction.end - self.limits.protected
        )
        least = max(1, -(-self.limits.always // self.limits.block_size))
        most = (
            max(self.kept, self.prefill_limit - self.limits.interval)
            if self.prefill_limit
            else held
        )
        blocks = min(max(self._resize(before), least), held, most)
        return Eviction(eviction.at, eviction.end, *self._split(last, blocks))


@dataclass(frozen=True, slots=True)
class Layout:
    """The logical blocks of a request when tokens are evicted, in the order a policy sees them.

    Attributes:
        blocks: Logical block numbers: where survivors go, then the other candidates, then the
            block being filled.
        survivors: How many of them receive survivors.
        candidates: How many of them are covered by the eviction.
        tokens: Tokens in all of them.
    """

    blocks: tuple[int, ...]
    survivors: int
    candidates: int
    tokens: int


def layout(last: Eviction | None, eviction: Eviction, protected: int, block_size: int) -> Layout:
    """Lay out a request's blocks just before ``eviction``; ``last`` is the one in force."""
    filled = -(-eviction.at // block_size)
    if last is None:
        held = list(range(filled))
    else:
        held = [*range(protected, protected + last.kept), *range(last.end - last.grown, filled)]
    goal = [
        *range(protected, protected + eviction.kept),
        *range(eviction.end - eviction.grown, eviction.end),
    ]
    order = goal + sorted(set(held) - set(goal))
    candidates = sum(b < eviction.end for b in order)
    return Layout(
        tuple(order),
        len(goal),
        candidates,
        candidates * block_size + eviction.at - eviction.end * block_size,
    )


def choose(
    policy: ScoringPolicy,
    held: ResidentView,
    candidates: int,
    count: int,
    unwanted: Tensor | None = None,
    rules: Rules | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the tokens that survive an eviction.

    Args:
        policy: The policy.
        held: The tokens of the rows; ``held.held`` counts the block being filled too.
        candidates: Tokens, from the first, that the eviction covers.
        count: How many of them survive per row and KV head.
        unwanted: Tokens that must not survive, broadcast to ``[rows, kv_heads, held]`` bool.
        rules: What the policy declared; read now if None.

    Returns:
        Indices of the survivors, ascending, ``[rows, kv_heads, count]`` int32, and the policy's
        scores, ``[rows, kv_heads, held]`` float32. Sinks and recent tokens survive whatever their
        score; NaN counts as the lowest score.

    Raises:
        ValueError: The policy did not return one score per token.
    """
    rules = rules or Rules.of(policy)
    scores = scored(policy, held)
    return keep_best(rules, held, scores, candidates, count, unwanted), scores


def scored(policy: ScoringPolicy, held: ResidentView) -> Tensor:
    """Let a policy score tokens.

    The policy is shown copies of the bookkeeping that decides and follows what survives.

    Args:
        policy: The policy.
        held: The tokens of the rows.

    Returns:
        ``[rows, kv_heads, held]`` float32, without NaN and infinities.

    Raises:
        ValueError: The policy did not return one score per token.
        TypeError: It returned something else than a dense tensor of reals.
    """
    return finite(given_scores(policy, own_view(held)))


def given_scores(policy: ScoringPolicy, shown: ResidentView) -> Tensor:
    """Let a policy score tokens, and take what it returns as it is.

    Args:
        policy: The policy.
        shown: The tokens of the rows, of which nothing is read afterwards.

    Returns:
        ``[rows, kv_heads, held]`` float32, contiguous along the last dimension; perhaps the
        policy's own.

    Raises:
        ValueError: The policy did not return one score per token.
        TypeError: It returned something else than a dense tensor of reals.
    """
    shape, device = shown.positions.shape, shown.positions.device
    given: Any = policy.score(shown)
    if type(given) is not Tensor or given.layout is not torch.strided or given.is_complex():
        raise TypeError(f"score returned {type(given).__name__}, expected a dense tensor of reals")
    if given.shape != shape:
        raise ValueError(
            f"{type(policy).name} returned scores of shape {tuple(given.shape)} for tokens of "
            f"shape {tuple(shape)}"
        )
    if given.device != device:
        raise ValueError(f"score returned a tensor on {given.device}")
    plain = given.detach().to(torch.float32)
    return plain if plain.stride(-1) == 1 or plain.shape[-1] < 2 else plain.contiguous()


def finite(scores: Tensor) -> Tensor:
    """Return a copy of scores without NaN, which count as the lowest, and infinities."""
    lowest = torch.finfo(torch.float32).min
    # Of their own, too: the policy may hold on to what it returned.
    return scores.clone().nan_to_num_(nan=lowest, posinf=-lowest, neginf=lowest)


def own_view(held: ResidentView) -> ResidentView:
    """Return a view for a policy whose small tensors, those a host goes on with, are copies."""
    attention = held.cumulative_attention
    return replace(
        held,
        num_tokens=held.num_tokens.clone(),
        num_prompt_tokens=held.num_prompt_tokens.clone(),
        positions=held.positions.clone(),
        block_table=held.block_table.clone(),
        cumulative_attention=attention.clone() if attention is not None else None,
    )


def keep_best(
    rules: Rules | ScoringPolicy,
    held: ResidentView,
    scores: Tensor,
    candidates: int,
    count: int,
    unwanted: Tensor | None = None,
) -> Tensor:
    """Select the ``count`` best of the first ``candidates`` tokens; see `choose`."""
    rules = rules if isinstance(rules, Rules) else Rules.of(rules)
    positions = held.positions[..., :candidates]
    newest = (held.num_tokens - rules.recent)[:, None, None]
    always = (positions < rules.sink) | (positions >= newest)
    ranked = scores[..., :candidates].masked_fill(always, float("inf"))
    if unwanted is not None:
        ranked = ranked.masked_fill(unwanted[..., :candidates], float("-inf"))
    return select_top(ranked.contiguous(), count)
