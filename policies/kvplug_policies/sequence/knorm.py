"""Key norm: tokens with small keys stay.

Devoto et al., arXiv 2406.11430: in most layers and heads a key of small L2 norm draws much
attention, so the norm alone, known when the key is written, says what to drop. Needs no query and
no attention weight.

Differences from the paper, forced by paging or by serving:

* The paper evicts at every token; here decisions fall every ``interval`` generated tokens, and a
  budget is whole blocks.
* The first ``sink`` and latest ``recent`` tokens are always kept; the paper keeps none, which is
  ``sink: 0, recent: 0``.
* The paper leaves its first two layers whole, where the correlation is weak. Here every layer
  has the budget unless ``layers`` says more, e.g. ``{'0-1': 4.0}``.
"""

from __future__ import annotations

from torch import Tensor

from kvplug.contract import ResidentView, ScoringPolicy
from kvplug_kernels.key_scores import KEY_NORM


class Knorm(ScoringPolicy):
    """Keeps the tokens of each KV head whose keys have the smallest L2 norm."""

    name = "knorm"
    changes = "drops the tokens with the largest key norm, per KV head, beyond the budget"
    paper = (
        "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, arXiv 2406.11430"
    )

    def score(self, resident: ResidentView) -> Tensor:
        return -resident.key_score(KEY_NORM)
