"""Smart window: as large as a request's far tokens are worth, and keys that mattered stay.

An adaptive window. It answers two questions about a request at every decision.

**Which tokens?** A token's worth is the larger of two numbers, both in units of a fair share: what
the latest ``window`` queries pay it, pooled over neighbours, against what they would pay if they
looked at all resident tokens alike; and what it received since it was written, against what it
would have received had every query since looked at its whole text alike, which grows with the
logarithm of the text. So a token that the request needs now is kept at once, and one that once
mattered stays for good: what it received is never forgotten, only diluted, and slowly.

**How many?** Had the window been a quarter smaller, it would hold the far tokens, those older than
the latest ones, that looked worth most before the latest queries ran. The part of their attention
that those queries pay to the other far tokens is what the smaller window would have lost. Above
``grow`` the next window is a step larger, below ``shrink`` a step smaller, between them it stays,
and it never leaves ``min`` to ``max`` times the budget.

Paging: decisions fall every ``interval`` generated tokens, sizes are whole blocks, heads of a layer
keep equally many tokens, layers of one share have one size. A window cannot grow by more than was
generated since the decision before, for evicted tokens are gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kvplug.contract import (
    EngineView,
    PolicyOptions,
    ResidentView,
    ScoringOptions,
    ScoringPolicy,
)
from kvplug_policies.scores import latest, query_count, raised

SMALLER = 0.75
"""Size of the smaller window that a window is judged by."""

DOUBT = 1.0
"""Fair shares of attention that a token is credited with and charged for before it is known, so
that a token of yesterday does not outshine one that has been of use for long."""


class SmartWindow(ScoringPolicy):
    """Keeps what mattered and what matters now, in a window as large as that needs."""

    name = "smart_window"
    changes = "drops the tokens worth least so far and now; how many, follows what each is paid"
    paper = "kvplug's own"
    wants_cumulative_attention = True

    class Options(ScoringOptions):
        """Options of `SmartWindow`."""

        window: int = Field(32, ge=1, le=1024, description="latest queries observed, and kept")
        kernel: int = Field(5, ge=1, le=63, description="neighbouring tokens pooled, an odd number")
        min: float = Field(
            0.25, gt=0, le=1, description="smallest window, as a fraction of the budget"
        )
        max: float = Field(
            4.0, ge=1, le=64, description="largest window, as a multiple of the budget"
        )
        grow: float = Field(
            0.1,
            ge=0,
            le=1,
            description="attention lost by a smaller window, as a fraction, above which it grows",
        )
        shrink: float = Field(
            0.05,
            ge=0,
            le=1,
            description="attention lost by a smaller window, as a fraction, below which it shrinks",
        )
        step: float = Field(
            1.25, gt=1, le=4, description="factor by which a window grows or shrinks at a decision"
        )

        @model_validator(mode="after")
        def _knobs_agree(self) -> Self:
            if self.shrink > self.grow:
                raise ValueError(f"shrink {self.shrink} is larger than grow {self.grow}")
            if self.kernel % 2 == 0:
                raise ValueError("kernel must be odd")
            if isinstance(self.budget, int) and self.budget < self.sink + self.window:
                raise ValueError(
                    f"budget {self.budget} is smaller than sink + window = "
                    f"{self.sink + self.window}"
                )
            return self

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self.observation = self.options.window
        self._observed: tuple[ResidentView, Tensor] | None = None
        self._verdicts = {"grew": 0, "stayed": 0, "shrank": 0}
        self._sizes: list[float] = [0.0, 0.0, 0.0]
        self._far = self._lost = 0.0

    def score(self, resident: ResidentView) -> Tensor:
        options = self.options
        received = self._received(resident)
        self._observed = resident, received
        inside = latest(resident, options.window)
        pooled = resident.pooled_mass(
            received, options.window, kernel=options.kernel, how="mean", kept=0.0
        )
        now = pooled * resident.count
        so_far = self._so_far(resident, self._cumulative(resident))
        return raised(torch.maximum(now, so_far), inside)

    def measure(self, resident: ResidentView, scores: Tensor) -> Tensor:
        """Measure the attention that the latest queries pay to far tokens.

        Returns:
            ``[rows, 3]``: the part of the attention that goes to far tokens, the part that a
            smaller window would have lost, and the requested budget.
        """
        observed, self._observed = self._observed, None
        same = observed is not None and observed[0] is resident
        received = observed[1] if observed is not None and same else self._received(resident)
        count = query_count(resident, self.options.window)
        before = (self._cumulative(resident) - received * count).clamp(min=0.0)
        near = latest(resident, max(self.options.window, self.options.recent))
        always = near | (resident.positions < self.options.sink)
        worth = self._so_far(resident, before).masked_fill(always, torch.inf)
        order = worth.argsort(dim=-1, descending=True, stable=True)
        rank = torch.arange(resident.count, device=worth.device)
        asked = self.options.budget
        base = (
            torch.full_like(resident.num_tokens, asked)
            if isinstance(asked, int)
            else resident.num_prompt_tokens * asked
        ).float()
        block = self.engine.block_size
        since = -(-self.options.interval // block) * block
        size = torch.where(
            resident.num_tokens <= resident.count,
            base * self.share(resident.layer),
            float(resident.count - since),
        )
        lost = rank >= size[:, None, None] * SMALLER
        paid = received.masked_fill(always, 0.0)
        paid_lost = paid.gather(-1, order) * lost
        return torch.stack([paid.sum(-1).mean(-1), paid_lost.sum(-1).mean(-1), base], -1)

    def resize(self, measured: Sequence[float], budget: int, num_tokens: int) -> int:
        options = self.options
        far, lost, base = measured
        size = float(budget)
        if lost > options.grow:
            size *= options.step
        elif lost < options.shrink:
            size /= options.step
        size = min(max(size, options.min * base), options.max * base)
        asked = max(1, round(size))
        verdict = "grew" if asked > budget else "shrank" if asked < budget else "stayed"
        self._verdicts[verdict] += 1
        total, smallest, largest = self._sizes
        first = total == 0.0
        self._sizes = [
            total + asked,
            asked if first else min(smallest, asked),
            max(largest, asked),
        ]
        self._far += far
        self._lost += lost
        return asked

    def counters(self) -> dict[str, float]:
        """Decisions at which a window grew, stayed and shrank; its smallest, mean and largest size
        in tokens; mean part of the attention that went to far tokens, and that a window a quarter
        smaller would have lost."""
        decisions = sum(self._verdicts.values())
        if not decisions:
            return {}
        total, smallest, largest = self._sizes
        return {
            **self._verdicts,
            "smallest_window": smallest,
            "mean_window": total / decisions,
            "largest_window": largest,
            "far_attention": self._far / decisions,
            "lost_attention": self._lost / decisions,
        }

    def _received(self, resident: ResidentView) -> Tensor:
        """Attention of the latest queries per query, ``[rows, kv_heads, resident]``."""
        window = self.options.window
        return resident.over_groups(resident.attention_mass(window)) / query_count(resident, window)

    @staticmethod
    def _cumulative(resident: ResidentView) -> Tensor:
        if resident.cumulative_attention is None:
            raise ValueError(
                "smart_window needs cumulative attention, which its host does not provide"
            )
        return resident.cumulative_attention.float()

    @staticmethod
    def _so_far(resident: ResidentView, totals: Tensor) -> Tensor:
        """Attention received since a token was written, against its fair share of it."""
        text = resident.num_tokens[:, None, None].float()
        fair = (text.log() - (resident.positions + 1).float().log()).clamp(min=0.0)
        return (totals + DOUBT) / (fair + DOUBT)
