from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from paged_cases import LAYER_LAYOUTS, NO_BLOCK, lay_out_layers
from torch import Tensor

from kvplug_kernels.attention_mass.kernel import attention_mass_triton
from kvplug_kernels.attention_mass.naive import attention_mass_naive
from kvplug_kernels.attention_mass.vectorized import attention_mass_vectorized
from kvplug_kernels.compact_kv import compact_kv, plan_moves
from kvplug_kernels.key_scores import KEY_NORM, key_scores
from kvplug_kernels.key_scores.kernel import key_scores_triton
from kvplug_kernels.key_scores.naive import key_scores_naive
from kvplug_kernels.key_scores.vectorized import key_scores_vectorized
from kvplug_kernels.move_tokens import LayerCaches, move_tokens
from kvplug_kernels.paging import FoldedLayers
from kvplug_kernels.select_top import select_top

LAYERS, BLOCKS, HEADS, SIZE, WIDTH = 3, 7, 2, 4, 8
LENS = [11, 4]
EVERY = pytest.mark.parametrize("layout", LAYER_LAYOUTS)


def make_layers(layout: str, device: torch.device) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    caches = torch.randn(LAYERS, BLOCKS, HEADS, SIZE, 2 * WIDTH, generator=rng)
    return lay_out_layers(caches.to(device), layout)


def table(device: torch.device) -> Tensor:
    blocks = [[5, 0, 6], [3, NO_BLOCK, NO_BLOCK]]
    return torch.tensor(blocks, dtype=torch.int32, device=device)


def folded(caches: list[Tensor]) -> FoldedLayers:
    found = FoldedLayers.of(caches)
    assert found is not None
    return found


@EVERY
def test_every_block_of_every_layer_is_a_block_of_the_one_cache(
    layout: str, device: torch.device
) -> None:
    caches = make_layers(layout, device)
    one = folded(caches)
    assert one.num_layers == LAYERS and one.pages.data_ptr() == caches[0].data_ptr()
    blocks = torch.arange(BLOCKS, dtype=torch.int32, device=device)[None]
    numbers = one.block_table(blocks)
    assert numbers.shape == (LAYERS, BLOCKS) and numbers.dtype == torch.int32
    assert int(numbers.max()) == one.pages.shape[0] - 1
    for cache, own in zip(caches, numbers, strict=True):
        assert torch.equal(one.pages[own.long()], cache)


@EVERY
def test_a_part_of_each_content(layout: str, device: torch.device) -> None:
    """The values, where a token's key and value lie side by side."""
    values = [cache[..., WIDTH:] for cache in make_layers(layout, device)]
    one = folded(values)
    numbers = one.block_table(torch.tensor([[BLOCKS - 1]], device=device))
    for value, (number,) in zip(values, numbers.tolist(), strict=True):
        assert torch.equal(one.pages[number], value[-1])


@EVERY
@pytest.mark.parametrize("scores", [key_scores_triton, key_scores_vectorized])
def test_scores_of_all_layers_in_one_call(
    layout: str, scores: Callable[..., Tensor], device: torch.device
) -> None:
    caches = make_layers(layout, device)
    keys, values = (folded([c[..., part] for c in caches]) for part in (slice(8), slice(8, 16)))
    lens = torch.tensor(LENS, dtype=torch.int32, device=device)
    got = scores(keys.pages, values.pages, keys.block_table(table(device)), lens.repeat(LAYERS))
    for i, cache in enumerate(caches):
        own = key_scores_naive(cache[..., :8], cache[..., 8:], table(device), lens)
        torch.testing.assert_close(got[:, 2 * i : 2 * i + 2], own, rtol=1e-5, atol=2e-6)


@EVERY
@pytest.mark.parametrize("mass", [attention_mass_triton, attention_mass_vectorized])
def test_attention_of_all_layers_in_one_call(
    layout: str, mass: Callable[..., Tensor], device: torch.device
) -> None:
    caches = make_layers(layout, device)
    keys = folded([cache[..., :WIDTH] for cache in caches])
    rng = torch.Generator().manual_seed(1)
    query = torch.randn(LAYERS * 2, 3, 2 * HEADS, WIDTH, generator=rng).to(device)
    lens = torch.tensor(LENS, dtype=torch.int32, device=device)
    got = mass(query, keys.pages, keys.block_table(table(device)), lens.repeat(LAYERS), 0.3)
    for i, cache in enumerate(caches):
        rows = slice(2 * i, 2 * i + 2)
        own = attention_mass_naive(query[rows], cache[..., :WIDTH], table(device), lens, 0.3)
        torch.testing.assert_close(got[rows], own, rtol=1e-5, atol=1e-5)


@EVERY
def test_an_eviction_of_all_layers(layout: str, device: torch.device) -> None:
    """Scores, selection, plan and moves of all layers together leave what one layer after another
    leaves."""
    caches = make_layers(layout, device)
    rows = table(device)[:1]
    lens = torch.tensor(LENS[:1], dtype=torch.int32, device=device)
    expected = [cache.clone() for cache in caches]
    for cache in expected:
        scores = key_scores(cache[..., :WIDTH], cache[..., WIDTH:], rows, lens)[KEY_NORM]
        compact_kv([cache], rows, select_top(scores, 6, lens), count=6)

    keys, values = (folded([c[..., part] for c in caches]) for part in (slice(8), slice(8, 16)))
    every = lens.repeat(LAYERS)
    scores = key_scores(keys.pages, values.pages, keys.block_table(rows), every)[KEY_NORM]
    source = plan_moves(select_top(scores, 6, every), 6)
    move_tokens(LayerCaches(caches), rows, source.view(LAYERS, 1, HEADS, 6))
    for cache, want in zip(caches, expected, strict=True):
        assert torch.equal(cache, want)


def test_one_layer(device: torch.device) -> None:
    (cache, *_) = make_layers("LBNHC", device)
    one = folded([cache])
    assert torch.equal(one.pages, cache)
    assert torch.equal(one.block_table(table(device)[:1]), table(device)[:1])


def test_layers_that_are_no_one_cache(device: torch.device) -> None:
    caches = make_layers("LBNHC", device)
    assert FoldedLayers.of([cache.clone() for cache in caches]) is None
    assert FoldedLayers.of([caches[0], caches[2], caches[1]]) is None
    assert FoldedLayers.of([*caches[:2], caches[0]]) is None
    assert FoldedLayers.of([caches[0], caches[1][..., 8:]]) is None
    assert FoldedLayers.of([caches[0], caches[1][:, :1]]) is None
