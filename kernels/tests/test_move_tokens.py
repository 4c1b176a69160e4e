from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from grid import grid, implementations
from hypothesis import HealthCheck, given, settings
from paged_cases import LAYER_LAYOUTS, NO_BLOCK, lay_out_layers
from torch import Tensor

from kvplug_kernels.compact_kv.naive import plan_moves_naive
from kvplug_kernels.move_tokens import LayerCaches, move_tokens
from kvplug_kernels.move_tokens.kernel import BESIDE, move_tokens_triton
from kvplug_kernels.move_tokens.naive import move_tokens_naive
from kvplug_kernels.move_tokens.vectorized import move_tokens_vectorized

Implementation = Callable[..., None]
CompileForCuda = Callable[[str, str, dict[str, str], dict[str, int | None]], str]
Launches = list[tuple[str, tuple[int, ...]]]

FAST, ALL = implementations(move_tokens_naive, move_tokens_triton, move_tokens_vectorized)
BLOCKS = 13


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    size = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(0, 256, size, generator=rng, dtype=torch.uint8).to(device).view(dtype)


def make_layers(
    layout: str,
    layers: int,
    heads: int,
    block_size: int,
    content: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device,
) -> list[Tensor]:
    shape = (layers, BLOCKS, heads, block_size, content)
    return lay_out_layers(random_bytes(shape, dtype, device), layout)


def make_table(
    rows: int, width: int, device: torch.device, dtype: torch.dtype = torch.int32
) -> Tensor:
    rng = torch.Generator().manual_seed(2)
    return torch.randperm(BLOCKS, generator=rng)[: rows * width].view(rows, width).to(device, dtype)


def make_source(
    layers: int, rows: int, heads: int, n: int, count: int, device: torch.device, seed: int = 3
) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    kept = torch.rand(layers * rows, heads, n, generator=rng).argsort(-1)[..., :count]
    source = plan_moves_naive(kept.sort(-1).values.int().to(device), count)
    return source.view(layers, rows, heads, count)


def storages(caches: list[Tensor]) -> list[Tensor]:
    """All of the memory that the caches lie in, once each, as bytes."""
    found = {cache.untyped_storage().data_ptr(): cache for cache in caches}
    return [
        torch.tensor([], dtype=torch.uint8, device=cache.device).set_(cache.untyped_storage())  # type: ignore[call-overload]
        for cache in found.values()
    ]


def assert_moves(
    implementation: Implementation, caches: list[Tensor], table: Tensor, source: Tensor
) -> LayerCaches:
    """Every token goes where the specification puts it, and no other byte changes."""
    opened = LayerCaches(caches)
    memory = storages(caches)
    before = [bytes_.clone() for bytes_ in memory]
    move_tokens_naive(opened, table, source)
    expected = [bytes_.clone() for bytes_ in memory]
    for bytes_, old in zip(memory, before, strict=True):
        bytes_.copy_(old)
    implementation(opened, table, source)
    for bytes_, want in zip(memory, expected, strict=True):
        assert torch.equal(bytes_, want)
    return opened


@ALL
def test_worked_example(implementation: Implementation, device: torch.device) -> None:
    """Two layers of one head keep other tokens of the same blocks."""
    caches = [torch.arange(8.0, device=device).reshape(4, 1, 2, 1) + 10 * i for i in range(2)]
    table = torch.tensor([[3, 0, 1]], device=device)
    # Resident: 6 7 0 1 2 3 and the same plus 10.
    source = torch.tensor([[[[3, 1]]], [[[0, 5]]]], dtype=torch.int32, device=device)
    implementation(LayerCaches(caches), table, source)
    assert caches[0].flatten().tolist() == [0, 1, 2, 3, 4, 5, 1, 7]
    assert caches[1].flatten().tolist() == [10, 11, 12, 13, 14, 15, 16, 13]


