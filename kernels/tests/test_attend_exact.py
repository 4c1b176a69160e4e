from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grid import grid, implementations
from paged_cases import to_device
from torch import Tensor

import kvplug_kernels.attend_exact.vectorized as vectorized
from kvplug_kernels.attend_exact import attend_exact, merge_attention
from kvplug_kernels.attend_exact.cpu import attend_exact_cpu, merge_attention_cpu
from kvplug_kernels.attend_exact.kernel import attend_exact_triton, merge_attention_triton
from kvplug_kernels.attend_exact.naive import attend_exact_naive, merge_attention_naive
from kvplug_kernels.attend_exact.vectorized import (
    attend_exact_vectorized,
    merge_attention_vectorized,
)

Implementation = Callable[..., tuple[Tensor, Tensor]]
Launches = list[tuple[str, tuple[int, ...]]]
CompileForCuda = Callable[[str, str, dict[str, str], dict[str, int | None]], None]

NAN, INF = float("nan"), float("inf")
FAST, ALL = implementations(
    attend_exact_naive, attend_exact_triton, attend_exact_vectorized, attend_exact_cpu
)
_, MERGES = implementations(
    merge_attention_naive,
    merge_attention_triton,
    merge_attention_vectorized,
    merge_attention_cpu,
    name="merge",
)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def make_case(
    widths: list[int],
    recent: list[int] | None = None,
    *,
    size: int = 8,
    kv_heads: int = 2,
    group: int = 2,
    head_size: int = 16,
    padding: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device,
) -> dict[str, Any]:
    """Arguments of a call; NaN in every token and recent slot that no row owns."""
    rng = torch.Generator().manual_seed(0)
    tokens = sum(widths)
    case: dict[str, Any] = {}
    for name, heads in (("query", kv_heads * group), ("key", kv_heads), ("value", kv_heads)):
        x = torch.full((tokens + padding, heads, head_size), NAN)
        x[:tokens] = torch.randn(tokens, heads, head_size, generator=rng)
        case[name] = x.to(device, dtype)
    starts = [0, *itertools.accumulate(widths)]
    case["query_start"] = torch.tensor(starts, dtype=torch.int32, device=device)
    case |= {"scale": head_size**-0.5, "max_query_len": max(widths, default=0)}
    if recent is not None:
        rows = len(widths)
        recent_slots = torch.randperm(rows + 2, generator=rng)[:rows]
        for name in ("recent_key", "recent_value"):
            x = torch.full((rows + 2, size, kv_heads, head_size), NAN)
            for slot, n in zip(recent_slots.tolist(), recent, strict=True):
                x[slot, : max(n, 0)] = torch.randn(x[slot, : max(n, 0)].shape, generator=rng)
            case[name] = x.to(device, dtype)
        recent_slots[torch.tensor(recent) <= 0] = -1
        case["recent_slots"] = recent_slots.to(device)
        case["recent_lens"] = torch.tensor(recent, dtype=torch.int32, device=device)
    return case


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], tolerance: float) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@ALL
def test_worked_example(implementation: Implementation, device: torch.device) -> None:
    """The second query sees two keys, the other's logit larger by log 3."""
    query = torch.ones(2, 1, 1, device=device)
    key = torch.tensor([[[0.0]], [[1.0986123]]], device=device)
    value = torch.tensor([[[4.0]], [[8.0]]], device=device)
    starts = torch.tensor([0, 2], dtype=torch.int32, device=device)
    out, lse = implementation(query, key, value, starts, 1.0, max_query_len=2)
    torch.testing.assert_close(out.flatten().cpu(), torch.tensor([4.0, 7.0]))
    torch.testing.assert_close(lse.flatten().cpu(), torch.tensor([1.0, 4.0]).log())


