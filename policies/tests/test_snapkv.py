from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from kvplug.errors import DeploymentError
from kvplug.parser import load_deployment
from kvplug.testing.sequence import build, permuted, residents
from kvplug_policies.sequence.snapkv import SnapKV


def plain(
    keys: Tensor, queries: Tensor, window: int, kernel: int, pooling: str, norms: Tensor | None
) -> Tensor:
    """The paper's listing over text-ordered keys: scores of the tokens before the window."""
    heads, length = queries.shape[2], keys.shape[2]
    group = heads // keys.shape[1]
    logits = torch.einsum("rwhd,rhtd->rhwt", queries, keys.repeat_interleave(group, 1))
    logits = logits / math.sqrt(keys.shape[-1])
    above = torch.ones(window, length).triu(length - window + 1).bool()
    weights = logits.masked_fill(above, -math.inf).softmax(-1)[..., :-window].mean(2)
    weights = weights.unflatten(1, (-1, group)).mean(2)
    pooled = (functional.avg_pool1d if pooling == "mean" else functional.max_pool1d)(
        weights, kernel, stride=1, padding=kernel // 2
    )
    return pooled if norms is None else pooled * norms[..., :-window]


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize(("window", "kernel"), [(32, 7), (16, 5), (1, 1)])
@pytest.mark.parametrize("value_norm", [False, True])
def test_scores_are_the_papers(window: int, kernel: int, pooling: str, value_norm: bool) -> None:
    random = torch.Generator().manual_seed(window)
    keys, values = (torch.randn(2, 2, 90, 16, generator=random) for _ in range(2))
    queries = torch.randn(2, window, 6, 16, generator=random)
    policy = build(SnapKV, window=window, kernel=kernel, pooling=pooling, value_norm=value_norm)
    assert policy.observation == window
    held = residents(keys, values, queries=queries)
    norms = values.norm(dim=-1) if value_norm else None
    expected = plain(keys, queries, window, kernel, pooling, norms)
    scores = policy.score(held)
    torch.testing.assert_close(scores[..., :-window], expected)
    assert (scores[..., -window:] > expected.amax(-1, keepdim=True)).all()

    order = torch.stack([torch.randperm(90, generator=random) for _ in range(4)]).reshape(2, 2, 90)
    torch.testing.assert_close(
        policy.score(permuted(held, order, 32)), scores.gather(2, order), rtol=1e-4, atol=1e-6
    )


def test_a_neighbour_that_is_gone_receives_nothing() -> None:
    """Text positions 0, 1, 2, 9: token 9 has no held neighbour, tokens 0 to 2 share theirs."""
    keys = torch.zeros(1, 1, 5, 4)
    queries = torch.zeros(1, 1, 1, 4)
    positions = torch.tensor([[[9, 1, 0, 2, 20]]])
    held = residents(keys, positions=positions, queries=queries)
    scores = build(SnapKV, window=1, kernel=3, pooling="mean").score(held)
    even = 0.2  # every logit is 0
    expected = torch.tensor([even / 3, even, even * 2 / 3, even * 2 / 3])
    torch.testing.assert_close(scores[0, 0, :4], expected)


@pytest.mark.parametrize(
    "options", [{"kernel": 4}, {"window": 0}, {"pooling": "sum"}, {"budget": 20, "recent": 0}]
)
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SnapKV.Options.model_validate(options)


def test_options_that_contradict_each_other_are_named_without_their_values() -> None:
    section = {"sequence": {"use": "snapkv", "budget": 16, "recent": 64}}
    with pytest.raises(DeploymentError) as refused:
        load_deployment(section)
    (refusal,) = refused.value.refusals
    assert refusal.key == "kvplug.sequence"
    assert refusal.problem == "snapkv: budget 16 is smaller than sink + recent = 68."
    assert refusal.fix == "change budget, sink or recent."
