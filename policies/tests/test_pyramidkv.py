from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from kvplug.contract import LayerView
from kvplug.testing.sequence import build, residents
from kvplug_policies.sequence.pyramidkv import PyramidKV
from kvplug_policies.sequence.snapkv import SnapKV


def shares(depth: int, **options: object) -> list[float]:
    policy = build(PyramidKV, **options)
    return [policy.share(LayerView(i, depth)) for i in range(depth)]


@pytest.mark.parametrize("layers", [1, 2, 3, 7, 30, 32, 80])
@pytest.mark.parametrize("groups", [1, 3, 8])
@pytest.mark.parametrize("budget", [256, 2048, 0.25, 0.5, 0.75])
def test_shares_fall_in_few_steps_around_one(layers: int, groups: int, budget: int | float) -> None:
    found = shares(layers, groups=groups, budget=budget)
    assert len(set(found)) == min(groups, layers)
    assert found == sorted(found, reverse=True)
    assert sum(found) / layers == pytest.approx(1.0, abs=2e-6)
    assert found[-1] > 0
    if isinstance(budget, float):
        assert found[0] * budget <= 1.0 + 1e-6


def test_a_step_per_layer_is_the_papers_line() -> None:
    """A budget of 100 beyond the 36 always kept, beta 20: 195 down to 5 over three layers."""
    found = shares(3, groups=3, budget=136, beta=20)
    assert [s * 136 for s in found] == pytest.approx([36 + 195, 36 + 100, 36 + 5], abs=1e-3)


def test_a_step_is_the_mean_of_its_layers() -> None:
    fine, coarse = (shares(6, groups=g, budget=0.2) for g in (6, 2))
    assert coarse[:3] == pytest.approx([sum(fine[:3]) / 3] * 3, abs=1e-5)
    assert coarse[3:] == pytest.approx([sum(fine[3:]) / 3] * 3, abs=1e-5)


def test_the_last_layer_holds_what_is_always_kept() -> None:
    found = shares(30, budget=64, window=32, sink=4, groups=30)
    assert min(found) * 64 >= 36 - 1e-4


def test_a_share_of_ones_own_multiplies() -> None:
    plain, double = shares(6, budget=0.2), shares(6, budget=0.2, layers={"0-5": 2.0})
    assert double == pytest.approx([2 * s for s in plain], abs=2e-6)


def test_tokens_are_scored_as_snapkv_scores_them() -> None:
    random = torch.Generator().manual_seed(0)
    held = residents(
        torch.randn(1, 2, 80, 8, generator=random),
        queries=torch.randn(1, 32, 4, 8, generator=random),
    )
    assert torch.equal(build(PyramidKV).score(held), build(SnapKV).score(held))


@pytest.mark.parametrize("options", [{"beta": 0}, {"groups": 0}, {"kernel": 2}])
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PyramidKV.Options.model_validate(options)
