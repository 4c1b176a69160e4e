"""SnapKV: the last queries of a prompt show what the answer will look at.

Li et al., arXiv 2404.14469: attention of the last ``window`` queries over the tokens before them,
summed over the queries, pooled over neighbours so that clusters stay whole, and the top of it kept
together with the window itself. Query heads that share a KV head are averaged.

Differences from the paper, forced by paging or by serving:

* The paper decides once, at the end of the prompt, and lets the answer's tokens pile up. Here the
  same rule is applied again every ``interval`` generated tokens, with the latest queries as the
  window, and inside a prompt longer than ``prefill``. A budget is whole blocks.
* Pooling goes by position in the text: after a decision, a neighbour that is gone counts as one
  that receives no attention.
* The first ``sink`` tokens are always kept; the paper keeps them by their score.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from kvplug.contract import EngineView, PolicyOptions, ResidentView, ScoringOptions, ScoringPolicy
from kvplug_policies.scores import ALWAYS, latest, raised, value_norms


class SnapKV(ScoringPolicy):
    """Keeps the tokens of each KV head that the latest queries attend to."""

    name = "snapkv"
    changes = "drops the tokens the latest queries attend to least, per KV head, in clusters"
    paper = "SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469"

    class Options(ScoringOptions):
        """Options of `SnapKV`, and of policies that score as it does."""

        window: int = Field(32, ge=1, le=1024, description="latest queries observed, and kept")
        kernel: int = Field(7, ge=1, le=63, description="neighbouring tokens pooled, an odd number")
        pooling: Literal["max", "mean"] = Field("max", description="how neighbours are pooled")
        value_norm: bool = Field(
            False,
            description="multiply by the norm of the value, to score what the output loses",
        )

        @field_validator("kernel")
        @classmethod
        def _kernel_has_a_middle(cls, value: int) -> int:
            if value % 2 == 0:
                raise ValueError("kernel must be odd")
            return value

        @model_validator(mode="after")
        def _budget_holds_the_window(self) -> Self:
            if isinstance(self.budget, int) and self.budget < self.sink + self.window:
                needed = self.sink + self.window
                raise ValueError(f"budget {self.budget} is smaller than sink + window = {needed}")
            return self

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self.observation = self.options.window

    def score(self, resident: ResidentView) -> Tensor:
        options, window = self.options, self.options.window
        pooled = resident.pooled_mass(
            resident.attention_mass(window),
            window,
            window=window,
            kernel=options.kernel,
            how=options.pooling,
            kept=ALWAYS,
        )
        if options.value_norm:
            return raised(pooled * value_norms(resident), latest(resident, window))
        return pooled
