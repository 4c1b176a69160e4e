from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from grid import grid, implementations
from hypothesis import HealthCheck, given, settings
from paged_cases import to_device
from torch import Tensor

from kvplug_kernels.compact_block_table import compact_block_table
from kvplug_kernels.compact_block_table.kernel import compact_block_table_triton
from kvplug_kernels.compact_block_table.naive import compact_block_table_naive
from kvplug_kernels.compact_block_table.vectorized import compact_block_table_vectorized

Implementation = Callable[..., tuple[Tensor, Tensor]]
Launches = list[tuple[str, tuple[int, ...]]]
CompileForCuda = Callable[[str, str, dict[str, str], dict[str, int | None]], None]

FAST, ALL = implementations(
    compact_block_table_naive, compact_block_table_triton, compact_block_table_vectorized
)


def make_batch(
    n_rows: int,
    width: int,
    block_size: int,
    *,
    device: torch.device,
    n_source: int | None = None,
    rows_dtype: torch.dtype | None = None,
    gaps: bool = False,
    null_block: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Random arguments within the contract: the last live entry is neither null nor in the gap."""
    rng = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=rng)

    n_source = n_rows if n_source is None else n_source
    table = draw(1, 10_000, n_source, width) + max(null_block, 0)
    table[torch.rand(n_source, width, generator=rng) < 0.3] = null_block
    seq_lens = draw(1, width * block_size + 1, n_rows)
    seq_lens[torch.rand(n_rows, generator=rng) < 0.2] = 0
    rows = draw(0, n_source, n_rows) if rows_dtype is not None else torch.arange(n_rows)
    tail = ((seq_lens - 1) // block_size).clamp(min=0)
    table[rows, tail] = 77_777
    batch: dict[str, Any] = {
        "block_table": table.to(device, torch.int32),
        "seq_lens": seq_lens.to(device, torch.int32),
        "block_size": block_size,
        "null_block": null_block,
    }
    if rows_dtype is not None:
        batch["rows"] = rows.to(device, rows_dtype)
    if gaps:
        ends = (draw(0, width + 1, n_rows)).minimum(tail)
        starts = draw(-1, width + 1, n_rows)
        batch["gap_start"] = starts.to(device, torch.int32)
        batch["gap_end"] = ends.to(device, torch.int32)
    return batch


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0)


def assert_matches_naive(implementation: Implementation, batch: dict[str, Any]) -> None:
    before = {k: v.clone() for k, v in batch.items() if isinstance(v, Tensor)}
    expected = compact_block_table_naive(**batch)
    assert_same(implementation(**batch), expected)
    for name, tensor in before.items():
        assert torch.equal(batch[name], tensor), f"{name} was written"


@ALL
def test_worked_example(implementation: Implementation, device: torch.device) -> None:
    table = torch.tensor([[5, 0, 6, 7, 8, 9], [1, 2, 3, 4, 0, 0], [1, 2, 3, 4, 5, 6]])
    got = implementation(
        table.to(device, torch.int32),
        torch.tensor([70, 64, 0], dtype=torch.int32, device=device),
        16,
        gap_start=torch.tensor([2, 0, 0], dtype=torch.int32, device=device),
        gap_end=torch.tensor([3, 0, 9], dtype=torch.int32, device=device),
    )
    assert got[0].tolist() == [[5, 7, 8, 0, 0, 0], [1, 2, 3, 4, 0, 0], [0, 0, 0, 0, 0, 0]]
    assert got[1].tolist() == [70 - 2 * 16, 64, 0]
    assert got[0].dtype == got[1].dtype == torch.int32


@grid(
    FAST,
    pytest.mark.parametrize("gaps", [False, True], ids=["nulls", "nulls+gaps"]),
    pytest.mark.parametrize("width", [1, 7, 33, 130]),
    pytest.mark.parametrize("n_rows", [1, 3, 17]),
    pairs=[("width", "gaps")],
)
def test_matches_naive(
    implementation: Implementation, n_rows: int, width: int, gaps: bool, device: torch.device
) -> None:
    block_size = {1: 16, 7: 32, 33: 128, 130: 16}[width]
    seed = 1000 * n_rows + width
    batch = make_batch(n_rows, width, block_size, device=device, gaps=gaps, seed=seed)
    assert_matches_naive(implementation, batch)


@FAST
@pytest.mark.parametrize("block_size", [1, 16, 24, 32, 128])
def test_block_sizes(implementation: Implementation, block_size: int, device: torch.device) -> None:
    batch = make_batch(9, 33, block_size, device=device, gaps=True, seed=block_size)
    assert_matches_naive(implementation, batch)


@FAST
@pytest.mark.parametrize("width", [1023, 1024, 1025, 2500])
def test_rows_longer_than_one_chunk(
    implementation: Implementation, width: int, device: torch.device
) -> None:
    batch = make_batch(3, width, 16, device=device, gaps=True, seed=width)
    batch["seq_lens"][0] = width * 16 - 5
    batch["block_table"][0, -1] = 77_777
    assert_matches_naive(implementation, batch)


@grid(
    FAST,
    pytest.mark.parametrize("rows_dtype", [torch.int32, torch.int64]),
    pytest.mark.parametrize("n_source", [2, 40]),
)
def test_rows_select_and_repeat(
    implementation: Implementation, n_source: int, rows_dtype: torch.dtype, device: torch.device
) -> None:
    batch = make_batch(
        17, 33, 16, device=device, n_source=n_source, rows_dtype=rows_dtype, gaps=True
    )
    assert len(set(batch["rows"].tolist())) < 17
    assert_matches_naive(implementation, batch)


@FAST
@pytest.mark.parametrize("null_block", [-1, 1, 12_345])
def test_null_block_other_than_zero(
    implementation: Implementation, null_block: int, device: torch.device
) -> None:
    batch = make_batch(5, 33, 16, device=device, null_block=null_block, gaps=True)
    assert_matches_naive(implementation, batch)


@FAST
def test_lengths_at_block_boundaries_and_past_the_table(
    implementation: Implementation, device: torch.device
) -> None:
    seq_lens = torch.tensor([0, 1, 15, 16, 17, 112, 200, 2**31 - 1], dtype=torch.int32)
    table = torch.arange(1, 57, dtype=torch.int32, device=device).reshape(8, 7)
    table[4:, 0] = 0
    batch = {"block_table": table, "seq_lens": seq_lens.to(device), "block_size": 16}
    assert_matches_naive(implementation, batch)


@FAST
@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (0, 0)])
def test_empty(
    implementation: Implementation, shape: tuple[int, int], device: torch.device
) -> None:
    batch = {
        "block_table": torch.zeros(shape, dtype=torch.int32, device=device),
        "seq_lens": torch.zeros(shape[0], dtype=torch.int32, device=device),
        "block_size": 16,
    }
    assert_matches_naive(implementation, batch)


@FAST
def test_strided_rows(implementation: Implementation, device: torch.device) -> None:
    batch = make_batch(6, 33, 16, device=device, gaps=True)
    wide = torch.full((12, 50), 31, dtype=torch.int32, device=device)
    view = wide[::2, 9:42]
    view.copy_(batch["block_table"])
    batch["block_table"] = view
    before = wide.clone()
    assert_matches_naive(implementation, batch)
    assert torch.equal(wide, before)


@ALL
def test_persistent_buffers(implementation: Implementation, device: torch.device) -> None:
    batch = make_batch(5, 33, 16, device=device, n_source=8, rows_dtype=torch.int32, gaps=True)
    expected = compact_block_table_naive(**batch)
    out_table = torch.full((9, 40), -7, dtype=torch.int32, device=device)
    out_lens = torch.full((9,), -7, dtype=torch.int32, device=device)
    got = implementation(**batch, out_table=out_table, out_lens=out_lens)
    assert_same(got, expected)
    assert got[0].data_ptr() == out_table.data_ptr() and got[0].shape == (5, 33)
    assert got[1].data_ptr() == out_lens.data_ptr() and got[1].shape == (5,)
    assert (out_table[5:] == -7).all() and (out_table[:, 33:] == -7).all()
    assert (out_lens[5:] == -7).all()
    assert_same(implementation(**batch, out_table=out_table), expected)
    assert_same(implementation(**batch, out_lens=out_lens), expected)


def test_triton_is_one_launch(launches: Launches, device: torch.device) -> None:
    compact_block_table_triton(**make_batch(17, 2500, 16, device=device, gaps=True))
    assert launches == [("compact_block_table_kernel", (17,))]


def test_dispatch(launches: Launches, device: torch.device) -> None:
    batch = make_batch(3, 7, 16, device=device)
    assert_same(compact_block_table(**batch), compact_block_table_naive(**batch))
    assert len(launches) == (1 if device.type == "cuda" else 0)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_properties(data: st.DataObject, device: torch.device) -> None:
    n_rows = data.draw(st.integers(1, 3))
    width = data.draw(st.integers(1, 20))
    block_size = data.draw(st.integers(1, 40))
    gaps = data.draw(st.booleans())
    batch = make_batch(
        n_rows, width, block_size, device=device, gaps=gaps, seed=data.draw(st.integers(0, 2**31))
    )
    expected = compact_block_table_naive(**batch)
    assert_same(compact_block_table_triton(**batch), expected)
    assert_same(compact_block_table_vectorized(**batch), expected)
    # The compacted table has no hole, so compacting it again changes nothing.
    again = {**batch, "block_table": expected[0], "seq_lens": expected[1]}
    again.pop("gap_start", None)
    again.pop("gap_end", None)
    assert_same(compact_block_table_naive(**again), expected)
    # The tail stays, and so does the number of tokens in it.
    for seq_len, new_len, row in zip(
        batch["seq_lens"].tolist(), expected[1].tolist(), expected[0].tolist(), strict=True
    ):
        assert seq_len % block_size == new_len % block_size
        if seq_len:
            assert row[(new_len - 1) // block_size] == 77_777


def bad(name: str, **changes: Any) -> Any:
    return pytest.param(name, changes, id=f"{name}-{'-'.join(changes)}")


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int32)


@ALL
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        bad("block_size", block_size=0),
        bad("null_block", null_block=2**31),
        bad("block_table", block_table=torch.ones(3, 7)),
        bad("block_table", block_table=ones(21)),
        bad("block_table", block_table=ones(7, 3).t()),
        bad("seq_lens", seq_lens=torch.ones(3, dtype=torch.int64)),
        bad("seq_lens", seq_lens=ones(4)),
        bad("seq_lens", seq_lens=ones(6)[::2]),
        bad("rows", rows=torch.ones(3)),
        bad("rows", rows=ones(4)),
        bad("gap_start", gap_end=ones(3)),
        bad("gap_end", gap_start=ones(3)),
        bad("gap_start", gap_start=ones(2), gap_end=ones(3)),
        bad("gap_end", gap_start=ones(3), gap_end=torch.ones(3)),
        bad("out_table", out_table=ones(3, 6)),
        bad("out_table", out_table=ones(2, 7)),
        bad("out_table", out_table=torch.ones(3, 7)),
        bad("out_lens", out_lens=ones(2)),
        bad("out_lens", out_lens=torch.ones(3)),
    ],
)
def test_rejects(
    implementation: Implementation, name: str, changes: dict[str, Any], device: torch.device
) -> None:
    arguments: dict[str, Any] = {
        "block_table": ones(3, 7).to(device),
        "seq_lens": ones(3).to(device),
        "block_size": 16,
    }
    for key, value in changes.items():
        arguments[key] = to_device(value, device) if isinstance(value, Tensor) else value
    with pytest.raises(ValueError, match=rf"\b{name}\b.*\.$"):
        implementation(**arguments)


@ALL
def test_rejects_outputs_on_inputs(implementation: Implementation, device: torch.device) -> None:
    batch = make_batch(3, 7, 16, device=device)
    with pytest.raises(ValueError, match="out_table must not share memory with block_table"):
        implementation(**batch, out_table=batch["block_table"])
    with pytest.raises(ValueError, match="out_lens must not share memory with seq_lens"):
        implementation(**batch, out_lens=batch["seq_lens"])


def test_rejects_another_device() -> None:
    table = torch.zeros(3, 7, dtype=torch.int32)
    with pytest.raises(
        ValueError, match="seq_lens must be on cpu like the other tensors, got meta"
    ):
        compact_block_table(table, torch.zeros(3, dtype=torch.int32, device="meta"), 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph_replay(device: torch.device) -> None:
    batch = make_batch(5, 33, 16, device=device, gaps=True, seed=1)
    fresh = make_batch(5, 33, 16, device=device, gaps=True, seed=2)
    out_table = torch.full((8, 40), -7, dtype=torch.int32, device=device)
    out_lens = torch.full((8,), -7, dtype=torch.int32, device=device)
    compact_block_table(**batch, out_table=out_table, out_lens=out_lens)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = compact_block_table(**batch, out_table=out_table, out_lens=out_lens)
    for key, value in fresh.items():
        if isinstance(value, Tensor):
            batch[key].copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(got, compact_block_table_naive(**fresh))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a table beyond 2**31 entries")
def test_offsets_beyond_int32(device: torch.device) -> None:
    table = torch.zeros(2**31 // 512 + 2, 512, dtype=torch.int32, device=device)
    assert (table.shape[0] - 1) * table.stride(0) > 2**31
    table[-1] = torch.arange(1, 513, dtype=torch.int32, device=device)
    table[-1, 1] = 0
    last = torch.tensor([table.shape[0] - 1], device=device)
    seq_lens = torch.tensor([8192], dtype=torch.int32, device=device)
    got, lens = compact_block_table(table, seq_lens, 16, rows=last)
    assert got.tolist() == [[1, *range(3, 513), 0]] and lens.tolist() == [8176]


@pytest.mark.parametrize("optional", [None, "*i32"], ids=["bare", "rows+gaps"])
def test_compiles_for_cuda(compile_for_cuda: CompileForCuda, optional: str | None) -> None:
    signature = dict.fromkeys(("block_table", "seq_lens", "out_table", "out_lens"), "*i32")
    signature |= {"stride_table": "i64", "stride_out": "i32"}
    signature |= dict.fromkeys(("W", "block_size", "null_block"), "i32")
    constants: dict[str, int | None] = {"BLOCK": 512}
    for name in ("rows", "gap_start", "gap_end"):
        if optional is None:
            constants[name] = None
        else:
            signature[name] = optional
    compile_for_cuda(
        "kvplug_kernels.compact_block_table.kernel",
        "compact_block_table_kernel",
        signature,
        constants,
    )
