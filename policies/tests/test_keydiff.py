from __future__ import annotations

import torch
from torch.nn import functional

from kvplug.testing.sequence import build, residents
from kvplug_policies.sequence.keydiff import KeyDiff


def test_the_key_that_points_elsewhere_stays() -> None:
    keys = torch.tensor([[[[1.0, 0.0], [5.0, 0.0], [0.0, 2.0]]]])
    scores = build(KeyDiff).score(residents(keys))
    mean = torch.tensor([2 / 3, 1 / 3])
    expected = -torch.tensor([mean[0], mean[0], mean[1]]) / mean.norm()
    torch.testing.assert_close(scores[0, 0], expected)


def test_scores_are_the_formula() -> None:
    keys = torch.randn(2, 3, 41, 16, generator=torch.Generator().manual_seed(0))
    anchor = functional.normalize(keys, dim=-1).mean(2, keepdim=True)
    expected = -functional.cosine_similarity(keys, anchor, dim=-1)
    torch.testing.assert_close(build(KeyDiff).score(residents(keys)), expected)
