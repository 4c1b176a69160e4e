from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from kvplug.testing.sequence import build, residents
from kvplug_policies.scores import ALWAYS
from kvplug_policies.sequence import r_kv
from kvplug_policies.sequence.r_kv import RKV, redundancy


def plain_redundancy(keys: Tensor, threshold: float, spare: int) -> Tensor:
    """One head's keys in text order, token by token."""
    held = len(keys)
    likeness = torch.zeros(held, held)
    for i in range(held):
        for j in range(held):
            if i != j:
                likeness[i, j] = functional.cosine_similarity(keys[i], keys[j], dim=0)
    for i in range(held):
        alike = [j for j in range(held) if j != i and likeness[i, j] > threshold]
        for j in alike[-spare:]:
            likeness[i, j] = 0.0
    return likeness.mean(0).softmax(0)


@pytest.mark.parametrize("spare", [1, 3])
@pytest.mark.parametrize("small_chunks", [False, True])
def test_redundancy_is_the_papers(
    spare: int, small_chunks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small_chunks:
        monkeypatch.setattr(r_kv, "CHUNK_BYTES", 12 * 4 * 30 * 7)
    random = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 2, 30, 3, generator=random)
    positions = torch.arange(30).int().expand(2, 2, 30)
    got = redundancy(keys, positions, 0.5, spare)
    for r in range(2):
        for h in range(2):
            expected = plain_redundancy(keys[r, h], 0.5, spare)
            torch.testing.assert_close(got[r, h], expected, rtol=1e-4, atol=1e-7)


def test_the_last_of_a_repetition_stays() -> None:
    keys = torch.eye(8)[torch.tensor([1, 0, 0, 0, 2, 3])]
    found = redundancy(keys[None, None], torch.arange(6).int()[None, None], 0.5, 1)[0, 0]
    assert found[1] > found[2] > found[3]
    torch.testing.assert_close(found[[0, 4, 5]], found[[4, 5, 0]])


def test_importance_and_redundancy_are_mixed() -> None:
    window, held = 8, 50
    random = torch.Generator().manual_seed(1)
    keys = torch.randn(1, 2, held, 8, generator=random)
    queries = torch.randn(1, window, 6, 8, generator=random)
    logits = torch.einsum("rwhd,rhtd->rhwt", queries, keys.repeat_interleave(3, 1)) / math.sqrt(8)
    above = torch.ones(window, held).triu(held - window + 1).bool()
    weights = logits.masked_fill(above, -math.inf).softmax(-1).mean(2)
    important = weights.unflatten(1, (2, 3)).amax(2)[..., :-window]
    important = functional.max_pool1d(important, 7, stride=1, padding=3)
    repeated = torch.stack([plain_redundancy(keys[0, h], 0.5, 1) for h in range(2)])
    expected = 0.1 * important - 0.9 * repeated[None, :, :-window]
    scores = build(RKV).score(residents(keys, queries=queries))
    torch.testing.assert_close(scores[..., :-window], expected, rtol=1e-4, atol=1e-6)
    assert (scores[..., -window:] == ALWAYS).all()


def test_what_the_latest_tokens_receive_is_not_shared() -> None:
    window, held = 4, 20
    keys = torch.zeros(1, 1, held, 8)
    keys[0, 0, held - window, 0] = 1.0
    queries = torch.zeros(1, window, 1, 8)
    queries[..., 0] = 30.0
    policy = build(RKV, window=window, kernel=5, mix=1.0)
    scores = policy.score(residents(keys, queries=queries, scale=1.0))[0, 0]
    assert (scores[:-window] < 1e-6).all() and (scores[-window:] == ALWAYS).all()


@pytest.mark.parametrize("options", [{"kernel": 2}, {"mix": 1.5}, {"spare": 0}, {"threshold": 2}])
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RKV.Options.model_validate(options)
