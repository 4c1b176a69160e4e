"""TOVA: the latest query decides, and all heads of a layer keep the same tokens.

Oren et al., arXiv 2401.06104: a transformer with a bounded cache is a recurrent network whose state
is a set of tokens. At every step the token that the latest query attends to least, on average over
the heads of the layer, leaves it. There is no other rule: neither the first nor the latest tokens
are kept as such.

Differences from the paper, forced by paging or by serving:

* The paper drops one token at every step; here decisions fall every ``interval`` generated tokens,
  each by the latest query alone, and a budget is whole blocks.
* The first ``sink`` and latest ``recent`` tokens are always kept. By default that is one token,
  the latest, which attention keeps in the paper as well.
* Under tensor parallelism the average is over the heads of a rank, so ranks may keep different
  tokens.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from kvplug.contract import ResidentView, ScoringOptions, ScoringPolicy
from kvplug_policies.scores import TextOrder, value_norms


class Tova(ScoringPolicy):
    """Keeps the tokens the latest query attends to, the same ones for every head of a layer."""

    name = "tova"
    changes = "drops the tokens the latest query attends to least, on average over a layer's heads"
    paper = "Transformers are Multi-State RNNs, arXiv 2401.06104"
    observation = 1

    class Options(ScoringOptions):
        """Options of `Tova`."""

        sink: int = Field(0, ge=0, le=1 << 20, description="first tokens that are always kept")
        recent: int = Field(1, ge=0, le=1 << 24, description="latest tokens that are always kept")
        value_norm: bool = Field(
            False,
            description="multiply by the norm of the value, to score what the output loses",
        )

    options: Options

    def score(self, resident: ResidentView) -> Tensor:
        received = resident.over_groups(resident.attention_mass(1))
        if self.options.value_norm:
            received = received * value_norms(resident)
        # Heads hold the same tokens, though not always in the same slots.
        text = TextOrder(resident.positions)
        mean = text.sort(received).mean(1, keepdim=True)
        return text.unsort(mean.expand_as(received))
