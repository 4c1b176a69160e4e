from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from kvplug.contract import LayerView, ScoringOptions
from kvplug.testing.sequence import ENGINE, build, random_residents, residents
from kvplug_policies.scores import ALWAYS
from kvplug_policies.sequence.ada_kv import AdaKV, head_budgets, pooled_counts
from kvplug_policies.sequence.h2o import H2O
from kvplug_policies.sequence.pyramidkv import PyramidKV
from kvplug_policies.sequence.snapkv import SnapKV


def plain_counts(scores: Tensor, budget: int) -> list[int]:
    """Heads of the pooled top, one row, as the paper's code finds it."""
    entries = []
    for h, head in enumerate(scores):
        parts = head / head.sum()
        weight = parts.sort(descending=True).values[:budget].sum()
        entries += [(float(p * weight), h) for p in parts]
    top = sorted(entries, reverse=True)[: budget * len(scores)]
    return [sum(h == head for _, h in top) for head in range(len(scores))]


@pytest.mark.parametrize("budget", [1, 7, 20, 40])
def test_pooled_counts_are_the_papers(budget: int) -> None:
    scores = torch.rand(3, 4, 40, generator=torch.Generator().manual_seed(0)) ** 4
    got = pooled_counts(scores, torch.tensor([budget] * 3))
    assert got.tolist() == [plain_counts(row, budget) for row in scores]


@pytest.mark.parametrize("budget", [0, 1, 7, 20, 40])
@pytest.mark.parametrize("safeguard", [0.0, 0.2, 0.5, 1.0])
def test_heads_get_the_budget_between_them(budget: int, safeguard: float) -> None:
    scores = torch.rand(5, 3, 40, generator=torch.Generator().manual_seed(1)) ** 6
    got = head_budgets(scores, budget, safeguard)
    assert got.sum(-1).tolist() == [3 * budget] * 5
    assert (got >= int(safeguard * budget)).all()
    assert (got <= 40).all()
    if safeguard == 1.0:
        assert (got == budget).all()
    counts = pooled_counts(scores, torch.full((5,), budget)) * (1 - safeguard)
    assert ((got - counts - safeguard * budget).abs() < 1).all()


def test_a_wide_head_gets_more_than_a_narrow_one() -> None:
    narrow = torch.zeros(100)
    narrow[3] = 1.0
    scores = torch.stack([narrow, torch.ones(100)])[None]
    assert head_budgets(scores, 10, 0.2).tolist() == [[3, 17]]


def test_budgets_may_differ_by_row() -> None:
    scores = torch.rand(2, 3, 40, generator=torch.Generator().manual_seed(2))
    both = head_budgets(scores, torch.tensor([5, 30]))
    assert torch.equal(both[:1], head_budgets(scores[:1], 5))
    assert torch.equal(both[1:], head_budgets(scores[1:], 30))


def test_it_scores_and_shares_as_its_scorer_with_its_own_common_options() -> None:
    made = build(AdaKV, of={"use": "pyramidkv", "window": 16, "groups": 2}, budget=300, sink=2)
    alone = build(PyramidKV, window=16, groups=2, budget=300, sink=2)
    assert made.observation == 16
    held = random_residents(made)
    assert torch.equal(made.score(held), alone.score(held))
    layers = [LayerView(i, 6) for i in range(6)]
    assert [made.share(v) for v in layers] == [alone.share(v) for v in layers]

    totals = build(AdaKV, of="h2o")
    assert totals.wants_cumulative_attention
    assert not made.wants_cumulative_attention
    held = random_residents(totals)
    assert torch.equal(totals.score(held), build(H2O).score(held))


def made_view(scores: Tensor) -> tuple[AdaKV, Tensor]:
    """Ada-KV over one row of scores; sink 0, the last token recent."""
    policy = build(AdaKV, budget=8, sink=0, recent=1, mass=0.9, of="knorm")
    assert isinstance(policy, AdaKV)
    held = residents(torch.ones(1, scores.shape[0], scores.shape[1], 2))
    return policy, policy.measure(held, scores[None])


