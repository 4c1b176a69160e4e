"""When a running request is cut and which tokens survive: what every host of a scoring policy does.

A request's text is laid out in logical blocks. A `Cut` is a position of the text at which the
blocks before it shrink to a few that hold the tokens worth keeping. Cuts follow from the policy's
options, the prompt's length and positions alone, so the side that owns the blocks and the side
that owns the tensors agree on them without a word, however a prompt was cut into chunks.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvplug.contract import HeldView, LayerView, ScoringPolicy
from kvplug_kernels.select_top import select_top


@dataclass(frozen=True, slots=True)
class Limits:
    """The options of one group of layers with equal shares, in blocks.

    Attributes:
        block_size: Tokens per block.
        budget: Tokens kept (int), or the part of the prompt (float), before `share`.
        share: The group's part of the budget.
        always: Tokens kept whatever their score: sinks and recent ones.
        interval: Blocks generated between two cuts.
        shared: Leading blocks that may be shared with other requests: never written by a cut.
        hold: Blocks held before a cut must be made inside a prompt; 0 for no limit.
    """

    block_size: int
    budget: int | float
    share: float
    always: int
    interval: int
    shared: int
    hold: int = 0

    @classmethod
    def of(cls, policy: ScoringPolicy, layer: LayerView, block_size: int, hold: int = 0) -> Limits:
        """The limits a policy sets for a layer.

        Args:
            policy: The policy.
            layer: A layer of the group.
            block_size: Tokens per block.
            hold: Blocks to hold where the policy's ``prefill`` says nothing; 0 for no limit.

        Raises:
            ValueError: The layer's budget is smaller than what is always kept.
        """
        options, share = policy.options, policy.share(layer)
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
            shared=max(interval, -(-options.shared // block_size)),
            hold=-(-options.prefill // block_size) if options.prefill else hold,
        )

    def holding(self, hold: int) -> Limits:
        """The same with another `hold`."""
        return replace(self, hold=hold)

    def kept(self, num_prompt_tokens: int) -> int:
        """Blocks kept of a request; never fewer than hold what is always kept."""
        budget = self.budget
        tokens = budget if isinstance(budget, int) else budget * num_prompt_tokens
        return max(1, -(-max(math.ceil(tokens * self.share), self.always) // self.block_size))

    def spared(self, num_prompt_tokens: int) -> int:
        """Full blocks below which a text is never cut: it fits the budget of an equal share, or
        its survivors would have to be written where other requests read."""
        within = self.budget // self.block_size if isinstance(self.budget, int) else 0
        return max(self.shared + self.kept(num_prompt_tokens), within + 1)

    def most(self, num_tokens: int) -> int:
        """Most blocks a request of up to ``num_tokens`` holds, what is in flight not counted,
        if cuts inside its prompt come as early as they can."""
        whole = -(-num_tokens // self.block_size)
        return min(whole, self.spared(num_tokens) + self.interval + 1)


@dataclass(frozen=True, slots=True)
class Cut:
    """What a request holds from a position on.

    Held afterwards: logical blocks ``[shared, shared + kept)`` and ``[end - tail, ...)``. They
    carry the survivors of everything before block ``end``; blocks from ``end`` on are whole.

    Attributes:
        at: Tokens computed when the cut is made.
        end: Full blocks it covers.
        kept: Blocks of survivors after the shared ones.
        tail: Blocks of survivors before block ``end``: where a budget grew.
    """

    at: int
    end: int
    kept: int
    tail: int = 0

    @property
    def blocks(self) -> int:
        """Blocks of survivors."""
        return self.kept + self.tail


class Plan:
    """The cuts of one request in one group of layers, found as far as they are asked for.

    Args:
        limits: The group's limits.
        num_prompt_tokens: Tokens of the prompt.
        resize: Blocks to keep at a cut while generating, given the blocks kept before; for
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
        self.hold = max(limits.hold, least) if limits.hold else 0
        self.cuts: list[Cut] = []
        self._resize = resize
        self._next = self._after(None)

    def until(self, tokens: int) -> None:
        """Find every cut up to a position."""
        while self._next.at <= tokens:
            cut = self._next
            last = self.cuts[-1] if self.cuts else None
            if self._resize is not None and cut.at > self.num_prompt_tokens:
                cut = self._resized(cut, last)
            self.cuts.append(cut)
            self._next = self._after(cut)

    def between(self, start: int, end: int) -> tuple[Cut | None, Sequence[Cut]]:
        """The cut in force at ``start`` and those in ``(start, end]``."""
        self.until(end)
        first = bisect_right(self.cuts, start, key=lambda cut: cut.at)
        last = bisect_right(self.cuts, end, key=lambda cut: cut.at)
        return self.cuts[first - 1] if first else None, self.cuts[first:last]

    @property
    def first(self) -> int:
        """Position of the first cut."""
        return self.cuts[0].at if self.cuts else self._next.at

    def _after(self, last: Cut | None) -> Cut:
        limits, prompt, size = self.limits, self.num_prompt_tokens, self.limits.block_size
        at, end, blocks = (last.at, last.end, last.blocks) if last else (0, 0, 0)
        if at < prompt:
            forced = end + self.hold - blocks
            if self.hold and forced * size < prompt:
                room = self.hold - limits.shared - max(limits.interval, self.hold // 4)
                return Cut(forced * size, forced, max(self.kept, room))
            full = prompt // size
            if full >= self.spared and (full > end or blocks > self.kept):
                return Cut(prompt, full, self.kept)
        full = self.spared if last is None else end + limits.interval
        return Cut(full * size, full, *self._split(last, self.kept))

    def _split(self, last: Cut | None, blocks: int) -> tuple[int, int]:
        """Survivors at the front and at the end of what the cut covers: blocks given back in the
        middle cannot be had again, so a growing budget keeps the newest ones."""
        kept = blocks if last is None else min(blocks, last.kept)
        return kept, blocks - kept

    def _resized(self, cut: Cut, last: Cut | None) -> Cut:
        assert self._resize is not None
        before = last.blocks if last is not None else self.kept
        held = before + cut.end - last.end if last is not None else cut.end - self.limits.shared
        least = max(1, -(-self.limits.always // self.limits.block_size))
        most = max(self.kept, self.hold - self.limits.interval) if self.hold else held
        blocks = min(max(self._resize(before), least), held, most)
        return Cut(cut.at, cut.end, *self._split(last, blocks))


@dataclass(frozen=True, slots=True)
class Layout:
    """The logical blocks a request holds when a cut is made, in the order a decision sees them.

    Attributes:
        blocks: Logical block numbers: where survivors go, then the other candidates, then the
            block being filled.
        survivors: How many of them receive survivors.
        candidates: How many of them are covered by the cut.
        tokens: Tokens held in all of them.
    """

    blocks: tuple[int, ...]
    survivors: int
    candidates: int
    tokens: int


def layout(last: Cut | None, cut: Cut, shared: int, block_size: int) -> Layout:
    """The blocks held just before ``cut``, of a request whose cut in force is ``last``."""
    filled = -(-cut.at // block_size)
    if last is None:
        held = list(range(filled))
    else:
        held = [*range(shared, shared + last.kept), *range(last.end - last.tail, filled)]
    goal = [*range(shared, shared + cut.kept), *range(cut.end - cut.tail, cut.end)]
    rest = sorted(set(held) - set(goal))
    order = goal + rest
    candidates = sum(b < cut.end for b in order)
    return Layout(
        tuple(order),
        len(goal),
        candidates,
        candidates * block_size + cut.at - cut.end * block_size,
    )


def choose(
    policy: ScoringPolicy,
    held: HeldView,
    candidates: int,
    count: int,
    unwanted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The held tokens that survive a cut.

    Args:
        policy: The policy.
        held: What the rows hold; ``held.held`` counts the block being filled too.
        candidates: Held tokens, from the first, that the cut covers.
        count: How many of them survive per row and KV head.
        unwanted: Held tokens that must not survive, broadcast to ``[rows, kv_heads, held]`` bool.

    Returns:
        Held indices, ascending, ``[rows, kv_heads, count]`` int32, and the policy's scores,
        ``[rows, kv_heads, held]`` float32. Sinks and recent tokens survive whatever their score;
        NaN counts as the lowest score.

    Raises:
        ValueError: The policy returned something else than one score per held token.
    """
    scores = policy.score(held)
    if scores.shape != held.positions.shape:
        raise ValueError(
            f"{policy.name} returned scores of shape {tuple(scores.shape)} for held tokens of "
            f"shape {tuple(held.positions.shape)}"
        )
    lowest = torch.finfo(torch.float32).min
    scores = torch.nan_to_num(scores.float(), nan=lowest, posinf=-lowest, neginf=lowest)
    return keep_best(policy, held, scores, candidates, count, unwanted), scores


def keep_best(
    policy: ScoringPolicy,
    held: HeldView,
    scores: Tensor,
    candidates: int,
    count: int,
    unwanted: Tensor | None = None,
) -> Tensor:
    """The ``count`` best of the first ``candidates`` held tokens; see `choose`."""
    positions = held.positions[..., :candidates]
    newest = (held.num_tokens - policy.options.recent)[:, None, None]
    always = (positions < policy.options.sink) | (positions >= newest)
    ranked = scores[..., :candidates].masked_fill(always, float("inf"))
    if unwanted is not None:
        ranked = ranked.masked_fill(unwanted[..., :candidates], float("-inf"))
    return select_top(ranked.contiguous(), count)
