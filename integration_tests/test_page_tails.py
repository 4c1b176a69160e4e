"""Numbers beside tokens, in the tail of the tokens' own page."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheTensor,
    compute_layout_strides,
    create_kv_cache_views,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from kvplug.hosts.vllm.worker.page_tails import tail_of, with_tail
from kvplug_kernels.paging import FoldedLayers

BLOCKS, LAYERS = 5, 3


def spec_of(**changes: Any) -> FullAttentionSpec:
    values = {"block_size": 16, "num_kv_heads": 2, "head_size": 40, "dtype": torch.bfloat16}
    return FullAttentionSpec(**(values | changes))


def caches_of(spec: FullAttentionSpec, layout: KVCacheLayout) -> tuple[torch.Tensor, Any]:
    """vLLM's own views of pages, in an allocation of just what the spec says."""
    whole = LAYERS * BLOCKS * spec.page_size_bytes
    raw = torch.zeros(whole, dtype=torch.int8)
    layer, block, *_ = compute_layout_strides(spec, BLOCKS, LAYERS, layout)
    names = [f"layers.{i}" for i in range(LAYERS)]
    tensor = KVCacheTensor(
        size=whole, layers=names, layer_stride=layer, block_stride=block, offset=0
    )
    return raw, create_kv_cache_views(raw, spec, BLOCKS, layout, tensor)


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC", "BLNHC", "BLHNC"])
@pytest.mark.parametrize(
    "changes", [{}, {"dtype": torch.uint8, "state_content_bytes": 36}, {"num_kv_heads": 1}]
)
@pytest.mark.parametrize("fields", [1, 2])
def test_tails_overlap_nothing_and_lie_in_what_was_planned(
    layout: str, changes: dict[str, Any], fields: int
) -> None:
    spec = with_tail(spec_of(**changes), fields)
    tail = fields * spec.num_heads * spec.block_size * 4
    assert 0 <= spec.page_size_bytes - spec.unpadded_page_size_bytes - tail < 256
    raw, caches = caches_of(spec, KVCacheLayout[layout])
    for cache in caches:
        assert cache.stride(0) % cache.shape[3] == 0, "blocks start at whole tokens"
        cache.copy_(torch.ones((), dtype=cache.dtype))
        for field in range(fields):
            own = tail_of(cache, field, torch.int32 if field == 0 else torch.float32)
            assert own.untyped_storage().data_ptr() == raw.untyped_storage().data_ptr()
            assert not own.any(), "nothing has written here"
            own.copy_(torch.arange(own.numel()).view(own.shape) + 1)
        assert (cache == torch.ones((), dtype=cache.dtype)).all()
    assert len(caches) * prod(caches[0].shape) * caches[0].element_size() < raw.numel()
    for cache in caches:
        for field in range(fields):
            own = tail_of(cache, field, torch.int32 if field == 0 else torch.float32)
            assert torch.equal(own.long(), torch.arange(own.numel()).view(own.shape) + 1)


@pytest.mark.parametrize("layout", ["LBNHC", "BLNHC"])
def test_layers_folded_into_one_cache_have_the_same_tails(layout: str) -> None:
    spec = with_tail(spec_of(), 1)
    _, caches = caches_of(spec, KVCacheLayout[layout])
    fold = FoldedLayers.of(caches)
    assert fold is not None
    whole = tail_of(fold.pages, 0, torch.int32)
    for i, cache in enumerate(caches):
        tail_of(cache, 0, torch.int32).fill_(1 + i)
        blocks = torch.arange(BLOCKS) * fold.block_step + i * fold.layer_step
        assert (whole[blocks] == 1 + i).all()


def test_a_format_that_shares_heads_has_tails_for_those_it_stores() -> None:
    spec = with_tail(spec_of(num_head_slots=1), 1)
    assert spec.page_size_bytes - spec.unpadded_page_size_bytes < 16 * 4 + 160
