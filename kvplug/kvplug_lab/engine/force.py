"""A logits processor that makes an answer have given tokens, so that their probabilities are known.

vLLM reports a token's log-probability before logits processors change anything, so a forced answer
is teacher forcing in the engine itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from kvplug_lab.engine.trial import FORCED


class ForceTokens(AdapterLogitsProcessor):
    """Forces the answer of requests whose ``extra_args`` name its tokens."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        forced = (params.extra_args or {}).get(FORCED)
        if forced is None:
            return None

        def force(output_ids: list[int], logits: Tensor) -> Tensor:
            if len(output_ids) >= len(forced):
                return logits
            only = torch.full_like(logits, float("-inf"))
            only[forced[len(output_ids)]] = 0.0
            return only

        return force