@ALL
def test_what_is_not_a_number_stays_in_its_head(
    implementation: Implementation, device: torch.device
) -> None:
    query = torch.ones(2, 2, 16, device=device)
    query[1, 1, 3] = NAN
    key, value = (torch.ones(2, 1, 16, device=device) for _ in range(2))
    starts = torch.tensor([0, 2], dtype=torch.int32, device=device)
    out, lse = implementation(query, key, value, starts, 1.0, max_query_len=2)
    assert out[1, 1].isnan().all() and lse[1, 1].isnan()
    assert out[0].isfinite().all() and out[1, 0].isfinite().all()
    assert lse[0].isfinite().all() and lse[1, 0].isfinite()


@pytest.mark.parametrize("merge", [merge_attention_vectorized, merge_attention_cpu])
def test_a_cpu_loses_nothing_that_is_not_a_number_in_a_merge(merge: Callable[..., None]) -> None:
    one, two = torch.ones(1, 2, 16), torch.ones(1, 2, 16)
    two[0, 1] = NAN
    lse = torch.tensor([[0.0, NAN]])
    out = torch.zeros(1, 2, 16)
    merge(one, torch.zeros(1, 2), two, lse, out)
    assert out[0, 0].eq(1).all() and out[0, 1].isnan().all()


@ALL
def test_against_dense_softmax(implementation: Implementation, device: torch.device) -> None:
    case = make_case([5, 3], [4, 0], device=device)
    out, lse = implementation(**case)
    q, k, v = (case[n].cpu().double() for n in ("query", "key", "value"))
    for row, (a, b, n) in enumerate([(0, 5, 4), (5, 8, 0)]):
        slot = int(case["recent_slots"][row]) if n else 0
        keys = torch.cat([case["recent_key"][slot, :n].cpu().double(), k[a:b]])
        values = torch.cat([case["recent_value"][slot, :n].cpu().double(), v[a:b]])
        logits = torch.einsum("qhgd,thd->hgqt", q[a:b].unflatten(1, (2, 2)), keys) * case["scale"]
        seen = torch.arange(n + b - a) <= n + torch.arange(b - a)[:, None]
        logits = logits.masked_fill(~seen, -INF)
        want = torch.einsum("hgqt,thd->qhgd", logits.softmax(-1), values).flatten(1, 2)
        torch.testing.assert_close(out[a:b].cpu().double(), want, rtol=1e-5, atol=1e-5)
        total = logits.logsumexp(-1).permute(2, 0, 1).flatten(1)
        torch.testing.assert_close(lse[a:b].cpu().double(), total, rtol=1e-5, atol=1e-5)


