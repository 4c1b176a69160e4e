"""A press as kvpress has them, for engines where kvpress is not installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class KeyDifference:
    """A token scores by how far its key points from the mean direction of keys."""

    sign: float = -1.0

    def score(
        self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any
    ) -> Tensor:
        mean = torch.nn.functional.normalize(keys, dim=-1).mean(dim=2, keepdim=True)
        return self.sign * torch.cosine_similarity(keys, mean, dim=-1)
