from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvplug.contract import LayerView, Rope
from kvplug.testing.sequence import build, residents
from kvplug_policies import scores as shared
from kvplug_policies.scores import ALWAYS
from kvplug_policies.sequence.expected_attention import ExpectedAttention, rotated

HEAD = 16
ROPE = Rope(tuple(100.0 ** (-i / 8) for i in range(8)))


def rotation(rope: Rope, position: int) -> Tensor:
    """The rotation of one position as a matrix over the elements of a head."""
    pairs = len(rope.frequencies)
    matrix = torch.eye(HEAD)
    for i, frequency in enumerate(rope.frequencies):
        first, second = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + pairs)
        angle = position * frequency
        matrix[first, first] = matrix[second, second] = math.cos(angle)
        matrix[first, second], matrix[second, first] = -math.sin(angle), math.sin(angle)
    return matrix


def plain(
    keys: Tensor, values: Tensor, unrotated: Tensor, rope: Rope, sink: int, horizon: int, eps: float
) -> Tensor:
    """The paper's formulas, for one request in text order, with explicit matrices."""
    length, heads = keys.shape[1], unrotated.shape[1]
    group = heads // keys.shape[0]
    turn = torch.stack([rotation(rope, length + j) for j in range(horizon)]).mean(0)
    out = torch.zeros(keys.shape[:2])
    for h in range(heads):
        counted = unrotated[sink:, h]
        mean = counted.mean(0)
        centred = counted - mean
        covariance = turn @ (centred.T @ centred / len(counted)) @ turn.T
        own = keys[h // group, sink:]
        logits = own @ (turn @ mean) / math.sqrt(HEAD)
        logits = logits + ((own @ covariance) * own).sum(-1) / HEAD / 2
        out[h // group, sink:] += logits.softmax(-1) / group
    return (out + eps) * values.norm(dim=-1)


@pytest.mark.parametrize(
    "rope",
    [ROPE, Rope(ROPE.frequencies, interleaved=True), Rope(ROPE.frequencies[:4])],
    ids=["halves", "interleaved", "partial"],
)
@pytest.mark.parametrize("small_chunks", [False, True])
def test_scores_are_the_papers(
    rope: Rope, small_chunks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small_chunks:
        monkeypatch.setattr(shared, "CHUNK_BYTES", 8 * 4 * HEAD * 7)
    length, sink, horizon = 40, 3, 20
    random = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, length, HEAD, generator=random) for _ in range(2))
    unrotated = torch.randn(length, 4, HEAD, generator=random) + 0.5
    turns = torch.stack([rotation(rope, p) for p in range(length)])
    held = residents(
        keys,
        values,
        queries=torch.einsum("tij,thj->thi", turns, unrotated)[None],
        layer=LayerView(0, 4, 2, 4, HEAD, rope=rope),
    )
    policy = build(
        ExpectedAttention, queries=length, horizon=horizon, sink=sink, epsilon=0.01, recent=0
    )
    expected = plain(keys[0], values[0], unrotated, rope, sink, horizon, 0.01)
    scores = policy.score(held)[0]
    torch.testing.assert_close(scores[:, sink:], expected[:, sink:], rtol=1e-4, atol=1e-6)
    assert (scores[:, :sink] == ALWAYS).all()


def test_turning_back_undoes_a_rotation() -> None:
    values = torch.randn(5, HEAD, generator=torch.Generator().manual_seed(1))
    angles = torch.arange(5)[:, None] * torch.tensor(ROPE.frequencies)
    for interleaved in (False, True):
        there = rotated(values, angles.cos(), angles.sin(), interleaved)
        back = rotated(there, angles.cos(), -angles.sin(), interleaved)
        torch.testing.assert_close(back, values)


def test_queries_that_were_not_observed_do_not_count() -> None:
    random = torch.Generator().manual_seed(2)
    keys = torch.randn(1, 1, 30, HEAD, generator=random)
    queries = torch.randn(1, 8, 1, HEAD, generator=random)
    policy = build(ExpectedAttention, queries=8)
    layer = LayerView(0, 4, 1, 1, HEAD, rope=ROPE)
    whole = residents(keys, queries=queries, layer=layer)
    assert whole.query_positions is not None
    padded = replace(
        whole,
        queries=torch.cat([torch.full((1, 5, 1, HEAD), 9.0), queries], 1),
        query_positions=torch.cat(
            [torch.full((1, 5), -1, dtype=torch.int32), whole.query_positions], 1
        ),
    )
    torch.testing.assert_close(policy.score(padded), policy.score(whole))


def test_without_a_rotation_queries_stay_as_they_are() -> None:
    """The mean alone: the key that the mean query points at is expected to be attended to."""
    keys = torch.zeros(1, 1, 6, HEAD)
    keys[0, 0, 4, 0] = 3.0
    queries = torch.zeros(1, 4, 1, HEAD)
    queries[..., 0] = 2.0
    policy = build(ExpectedAttention, queries=4, covariance=False, sink=0, value_norm=False)
    scores = policy.score(residents(keys, queries=queries))[0, 0]
    logits = torch.tensor([0.0, 0, 0, 0, 6.0 / 4, 0])
    torch.testing.assert_close(scores, logits.softmax(-1))