@grid(
    FAST,
    pytest.mark.parametrize("layout", LAYER_LAYOUTS),
    pytest.mark.parametrize(
        ("dtype", "content"),
        [
            (torch.bfloat16, 128),
            (torch.float16, 20),
            (torch.float32, 1),
            (torch.uint8, 136),
            (torch.uint8, 144),
            (torch.uint8, 7),
            (torch.float8_e4m3fn, 66),
            (torch.int64, 3),
        ],
        ids=str,
    ),
    pytest.mark.parametrize("table_dtype", [torch.int32, torch.int64]),
    pytest.mark.parametrize(("layers", "rows", "heads"), [(3, 2, 2), (1, 1, 1), (2, 3, 4)]),
)
def test_layouts_and_contents(
    implementation: Implementation,
    layout: str,
    dtype: torch.dtype,
    content: int,
    table_dtype: torch.dtype,
    layers: int,
    rows: int,
    heads: int,
    device: torch.device,
) -> None:
    caches = make_layers(layout, layers, heads, 16, content, dtype=dtype, device=device)
    source = make_source(layers, rows, heads, 64, 40, device)
    assert_moves(implementation, caches, make_table(rows, 4, device, table_dtype), source)


@FAST
@pytest.mark.parametrize("block_size", [1, 16, 24, 32, 64])
def test_block_sizes_and_counts(
    implementation: Implementation, block_size: int, device: torch.device
) -> None:
    n = 4 * block_size
    for count in sorted({1, n // 2, n - 1, n}):
        caches = make_layers("LBNHC", 2, 2, block_size, 16, device=device)
        source = make_source(2, 2, 2, n, count, device, seed=count)
        assert_moves(implementation, caches, make_table(2, 4, device), source)


@FAST
def test_content_wider_than_one_tile(implementation: Implementation, device: torch.device) -> None:
    caches = make_layers("LBHNC", 2, 1, 3, 9001, dtype=torch.uint8, device=device)
    assert_moves(
        implementation, caches, make_table(1, 2, device), make_source(2, 1, 1, 6, 3, device)
    )


@FAST
def test_layers_of_several_allocations(
    implementation: Implementation, device: torch.device
) -> None:
    caches = [random_bytes((BLOCKS, 2, 16, 64), torch.bfloat16, device) for _ in range(3)]
    assert_moves(
        implementation, caches, make_table(2, 4, device), make_source(3, 2, 2, 64, 30, device)
    )


@FAST
def test_keys_and_values_of_their_own_follow_one_plan(
    implementation: Implementation, device: torch.device
) -> None:
    """The keys of all layers, then the values of all layers."""
    dtype = torch.int32
    keys, values = (
        make_layers("LBHNC", 3, 2, 16, 32, dtype=dtype, device=device) for _ in range(2)
    )
    source = make_source(3, 2, 2, 64, 30, device)
    assert_moves(implementation, keys + values, make_table(2, 4, device), source)
    assert all(torch.equal(key, value) for key, value in zip(keys, values, strict=True))


@FAST
def test_a_part_of_each_content(implementation: Implementation, device: torch.device) -> None:
    """The values alone, in pages that hold a token's key and value side by side."""
    caches = make_layers("LBNHC", 2, 2, 16, 64, device=device)
    source = make_source(2, 2, 2, 64, 30, device)
    assert_moves(implementation, [c[..., 32:] for c in caches], make_table(2, 4, device), source)


@FAST
def test_data_without_content(implementation: Implementation, device: torch.device) -> None:
    """Positions kept beside the slots: one number each."""
    caches = list(random_bytes((2, BLOCKS, 2, 16), torch.int32, device))
    assert_moves(
        implementation, caches, make_table(2, 4, device), make_source(2, 2, 2, 64, 30, device)
    )


@FAST
def test_strides_of_the_plan_and_the_table(
    implementation: Implementation, device: torch.device
) -> None:
    caches = make_layers("LBNHC", 3, 2, 16, 16, device=device)
    wide = make_source(2, 3, 2, 64, 30, device).transpose(0, 1)
    table = torch.full((2, 12), NO_BLOCK, dtype=torch.int32, device=device)
    table[:, 4:8] = make_table(2, 4, device)
    assert_moves(implementation, caches, table[:, 4:8], wide)
    assert_moves(implementation, caches, table[:, 4:8], wide[..., :17])


@FAST
def test_nothing_moves_in_place(implementation: Implementation, device: torch.device) -> None:
    """A row without an eviction among others that have one; its blocks are not looked up."""
    caches = make_layers("LBNHC", 2, 2, 16, 16, device=device)
    source = make_source(2, 2, 2, 64, 30, device)
    source[:, 1] = torch.arange(30, dtype=torch.int32, device=device)
    table = make_table(2, 4, device)
    table[1] = NO_BLOCK
    assert_moves(implementation, caches, table, source)


@FAST
def test_sources_may_be_shared(implementation: Implementation, device: torch.device) -> None:
    table = torch.tensor([[0, 1, 4], [2, 3, 4]], dtype=torch.int32, device=device)
    caches = make_layers("LBNHC", 2, 2, 16, 16, device=device)
    assert_moves(implementation, caches, table, make_source(2, 2, 2, 48, 30, device))


@FAST
@pytest.mark.parametrize(("rows", "count", "content"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(
    implementation: Implementation, rows: int, count: int, content: int, device: torch.device
) -> None:
    caches = [torch.zeros(6, 2, 16, content, device=device)]
    source = make_source(1, rows, 2, 16, count, device)
    implementation(LayerCaches(caches), make_table(rows, 2, device), source)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    layers=st.integers(1, 3),
    rows=st.integers(1, 3),
    heads=st.integers(1, 3),
    block_size=st.integers(1, 9),
    content=st.integers(1, 40),
    layout=st.sampled_from(sorted(LAYER_LAYOUTS)),
    kept=st.floats(0.1, 1),
    seed=st.integers(0, 1000),
)
def test_random_moves(
    layers: int,
    rows: int,
    heads: int,
    block_size: int,
    content: int,
    layout: str,
    kept: float,
    seed: int,
    device: torch.device,
) -> None:
    count = max(round(4 * block_size * kept), 1)
    source = make_source(layers, rows, heads, 4 * block_size, count, device, seed)
    for implementation in (move_tokens_triton, move_tokens_vectorized):
        caches = make_layers(layout, layers, heads, block_size, content, device=device)
        assert_moves(implementation, caches, make_table(rows, 4, device), source)


@pytest.mark.parametrize(
    ("content", "unit"), [(128, 16), (72, 16), (68, 8), (66, 4), (65, 2)], ids=str
)
def test_unit_of_copies(content: int, unit: int, device: torch.device) -> None:
    """Sixteen bytes at a time wherever addresses and strides allow it."""
    for layout in LAYER_LAYOUTS:
        caches = LayerCaches(make_layers(layout, 2, 2, 16, content, device=device))
        assert caches.unit == unit and caches.content * unit == 2 * content
    pages = make_layers("LBNHC", 2, 2, 16, 64, device=device)
    assert LayerCaches([page[..., 4:60] for page in pages]).unit == 8


@FAST
@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("pairs", [1, 2])
def test_what_is_kept_beside_tokens_follows_them(
    implementation: Implementation, pairs: int, count: int, device: torch.device
) -> None:
    """Also beside those that stay; in the slots of survivors alone, whatever the strides."""
    caches, table = make_layers("LBNHC", 1, 2, 16, 8, device=device), make_table(2, 4, device)
    source = make_source(1, 2, 2, 60, count, device)
    rng = torch.Generator().manual_seed(4)
    beside = []
    for dtype in (torch.int32, torch.float32)[:pairs]:
        wide = torch.full((BLOCKS, 2, 3, 20), -1, dtype=dtype, device=device)
        values = torch.randint(0, 999, (2, 2, 60), generator=rng).to(device, dtype)
        beside.append((wide[:, :, 1, 2:18], values))
    expected = [pages.clone() for pages, _ in beside]
    memory = storages(caches)[0].clone()
    move_tokens_naive(
        LayerCaches(caches),
        table,
        source,
        [(pages, values) for pages, (_, values) in zip(expected, beside, strict=True)],
    )
    moved = storages(caches)[0].clone()
    storages(caches)[0].copy_(memory)
    implementation(LayerCaches(caches), table, source, beside)
    assert torch.equal(storages(caches)[0], moved)
    for (pages, values), want in zip(beside, expected, strict=True):
        assert torch.equal(pages, want)
        assert int((want >= 0).sum()) == 4 * count
        first = values.gather(2, source[0].long())[..., 0]
        assert torch.equal(pages[table[:, 0].long(), :, 0], first)


def test_one_launch(launches: Launches, device: torch.device) -> None:
    caches = make_layers("LBNHC", 3, 2, 16, 128, device=device)
    source = make_source(3, 2, 2, 64, 40, device)
    move_tokens_triton(LayerCaches(caches), make_table(2, 4, device), source)
    assert launches == [("move_tokens_kernel", (3 * 2 * 2, 2))]


def test_dispatch(launches: Launches, device: torch.device) -> None:
    caches = make_layers("LBNHC", 3, 2, 16, 128, device=device)
    source = make_source(3, 2, 2, 64, 40, device)
    assert_moves(move_tokens, caches, make_table(2, 4, device), source)
    assert len(launches) == (1 if device.type == "cuda" else 0)


CACHE = torch.zeros(6, 2, 16, 4)
SOURCE = torch.zeros(2, 3, 2, 5, dtype=torch.int32)
TABLE = torch.zeros(3, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("name", "caches"),
    [
        pytest.param("caches", [], id="none"),
        pytest.param("caches[0]", [CACHE[0, 0]], id="ndim"),
        pytest.param("caches[0]", [CACHE[:, :, :0]], id="block-size"),
        pytest.param("caches[0]", [CACHE[..., ::2]], id="stride"),
        pytest.param("caches[0]", [CACHE.to(torch.complex128)], id="16-bytes"),
        pytest.param("caches[1]", [CACHE, CACHE[:5]], id="blocks"),
        pytest.param("caches[1]", [CACHE, CACHE[:, :1]], id="heads"),
        pytest.param("caches[1]", [CACHE, CACHE.int()], id="dtype"),
        pytest.param(
            "caches[1]",
            [CACHE, CACHE.transpose(1, 2).contiguous().transpose(1, 2)],
            id="other-strides",
        ),
        pytest.param("caches[1]", [CACHE, CACHE.to("meta")], id="device"),
    ],
)
def test_rejects_caches(name: str, caches: list[Tensor]) -> None:
    escaped = name.replace("[", r"\[")
    with pytest.raises(ValueError, match=rf"^{escaped} must .*\.$"):
        LayerCaches(caches)


@ALL
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("source", {"source": SOURCE.long()}, id="source-dtype"),
        pytest.param("source", {"source": SOURCE[0]}, id="source-ndim"),
        pytest.param("source", {"source": SOURCE[:, :, :1]}, id="source-heads"),
        pytest.param("source", {"source": SOURCE[:0]}, id="source-no-layers"),
        pytest.param("source", {"source": SOURCE.expand(2, 3, 2, 5)[[0, 1, 1]]}, id="layers"),
        pytest.param("source", {"source": SOURCE.mT.contiguous().mT}, id="source-stride"),
        pytest.param("block_table", {"block_table": TABLE.float()}, id="block_table-dtype"),
        pytest.param("block_table", {"block_table": TABLE[:2]}, id="block_table-rows"),
        pytest.param("source", {"block_table": TABLE[:, :0]}, id="count-above"),
    ],
)
def test_rejects(
    implementation: Implementation, name: str, changes: dict[str, Any], device: torch.device
) -> None:
    caches = LayerCaches([torch.zeros_like(CACHE, device=device) for _ in range(4)])
    arguments = {"block_table": TABLE, "source": SOURCE, **changes}
    arguments = {
        key: torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
        ).zero_()
        for key, tensor in arguments.items()
    }
    with pytest.raises(ValueError, match=rf"^{name} must .*\.$"):
        implementation(caches, **arguments)


