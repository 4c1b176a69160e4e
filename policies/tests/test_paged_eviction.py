from __future__ import annotations

import torch

from kvplug.testing.sequence import ENGINE, build, permuted, residents
from kvplug_policies.scores import ALWAYS
from kvplug_policies.sequence.paged_eviction import PagedEviction

PAGE = ENGINE.block_size


def test_prompt_tokens_go_one_by_one() -> None:
    keys = torch.tensor([[[[3.0, 4.0], [0.0, 1.0], [0.0, 2.0]]]])
    values = torch.tensor([[[[1.0, 0.0], [0.0, 3.0], [8.0, 6.0]]]])
    scores = build(PagedEviction, sink=0, recent=0).score(residents(keys, values))
    torch.testing.assert_close(scores, torch.tensor([[[0.2, 3.0, 5.0]]]))


def test_an_answers_tokens_share_their_pages_mean() -> None:
    random = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 3 * PAGE + 5, 8, generator=random) for _ in range(2))
    prompt = torch.tensor([PAGE])
    held = residents(keys, values, num_prompt_tokens=prompt)
    token = values.norm(dim=-1) / keys.norm(dim=-1)
    full = token[..., : 3 * PAGE].unflatten(-1, (3, PAGE)).mean(-1).repeat_interleave(PAGE, -1)
    filling = token[..., 3 * PAGE :].mean(-1, keepdim=True).expand(-1, -1, 5)
    pages = torch.cat([full, filling], -1)
    scores = build(PagedEviction, sink=0, recent=0).score(held)
    torch.testing.assert_close(scores, pages)

    order = torch.stack([torch.randperm(held.count, generator=random) for _ in range(2)])[None]
    moved = build(PagedEviction, sink=0, recent=0).score(permuted(held, order, PAGE))
    torch.testing.assert_close(moved, pages.gather(2, order))


def test_pages_stay_the_same_pages_once_some_are_gone() -> None:
    """Text blocks 0, 2, 3 and half of 4 are held; the partition is still by block."""
    random = torch.Generator().manual_seed(1)
    positions = torch.cat([torch.arange(PAGE), torch.arange(2 * PAGE, 4 * PAGE + 8)])[None, None]
    count = positions.shape[-1]
    keys, values = (torch.randn(1, 1, count, 8, generator=random) for _ in range(2))
    held = residents(keys, values, positions=positions, num_prompt_tokens=torch.tensor([3]))
    scores = build(PagedEviction, sink=0, recent=0).score(held)
    blocks = positions[0, 0] // PAGE
    assert scores.unique().numel() == blocks.unique().numel() == 4
    for block in blocks.unique():
        assert scores[0, 0, blocks == block].unique().numel() == 1


def test_a_page_with_a_token_that_is_always_kept_is_kept_whole() -> None:
    keys = torch.randn(1, 1, 4 * PAGE, 8, generator=torch.Generator().manual_seed(2))
    policy = build(PagedEviction, sink=1, recent=PAGE + 1)
    scores = policy.score(residents(keys, num_prompt_tokens=torch.tensor([3])))
    kept = (scores[0, 0] == ALWAYS).unflatten(0, (4, PAGE))
    assert kept.all(1).tolist() == [True, False, True, True]
    assert not kept[1].any()


def test_rows_may_be_prompt_and_answer() -> None:
    keys = torch.randn(2, 1, 2 * PAGE, 8, generator=torch.Generator().manual_seed(3))
    held = residents(keys, num_prompt_tokens=torch.tensor([2 * PAGE, PAGE]))
    scores = build(PagedEviction, sink=0, recent=0).score(held)
    assert [row.unique().numel() for row in scores] == [2 * PAGE, 2]
