from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grid import grid, implementations
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_cases import to_device
from torch import Tensor

from kvplug_kernels.segment_stats import (
    KEY_COSINE,
    KEY_RMS,
    OUTGOING,
    SPARSITY,
    VALUE_RMS,
    segment_stats,
)
from kvplug_kernels.segment_stats.kernel import segment_stats_triton
from kvplug_kernels.segment_stats.naive import segment_stats_naive
from kvplug_kernels.segment_stats.vectorized import segment_stats_vectorized

Implementation = Callable[..., Tensor]
Launches = list[tuple[str, tuple[int, ...]]]
CompileForCuda = Callable[[str, str, dict[str, str], dict[str, Any]], None]

FAST, ALL = implementations(segment_stats_naive, segment_stats_triton, segment_stats_vectorized)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(
    n: int,
    heads: int,
    size: int,
    m: int | None,
    c: int | None,
    *,
    device: torch.device,
    group: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Tokens whose neighbours are alike and whose values differ in size."""
    rng = torch.Generator().manual_seed(seed)

    def tokens(count: int, of: int) -> Tensor:
        return torch.randn(count, of, size, generator=rng).to(device, dtype)

    key = (torch.randn(n, heads, size, generator=rng).cumsum(0) * 0.3).to(device, dtype)
    value = tokens(n, heads) * torch.rand(n, 1, 1, generator=rng).to(device, dtype)
    query = None if m is None else tokens(m, heads * group)
    return key, value, query, None if c is None else tokens(c, heads)


def assert_matches_naive(implementation: Implementation, *given: Tensor | None) -> None:
    before = [None if x is None else x.clone() for x in given]
    scale = 0.3
    expected = segment_stats_naive(*given, scale)  # type: ignore[arg-type]
    got = implementation(*given, scale)
    assert got.dtype == torch.float32 and got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=3e-5, atol=3e-6, equal_nan=True)
    for x, old in zip(given, before, strict=True):
        assert x is None or old is None or torch.equal(x, old)


@ALL
def test_worked_example(implementation: Implementation, device: torch.device) -> None:
    """Two tokens of two elements, all columns by hand."""
    key = torch.tensor([[[3.0, 4]], [[4.0, 3]]], device=device)
    value = torch.tensor([[[6.0, 8]], [[0.0, 0]]], device=device)
    query = torch.tensor([[[0.0, 0]]], device=device)
    got = implementation(key, value, query, key[:1], 1.0)[0].tolist()
    assert got[KEY_RMS] == pytest.approx(math.sqrt(12.5))
    assert got[VALUE_RMS] == pytest.approx(5)
    assert got[SPARSITY] == pytest.approx(1), "one token has all"
    assert got[KEY_COSINE] == pytest.approx(24 / 25)
    assert got[OUTGOING] == pytest.approx(1 / 3), "three keys that are worth the same"


@ALL
def test_the_last_queries_see_causally(
    implementation: Implementation, device: torch.device
) -> None:
    """Queries of zero weigh what they see alike: one key before, and 2 or 3 of the segment."""
    key = torch.ones(3, 1, 4, device=device)
    query = torch.zeros(2, 2, 4, device=device)
    got = implementation(key, key, query, key[:1], 1.0)
    assert got[0, OUTGOING].item() == pytest.approx((1 / 3 + 1 / 4) / 2)


@ALL
def test_what_is_undefined(implementation: Implementation, device: torch.device) -> None:
    key, value, query, before = make(5, 2, 8, 2, 3, device=device)
    assert implementation(key[:0], value[:0]).isnan().all()
    assert implementation(key[:0], value[:0]).shape == (2, 5)
    one = implementation(key[:1], value[:1], query[:1], before, 1.0)  # type: ignore[index]
    undefined = one.isnan().tolist()
    assert undefined == [[False, False, True, True, False]] * 2
    assert implementation(key, value, None, before, 1.0)[:, OUTGOING].isnan().all()
    assert implementation(key, value, query[:0], before, 1.0)[:, OUTGOING].isnan().all()  # type: ignore[index]
    for nothing in (None, before[:0]):  # type: ignore[index]
        assert implementation(key, value, query, nothing, 1.0)[:, OUTGOING].tolist() == [0, 0]
    zero = implementation(torch.zeros_like(key), torch.zeros_like(value), query, before, 1.0)
    assert zero[:, : KEY_COSINE + 1].eq(0).all()
    alike = implementation(torch.ones_like(key), torch.ones_like(value))
    torch.testing.assert_close(
        alike[:, :4], torch.tensor([[1.0, 1, 0, 1]] * 2, device=device), rtol=0, atol=1e-6
    )


@grid(
    FAST,
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
    pytest.mark.parametrize("size", [16, 40, 64, 128, 192]),
)
def test_sizes(
    implementation: Implementation, size: int, dtype: torch.dtype, device: torch.device
) -> None:
    assert_matches_naive(implementation, *make(33, 2, size, 5, 19, device=device, dtype=dtype))


@FAST
@pytest.mark.parametrize(("n", "m", "c"), [(1, 1, 1), (2, 2, 70), (64, 17, 64), (129, 33, 1)])
def test_lengths(
    implementation: Implementation, n: int, m: int, c: int, device: torch.device
) -> None:
    assert_matches_naive(implementation, *make(n, 2, 16, m, c, device=device, group=2))


@FAST
def test_tiles_of_tokens(implementation: Implementation, device: torch.device) -> None:
    """More tiles than the merge takes at a time, and more tokens than a chunk has."""
    assert_matches_naive(implementation, *make(1100, 1, 64, 2, 1040, device=device, group=1))


@FAST
def test_strides(implementation: Implementation, device: torch.device) -> None:
    """Planes of a store, pages token-major, packed, and even a last dimension with strides."""
    key, value, query, before = make(21, 2, 16, 4, 7, device=device)
    assert query is not None and before is not None
    packed = torch.full((21, 2, 40), float("nan"), device=device)
    packed[..., :16], packed[..., 17:33] = key, value
    assert_matches_naive(implementation, packed[..., :16], packed[..., 17:33], query, before)
    far = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in (key, value, query, before)]
    assert_matches_naive(implementation, *far)
    wide = query.repeat_interleave(2, -1)[..., ::2]
    assert_matches_naive(implementation, key.flip(0), value.expand(21, 2, 16), wide, before)


@FAST
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_random_cases(implementation: Implementation, data: st.DataObject) -> None:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    n = data.draw(st.integers(1, 70))
    m = data.draw(st.none() | st.integers(0, min(n, 20)))
    c = data.draw(st.none() | st.integers(0, 70))
    heads, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 35))
    group, seed = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 99))
    dtype = data.draw(st.sampled_from(DTYPES))
    case = make(n, heads, size, m, c, device=device, group=group, dtype=dtype, seed=seed)
    assert_matches_naive(implementation, *case)


@FAST
def test_large_logits_do_not_overflow(implementation: Implementation, device: torch.device) -> None:
    key, value, query, before = make(20, 1, 16, 3, 9, device=device)
    assert query is not None and before is not None
    assert_matches_naive(implementation, key * 40, value, query * 40, before * 40)
    got = implementation(key, value, query * 0 + 1, before * 0 + 500.0, 1.0)
    assert got[0, OUTGOING].item() == 1.0


@FAST
def test_nan_stays_in_its_head(implementation: Implementation, device: torch.device) -> None:
    key, value, query, before = make(20, 2, 16, 3, 9, device=device)
    expected = segment_stats_naive(key, value, query, before, 1.0)
    key[3, 0, 1] = float("nan")
    got = implementation(key, value, query, before, 1.0)
    assert got[0, [KEY_RMS, KEY_COSINE, OUTGOING]].isnan().all()
    torch.testing.assert_close(got[1], expected[1])


def test_triton_is_two_launches(launches: Launches, device: torch.device) -> None:
    segment_stats_triton(*make(20, 2, 16, 3, 9, device=device))
    assert [name for name, _ in launches] == ["tile_stats_kernel", "merge_stats_kernel"]


def test_dispatch(launches: Launches, device: torch.device) -> None:
    case = make(20, 2, 16, 3, 9, device=device)
    torch.testing.assert_close(segment_stats(*case), segment_stats_naive(*case))
    assert len(launches) == (2 if device.type == "cuda" else 0)


@ALL
@pytest.mark.parametrize(
    ("message", "changes"),
    [
        pytest.param("key must have dtype", {"key": torch.zeros(4, 2, 8).int()}, id="key-dtype"),
        pytest.param("key must have shape", {"key": torch.zeros(4, 8)}, id="key-ndim"),
        pytest.param("key must have heads", {"key": torch.zeros(4, 0, 8)}, id="no-heads"),
        pytest.param("value must have dtype", {"value": torch.zeros(4, 2, 8).half()}, id="value"),
        pytest.param("value must have shape", {"value": torch.zeros(3, 2, 8)}, id="value-shape"),
        pytest.param("query must have dtype", {"query": torch.zeros(2, 4, 8).half()}, id="query"),
        pytest.param("query must have shape", {"query": torch.zeros(2, 4, 9)}, id="query-size"),
        pytest.param("query must have at most", {"query": torch.zeros(5, 4, 8)}, id="query-many"),
        pytest.param("query must have a mul", {"query": torch.zeros(2, 3, 8)}, id="query-heads"),
        pytest.param("before must have shape", {"before": torch.zeros(2, 4, 8)}, id="before"),
        pytest.param("scale must be finite", {"scale": math.inf}, id="scale"),
    ],
)
def test_rejects(
    implementation: Implementation, message: str, changes: dict[str, Any], device: torch.device
) -> None:
    arguments = {
        "key": torch.zeros(4, 2, 8),
        "value": torch.zeros(4, 2, 8),
        "query": torch.zeros(2, 4, 8),
        "before": torch.zeros(3, 2, 8),
        "scale": 1.0,
        **changes,
    }
    moved = {
        name: to_device(x, device) if isinstance(x, Tensor) else x for name, x in arguments.items()
    }
    with pytest.raises(ValueError, match=rf"^{message}.*\.$"):
        implementation(**moved)


@grid(
    pytest.mark.parametrize("asked", [True, False], ids=["queries", "no queries"]),
    pytest.mark.parametrize(
        ("dtype", "size", "block_q"), [("bf16", 128, 32), ("fp16", 80, 64), ("fp32", 64, 16)]
    ),
)
def test_compiles_for_cuda(
    compile_for_cuda: CompileForCuda, dtype: str, size: int, block_q: int, asked: bool
) -> None:
    tensors = ("key", "value", "before", *(("query",) if asked else ()))
    strides = [f"stride_{side}{of}" for side in "kvqb" for of in "nhd"]
    block_d = 1 << (size - 1).bit_length()
    compile_for_cuda(
        "kvplug_kernels.segment_stats.kernel",
        "tile_stats_kernel",
        {
            **dict.fromkeys(tensors, f"*{dtype}"),
            **dict.fromkeys(("n", "m", "c", "n_key_tiles", "n_tiles", *strides), "i32"),
            "tile_sum": "*fp32",
            **({"tile_lse": "*fp32"} if asked else {}),
            "scale": "fp32",
        },
        {
            **({} if asked else {"query": None, "tile_lse": None}),
            "GROUP": 4,
            "HEAD_SIZE": size,
            "BLOCK_T": 32,
            "BLOCK_Q": block_q,
            "BLOCK_D": block_d,
            "WIDEN": False,
        },
    )


@pytest.mark.parametrize("before", [True, False])
def test_the_merge_compiles_for_cuda(compile_for_cuda: CompileForCuda, before: bool) -> None:
    compile_for_cuda(
        "kvplug_kernels.segment_stats.kernel",
        "merge_stats_kernel",
        {
            **dict.fromkeys(("tile_sum", "tile_lse", "out"), "*fp32"),
            **dict.fromkeys(("n", "n_queries", "n_key_tiles", "n_tiles"), "i32"),
        },
        {"HEAD_SIZE": 128, "OUTGOING": True, "BEFORE": before, "BLOCK_N": 16, "BLOCK_Q": 64},
    )