@ALL
@pytest.mark.parametrize(
    ("name", "layers", "beside"),
    [
        (r"beside\[0\]\[0\]", 1, [(torch.zeros(2, 3, 4).half(), torch.zeros(2, 3, 9))]),
        (r"beside\[0\]\[1\]", 1, [(torch.zeros(5, 2, 4), torch.zeros(2, 2, 9).int())]),
        ("beside", 2, [(torch.zeros(5, 2, 4), torch.zeros(2, 2, 9))]),
        ("beside", 1, [(torch.zeros(5, 2, 4), torch.zeros(2, 2, 9))] * 3),
    ],
)
def test_rejects_what_lies_beside(
    implementation: Implementation,
    name: str,
    layers: int,
    beside: list[tuple[Tensor, Tensor]],
    device: torch.device,
) -> None:
    caches = LayerCaches([torch.zeros(5, 2, 4, 8, device=device)] * layers)
    table = torch.zeros(2, 3, dtype=torch.int32, device=device)
    source = torch.zeros(layers, 2, 2, 6, dtype=torch.int32, device=device)
    given = [(pages.to(device), values.to(device)) for pages, values in beside]
    with pytest.raises(ValueError, match=rf"^{name} must .*\.$"):
        implementation(caches, table, source, given)


def test_rejects_another_device() -> None:
    with pytest.raises(ValueError, match="source must be on cpu like the other tensors, got meta"):
        move_tokens(LayerCaches([CACHE]), TABLE, SOURCE.to("meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph_replay(device: torch.device) -> None:
    caches = make_layers("LBNHC", 3, 2, 16, 64, device=device)
    opened, table = LayerCaches(caches), make_table(2, 4, device)
    source = torch.arange(40, dtype=torch.int32, device=device).repeat(3, 2, 2, 1)
    move_tokens(opened, table, source)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        move_tokens(opened, table, source)
    source.copy_(make_source(3, 2, 2, 64, 40, device))
    (memory,) = storages(caches)
    before = memory.clone()
    graph.replay()
    torch.cuda.synchronize()
    got = memory.clone()
    memory.copy_(before)
    move_tokens_naive(opened, table, source)
    assert torch.equal(got, memory)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a cache beyond 2**31 elements")
def test_offsets_beyond_int32(device: torch.device) -> None:
    cache = torch.zeros(2**15 + 8, 8, 64, 144, dtype=torch.uint8, device=device)
    assert cache.numel() > 2**31
    last = cache.shape[0] - 1
    cache[last, :, 63] = 7
    table = torch.tensor([[last - 1, last]], dtype=torch.int32, device=device)
    source = torch.tensor([127], dtype=torch.int32, device=device).expand(1, 1, 8, 1)
    # Bytes, so that the strides are counted in bytes and do not fit 32 bits.
    for pages in (cache, cache[..., 1:]):
        move_tokens(LayerCaches([pages]), table, source)
        assert (cache[last - 1, :, 0, -143:] == 7).all() and not cache[last - 1, :, 1:].any()


@pytest.mark.parametrize(
    ("word", "vector", "content"), [(8, 2, 64), (8, 1, 17), (4, 1, 33), (2, 1, 65), (1, 1, 7)]
)
def test_compiles_for_cuda(
    compile_for_cuda: CompileForCuda, word: int, vector: int, content: int
) -> None:
    sizes = ("n_layers", "n_rows", "count")
    names = ("cb", "ch", "ct", "br", "sl", "sr", "sh")
    strides = tuple(f"stride_{s}" for s in (*names, *BESIDE))
    tile = {"BLOCK_R": 16, "BLOCK_C": 1 << (content - 1).bit_length()}
    ptx = compile_for_cuda(
        "kvplug_kernels.move_tokens.kernel",
        "move_tokens_kernel",
        {
            "pointers": "*i64",
            "block_table": "*i32",
            "source": "*i32",
            "beside_a": "*i32",
            "values_a": "*i32",
            **dict.fromkeys((*sizes, *strides), "i32"),
        },
        {
            "beside_b": None,
            "values_b": None,
            "HEADS": 8,
            "BLOCK_SIZE": 16,
            "CONTENT": content,
            "WORD": word,
            "VECTOR": vector,
            **tile,
        },
    )
    # A thread moves as many bytes at once as every address allows.
    moved = f"v2.b{8 * word}" if vector == 2 else f"b{8 * word}"
    assert f"ld.global.{moved} " in ptx and f"st.global.{moved} " in ptx