def test_what_a_layer_needs_is_counted_over_all_heads() -> None:
    """Ten open tokens each: a head of one token's mass and an even one need 1 + 8 for 90%."""
    narrow = torch.tensor([1.0] + [0.0] * 9 + [5.0])
    even = torch.tensor([1.0] * 10 + [5.0])
    _, measured = made_view(torch.stack([narrow, even]))
    needed, base, widest, whole = measured[0].tolist()
    assert (base, whole) == (8.0, 1.0)
    # Within a budget of 7 the even head holds 0.7 of its mass, so its parts weigh 0.07 each: of
    # 1.7 in all, 90% is the narrow head's one and eight of those.
    assert needed == pytest.approx((1 + 8) / 2 + 1)
    assert widest > 1.0


def test_tokens_a_scorer_keeps_anyway_are_not_divided() -> None:
    even = torch.tensor([1.0] * 6 + [ALWAYS] * 4 + [ALWAYS])
    _, measured = made_view(torch.stack([even, even]))
    assert measured[0, 0].item() == pytest.approx(5 + 11 / 2)


def test_negative_scores_count_from_the_lowest() -> None:
    scores = torch.tensor([-3.0] * 9 + [-1.0, -2.0])
    _, measured = made_view(torch.stack([scores, scores]))
    assert measured[0, 0].item() == pytest.approx(1 + 2 / 2)


def test_a_part_of_the_prompt_is_the_base() -> None:
    policy = build(AdaKV, budget=0.5)
    case = random_residents(policy)
    case = replace(case, num_prompt_tokens=torch.tensor([60, 80], dtype=torch.int32))
    assert policy.measure(case, policy.score(case))[:, 1].tolist() == [30.0, 40.0]


@pytest.mark.parametrize(
    ("wished", "given"), [(500.0, 500), (10.0, 200), (5000.0, 1800), (1000.4, 1000)]
)
def test_budgets_move_within_the_safeguard(wished: float, given: int) -> None:
    policy = build(AdaKV, safeguard=0.2)
    assert policy.resize([wished, 1000.0, 1.5, 1.0], 640, 5000) == given
    counters = policy.counters()
    assert counters["budgets_set"] == 1
    assert counters["wished_part"] == pytest.approx(wished / 1000)
    assert counters["given_part"] == given / 1000
    assert counters["widest_head_part"] == 1.5


def test_a_budget_is_set_once_on_the_whole_text() -> None:
    policy = build(AdaKV, sink=0, recent=1)
    whole = random_residents(policy, rows=1, held=60, text=60)
    cut = random_residents(policy, rows=1, held=60, text=90)
    assert [policy.measure(c, policy.score(c))[0, 3].item() for c in (whole, cut)] == [1.0, 0.0]
    assert policy.resize([100.0, 1000.0, 1.5, 0.0], 640, 5000) == 640
    assert policy.counters() == {}


def test_it_resizes_where_the_plain_scorer_does_not() -> None:
    assert build(AdaKV).resizes
    assert not build(SnapKV).resizes


@pytest.mark.parametrize(
    ("of", "message"),
    [
        ("lru", "not a scorer; use one of .*snapkv"),
        ("sink_window", "not a scorer"),
        ("smart_window", "sets its own budgets"),
        ("ada_kv", "sets its own budgets"),
        ({"use": "snapkv", "kernel": 2}, "odd"),
        ({"use": "snapkv", "colour": 2}, "colour"),
    ],
)
def test_what_is_no_scorer_is_refused(of: object, message: str) -> None:
    options = AdaKV.Options.model_validate({"of": of})
    with pytest.raises(ValueError, match=message):
        AdaKV(options, ENGINE)


@pytest.mark.parametrize(
    "options",
    [
        {"of": {"kernel": 5}},
        {"of": {"use": "snapkv", "budget": 3}},
        {"safeguard": 0.0},
        {"mass": 1.0},
    ],
)
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AdaKV.Options.model_validate(options)


def test_common_options_stand_beside_the_scorer() -> None:
    with pytest.raises(ValidationError, match="beside `of`"):
        AdaKV.Options.model_validate({"of": {"use": "snapkv", "interval": 3}})
    assert set(ScoringOptions.model_fields) < set(AdaKV.Options.model_fields)
