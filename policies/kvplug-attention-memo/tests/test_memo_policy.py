"""The policy around the memory: what it says of itself, and one memory a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvplug.contract import DecodeRows, EngineView, Kind, LayerView
from kvplug.deployment import Deployment
from kvplug.parser import load_deployment
from kvplug_attention_memo.policy import Memo

LAYERS = tuple(
    LayerView(i, 2, num_kv_heads=2, num_heads=4, head_size=8, dtype="float32") for i in range(2)
)
ENGINE = EngineView(block_size=4, layers=LAYERS)


def rows(query: Tensor, key: Tensor, value: Tensor, length: int, owner: int = 0) -> DecodeRows:
    def gather(
        _: Sequence[int], starts: Sequence[int], ends: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        return key[:, :, starts[0] : ends[0]], value[:, :, starts[0] : ends[0]]

    return DecodeRows(query, [3], [owner], [length], 8**-0.5, 0.0, gather)


def full(query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        query[:, :, None], key[:, :, :length], value[:, :, :length], enable_gqa=True
    )[:, :, 0]


def test_a_deployment_finds_it_by_its_entry_point() -> None:
    deployment: Deployment = load_deployment({"attention": {"use": "memo", "near": 16}})
    choice = deployment.choice(Kind.ATTENTION)
    assert choice is not None and choice.policy is Memo and not Memo.exact


def test_the_same_query_reuses_and_another_layer_has_its_own_memory() -> None:
    policy = Memo(Memo.Options(near=16, cosine=0.9), ENGINE)
    rng = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 2, 60, 8, generator=rng) for _ in "kv")
    query = torch.randn(1, 4, 8, generator=rng)
    first = policy.attend(LAYERS[0], rows(query, key, value, 50))
    torch.testing.assert_close(first, full(query, key, value, 50))
    assert policy.counters() == {"far_rows": 1, "reused_rows": 0}
    again = policy.attend(LAYERS[0], rows(query, key, value, 51))
    torch.testing.assert_close(again, full(query, key, value, 51))
    assert policy.counters() == {"far_rows": 2, "reused_rows": 1}
    other = policy.attend(LAYERS[1], rows(query, key, value, 51))
    torch.testing.assert_close(other, full(query, key, value, 51))
    assert policy.counters() == {"far_rows": 3, "reused_rows": 1}


def test_another_owner_of_the_slot_never_reuses() -> None:
    policy = Memo(Memo.Options(near=16, cosine=0.5), ENGINE)
    rng = torch.Generator().manual_seed(1)
    query = torch.randn(1, 4, 8, generator=rng)
    for owner in range(2):
        key, value = (torch.randn(1, 2, 60, 8, generator=rng) for _ in "kv")
        found = policy.attend(LAYERS[0], rows(query, key, value, 50 + owner, owner))
        torch.testing.assert_close(found, full(query, key, value, 50 + owner))
    assert policy.counters()["reused_rows"] == 0
