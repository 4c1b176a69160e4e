from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from grid import grid, implementations
from hypothesis import HealthCheck, given, settings
from paged_cases import LAYOUTS, lay_out, to_device
from torch import Tensor

import kvplug_kernels.compact_kv.vectorized as vectorized
from kvplug_kernels.compact_kv import compact_kv, plan_moves
from kvplug_kernels.compact_kv.kernel import compact_kv_triton, plan_moves_triton
from kvplug_kernels.compact_kv.naive import WORDS, compact_kv_naive, plan_moves_naive
from kvplug_kernels.compact_kv.vectorized import compact_kv_vectorized, plan_moves_vectorized

Implementation = Callable[..., Tensor]
Launches = list[tuple[str, tuple[int, ...]]]
CompileForCuda = Callable[[str, str, dict[str, str], dict[str, int | None]], None]

FAST, ALL = implementations(compact_kv_naive, compact_kv_triton, compact_kv_vectorized)
_, PLANS = implementations(plan_moves_naive, plan_moves_triton, plan_moves_vectorized, name="plan")
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
    torch.bool,
]


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def random_pages(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random bits, NaN payloads included."""
    rng = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    bits = torch.randint(0, high, (*shape, dtype.itemsize), generator=rng, dtype=torch.uint8)
    return bits.view(dtype).squeeze(-1)


def make_table(rows: int, width: int, device: torch.device, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    table = torch.randperm(rows * width + 2, generator=rng)[: rows * width]
    return table.view(rows, width).int().to(device)


def make_keep(
    rows: int, heads: int, n: int, count: int, device: torch.device, seed: int = 0
) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, heads, n, generator=rng).argsort(-1)[..., :count]
    return kept.sort(-1).values.int().to(device)


def row_tokens(cache: Tensor, table: Tensor, r: int, h: int) -> Tensor:
    """Tokens of row ``r`` in head ``h``, in stored order, with their bits as bytes."""
    tokens = cache[table[r].long(), h].flatten(0, 1)
    return tokens.contiguous().view(tokens.shape[0], -1).view(torch.uint8)


def assert_matches_naive(
    implementation: Implementation, caches: list[Tensor], table: Tensor, keep: Tensor
) -> None:
    """The same moves, the same caches, and not a byte of the memory around them changed."""
    count = keep.shape[2]
    originals = [words(cache).clone() for cache in caches]
    memory = [storage_of(cache).clone() for cache in caches]
    copies = [cache.clone(memory_format=torch.contiguous_format) for cache in caches]
    source = compact_kv_naive(copies, table, keep, count=count)
    got = implementation(caches, table, keep, count=count)
    assert got.dtype == torch.int32 and torch.equal(got, source)
    for cache, copy, original, before in zip(caches, copies, originals, memory, strict=True):
        assert torch.equal(words(cache), words(copy))
        words(cache).copy_(original)
        assert torch.equal(storage_of(cache), before)


def words(tensor: Tensor) -> Tensor:
    """A view as integers, which equal each other when and only when their bits do."""
    return tensor.view(WORDS[tensor.dtype.itemsize])


def storage_of(tensor: Tensor) -> Tensor:
    """All of the memory that a tensor is a view of."""
    storage = tensor.untyped_storage()
    return torch.tensor([], dtype=torch.uint8, device=tensor.device).set_(storage)  # type: ignore[call-overload]


@PLANS
@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ([0, 1, 2], [0, 1, 2]),
        ([3, 4, 5], [3, 4, 5]),
        ([1, 4, 9], [4, 1, 9]),
        ([0, 2, 7], [0, 7, 2]),
        ([0, 3, 5, 6, 8], [0, 5, 6, 3, 8]),
        ([7], [7]),
        ([], []),
    ],
)
def test_worked_plans(
    plan: Implementation, keep: list[int], expected: list[int], device: torch.device
) -> None:
    given_keep = torch.tensor(keep, dtype=torch.int32, device=device).view(1, 1, -1)
    assert plan(given_keep, len(keep)).tolist() == [[expected]]


@PLANS
@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 1023, 1025, 2500])
def test_plans_of_all_sizes(plan: Implementation, count: int, device: torch.device) -> None:
    for n in (count, count + 1, count + count // 4, 4 * count):
        keep = make_keep(2, 2, n, count, device, seed=n)
        assert torch.equal(plan(keep, count), plan_moves_naive(keep, count))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_properties_of_a_plan(data: st.DataObject, device: torch.device) -> None:
    count = data.draw(st.integers(1, 20))
    kept = data.draw(
        st.lists(st.integers(0, 60), min_size=count, max_size=count, unique=True).map(sorted)
    )
    keep = torch.tensor([[kept]], dtype=torch.int32, device=device)
    source = plan_moves_naive(keep, count)[0, 0].tolist()
    assert sorted(source) == kept
    moved = [(j, t) for j, t in enumerate(source) if t != j]
    assert all(j not in kept and t >= count for j, t in moved)
    assert [t for _, t in moved] == sorted(t for _, t in moved)
    for plan in (plan_moves_triton, plan_moves_vectorized):
        assert plan(keep, count)[0, 0].tolist() == source


@PLANS
def test_plan_into_a_persistent_buffer(plan: Implementation, device: torch.device) -> None:
    keep = make_keep(4, 3, 50, 20, device).transpose(0, 1)
    buffer = torch.full((5, 6, 30), 99, dtype=torch.int32, device=device)
    out = buffer[1:4, 2:, 5:25]
    got = plan(keep, 20, out=out)
    assert got.data_ptr() == out.data_ptr()
    assert torch.equal(got, plan_moves_naive(keep.contiguous(), 20))
    out.fill_(99)
    assert (buffer == 99).all()


@ALL
def test_worked_example(implementation: Implementation, device: torch.device) -> None:
    cache = torch.arange(8, dtype=torch.float32, device=device).reshape(4, 1, 2, 1)
    table = torch.tensor([[3, 0, 1]], dtype=torch.int32, device=device)
    # Held: 6 7 0 1 2 3. Kept: the second, the fourth and the sixth.
    keep = torch.tensor([[[1, 3, 5]]], dtype=torch.int32, device=device)
    assert implementation([cache], table, keep, count=3).tolist() == [[[3, 1, 5]]]
    assert cache.flatten().tolist() == [3, 1, 2, 3, 4, 5, 1, 7]


@grid(
    FAST,
    pytest.mark.parametrize("layout", LAYOUTS),
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
)
def test_dtypes_and_layouts(
    implementation: Implementation, dtype: torch.dtype, layout: str, device: torch.device
) -> None:
    table = make_table(2, 3, device)
    pages = random_pages((8, 2, 16, 20), dtype, 1)
    cache = lay_out(words(pages.to(device)), layout).view(dtype)
    assert_matches_naive(implementation, [cache], table, make_keep(2, 2, 48, 20, device))


@FAST
@pytest.mark.parametrize(
    ("heads", "block_size", "content"),
    [(1, 16, (64,)), (3, 32, (80,)), (2, 64, (2, 3)), (4, 128, ()), (2, 7, (1,)), (1, 1, (96, 2))],
)
def test_shapes(
    implementation: Implementation,
    heads: int,
    block_size: int,
    content: tuple[int, ...],
    device: torch.device,
) -> None:
    """Any content, none included: one element a slot."""
    table = make_table(2, 3, device)
    n = 3 * block_size
    for count in sorted({1, n // 2, n - 1, n}):
        shape = (8, heads, block_size, *content)
        cache = random_pages(shape, torch.bfloat16, 2).to(device)
        keep = make_keep(2, heads, n, count, device, seed=count)
        assert_matches_naive(implementation, [cache], table, keep)


@FAST
def test_content_wider_than_one_tile(implementation: Implementation, device: torch.device) -> None:
    cache = random_pages((4, 1, 3, 9001), torch.uint8, 3).to(device)
    table = make_table(1, 2, device)
    assert_matches_naive(implementation, [cache], table, make_keep(1, 1, 6, 3, device, seed=3))


@FAST
def test_caches_of_one_row_move_together(
    implementation: Implementation, device: torch.device
) -> None:
    """Keys, values of another size, and positions: each kept token takes all of its data along."""
    table = make_table(2, 4, device)
    keep = make_keep(2, 3, 64, 30, device)
    caches = [
        random_pages((10, 3, 16, 32), torch.bfloat16, 1).to(device),
        random_pages((10, 3, 16, 8), torch.float32, 2).to(device),
        random_pages((10, 3, 16), torch.int32, 3).to(device),
    ]
    before = [cache.clone() for cache in caches]
    implementation(caches, table, keep, count=30)
    for cache, old in zip(caches, before, strict=True):
        for r in range(2):
            for h in range(3):
                now, then = row_tokens(cache, table, r, h), row_tokens(old, table, r, h)
                kept = sorted(then[keep[r, h].long()].tolist())
                assert sorted(now[:30].tolist()) == kept
                assert torch.equal(now[30:], then[30:])
    moved = [row_tokens(cache, table, 1, 2)[:30] for cache in caches]
    old = [row_tokens(cache, table, 1, 2) for cache in before]
    rows = {bytes(p.tolist()): t for t, p in enumerate(old[2])}
    origin = [rows[bytes(p.tolist())] for p in moved[2]]
    assert all(torch.equal(new, was[origin]) for new, was in zip(moved, old, strict=True))


@FAST
def test_nothing_moves_when_the_first_are_kept(
    implementation: Implementation, device: torch.device
) -> None:
    cache = random_pages((8, 2, 16, 20), torch.bfloat16, 1).to(device)
    before = as_bytes(cache).clone()
    keep = torch.arange(40, dtype=torch.int32, device=device).repeat(2, 2, 1)
    source = implementation([cache], make_table(2, 3, device), keep, count=40)
    assert torch.equal(source, keep) and torch.equal(as_bytes(cache), before)


@FAST
def test_sources_may_be_shared(implementation: Implementation, device: torch.device) -> None:
    """Only destinations need blocks of their own: two rows read the same last block."""
    table = torch.tensor([[0, 1, 4], [2, 3, 4]], dtype=torch.int32, device=device)
    cache = random_pages((5, 2, 16, 8), torch.bfloat16, 1).to(device)
    assert_matches_naive(implementation, [cache], table, make_keep(2, 2, 48, 30, device))


@FAST
def test_blocks_past_the_kept_tokens_are_not_looked_up(
    implementation: Implementation, device: torch.device
) -> None:
    table = make_table(1, 4, device)
    table[0, 3] = 2**31 - 1
    cache = random_pages((6, 1, 16, 8), torch.bfloat16, 1).to(device)
    assert_matches_naive(implementation, [cache], table, make_keep(1, 1, 48, 20, device))


@FAST
@pytest.mark.parametrize(
    ("rows", "heads", "count", "content"), [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)]
)
def test_empty(
    implementation: Implementation,
    rows: int,
    heads: int,
    count: int,
    content: int,
    device: torch.device,
) -> None:
    cache = torch.zeros(6, heads, 16, content, device=device)
    keep = make_keep(rows, heads, 16, count, device)
    source = implementation([cache], make_table(rows, 2, device), keep, count=count)
    assert torch.equal(source, plan_moves_naive(keep, count))
    assert implementation([], make_table(rows, 2, device), keep, count=count).shape == keep.shape


@pytest.mark.parametrize("bound", [1, 300, 5_000])
def test_vectorized_in_pieces(
    bound: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(vectorized, "MOVED_BYTES", bound)
    cache = random_pages((8, 2, 16, 20), torch.bfloat16, 1).to(device)
    keep = make_keep(2, 2, 48, 20, device)
    assert_matches_naive(compact_kv_vectorized, [cache], make_table(2, 3, device), keep)


def test_triton_plans_once_and_moves_each_cache(launches: Launches, device: torch.device) -> None:
    caches = [torch.zeros(8, 2, 16, 4, device=device) for _ in range(3)]
    keep = make_keep(2, 2, 48, 20, device)
    compact_kv_triton(caches, make_table(2, 3, device), keep, count=20)
    assert [name for name, _ in launches] == ["plan_moves_kernel"] + 3 * ["move_kernel"]


def test_dispatch(launches: Launches, device: torch.device) -> None:
    cache = random_pages((8, 2, 16, 20), torch.bfloat16, 1).to(device)
    keep = make_keep(2, 2, 48, 20, device)
    assert torch.equal(plan_moves(keep, 20), plan_moves_naive(keep, 20))
    assert_matches_naive(compact_kv, [cache], make_table(2, 3, device), keep)
    assert len(launches) == (3 if device.type == "cuda" else 0)


CACHE = torch.zeros(6, 2, 16, 4)
KEEP = torch.zeros(2, 2, 5, dtype=torch.int32)
TABLE = torch.zeros(2, 3, dtype=torch.int32)


@ALL
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("keep", {"keep": KEEP.long()}, id="keep-dtype"),
        pytest.param("keep", {"keep": KEEP[0]}, id="keep-ndim"),
        pytest.param("keep", {"count": 4}, id="keep-count"),
        pytest.param("block_table", {"block_table": TABLE.long()}, id="block_table-dtype"),
        pytest.param("block_table", {"block_table": TABLE[:1]}, id="block_table-rows"),
        pytest.param("count", {"block_table": TABLE[:, :0]}, id="count-above"),
        pytest.param("caches[1]", {"caches": [CACHE, CACHE[:, 0]]}, id="cache-heads"),
        pytest.param("caches[0]", {"caches": [CACHE[:, :, :0]]}, id="cache-block-size"),
        pytest.param("caches[0]", {"caches": [CACHE[..., ::2]]}, id="cache-stride"),
        pytest.param(
            "caches[0]", {"caches": [CACHE.view(6, 2, 16, 2, 2).mT]}, id="cache-content-stride"
        ),
        pytest.param("caches[0]", {"caches": [CACHE.to(torch.complex128)]}, id="cache-16-bytes"),
        pytest.param("out", {"out": KEEP.float()}, id="out-dtype"),
        pytest.param("out", {"out": KEEP[:, :1]}, id="out-shape"),
    ],
)
def test_rejects(
    implementation: Implementation, name: str, changes: dict[str, Any], device: torch.device
) -> None:
    arguments = {"caches": [CACHE], "block_table": TABLE, "keep": KEEP, "count": 5, **changes}
    arguments["caches"] = [to_device(cache, device) for cache in arguments["caches"]]
    for key in {"block_table", "keep", "out"} & set(arguments):
        arguments[key] = to_device(arguments[key], device)
    escaped = name.replace("[", r"\[")
    with pytest.raises(ValueError, match=rf"^{escaped} must .*\.$"):
        implementation(**arguments)


@ALL
def test_rejects_output_on_input(implementation: Implementation, device: torch.device) -> None:
    keep = make_keep(2, 2, 48, 20, device)
    cache = torch.zeros(8, 2, 16, 4, device=device)
    with pytest.raises(ValueError, match="out must not share memory with keep"):
        implementation([cache], make_table(2, 3, device), keep, count=20, out=keep)


def test_rejects_another_device() -> None:
    with pytest.raises(
        ValueError, match=r"caches\[0\] must be on cpu like the other tensors, got meta"
    ):
        compact_kv([CACHE.to("meta")], TABLE, KEEP, count=5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph_replay(device: torch.device) -> None:
    cache = random_pages((8, 2, 16, 20), torch.bfloat16, 1).to(device)
    table, keep = make_table(2, 3, device), make_keep(2, 2, 48, 20, device)
    out = torch.zeros_like(keep)
    compact_kv([cache], table, keep, count=20, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compact_kv([cache], table, keep, count=20, out=out)
    keep.copy_(make_keep(2, 2, 48, 20, device, seed=9))
    expected = cache.clone()
    source = compact_kv_naive([expected], table, keep, count=20)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, source) and torch.equal(as_bytes(cache), as_bytes(expected))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a cache beyond 2**31 elements")
def test_offsets_beyond_int32(device: torch.device) -> None:
    cache = torch.zeros(2**15 + 8, 8, 64, 144, dtype=torch.uint8, device=device)
    assert cache.numel() > 2**31
    last = cache.shape[0] - 1
    cache[last, :, 63] = 7
    table = torch.tensor([[last - 1, last]], dtype=torch.int32, device=device)
    keep = torch.tensor([127], dtype=torch.int32, device=device).expand(1, 8, 1)
    compact_kv([cache], table, keep, count=1)
    assert (cache[last - 1, :, 0] == 7).all() and not cache[last - 1, :, 1:].any()


def test_plan_compiles_for_cuda(compile_for_cuda: CompileForCuda) -> None:
    strides = ("stride_kr", "stride_kh", "stride_or", "stride_oh")
    compile_for_cuda(
        "kvplug_kernels.compact_kv.kernel",
        "plan_moves_kernel",
        {
            **dict.fromkeys(("keep", "out"), "*i32"),
            **dict.fromkeys(("count", "n_steps", *strides), "i32"),
        },
        {"HEADS": 8, "BLOCK": 1024},
    )


@pytest.mark.parametrize("element", ["u8", "i16", "i64"])
def test_move_compiles_for_cuda(compile_for_cuda: CompileForCuda, element: str) -> None:
    strides = ("cb", "ch", "ct", "br", "sr", "sh")
    compile_for_cuda(
        "kvplug_kernels.compact_kv.kernel",
        "move_kernel",
        {
            "cache": f"*{element}",
            **dict.fromkeys(("block_table", "source"), "*i32"),
            **dict.fromkeys(("count", *(f"stride_{s}" for s in strides)), "i32"),
        },
        {"HEADS": 8, "BLOCK_SIZE": 24, "CONTENT": 200, "BLOCK_R": 16, "BLOCK_C": 256},
    )
