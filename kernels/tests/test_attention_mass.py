from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from grid import grid, implementations
from hypothesis import HealthCheck, given, settings
from paged_cases import LAYOUTS, make_pages, make_table, to_device
from torch import Tensor

import kvplug_kernels.attention_mass.vectorized as vectorized
from kvplug_kernels.attention_mass import attention_mass
from kvplug_kernels.attention_mass.kernel import LOG2_E, attention_mass_triton
from kvplug_kernels.attention_mass.naive import attention_mass_naive
from kvplug_kernels.attention_mass.vectorized import attention_mass_vectorized

Implementation = Callable[..., Tensor]
Launches = list[tuple[str, tuple[int, ...]]]
CompileForCuda = Callable[[str, str, dict[str, str], dict[str, int | None]], None]

KERNELS = ["split_lse_kernel", "mass_kernel"]
FAST, ALL = implementations(attention_mass_naive, attention_mass_triton, attention_mass_vectorized)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_case(
    lens: list[int],
    width: int,
    *,
    w: int = 3,
    kv_heads: int = 2,
    group: int = 2,
    block_size: int = 16,
    head_size: int = 16,
    dtype: torch.dtype = torch.float32,
    layout: str = "head-major",
    positions: bool = False,
    device: torch.device,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of a call. With positions, each head's rise from a start and a pace of its own."""
    rng = torch.Generator().manual_seed(seed)
    table, num_blocks = make_table(lens, width, block_size, seed)
    cache = make_pages(
        table,
        lens,
        num_blocks,
        kv_heads,
        block_size,
        head_size,
        dtype=dtype,
        layout=layout,
        device=device,
        seed=seed,
    )
    query = torch.randn(len(lens), w, kv_heads * group, head_size, generator=rng)
    case: dict[str, Any] = {
        "query": query.to(device, dtype),
        "key_cache": cache,
        "block_table": table.to(device),
        "lens": torch.tensor(lens, dtype=torch.int32, device=device),
        "scale": 1.5 / math.sqrt(head_size),
    }
    if positions:
        max_len = width * block_size
        steps = torch.randint(0, 4, (len(lens), kv_heads, max_len), generator=rng)
        case["key_positions"] = steps.cumsum(-1).int().to(device)
        last = torch.tensor(lens)[:, None] + torch.arange(w)
        case["query_positions"] = last.int().to(device)
    return case


def assert_mass(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-6)


def assert_matches_naive(implementation: Implementation, case: dict[str, Any]) -> None:
    assert_mass(implementation(**case), attention_mass_naive(**case))


@ALL
def test_worked_example(implementation: Implementation, device: torch.device) -> None:
    """Two queries at the end of three tokens; the head of zero queries attends evenly, the other
    has a logit of log 2 for the last token."""
    cache = torch.zeros(2, 1, 2, 4, device=device)
    cache[0, 0, 0, 0] = 1
    query = torch.zeros(1, 2, 2, 4, device=device)
    query[:, :, 1, 0] = 2 * math.log(2)
    got = implementation(
        query,
        cache,
        torch.tensor([[1, 0]], dtype=torch.int32, device=device),
        torch.tensor([3], dtype=torch.int32, device=device),
        0.5,
    )
    expected = [[[1 / 2 + 1 / 3, 1 / 2 + 1 / 3, 1 / 3, 0], [3 / 4, 3 / 4, 1 / 2, 0]]]
    assert_mass(got, torch.tensor(expected, device=device))


@grid(
    FAST,
    pytest.mark.parametrize("layout", LAYOUTS),
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
)
def test_dtypes_and_layouts(
    implementation: Implementation, dtype: torch.dtype, layout: str, device: torch.device
) -> None:
    case = make_case([37, 16], 3, dtype=dtype, layout=layout, device=device)
    assert_matches_naive(implementation, case)


@grid(
    FAST,
    pytest.mark.parametrize("positions", [False, True]),
    pytest.mark.parametrize(
        ("block_size", "head_size", "group"),
        [
            (16, 32, 1),
            (32, 64, 3),
            (64, 80, 4),
            (128, 96, 2),
            (16, 128, 1),
            (16, 256, 2),
            (7, 24, 5),
        ],
    ),
)
def test_shapes(
    implementation: Implementation,
    block_size: int,
    head_size: int,
    group: int,
    positions: bool,
    device: torch.device,
) -> None:
    case = make_case(
        [2 * block_size - 3, block_size + 1],
        2,
        block_size=block_size,
        head_size=head_size,
        group=group,
        positions=positions,
        dtype=torch.bfloat16,
        device=device,
    )
    assert_matches_naive(implementation, case)


@FAST
@pytest.mark.parametrize("w", [1, 5, 17, 70])
def test_windows(implementation: Implementation, w: int, device: torch.device) -> None:
    """Windows of one and of several tiles, and longer than what a row holds."""
    case = make_case([40, 17, 3], 3, w=w, kv_heads=1, device=device)
    assert_matches_naive(implementation, case)


@FAST
def test_lengths_at_the_edges(implementation: Implementation, device: torch.device) -> None:
    case = make_case([0, 1, 15, 16, 17, 31, 32], 2, w=2, kv_heads=1, device=device)
    assert_matches_naive(implementation, case)


@FAST
def test_lengths_are_cut_to_what_there_is(
    implementation: Implementation, device: torch.device
) -> None:
    case = make_case([40, 9], 2, device=device)
    case["lens"][1] = -5
    assert_matches_naive(implementation, case)
    assert not implementation(**case)[1].any()


@FAST
@pytest.mark.parametrize("positions", [False, True])
def test_many_tiles(implementation: Implementation, positions: bool, device: torch.device) -> None:
    case = make_case([300, 129], 20, w=4, kv_heads=1, positions=positions, device=device)
    assert_matches_naive(implementation, case)


@FAST
def test_more_tiles_than_are_merged_at_once(
    implementation: Implementation, device: torch.device
) -> None:
    case = make_case([2200], 18, w=2, kv_heads=1, group=1, block_size=128, device=device)
    assert_matches_naive(implementation, case)


@FAST
@pytest.mark.parametrize(
    ("w", "dtype"), [(1, torch.float32), (5, torch.bfloat16), (33, torch.float32)]
)
def test_largest_weight(
    implementation: Implementation, w: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Of one query it is the sum; of more the largest of what each alone gives."""
    case = make_case([37, 20], 3, w=w, kv_heads=1, dtype=dtype, positions=True, device=device)
    got = implementation(**case, how="max")
    assert_mass(got, attention_mass_naive(**case, how="max"))
    alone = [
        implementation(
            **case
            | {
                "query": case["query"][:, i : i + 1],
                "query_positions": case["query_positions"][:, i : i + 1],
            }
        )
        for i in range(0, w, 8)
    ]
    assert all(bool((got >= one - 1e-5).all()) for one in alone)


@FAST
@pytest.mark.parametrize("rows", [1, 64])
def test_one_long_row_and_many_short(
    implementation: Implementation, rows: int, device: torch.device
) -> None:
    lens, width = ([1100], 70) if rows == 1 else ([5] * rows, 1)
    case = make_case(lens, width, w=2, kv_heads=1, group=1, dtype=torch.bfloat16, device=device)
    assert_matches_naive(implementation, case)


def test_a_long_row_is_shared_by_programs(launches: Launches, device: torch.device) -> None:
    case = make_case([1100], 70, w=2, kv_heads=1, group=1, dtype=torch.bfloat16, device=device)
    attention_mass_triton(**case)
    assert all(grid[1] > 1 for _, grid in launches)


@FAST
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(implementation: Implementation, softcap: float, device: torch.device) -> None:
    case = make_case([37, 20], 3, device=device)
    capped = implementation(**case, softcap=softcap)
    assert_mass(capped, attention_mass_naive(**case, softcap=softcap))
    assert not torch.allclose(capped, implementation(**case))


@FAST
def test_positions_need_not_rise(implementation: Implementation, device: torch.device) -> None:
    case = make_case([37, 20], 3, w=4, positions=True, device=device)
    rng = torch.Generator().manual_seed(5)
    shuffled = torch.randint(-3, 40, (2, 2, 48), generator=rng)
    case["key_positions"] = shuffled.int().to(device)
    case["query_positions"] = torch.tensor(
        [[0, 5, 39, 2**31 - 1], [12, -2, 8, 7]], dtype=torch.int32, device=device
    )
    assert_matches_naive(implementation, case)


@FAST
def test_positions_in_text_order_change_nothing(
    implementation: Implementation, device: torch.device
) -> None:
    case = make_case([37, 20], 3, w=4, device=device)
    plain = implementation(**case)
    case["key_positions"] = torch.arange(48, device=device).int().expand(2, 2, 48)
    last = case["lens"][:, None] - 4 + torch.arange(4, device=device)
    assert_mass(implementation(**case, query_positions=last.int()), plain)


@ALL
def test_padding_queries(implementation: Implementation, device: torch.device) -> None:
    """Padding queries are ignored, even NaN."""
    case = make_case([37, 20], 3, w=4, positions=True, device=device)
    case["query_positions"][:, :2] = -1
    trimmed = {**case, "query": case["query"][:, 2:].contiguous()}
    trimmed["query_positions"] = case["query_positions"][:, 2:].contiguous()
    case["query"][:, :2] = float("nan")
    assert_mass(implementation(**case), attention_mass_naive(**trimmed))


@ALL
def test_a_query_that_sees_no_key(implementation: Implementation, device: torch.device) -> None:
    case = make_case([20, 20], 2, w=2, positions=True, device=device)
    case["key_positions"] += 100
    case["query_positions"] = torch.tensor([[50, 99], [99, 1000]], dtype=torch.int32, device=device)
    got = implementation(**case)
    assert not got[0].any()
    assert_mass(got[1].sum(-1), torch.ones(4, device=device))


@FAST
def test_mass_adds_up_to_the_queries(implementation: Implementation, device: torch.device) -> None:
    case = make_case([500, 200], 32, w=6, dtype=torch.bfloat16, device=device)
    total = implementation(**case).sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, 6), rtol=1e-5, atol=0)


@FAST
def test_large_logits(implementation: Implementation, device: torch.device) -> None:
    case = make_case([37, 20], 3, device=device)
    case["scale"] = 300.0
    got = implementation(**case)
    torch.testing.assert_close(got, attention_mass_naive(**case), rtol=1e-2, atol=1e-3)


@FAST
def test_a_dense_tensor_is_a_cache_of_one_page_a_row(
    implementation: Implementation, device: torch.device
) -> None:
    rng = torch.Generator().manual_seed(3)
    keys = torch.randn(3, 2, 21, 16, generator=rng).to(device)
    case = {
        "query": torch.randn(3, 4, 2, 16, generator=rng).to(device),
        "key_cache": keys,
        "block_table": torch.arange(3, dtype=torch.int32, device=device)[:, None],
        "lens": torch.full((3,), 21, dtype=torch.int32, device=device),
        "scale": 0.25,
    }
    hidden = torch.ones(4, 21, dtype=torch.bool, device=device).tril(17).logical_not()
    logits = torch.einsum("rwhd,rhtd->rhwt", case["query"], keys) * 0.25
    expected = logits.masked_fill(hidden, float("-inf")).softmax(-1).sum(2)
    assert_mass(implementation(**case), expected)


@FAST
def test_any_query_strides(implementation: Implementation, device: torch.device) -> None:
    case = make_case([37, 20], 3, device=device)
    expected = attention_mass_naive(**case)
    wide = torch.full((2, 4, 3, 40), float("nan"), device=device)
    case["query"] = wide[..., 8:24].copy_(case["query"].transpose(1, 2)).transpose(1, 2)
    assert_mass(implementation(**case), expected)


@ALL
@pytest.mark.parametrize("max_len", [40, 48, 131])
def test_persistent_buffer(
    implementation: Implementation, max_len: int, device: torch.device
) -> None:
    case = make_case([37, 20], 3, device=device)
    expected = torch.zeros(2, 4, 131, device=device)
    expected[..., :48] = attention_mass_naive(**case)
    buffer = torch.full((4, 6, 140), 7.0, device=device)
    out = buffer[1:3, 2:, 3 : 3 + max_len]
    got = implementation(**case, out=out)
    assert got.data_ptr() == out.data_ptr()
    assert_mass(got, expected[..., :max_len])
    out.fill_(7)
    assert (buffer == 7).all()


@FAST
@pytest.mark.parametrize(
    ("lens", "width", "w"), [([], 2, 3), ([20, 3], 2, 0), ([0, 0], 2, 3), ([0], 0, 3)]
)
def test_empty(
    implementation: Implementation, lens: list[int], width: int, w: int, device: torch.device
) -> None:
    case = make_case(lens, width, w=w, device=device)
    got = implementation(**case)
    assert got.shape == (len(lens), 4, width * 16) and not got.any()


@pytest.mark.parametrize("positions", [False, True])
def test_vectorized_bounds_its_logits(
    positions: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Rows, heads, groups and windows are cut as the bound gets tighter; the result stays."""
    case = make_case([37, 20, 45], 3, w=5, group=3, positions=positions, device=device)
    if positions:
        case["query_positions"][1, :3] = -1
    expected = attention_mass_naive(**case)
    sizes: list[int] = []
    softmax = torch.softmax

    def seen(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sizes.append(logits.numel() * 4)
        return softmax(logits, *args, **kwargs)

    monkeypatch.setattr(torch, "softmax", seen)
    counts = []
    for bound in (1 << 20, 12_000, 3_000, 800, 200):
        sizes.clear()
        monkeypatch.setattr(vectorized, "LOGITS_BYTES", bound)
        assert_mass(attention_mass_vectorized(**case), expected)
        assert max(sizes) <= bound
        counts.append(len(sizes))
    assert counts[0] == 1 and counts == sorted(set(counts))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_properties(data: st.DataObject, device: torch.device) -> None:
    width = data.draw(st.integers(1, 3))
    block_size = data.draw(st.sampled_from([3, 16]))
    capacity = width * block_size
    lens = data.draw(st.lists(st.integers(0, capacity), min_size=1, max_size=2))
    case = make_case(
        lens,
        width,
        w=data.draw(st.integers(1, 4)),
        kv_heads=data.draw(st.integers(1, 2)),
        group=data.draw(st.integers(1, 2)),
        block_size=block_size,
        dtype=data.draw(st.sampled_from(DTYPES)),
        layout=data.draw(st.sampled_from(LAYOUTS)),
        positions=data.draw(st.booleans()),
        device=device,
        seed=data.draw(st.integers(0, 99)),
    )
    softcap = data.draw(st.sampled_from([0.0, 2.0]))
    expected = attention_mass_naive(**case, softcap=softcap)
    assert_mass(attention_mass_vectorized(**case, softcap=softcap), expected)
    assert_mass(attention_mass_triton(**case, softcap=softcap), expected)


def test_triton_is_two_launches(launches: Launches, device: torch.device) -> None:
    attention_mass_triton(**make_case([37, 20], 3, device=device))
    assert [name for name, _ in launches] == KERNELS


def test_dispatch(launches: Launches, device: torch.device) -> None:
    case = make_case([37, 20], 3, device=device)
    assert_mass(attention_mass(**case), attention_mass_naive(**case))
    assert [name for name, _ in launches] == (KERNELS if device.type == "cuda" else [])


def integers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


ARGUMENTS: dict[str, Any] = {
    "query": torch.zeros(2, 3, 4, 8),
    "key_cache": torch.zeros(5, 2, 16, 8),
    "block_table": integers(2, 3),
    "lens": integers(2),
    "scale": 1.0,
}


@ALL
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("key_cache", {"key_cache": torch.zeros(5, 2, 8)}, id="key_cache-ndim"),
        pytest.param("key_cache", {"key_cache": torch.zeros(5, 2, 0, 8)}, id="key_cache-empty"),
        pytest.param(
            "key_cache", {"key_cache": torch.zeros(5, 2, 16, 8).double()}, id="key_cache-dtype"
        ),
        pytest.param(
            "key_cache", {"key_cache": torch.zeros(5, 2, 16, 16)[..., ::2]}, id="key_cache-stride"
        ),
        pytest.param("query", {"query": torch.zeros(2, 3, 4, 8).half()}, id="query-dtype"),
        pytest.param("query", {"query": torch.zeros(2, 3, 4, 9)}, id="query-head_size"),
        pytest.param("query", {"query": torch.zeros(2, 3, 5, 8)}, id="query-heads"),
        pytest.param("query", {"query": torch.zeros(2, 3, 0, 8)}, id="query-no-heads"),
        pytest.param("block_table", {"block_table": integers(3, 3)}, id="block_table-rows"),
        pytest.param("block_table", {"block_table": torch.zeros(2, 3)}, id="block_table-dtype"),
        pytest.param("lens", {"lens": integers(3)}, id="lens-rows"),
        pytest.param("lens", {"lens": integers(2).long()}, id="lens-dtype"),
        pytest.param("scale", {"scale": float("inf")}, id="scale"),
        pytest.param("softcap", {"softcap": -1.0}, id="softcap"),
        pytest.param("softcap", {"softcap": float("nan")}, id="softcap-nan"),
        pytest.param("how", {"how": "mean"}, id="how"),
        pytest.param("query_positions", {"key_positions": integers(2, 2, 48)}, id="keys-only"),
        pytest.param("key_positions", {"query_positions": integers(2, 3)}, id="queries-only"),
        pytest.param(
            "key_positions",
            {"key_positions": integers(2, 2, 47), "query_positions": integers(2, 3)},
            id="key_positions-shape",
        ),
        pytest.param(
            "query_positions",
            {"key_positions": integers(2, 2, 48), "query_positions": integers(2, 4)},
            id="query_positions-shape",
        ),
        pytest.param("out", {"out": torch.zeros(2, 4, 48).half()}, id="out-dtype"),
        pytest.param("out", {"out": torch.zeros(2, 2, 48)}, id="out-shape"),
    ],
)
def test_rejects(
    implementation: Implementation, name: str, changes: dict[str, Any], device: torch.device
) -> None:
    arguments = {
        key: to_device(value, device) if isinstance(value, Tensor) else value
        for key, value in {**ARGUMENTS, **changes}.items()
    }
    with pytest.raises(ValueError, match=rf"^{name} must .*\.$"):
        implementation(**arguments)


@ALL
def test_rejects_output_on_input(implementation: Implementation, device: torch.device) -> None:
    case = make_case([37, 20], 3, device=device)
    out = case["key_cache"].flatten()[: 2 * 4 * 48].view(2, 4, 48)
    with pytest.raises(ValueError, match="out must not share memory with key_cache"):
        implementation(**case, out=out)


def test_rejects_another_device() -> None:
    with pytest.raises(ValueError, match="lens must be on cpu like the other tensors, got meta"):
        attention_mass(**{**ARGUMENTS, "lens": integers(2).to("meta")})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph_replay(device: torch.device) -> None:
    case = make_case([37, 20], 3, device=device)
    fresh = make_case([40, 7], 3, device=device, seed=1)
    out = torch.zeros(2, 4, 48, device=device)
    attention_mass(**case, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention_mass(**case, out=out)
    for name in ("query", "key_cache", "block_table", "lens"):
        case[name].copy_(fresh[name])
    graph.replay()
    torch.cuda.synchronize()
    assert_mass(out, attention_mass_naive(**fresh))


@pytest.mark.parametrize(
    ("element", "head_size", "positions", "softcap"),
    [("fp32", 256, True, False), ("bf16", 96, False, True)],
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_for_cuda(
    compile_for_cuda: CompileForCuda,
    kernel: str,
    element: str,
    head_size: int,
    positions: bool,
    softcap: bool,
) -> None:
    mass = kernel == "mass_kernel"
    outputs = ("split_lse", "out") if mass else ("split_lse",)
    sizes = ("n_splits", "n_split", *(("max_len", "stride_or", "stride_oh") if mass else ()))
    strides = ["qr", "qw", "qh", "cb", "ch", "ct", "br", "kr", "kh", "pr"]
    position_type = {"key_positions": "*i32", "query_positions": "*i32"} if positions else {}
    compile_for_cuda(
        "kvplug_kernels.attention_mass.kernel",
        kernel,
        {
            **dict.fromkeys(("query", "key_cache"), f"*{element}"),
            **dict.fromkeys(("block_table", "lens"), "*i32"),
            **dict.fromkeys(outputs, "*fp32"),
            **dict.fromkeys(("scale", "softcap"), "fp32"),
            **dict.fromkeys(("limit", *sizes, *(f"stride_{s}" for s in strides)), "i32"),
            **position_type,
        },
        {
            **({} if positions else dict.fromkeys(("key_positions", "query_positions"))),
            **({"BLOCK_S": 16, "MAX": softcap} if mass else {}),
            "SOFTCAP": softcap,
            "LOG2_E": LOG2_E,
            "KV_HEADS": 8,
            "GROUP": 3,
            "W": 20,
            "BLOCK_SIZE": 24,
            "HEAD_SIZE": head_size,
            "TILES": 6 if element == "fp32" else 1,
            "BLOCK_T": 16 if element == "fp32" else 64,
            "BLOCK_G": 1 if element == "fp32" else 4,
            "BLOCK_W": 16 if element == "fp32" else 32,
            "BLOCK_D": 1 << (head_size - 1).bit_length(),
            "STAGES": 3,
            "WIDEN": False,
        },
    )
