from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from kvplug.contract import LayerView
from kvplug.testing.sequence import build, residents
from kvplug_policies.sequence.h2o import H2O

KEYS = torch.ones(1, 1, 8, 2)
TOTALS = torch.tensor([[[0.5, 3.0, 0.1, 2.0, 0.2, 0.7, 0.3, 0.6]]])


def test_half_the_budget_is_heavy_hitters_and_half_is_recent() -> None:
    scores = build(H2O, budget=4, sink=0, recent=0).score(residents(KEYS, totals=TOTALS))
    kept = scores.topk(4, -1).indices[0, 0].sort().values
    assert kept.tolist() == [1, 3, 6, 7]
    assert torch.equal(scores[..., :6], TOTALS[..., :6])


def test_the_recent_half_follows_the_layers_share() -> None:
    policy = build(H2O, budget=4, sink=0, recent=0, layers={"1": 2.0})
    layer = LayerView(1, 4, 1, 1, 2)
    scores = policy.score(residents(KEYS, totals=TOTALS, layer=layer))
    assert (scores > TOTALS).tolist() == [[[False] * 4 + [True] * 4]]


def test_a_part_of_the_prompt_is_counted_per_request() -> None:
    policy = build(H2O, budget=0.5, sink=0, recent=0)
    held = residents(
        KEYS.expand(2, 1, 8, 2),
        totals=TOTALS.expand(2, 1, 8).contiguous(),
        num_tokens=torch.tensor([8, 8]),
        num_prompt_tokens=torch.tensor([8, 4]),
    )
    raised = policy.score(held) > TOTALS
    assert raised.sum(-1).tolist() == [[2], [1]]


def test_age_is_no_merit_per_query() -> None:
    policy = build(H2O, budget=2, sink=0, recent=0, recent_part=0.0, per_query=True)
    scores = policy.score(residents(KEYS, totals=TOTALS))
    seen = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1])
    torch.testing.assert_close(scores[0, 0], TOTALS[0, 0] / seen)


def test_value_norm_weighs_what_the_output_would_lose() -> None:
    values = torch.full((1, 1, 8, 2), 3.0)
    policy = build(H2O, budget=2, sink=0, recent=0, recent_part=0.0, value_norm=True)
    scores = policy.score(residents(KEYS, values, totals=TOTALS))
    torch.testing.assert_close(scores, TOTALS * 18**0.5)


def test_totals_are_asked_for_and_missed() -> None:
    assert build(H2O).wants_cumulative_attention
    with pytest.raises(ValueError, match="cumulative attention"):
        build(H2O).score(residents(KEYS))


def test_a_part_above_one_is_refused() -> None:
    with pytest.raises(ValidationError):
        H2O.Options.model_validate({"recent_part": 1.5})
