from __future__ import annotations

import math

import torch

from kvplug.testing.sequence import build, permuted, residents
from kvplug_policies.sequence.tova import Tova


def test_scores_are_the_last_querys_attention_over_all_heads() -> None:
    random = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 2, 37, 8, generator=random) for _ in range(2))
    queries = torch.randn(2, 1, 6, 8, generator=random)
    logits = torch.einsum("rhd,rhtd->rht", queries[:, 0], keys.repeat_interleave(3, 1))
    mean = (logits / math.sqrt(8)).softmax(-1).mean(1, keepdim=True)
    held = residents(keys, values, queries=queries)
    torch.testing.assert_close(build(Tova).score(held), mean.expand(2, 2, 37))

    norms = values.norm(dim=-1)
    weighted = (logits / math.sqrt(8)).softmax(-1).unflatten(1, (2, 3)).mean(2) * norms
    torch.testing.assert_close(
        build(Tova, value_norm=True).score(held), weighted.mean(1, keepdim=True).expand(2, 2, 37)
    )


def test_heads_keep_the_same_tokens_though_their_slots_differ() -> None:
    random = torch.Generator().manual_seed(1)
    keys = torch.randn(1, 3, 50, 8, generator=random)
    held = residents(keys, queries=torch.randn(1, 1, 3, 8, generator=random))
    order = torch.stack([torch.randperm(50, generator=random) for _ in range(3)])[None]
    moved = permuted(held, order, 16)
    top = build(Tova).score(moved).topk(10, -1).indices
    kept = moved.positions.gather(-1, top.to(torch.int64)).sort(-1).values
    assert torch.equal(kept[:, :1].expand_as(kept), kept)


def test_one_token_is_always_kept_by_default() -> None:
    options = build(Tova).options
    assert (options.sink, options.recent) == (0, 1)
