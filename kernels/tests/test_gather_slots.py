from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvplug_kernels.gather_slots import gather_slots
from kvplug_kernels.gather_slots.kernel import gather_slots_triton
from kvplug_kernels.gather_slots.naive import gather_slots_naive
from kvplug_kernels.gather_slots.vectorized import gather_slots_vectorized

Implementation = Callable[..., Tensor]
Launches = list[tuple[str, tuple[int, ...]]]
CompileForCuda = Callable[[str, str, dict[str, str], dict[str, int | None]], None]

FAST = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(gather_slots_triton, id="triton"),
        pytest.param(gather_slots_vectorized, id="vectorized"),
    ],
)
ALL = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(gather_slots_naive, id="naive"),
        pytest.param(gather_slots_triton, id="triton"),
        pytest.param(gather_slots_vectorized, id="vectorized"),
    ],
)
DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.bool,
]
LAYOUTS = ["head-major", "token-major", "interleaved"]


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor with its strides, which ``Tensor.to`` does not always keep."""
    moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return moved.copy_(tensor)


def make_cache(
    num_blocks: int,
    num_heads: int,
    block_size: int,
    content: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    layout: str = "head-major",
    device: torch.device,
    seed: int = 0,
) -> Tensor:
    """Random bits, NaN payloads and subnormals included, in one of the page layouts."""
    rng = torch.Generator().manual_seed(seed)
    size = torch.zeros((), dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 256
    bits = torch.randint(
        0, high, (num_blocks, num_heads, block_size, content * size), generator=rng
    )
    cache = bits.to(torch.uint8).view(dtype).to(device)
    if layout == "token-major":
        return cache.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    if layout == "interleaved":
        wide = torch.zeros(num_blocks, 2, num_heads, block_size, content + 3, device=device)
        view = wide.to(dtype)[:, 1, :, :, 2 : content + 2]
        view.view(_integer(dtype)).copy_(cache.view(_integer(dtype)))
        return view
    return cache


def _integer(dtype: torch.dtype) -> torch.dtype:
    size = torch.zeros((), dtype=dtype).element_size()
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]


def make_slots(
    n: int, n_slots: int, *, dtype: torch.dtype = torch.int64, device: torch.device, seed: int = 0
) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    slots = torch.randint(0, n_slots, (n,), generator=rng)
    slots[torch.rand(n, generator=rng) < 0.2] = -1
    slots[-1] = n_slots - 1
    return slots.to(device, dtype)


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape
    torch.testing.assert_close(as_bytes(got), as_bytes(expected), rtol=0, atol=0)


def assert_matches_naive(implementation: Implementation, cache: Tensor, slots: Tensor) -> None:
    before = as_bytes(cache).clone(), slots.clone()
    assert_same(implementation(cache, slots), gather_slots_naive(cache, slots))
    assert torch.equal(as_bytes(cache), before[0]) and torch.equal(slots, before[1])


@ALL
def test_worked_example(implementation: Implementation, device: torch.device) -> None:
    cache = torch.arange(24, dtype=torch.float32, device=device).reshape(2, 2, 3, 2)
    slots = torch.tensor([4, -1, 2, 4], device=device)
    assert implementation(cache, slots).tolist() == [
        [[14, 15], [20, 21]],
        [[0, 0], [0, 0]],
        [[4, 5], [10, 11]],
        [[14, 15], [20, 21]],
    ]


@FAST
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_layouts(
    implementation: Implementation, dtype: torch.dtype, layout: str, device: torch.device
) -> None:
    cache = make_cache(5, 3, 16, 20, dtype=dtype, layout=layout, device=device)
    slots = make_slots(17, 5 * 16, device=device)
    assert_matches_naive(implementation, cache, slots)


@FAST
@pytest.mark.parametrize("slots_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("n", [1, 3, 17])
@pytest.mark.parametrize(
    ("num_heads", "block_size", "content"),
    [(1, 16, 1), (1, 1, 7), (3, 32, 33), (8, 128, 130), (5, 24, 64), (2, 7, 96)],
)
def test_shapes(
    implementation: Implementation,
    num_heads: int,
    block_size: int,
    content: int,
    n: int,
    slots_dtype: torch.dtype,
    device: torch.device,
) -> None:
    cache = make_cache(3, num_heads, block_size, content, device=device)
    slots = make_slots(n, 3 * block_size, dtype=slots_dtype, device=device, seed=n)
    assert_matches_naive(implementation, cache, slots)


@FAST
@pytest.mark.parametrize("content", [13, 16])
@pytest.mark.parametrize("shift", [0, 1, 2, 4, 8])
def test_content_at_any_alignment(
    implementation: Implementation, shift: int, content: int, device: torch.device
) -> None:
    pages = make_cache(3, 2, 16, 32, dtype=torch.uint8, device=device)
    slots = make_slots(9, 48, device=device)
    out = torch.zeros(9, 2, 32, dtype=torch.uint8, device=device)
    aligned, shifted = slice(0, content), slice(shift, shift + content)
    for source, target in ((shifted, aligned), (aligned, shifted)):
        cache = pages[..., source]
        got = implementation(cache, slots, out=out[..., target])
        assert_same(got, gather_slots_naive(cache, slots))


@FAST
def test_content_wider_than_one_tile(implementation: Implementation, device: torch.device) -> None:
    cache = make_cache(2, 2, 3, 9001, dtype=torch.uint8, layout="token-major", device=device)
    assert_matches_naive(implementation, cache, make_slots(5, 6, device=device))


@FAST
@pytest.mark.parametrize("padding", [-1, -2, -(2**31)])
def test_every_slot_is_padding(
    implementation: Implementation, padding: int, device: torch.device
) -> None:
    cache = make_cache(2, 3, 16, 5, dtype=torch.uint8, device=device)
    slots = torch.full((4,), padding, dtype=torch.int32, device=device)
    assert not implementation(cache, slots).any()
    assert not implementation(cache[:0], slots).any()


@FAST
@pytest.mark.parametrize(("n", "num_heads", "content"), [(0, 2, 4), (3, 0, 4), (3, 2, 0)])
def test_empty(
    implementation: Implementation, n: int, num_heads: int, content: int, device: torch.device
) -> None:
    cache = torch.zeros(2, num_heads, 16, content, device=device)
    slots = torch.zeros(n, dtype=torch.int64, device=device)
    assert implementation(cache, slots).shape == (n, num_heads, content)


@ALL
def test_persistent_buffer(implementation: Implementation, device: torch.device) -> None:
    cache = make_cache(4, 3, 16, 20, dtype=torch.uint8, layout="token-major", device=device)
    slots = make_slots(9, 64, device=device)
    expected = gather_slots_naive(cache, slots)
    buffer = torch.full((12, 4, 31), 99, dtype=torch.uint8, device=device)
    out = buffer[:9, 1:, 5:25]
    got = implementation(cache, slots, out=out)
    assert got.data_ptr() == out.data_ptr()
    assert_same(got, expected)
    out.fill_(99)
    assert (buffer == 99).all()


def test_triton_is_one_launch(launches: Launches, device: torch.device) -> None:
    cache = make_cache(4, 3, 16, 20, device=device)
    gather_slots_triton(cache, make_slots(9, 64, device=device))
    assert [name for name, _ in launches] == ["gather_slots_kernel"]


def test_dispatch(launches: Launches, device: torch.device) -> None:
    cache = make_cache(4, 3, 16, 20, device=device)
    slots = make_slots(9, 64, device=device)
    assert_same(gather_slots(cache, slots), gather_slots_naive(cache, slots))
    assert len(launches) == (1 if device.type == "cuda" else 0)


CACHE = torch.zeros(2, 3, 16, 4)


@ALL
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("cache", {"cache": torch.zeros(2, 3, 16)}, id="cache-ndim"),
        pytest.param("cache", {"cache": CACHE.to(torch.complex128)}, id="cache-16-bytes"),
        pytest.param("cache", {"cache": CACHE[:, :, :0]}, id="cache-block-size"),
        pytest.param("cache", {"cache": CACHE[..., ::2]}, id="cache-stride"),
        pytest.param("slots", {"slots": torch.zeros(5)}, id="slots-dtype"),
        pytest.param("slots", {"slots": torch.zeros(5, 1, dtype=torch.int64)}, id="slots-ndim"),
        pytest.param("slots", {"slots": torch.zeros(9, dtype=torch.int64)[::2]}, id="slots-stride"),
        pytest.param("out", {"out": torch.zeros(5, 3, 4, dtype=torch.int32)}, id="out-dtype"),
        pytest.param("out", {"out": torch.zeros(6, 3, 4)}, id="out-shape"),
        pytest.param("out", {"out": torch.zeros(5, 3, 8)[..., ::2]}, id="out-stride"),
    ],
)
def test_rejects(
    implementation: Implementation, name: str, changes: dict[str, Any], device: torch.device
) -> None:
    arguments = {"cache": CACHE, "slots": torch.zeros(5, dtype=torch.int64), **changes}
    moved = {key: to_device(value, device) for key, value in arguments.items()}
    with pytest.raises(ValueError, match=rf"^{name} must .*\.$"):
        implementation(**moved)


@ALL
def test_rejects_output_on_input(implementation: Implementation, device: torch.device) -> None:
    cache = make_cache(2, 3, 16, 4, device=device)
    slots = make_slots(5, 32, device=device)
    out = cache.flatten()[: 5 * 3 * 4].view(5, 3, 4)
    with pytest.raises(ValueError, match="out must not share memory with cache"):
        implementation(cache, slots, out=out)


def test_rejects_another_device() -> None:
    with pytest.raises(ValueError, match="slots must be on cpu like cache, got meta"):
        gather_slots(CACHE, torch.zeros(5, dtype=torch.int64, device="meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph_replay(device: torch.device) -> None:
    cache = make_cache(4, 3, 16, 20, device=device)
    slots = make_slots(9, 64, device=device, seed=1)
    fresh = make_slots(9, 64, device=device, seed=2)
    out = torch.zeros(9, 3, 20, dtype=cache.dtype, device=device)
    gather_slots(cache, slots, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gather_slots(cache, slots, out=out)
    slots.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(out, gather_slots_naive(cache, fresh))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a cache beyond 2**31 elements")
def test_offsets_beyond_int32(device: torch.device) -> None:
    cache = torch.zeros(2**15 + 8, 8, 64, 144, dtype=torch.uint8, device=device)
    assert cache.numel() > 2**31
    cache[-1] = 7
    slots = torch.tensor([cache.shape[0] * 64 - 1, 0], dtype=torch.int32, device=device)
    got = gather_slots(cache, slots)
    assert (got[0] == 7).all() and not got[1].any()


@pytest.mark.parametrize("element", ["u8", "i16"])
def test_compiles_for_cuda(compile_for_cuda: CompileForCuda, element: str) -> None:
    strides = ("stride_cb", "stride_ch", "stride_ct", "stride_on", "stride_oh")
    compile_for_cuda(
        "kvplug_kernels.gather_slots.kernel",
        "gather_slots_kernel",
        {
            **dict.fromkeys(("cache", "out"), f"*{element}"),
            "slots": "*i64",
            **dict.fromkeys(("n_rows", *strides), "i32"),
        },
        {"HEADS": 8, "BLOCK_SIZE": 24, "CONTENT": 200, "BLOCK_R": 16, "BLOCK_C": 256},
    )


def test_benchmark_runs(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_gather_slots.py"
    report = tmp_path / "rows.json"
    command = [sys.executable, str(script), "--quick", "--json", str(report)]
    subprocess.run(command, check=True, timeout=120)
    rows = json.loads(report.read_text())
    assert rows and all(row["ratio_median"] > 0 and row["bytes"] > 0 for row in rows)
