"""MorphKV: the recent tokens choose which old ones they need.

Ghadia et al., arXiv 2503.00979: the cache has a constant size. It holds the latest ``window``
tokens and those older ones that the queries of the window attend to most, by the sum of their
attention or by the largest share one of them gives. As the window moves on, so does the choice.

Differences from the paper, forced by paging or by serving:

* The paper chooses at every step; here decisions fall every ``interval`` generated tokens, and a
  budget is whole blocks.
* The paper keeps the attention of the window's queries as it was when they ran. Here it is computed
  at the decision, over the tokens resident then, which gives the same weights but for tokens
  dropped since, and needs no memory between decisions.
* Query heads that share a KV head are averaged after the softmax; the published code adds their
  logits.
* The first ``sink`` tokens are kept only if configured; by default none, as in the paper.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from kvplug.contract import EngineView, PolicyOptions, ResidentView, ScoringOptions, ScoringPolicy
from kvplug_policies.scores import ALWAYS, latest, raised, value_norms


class MorphKV(ScoringPolicy):
    """Keeps the latest tokens of each KV head and the older ones their queries attend to."""

    name = "morph_kv"
    changes = "drops the old tokens that the latest tokens attend to least, per KV head"
    paper = (
        "Dialogue Without Limits: Constant-Sized KV Caches for Extended Responses in LLMs, "
        "arXiv 2503.00979"
    )

    class Options(ScoringOptions):
        """Options of `MorphKV`."""

        sink: int = Field(0, ge=0, le=1 << 20, description="first tokens that are always kept")
        window: int = Field(
            32,
            ge=1,
            le=1024,
            description="latest tokens whose queries score the others; always kept",
        )
        fusion: Literal["max", "sum"] = Field(
            "max", description="how the attention of the window's queries is combined"
        )
        value_norm: bool = Field(
            False,
            description="multiply by the norm of the value, to score what the output loses",
        )

        @model_validator(mode="after")
        def _budget_holds_the_window(self) -> Self:
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

    def score(self, resident: ResidentView) -> Tensor:
        window, how = self.options.window, self.options.fusion
        received = resident.pooled_mass(resident.attention_mass(window, how), window, kept=ALWAYS)
        if self.options.value_norm:
            return raised(received * value_norms(resident), latest(resident, window))
        return received
