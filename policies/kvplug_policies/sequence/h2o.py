"""H2O: heavy hitters and recent tokens, half and half.

Zhang et al., arXiv 2306.14048: a few tokens receive most of the attention over a whole generation.
Each token's attention is accumulated over every query since it was written; half of the budget goes
to the tokens with the most of it, half to the latest tokens.

Differences from the paper, forced by paging or by serving:

* The paper drops one token at every step; here decisions fall every ``interval`` generated tokens
  and a budget is whole blocks. Attention is accumulated at every step all the same.
* Query heads that share a KV head are averaged: the paper's models have one query head each.
* The first ``sink`` tokens are always kept; the paper keeps them by their score.
"""

from __future__ import annotations

import math

from pydantic import Field
from torch import Tensor

from kvplug.contract import (
    ResidentView,
    ScoringOptions,
    ScoringPolicy,
)
from kvplug_policies.scores import ALWAYS, value_norms


class H2O(ScoringPolicy):
    """Keeps the tokens of each KV head with the most accumulated attention, and the latest."""

    name = "h2o"
    changes = "drops the tokens with the least attention accumulated so far, per KV head"
    paper = (
        "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, "
        "arXiv 2306.14048"
    )
    wants_cumulative_attention = True

    class Options(ScoringOptions):
        """Options of `H2O`."""

        recent_part: float = Field(
            0.5, ge=0, le=1, description="fraction of the budget for the latest tokens"
        )
        per_query: bool = Field(
            False,
            description="divide by the number of queries that could see the token, to ignore age",
        )
        value_norm: bool = Field(
            False,
            description="multiply by the norm of the value, to score what the output loses",
        )

    options: Options

    def score(self, resident: ResidentView) -> Tensor:
        if resident.cumulative_attention is None:
            raise ValueError("h2o needs cumulative attention, which its host does not provide")
        heavy, recent = resident.cumulative_attention, self._recent(resident)
        if self.options.per_query:
            seen = resident.num_tokens[:, None, None] - resident.positions
            heavy = heavy / seen.clamp(min=1)
        if self.options.value_norm:
            heavy = heavy * value_norms(resident)
        return resident.pooled_mass(heavy, recent, kept=ALWAYS)

    def _recent(self, resident: ResidentView) -> int | Tensor:
        """Latest tokens that are kept whatever their total: a number, or one per row."""
        options = self.options
        part = options.recent_part * self.share(resident.layer)
        if isinstance(options.budget, int):
            return math.floor(options.budget * part)
        return (resident.num_prompt_tokens * (options.budget * part)).int()
