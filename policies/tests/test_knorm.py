from __future__ import annotations

import torch

from kvplug.testing.sequence import build, residents
from kvplug_policies.sequence.knorm import Knorm


def test_small_keys_stay() -> None:
    keys = torch.tensor([[[[3.0, 4.0], [0.0, 1.0], [6.0, 8.0], [0.6, 0.8]]]])
    scores = build(Knorm).score(residents(keys))
    torch.testing.assert_close(scores, torch.tensor([[[-5.0, -1.0, -10.0, -1.0]]]))


def test_each_head_has_its_own_order() -> None:
    keys = torch.tensor([[[[1.0], [2.0]], [[2.0], [1.0]]]])
    assert build(Knorm).score(residents(keys)).argmax(-1).tolist() == [[0, 1]]


def test_norms_that_bfloat16_would_tie_are_told_apart() -> None:
    keys = torch.full((1, 1, 2, 128), 0.25, dtype=torch.bfloat16)
    keys[0, 0, 1, 0] = 0.251953125
    scores = build(Knorm).score(residents(keys))
    assert keys.float().norm(dim=-1).bfloat16().unique().numel() == 1
    assert scores[0, 0, 0] > scores[0, 0, 1]
