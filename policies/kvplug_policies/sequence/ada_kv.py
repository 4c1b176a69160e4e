"""Ada-KV: budgets where attention is spread, not where it is narrow; over any scorer.

Feng et al., arXiv 2407.11550: heads differ in how widely they attend. Taking the top of all heads'
scores together, instead of the top of each, gives wide heads more tokens and narrow ones fewer and
keeps more attention at the same total; a ``safeguard`` keeps any head from being starved.

What is Ada-KV here and what is not: a paged KV-cache group has one number of slots for all heads of
its layers, so **heads of a layer keep equally many tokens here, and that part of Ada-KV is not
done**. What adapts instead is how many: the same pooled ranking says how many tokens per head the
layers of a group need to hold ``mass`` of their scores, and the request's budget in that group
moves there, no lower than ``safeguard`` of the requested budget and no higher than as much above
it. So wide requests, and with ``layers`` or a pyramid wide groups of layers, get more, and narrow
ones fewer. The allocation of the paper itself, a count per head, is the function `head_budgets`,
for hosts whose heads need not be alike.

Other differences from the paper:

* As in the paper, the division is made once, on the whole text: at the end of the prompt, or
  later where a prompt was shorter than the budget. It holds from the next decision on. A prompt
  that was evicted from while it was prefilled keeps the requested budget.
* Scores that may be negative count from the lowest evictable one of their head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, ValidationError, field_validator
from torch import Tensor

from kvplug.contract import (
    EngineView,
    Kind,
    LayerView,
    PolicyOptions,
    ResidentView,
    ScoringOptions,
    ScoringPolicy,
)
from kvplug.registry import plugins
from kvplug_policies.scores import ALWAYS, latest


def pooled_counts(scores: Tensor, budget: Tensor) -> Tensor:
    """Count each head's tokens in the top of all heads' scores together.

    As the paper's code does, a head's scores are first weighed by the part of them that its own
    top ``budget`` tokens hold.

    Args:
        scores: At least 0, ``[rows, heads, resident]``.
        budget: Tokens per head, ``[rows]`` int64, at most ``resident``.

    Returns:
        ``[rows, heads]`` int64, of sum ``heads * budget``.
    """
    rows, heads, resident = scores.shape
    pooled = _weighed(scores, budget).flatten(1)
    order = pooled.argsort(dim=-1, descending=True, stable=True)
    taken = torch.arange(heads * resident, device=scores.device) < (heads * budget)[:, None]
    counts = torch.zeros((rows, heads), dtype=torch.int64, device=scores.device)
    return counts.scatter_add_(-1, order // resident, taken.long())


def head_budgets(scores: Tensor, budget: int | Tensor, safeguard: float = 0.2) -> Tensor:
    """Ada-KV's allocation: tokens per head, adaptive except for a fraction every head has.

    Args:
        scores: At least 0, ``[rows, heads, resident]``.
        budget: Mean tokens per head, at most ``resident``; a number, or one per row ``[rows]``.
        safeguard: Part of the budget that every head has, 0.0-1.0.

    Returns:
        ``[rows, heads]`` int64, of sum ``heads * budget``; a head gets at least ``safeguard *
        budget``, rounded down.
    """
    rows, heads, resident = scores.shape
    if not isinstance(budget, Tensor):
        budget = torch.full((rows,), budget, device=scores.device)
    budget = budget.long().clamp(0, resident)
    counts = pooled_counts(scores, budget).double()
    wanted = counts * (1.0 - safeguard) + budget[:, None].double() * safeguard
    whole = wanted.floor()
    left = heads * budget - whole.long().sum(-1)
    rank = (wanted - whole).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return whole.long() + (rank < left[:, None]).long()


def _weighed(scores: Tensor, budget: Tensor) -> Tensor:
    """Scores as parts of their head's, times the part that the head's top ``budget`` holds."""
    parts = scores / scores.sum(-1, keepdim=True).clamp(min=1e-30)
    best = parts.sort(-1, descending=True).values
    inside = torch.arange(scores.shape[-1], device=scores.device) < budget[:, None, None]
    return parts * best.where(inside, 0.0).sum(-1, keepdim=True)


class AdaKV(ScoringPolicy):
    """Any scorer, with a budget that follows how widely each request attends."""

    name = "ada_kv"
    changes = "drops what another scorer would; keeps more where scores are spread, fewer elsewhere"
    paper = (
        "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM "
        "Inference, arXiv 2407.11550"
    )

    class Options(ScoringOptions):
        """Options of `AdaKV`."""

        of: str | dict[str, Any] = Field(
            "snapkv",
            description="scorer: a name, or {use: NAME, option: value}",
        )
        safeguard: float = Field(
            0.2, gt=0, le=1, description="fraction of the budget that every head keeps"
        )
        mass: float = Field(
            0.9, gt=0, lt=1, description="fraction of the scores that the kept tokens must hold"
        )

        @field_validator("of")
        @classmethod
        def _names_a_scorer(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
            if isinstance(value, dict):
                if not isinstance(value.get("use"), str):
                    raise ValueError("`of` does not name a scorer: add `use:` to it")
                if common := sorted(set(ScoringOptions.model_fields) & set(value)):
                    raise ValueError(
                        f"{', '.join(common)} cannot be set in `of`: set it beside `of`"
                    )
            return value

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self.inner = self._scorer(engine)
        self.observation = self.inner.observation
        self.wants_cumulative_attention = self.inner.wants_cumulative_attention
        self._resized = 0
        self._wanted = 0.0
        self._kept = 0.0
        self._widest = 0.0

    def _scorer(self, engine: EngineView) -> ScoringPolicy:
        of = self.options.of
        name = of if isinstance(of, str) else str(of["use"])
        own = {} if isinstance(of, str) else {k: v for k, v in of.items() if k != "use"}
        registry = plugins().registry
        policy = registry.get(Kind.SEQUENCE, name)
        if policy is None or not issubclass(policy, ScoringPolicy):
            scorers = sorted(
                p.name
                for p in registry
                if issubclass(p, ScoringPolicy) and p.measure is ScoringPolicy.measure
            )
            raise ValueError(f"`of`: {name!r} is not a scorer; use one of {', '.join(scorers)}")
        common = {n: getattr(self.options, n) for n in ScoringOptions.model_fields}
        try:
            chosen = policy.Options.model_validate({**own, **common})
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ")
                for e in error.errors(include_url=False)
            )
            raise ValueError(f"`of`: {name}: {problems}") from error
        inner = policy(chosen, engine)
        if inner.resizes:
            raise ValueError(f"`of`: {name} sets its own budgets; use a scorer that does not")
        return inner

    def share(self, layer: LayerView) -> float:
        return self.inner.share(layer)

    def score(self, resident: ResidentView) -> Tensor:
        return self.inner.score(resident)

    def measure(self, resident: ResidentView, scores: Tensor) -> Tensor:
        """Measure how many tokens per head the layer needs, and what it was given.

        Returns:
            ``[rows, 4]``: tokens per KV head that hold ``mass`` of the scores, the budget asked
            for, both of a layer with share 1, the largest part of the budget that Ada-KV would
            give to one head, and 1 where nothing of the text was dropped before, else 0.
        """
        share, count = self.share(resident.layer), resident.count
        always = (resident.positions < self.options.sink) | latest(resident, self.options.recent)
        always |= scores >= ALWAYS / 2
        low = scores.masked_fill(always, ALWAYS).amin(-1, keepdim=True).clamp(max=0.0)
        open_ = (scores - low).masked_fill(always, 0.0)
        fixed = always.sum(-1).float().mean(-1)
        asked = self.options.budget
        base = (
            torch.full_like(fixed, float(asked))
            if isinstance(asked, int)
            else resident.num_prompt_tokens * asked
        )
        budget = (base * share - fixed).round().long().clamp(1, count)
        pooled = _weighed(open_, budget).flatten(1).double().sort(-1, descending=True).values
        pooled = pooled.cumsum(-1)
        enough = self.options.mass * pooled[:, -1:]
        needed = (pooled < enough).sum(-1) + 1
        heads = scores.shape[1]
        widest = head_budgets(open_, budget, self.options.safeguard).amax(-1) / budget
        whole = resident.num_tokens <= count
        return torch.stack([(needed / heads + fixed) / share, base, widest, whole], -1).float()

    def resize(self, measured: Sequence[float], budget: int, num_tokens: int) -> int:
        wanted, base, widest, whole = measured
        if whole < 0.5:
            # Evicted tokens draw no attention: 0.9 of what is left would shrink at every decision.
            return budget
        spare = self.options.safeguard * base
        kept = max(1, round(min(max(wanted, spare), 2 * base - spare)))
        self._resized += 1
        self._wanted += wanted / max(base, 1.0)
        self._kept += kept / max(base, 1.0)
        self._widest += widest
        return kept

    def counters(self) -> dict[str, float]:
        """Budgets set, and means over them of: the fraction of the requested budget that was
        wanted and that was given, and the largest fraction that Ada-KV would give to one head."""
        if not self._resized:
            return {}
        return {
            "budgets_set": self._resized,
            "wished_part": self._wanted / self._resized,
            "given_part": self._kept / self._resized,
            "widest_head_part": self._widest / self._resized,
        }
