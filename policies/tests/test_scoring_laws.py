from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from scoring_laws import build, permuted, random_case, row, scoring_policies
from torch import Tensor

from kvplug.contract import ResidentView, ScoringPolicy

EVERY = pytest.mark.parametrize("policy", scoring_policies(), ids=lambda p: p.name)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=1e-5)


def test_there_are_scoring_policies() -> None:
    assert scoring_policies()


@EVERY
@pytest.mark.parametrize(("kv_heads", "group"), [(3, 1), (2, 3), (1, 4)])
@pytest.mark.parametrize("held", [21, 64, 131])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_finite_float32_of_the_held_shape(
    policy: type[ScoringPolicy], kv_heads: int, group: int, held: int, dtype: torch.dtype
) -> None:
    made = build(policy)
    case = random_case(made, kv_heads=kv_heads, group=group, held=held, text=held + 60, dtype=dtype)
    scores = made.score(case)
    assert scores.shape == (2, kv_heads, held)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


@EVERY
def test_scores_tell_tokens_apart(policy: type[ScoringPolicy]) -> None:
    made = build(policy, budget=64)
    scores = made.score(random_case(made, held=120, text=200, seed=3))
    assert (scores.amax(-1) > scores.amin(-1)).all()


@EVERY
def test_a_row_scores_alone_as_it_does_beside_others(policy: type[ScoringPolicy]) -> None:
    made = build(policy)
    case = random_case(made, rows=3, seed=1)
    together = made.score(case)
    for index in range(3):
        close(made.score(row(case, index)), together[index : index + 1])


@EVERY
@pytest.mark.parametrize("page", [16, 32, 128])
def test_slots_do_not_matter(policy: type[ScoringPolicy], page: int) -> None:
    made = build(policy)
    case = random_case(made, same_tokens=True, seed=2)
    order = torch.stack([torch.randperm(case.count) for _ in range(4)]).reshape(2, 2, -1)
    moved = made.score(permuted(case, order, page))
    close(moved, made.score(case).gather(2, order))


@EVERY
def test_scores_are_the_same_twice_and_inputs_stay(policy: type[ScoringPolicy]) -> None:
    made = build(policy)
    case = random_case(made, dtype=torch.bfloat16, seed=4)
    before = {
        f.name: value.clone()
        for f in fields(ResidentView)
        if isinstance(value := getattr(case, f.name), Tensor)
    }
    first, second = made.score(case), made.score(case)
    assert torch.equal(first, second)
    for name, value in before.items():
        torch.testing.assert_close(getattr(case, name), value, rtol=0, atol=0, equal_nan=True)


@EVERY
def test_one_token_is_scored(policy: type[ScoringPolicy]) -> None:
    made = build(policy)
    case = random_case(made, held=21, text=30)
    first = permuted(case, case.positions.argsort(-1)[..., -1:], 16)
    scores = made.score(first)
    assert scores.shape == (2, 2, 1)
    assert scores.isfinite().all()


@EVERY
def test_measurements_are_rows_of_finite_numbers(policy: type[ScoringPolicy]) -> None:
    made = build(policy)
    case = random_case(made, rows=3, seed=6)
    scores = made.score(case)
    measured = made.measure(case, scores)
    assert (measured is not None) == made.resizes
    if measured is None:
        return
    assert measured.ndim == 2
    assert measured.isfinite().all()
    for index in range(3):
        alone = row(case, index)
        again = made.measure(alone, made.score(alone))
        assert again is not None
        close(again, measured[index : index + 1])
        asked = made.resize(measured[index].tolist(), 64, 1000)
        assert isinstance(asked, int)
        assert asked >= 1


@EVERY
def test_a_budget_below_what_is_always_kept_is_refused(policy: type[ScoringPolicy]) -> None:
    with pytest.raises(ValueError, match="smaller than"):
        build(policy, budget=10, sink=8, recent=8)