@grid(
    FAST,
    pytest.mark.parametrize("dtype", TOLERANCE, ids=str),
    pytest.mark.parametrize("recent", [None, [3, 0, 8, -2, 20, 1]]),
)
def test_rows_of_different_widths(
    implementation: Implementation,
    recent: list[int] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Empty rows, rows of one token, and tokens behind the last row."""
    case = make_case([1, 7, 0, 1, 20, 0], recent, padding=3, dtype=dtype, device=device)
    got = implementation(**case)
    assert_same(got, attend_exact_naive(**case), TOLERANCE[dtype])
    assert not got[0][29:].any() and (got[1][29:] == -INF).all()


@FAST
@pytest.mark.parametrize(
    ("head_size", "kv_heads", "group"), [(64, 1, 3), (96, 1, 1), (128, 1, 4), (256, 2, 1)]
)
def test_shapes(
    implementation: Implementation,
    head_size: int,
    kv_heads: int,
    group: int,
    device: torch.device,
) -> None:
    case = make_case(
        [18, 2], [0, 5], head_size=head_size, kv_heads=kv_heads, group=group, device=device
    )
    assert_same(implementation(**case), attend_exact_naive(**case), 5e-6)


@FAST
def test_more_than_a_tile(implementation: Implementation, device: torch.device) -> None:
    case = make_case([70], [40], size=48, kv_heads=1, device=device)
    assert_same(implementation(**case), attend_exact_naive(**case), 5e-6)


@FAST
def test_softcap(implementation: Implementation, device: torch.device) -> None:
    case = make_case([5, 1], [2, 3], device=device) | {"softcap": 0.5}
    assert_same(implementation(**case), attend_exact_naive(**case), 5e-6)


@FAST
def test_writes_into_the_given_outputs(
    implementation: Implementation, device: torch.device
) -> None:
    case = make_case([3, 1], padding=1, device=device)
    out = torch.full((5, 4, 16), NAN, device=device)
    lse = torch.full((5, 4), NAN, device=device)
    got = implementation(**case, out=out, lse=lse)
    assert got[0] is out and got[1] is lse
    assert_same(got, attend_exact_naive(**case), 5e-6)


def test_strided_inputs(device: torch.device) -> None:
    """Q, K and V as slices of one projection."""
    case = make_case([3, 4], device=device)
    packed = torch.cat([case["query"], case["key"], case["value"]], 1)
    case["query"], case["key"], case["value"] = packed.split([4, 2, 2], 1)
    want = attend_exact_naive(**case)
    assert_same(attend_exact_vectorized(**case), want, 5e-6)
    assert_same(attend_exact_triton(**case), want, 5e-6)


@pytest.mark.parametrize("bounds", [(4000, 8000), (200, 1)])
def test_memory_bound(bounds: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    case = make_case([9, 12, 1, 3], [3, 8, 2, 1], device=device)
    want = attend_exact_naive(**case)
    sizes: list[int] = []
    logsumexp = torch.logsumexp

    def seen(logits: Tensor, *args: Any) -> Tensor:
        sizes.append(logits.numel() * 4)
        return logsumexp(logits, *args)

    monkeypatch.setattr(torch, "logsumexp", seen)
    monkeypatch.setattr(vectorized, "LOGITS_BYTES", bounds[0])
    monkeypatch.setattr(vectorized, "KEYS_BYTES", bounds[1])
    assert_same(attend_exact_vectorized(**case), want, 5e-6)
    one_query = 4 * 20 * 4
    assert sizes and max(sizes) <= max(bounds[0], one_query)


@pytest.mark.parametrize("widths", [[], [0, 0]])
@ALL
def test_nothing_to_do(
    implementation: Implementation, widths: list[int], device: torch.device
) -> None:
    case = make_case(widths, padding=2, device=device)
    out, lse = implementation(**case)
    assert not out.any() and (lse == -INF).all()


def test_dispatch(launches: Launches, device: torch.device) -> None:
    case = make_case([3, 1], [1, 0], device=device)
    out, lse = attend_exact(**case)
    assert_same((out, lse), attend_exact_naive(**case), 5e-6)
    merge_attention(out, lse, out, lse, out)
    names = ["attend_exact_kernel", "merge_attention_kernel"]
    assert [name for name, _ in launches] == (names if device.type == "cuda" else [])


def test_triton_is_one_launch_each(launches: Launches, device: torch.device) -> None:
    out, lse = attend_exact_triton(**make_case([3, 1], [1, 0], device=device))
    merge_attention_triton(out, lse, out, lse, torch.zeros_like(out))
    assert [name for name, _ in launches] == ["attend_exact_kernel", "merge_attention_kernel"]


REJECTED: list[tuple[str, dict[str, Any]]] = [
    ("query", {"query": torch.zeros(4, 4, 16, dtype=torch.float64)}),
    ("query", {"query": torch.zeros(4, 3, 16)}),
    ("key", {"key": torch.zeros(4, 2, 16).half()}),
    ("key", {"key": torch.zeros(5, 2, 16)}),
    ("value", {"value": torch.zeros(4, 1, 16)}),
    ("value", {"value": torch.zeros(4, 2, 32)[..., ::2]}),
    ("query_start", {"query_start": torch.zeros(3)}),
    ("query_start", {"query_start": torch.zeros(0, dtype=torch.int32)}),
    ("scale", {"scale": NAN}),
    ("softcap", {"softcap": -1.0}),
    ("max_query_len", {"max_query_len": -1}),
    ("recent_value", {"recent_key": torch.zeros(2, 8, 2, 16)}),
    ("out", {"out": torch.zeros(4, 4, 16).half()}),
    ("out", {"out": torch.zeros(4, 8, 16)[:, ::2]}),
    ("lse", {"lse": torch.zeros(4, 3)}),
]


@ALL
@pytest.mark.parametrize(("name", "changes"), REJECTED)
def test_rejects(
    implementation: Implementation, name: str, changes: dict[str, Any], device: torch.device
) -> None:
    moved = {k: to_device(v, device) if isinstance(v, Tensor) else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=rf"^{name} must .*\.$"):
        implementation(**{**make_case([3, 1], device=device), **moved})


@ALL
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("recent_key", torch.zeros(2, 8, 2, 8)),
        ("recent_value", torch.zeros(2, 7, 2, 16)),
        ("recent_slots", torch.zeros(2, dtype=torch.int32)),
        ("recent_lens", torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_rejects_recent_tokens(
    implementation: Implementation, name: str, value: Tensor, device: torch.device
) -> None:
    case = make_case([3, 1], [1, 0], device=device)
    with pytest.raises(ValueError, match=rf"^{name} must .*\.$"):
        implementation(**{**case, name: value.to(device)})


# -- Merge -----------------------------------------------------------------------------------------


def make_parts(device: torch.device) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    parts = []
    for _ in range(2):
        parts += [torch.randn(9, 3, 24, generator=rng), torch.randn(9, 3, generator=rng) * 4]
    parts[1][0], parts[3][1] = -INF, -INF
    parts[1][2] = parts[3][2] = -INF
    # What no query saw is not read.
    parts[0][0] = parts[2][1] = parts[0][2] = parts[2][2] = NAN
    # Far apart: one weighs nothing.
    parts[1][3], parts[3][3] = 200.0, -200.0
    return [part.to(device) for part in parts]


@MERGES
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_merge(merge: Callable[..., Tensor], dtype: torch.dtype, device: torch.device) -> None:
    out_a, lse_a, out_b, lse_b = make_parts(device)
    out = torch.full_like(out_a, NAN, dtype=dtype)
    assert merge(out_a, lse_a, out_b, lse_b, out) is out
    # Triton's interpreter cuts off what does not fit a bfloat16.
    exact = {"rtol": 0, "atol": 0} if dtype != torch.bfloat16 else {"rtol": 2**-7, "atol": 0}
    torch.testing.assert_close(out[0], out_b[0].to(dtype), **exact)
    torch.testing.assert_close(out[1], out_a[1].to(dtype), **exact)
    assert not out[2].any()
    torch.testing.assert_close(out[3], out_a[3].to(dtype))
    weight = torch.sigmoid(lse_a.double() - lse_b.double())[4:, :, None]
    want = weight * out_a[4:].double() + (1 - weight) * out_b[4:].double()
    torch.testing.assert_close(out[4:].double(), want, rtol=0, atol=TOLERANCE[dtype] * 2)


@MERGES
def test_merge_into_an_input(merge: Callable[..., Tensor], device: torch.device) -> None:
    parts = make_parts(device)
    want = merge_attention_naive(*parts, torch.zeros_like(parts[0]))
    for at in (0, 2):
        own = [part.clone() for part in parts]
        merge(*own, own[at])
        torch.testing.assert_close(own[at], want)


@FAST
def test_two_halves_merge_into_the_whole(
    implementation: Implementation, device: torch.device
) -> None:
    """Recent tokens attended by themselves, then merged, are recent tokens attended."""
    case = make_case([1, 1], [5, 8], device=device)
    whole, whole_lse = attend_exact_naive(**case)
    plain = {k: v for k, v in case.items() if not k.startswith("recent")}
    own, own_lse = implementation(**plain)
    past, past_lse = torch.zeros_like(whole), torch.zeros_like(whole_lse)
    for row, n in enumerate((5, 8)):
        slot = case["recent_slots"][row]
        key, value = (
            case[f"recent_{x}"][slot, :n].repeat_interleave(2, 1) for x in ("key", "value")
        )
        logits = torch.einsum("hd,thd->ht", case["query"][row], key) * case["scale"]
        past[row] = torch.einsum("ht,thd->hd", logits.softmax(-1), value)
        past_lse[row] = logits.logsumexp(-1)
    merge = merge_attention_triton if implementation is attend_exact_triton else merge_attention
    merged = merge(past, past_lse, own, own_lse, torch.zeros_like(whole))
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-5)


@MERGES
@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, torch.zeros(2, 3, 8).half()),
        (1, torch.zeros(2, 4)),
        (2, torch.zeros(2, 3, 9)),
        (3, torch.zeros(2, 3).half()),
        (4, torch.zeros(2, 3, 8).int()),
    ],
)
def test_merge_rejects(
    merge: Callable[..., Tensor], at: int, value: Tensor, device: torch.device
) -> None:
    parts = [torch.zeros(2, 3, 8), torch.zeros(2, 3)] * 2 + [torch.zeros(2, 3, 8)]
    parts[at] = value
    with pytest.raises(ValueError, match=r" must .*\.$"):
        merge(*(part.to(device) for part in parts))


# -- CUDA ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph_replay(device: torch.device) -> None:
    case = make_case([3, 1], [4, 2], device=device)
    out, lse = attend_exact(**case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend_exact(**case, out=out, lse=lse)
    case["query"].neg_()
    graph.replay()
    torch.cuda.synchronize()
    assert_same((out, lse), attend_exact_naive(**case), 5e-6)


@pytest.mark.parametrize(
    ("element", "head_size", "recent", "tile"), [("bf16", 128, True, 64), ("fp32", 96, False, 16)]
)
def test_compiles_for_cuda(
    compile_for_cuda: CompileForCuda, element: str, head_size: int, recent: bool, tile: int
) -> None:
    from kvplug_kernels.attend_exact.kernel import attend_exact_kernel

    tensors = ("query", "key", "value", "recent_key", "recent_value")
    strides = [name for name in attend_exact_kernel.arg_names if name.startswith("stride")]
    compile_for_cuda(
        "kvplug_kernels.attend_exact.kernel",
        "attend_exact_kernel",
        {
            **dict.fromkeys(tensors, f"*{element}"),
            **dict.fromkeys(("query_start", "recent_lens"), "*i32"),
            "recent_slots": "*i64",
            **dict.fromkeys(("out", "lse"), "*fp32"),
            **dict.fromkeys(("scale", "softcap"), "fp32"),
            **dict.fromkeys(("recent_size", "n_tokens", *strides), "i32"),
        },
        {
            "KV_HEADS": 8,
            "QUERY_GROUP": 3,
            "HEAD_SIZE": head_size,
            "RECENT": recent,
            "SOFTCAP": recent,
            "BLOCK_M": tile,
            "BLOCK_T": 64 if tile == 64 else 32,
            "BLOCK_D": 128,
            "BLOCK_G": 4,
            "WIDEN": False,
        },
    )


@pytest.mark.parametrize("element", ["fp32", "bf16"])
def test_merge_compiles_for_cuda(compile_for_cuda: CompileForCuda, element: str) -> None:
    from kvplug_kernels.attend_exact.kernel import merge_attention_kernel

    sizes = [n for n in merge_attention_kernel.arg_names if n.startswith(("stride", "n_"))]
    compile_for_cuda(
        "kvplug_kernels.attend_exact.kernel",
        "merge_attention_kernel",
        {
            **dict.fromkeys(("out_a", "lse_a", "out_b", "lse_b"), "*fp32"),
            "out": f"*{element}",
            **dict.fromkeys(sizes, "i32"),
        },
        {"HEADS": 32, "HEAD_SIZE": 96, "BLOCK_P": 16, "BLOCK_D": 128},
    )
