"""KeyDiff: tokens whose keys are unlike the others stay.

Park et al., arXiv 2504.15364: keys that point away from the mean direction of the cache draw more
attention, so each token scores minus the cosine between its key and the mean of all normalised
keys resident. Needs no query, so it works block by block while a long prompt is read.

Differences from the paper, forced by paging or by serving:

* The paper decides after every block of a prompt and every generated token; here decisions fall
  every ``interval`` generated tokens, inside a prompt only where it is longer than ``prefill``,
  and a budget is whole blocks.
* The first ``sink`` and latest ``recent`` tokens are always kept; the paper keeps none, which is
  ``sink: 0, recent: 0``.
"""

from __future__ import annotations

from torch import Tensor

from kvplug.contract import ResidentView, ScoringPolicy
from kvplug_kernels.key_scores import KEY_TO_MEAN


class KeyDiff(ScoringPolicy):
    """Keeps the tokens of each KV head whose keys are least like the mean key."""

    name = "keydiff"
    changes = "drops the tokens whose keys are most like the mean key, per KV head"
    paper = (
        "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference, "
        "arXiv 2504.15364"
    )

    def score(self, resident: ResidentView) -> Tensor:
        return -resident.key_score(KEY_TO_MEAN)
