from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from grid import grid, implementations
from hypothesis import HealthCheck, given, settings
from paged_cases import NO_BLOCK, to_device
from torch import Tensor

from kvplug_kernels.compact_rows import compact_rows
from kvplug_kernels.compact_rows.kernel import compact_rows_triton
from kvplug_kernels.compact_rows.naive import compact_rows_naive
from kvplug_kernels.compact_rows.vectorized import compact_rows_vectorized

Implementation = Callable[..., tuple[Tensor, Tensor]]
CompileForCuda = Callable[[str, str, dict[str, str], dict[str, int | None]], None]
Launches = list[tuple[str, tuple[int, ...]]]

FAST, ALL = implementations(compact_rows_naive, compact_rows_triton, compact_rows_vectorized)
NEVER = 2**31 - 1
OUTPUTS = ("out_table", "out_lens", "places")


def ints(values: Any, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def make_step(
    rows: int,
    width: int,
    block_size: int,
    *,
    device: torch.device,
    protected: int = 2,
    ring: int = 0,
    places_dtype: torch.dtype = torch.int32,
    padded_rows: int = 0,
    padded_tokens: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """A step of random rows: decodes and chunks, some past an eviction, some without a slot."""
    rng = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=rng))

    whole, slots = rows + padded_rows, rows + 3
    lens, starts, forces = [], [0], [[NEVER, 0, 0, 0] for _ in range(slots)]
    names = torch.randperm(slots, generator=rng)[:whole].tolist()
    table = torch.full((whole, width), NO_BLOCK)
    for r in range(rows):
        n = draw(1, width * block_size + 1)
        query = min(n, draw(1, 40)) if r % 2 else 1
        blocks = -(-n // block_size)
        table[r, :blocks] = torch.randint(1, 10_000, (blocks,), generator=rng)
        resume = draw(0, blocks)
        if resume > protected:
            kept = draw(1, resume - protected + 1)
            forces[names[r]] = [draw(resume * block_size, n + 1), kept, resume, -1]
        if r % 5 == 4:
            names[r] = -1
        lens.append(n)
        starts.append(starts[-1] + query)
    step = {
        "block_table": ints(table.tolist(), device).view(whole, width),
        "seq_lens": ints([*lens, *[0] * padded_rows], device),
        "query_start": ints([*starts, *[starts[-1]] * padded_rows], device),
        "row_slots": ints(names, device),
        "forces": ints(forces, device),
        "block_size": block_size,
        "protected": protected,
        "out_table": torch.full((whole + 2, width + 3), -7, dtype=torch.int32, device=device),
        "out_lens": torch.full((whole + 2,), -7, dtype=torch.int32, device=device),
        "ring": ring,
    }
    if ring:
        tokens = starts[-1] + padded_tokens
        step["places"] = torch.full((tokens,), -7, dtype=places_dtype, device=device)
    return step


def assert_matches_naive(implementation: Implementation, step: dict[str, Any]) -> None:
    before = {k: v.clone() for k, v in step.items() if isinstance(v, Tensor)}
    expected = {**step, **{name: before[name].clone() for name in OUTPUTS if name in before}}
    compact_rows_naive(**expected)
    rows, width = step["block_table"].shape
    table, lens = implementation(**step)
    assert table.data_ptr() == step["out_table"].data_ptr() and table.shape == (rows, width)
    assert lens.data_ptr() == step["out_lens"].data_ptr() and lens.shape == (rows,)
    for name in before:
        torch.testing.assert_close(step[name], expected[name], rtol=0, atol=0, msg=name)


@ALL
def test_worked_example(implementation: Implementation, device: torch.device) -> None:
    """Blocks of 4. The first row decodes past its eviction at 18, whose survivors fill two blocks
    behind a protected one; the second reaches its own only with this chunk; the third is padding;
    the slot of the fourth is the first's eviction, but its request is another and starts over."""
    table = [
        [11, 12, 13, 14, 15, 16, 0],
        [21, 22, 23, 24, 25, 26, 27],
        [0] * 7,
        [41, 42, 43, 44, 45, 0, 0],
        [51, 52, 0, 0, 0, 0, 0],
    ]
    out_table = torch.full((6, 8), -7, dtype=torch.int32, device=device)
    out_lens = torch.full((6,), -7, dtype=torch.int32, device=device)
    places = torch.full((13,), -7, dtype=torch.int64, device=device)
    got = implementation(
        ints(table, device),
        ints([22, 26, 0, 18, 6], device),
        ints([0, 1, 5, 5, 7, 9], device),
        ints([2, 0, 2, 2, -1], device),
        ints([[24, 2, 5, 0], [NEVER, 0, 0, 0], [18, 2, 4, 0]], device),
        4,
        protected=1,
        out_table=out_table,
        out_lens=out_lens,
        ring=3,
        places=places,
    )
    assert got[0].tolist() == [
        [12, 13, 15, 16, 0, 0, 0],
        [21, 22, 23, 24, 25, 26, 27],
        [0] * 7,
        [41, 42, 43, 44, 45, 0, 0],
        [51, 52, 0, 0, 0, 0, 0],
    ]
    assert got[1].tolist() == [22 - 2 * 4, 26, 0, 18, 6]
    assert out_table[5].tolist() == [-7] * 8 and out_table[:, 7].tolist() == [-7] * 6
    assert out_lens.tolist()[5] == -7
    first, second = 2 * 3 + 21 % 3, [0 * 3 + p % 3 for p in (23, 24, 25)]
    fourth = [2 * 3 + p % 3 for p in (16, 17)]
    assert places.tolist() == [first, 9, *second, *fourth, 9, 9, 9, 9, 9, 9]


@grid(
    FAST,
    pytest.mark.parametrize("ring", [0, 1, 8, 32]),
    pytest.mark.parametrize("width", [1, 16, 33, 130]),
    pytest.mark.parametrize(("rows", "padding"), [(1, 0), (2, 1), (16, 0), (17, 3)]),
    pytest.mark.parametrize("protected", [0, 1, 16]),
    pytest.mark.parametrize("block_size", [16, 24]),
)
def test_matches_naive(
    implementation: Implementation,
    rows: int,
    padding: int,
    width: int,
    ring: int,
    protected: int,
    block_size: int,
    device: torch.device,
) -> None:
    step = make_step(
        rows,
        width,
        block_size,
        device=device,
        protected=protected,
        ring=ring,
        padded_rows=padding,
        padded_tokens=padding,
        seed=rows * width + ring,
    )
    assert_matches_naive(implementation, step)


@FAST
@pytest.mark.parametrize("width", [1024, 1025, 2500])
def test_rows_of_several_programs(
    implementation: Implementation, width: int, device: torch.device
) -> None:
    step = make_step(3, width, 2, device=device, ring=8, padded_tokens=4000, seed=width)
    assert_matches_naive(implementation, step)


@FAST
def test_a_chunk_longer_than_one_program(
    implementation: Implementation, device: torch.device
) -> None:
    step = make_step(2, 300, 16, device=device, ring=32, seed=1)
    step["query_start"] = ints([0, 1, 1 + 3000], device)
    step["seq_lens"] = ints([50, 4000], device)
    step["places"] = torch.full((3001,), -7, dtype=torch.int32, device=device)
    assert_matches_naive(implementation, step)


@FAST
def test_places_of_fewer_tokens_than_the_rows(
    implementation: Implementation, device: torch.device
) -> None:
    step = make_step(4, 30, 16, device=device, ring=8, seed=3)
    step["places"] = step["places"][:5]
    assert_matches_naive(implementation, step)


@FAST
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_places_of_either_dtype(
    implementation: Implementation, dtype: torch.dtype, device: torch.device
) -> None:
    step = make_step(5, 9, 16, device=device, ring=4, places_dtype=dtype, padded_tokens=3, seed=4)
    assert_matches_naive(implementation, step)


@FAST
def test_row_strides(implementation: Implementation, device: torch.device) -> None:
    step = make_step(5, 16, 16, device=device, ring=16, seed=5)
    wide = torch.full((5, 48), NO_BLOCK, dtype=torch.int32, device=device)
    step["block_table"] = wide[:, 16:32].copy_(step["block_table"])
    assert_matches_naive(implementation, step)


@ALL
def test_an_eviction_applies_from_its_position_on(
    implementation: Implementation, device: torch.device
) -> None:
    """The row's first query decides, for all of its queries."""
    step = make_step(1, 8, 16, device=device, seed=6)
    step["row_slots"] = ints([0], device)
    step["forces"][0] = ints([100, 1, 6, 0], device)
    for first, queries, held in [(99, 1, False), (99, 10, False), (100, 1, True), (100, 10, True)]:
        step["seq_lens"] = ints([first + queries], device)
        step["query_start"] = ints([0, queries], device)
        _, lens = implementation(**step)
        assert lens.tolist() == [first + queries - (5 * 16 if held else 0)]


@ALL
def test_an_empty_state_changes_nothing(
    implementation: Implementation, device: torch.device
) -> None:
    step = make_step(4, 8, 16, device=device, seed=7)
    step["forces"].zero_()
    table, lens = implementation(**step)
    live = torch.arange(8, device=device) * 16 < step["seq_lens"][:, None]
    assert torch.equal(lens, step["seq_lens"])
    assert torch.equal(table, step["block_table"].masked_fill(~live, 0))


@ALL
def test_a_force_that_leads_outside_the_table_shows_block_0(
    implementation: Implementation, device: torch.device
) -> None:
    step = make_step(1, 4, 16, device=device, protected=3, seed=8)
    step["row_slots"] = ints([0], device)
    step["seq_lens"], step["query_start"] = ints([64], device), ints([0, 1], device)
    step["forces"][0] = ints([0, 3, 3, 0], device)
    table, lens = implementation(**step)
    assert table.tolist() == [
        [int(step["block_table"][0, 3]), 0, 0, int(step["block_table"][0, 3])]
    ]
    assert lens.tolist() == [64]


@ALL
@pytest.mark.parametrize(("rows", "width"), [(0, 4), (0, 0), (2, 0)])
def test_empty(implementation: Implementation, rows: int, width: int, device: torch.device) -> None:
    step = make_step(0, width, 16, device=device, ring=4, padded_rows=rows, padded_tokens=3)
    table, lens = implementation(**step)
    assert table.shape == (rows, width) and lens.tolist() == [0] * rows
    assert step["places"].tolist() == 3 * [3 * 4]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 6),
    width=st.integers(1, 20),
    block_size=st.integers(1, 20),
    protected=st.integers(0, 3),
    ring=st.integers(0, 6),
    padding=st.integers(0, 3),
    seed=st.integers(0, 10_000),
)
def test_random_steps(
    rows: int,
    width: int,
    block_size: int,
    protected: int,
    ring: int,
    padding: int,
    seed: int,
    device: torch.device,
) -> None:
    for implementation in (compact_rows_triton, compact_rows_vectorized):
        step = make_step(
            rows,
            width,
            block_size,
            device=device,
            protected=protected,
            ring=ring,
            padded_rows=padding,
            padded_tokens=padding,
            seed=seed,
        )
        assert_matches_naive(implementation, step)


def test_one_launch(launches: Launches, device: torch.device) -> None:
    compact_rows_triton(**make_step(5, 9, 16, device=device))
    compact_rows_triton(**make_step(5, 9, 16, device=device, ring=4))
    assert launches == [("compact_rows_kernel", (5, 1)), ("compact_rows_kernel", (6, 1))]


def test_dispatch(launches: Launches, device: torch.device) -> None:
    step = make_step(5, 9, 16, device=device, ring=4)
    assert_matches_naive(compact_rows, step)
    assert len(launches) == (1 if device.type == "cuda" else 0)


SMALL = make_step(3, 7, 16, device=torch.device("cpu"), ring=4)


@ALL
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("block_size", {"block_size": 0}, id="block_size"),
        pytest.param("protected", {"protected": -1}, id="protected"),
        pytest.param("ring", {"ring": 0}, id="places-without-ring"),
        pytest.param("ring", {"places": None}, id="ring-without-places"),
        pytest.param("ring", {"ring": -1, "places": None}, id="ring-negative"),
        pytest.param("block_table", {"block_table": SMALL["block_table"].long()}, id="table-dtype"),
        pytest.param("block_table", {"block_table": SMALL["block_table"].mT}, id="table-stride"),
        pytest.param("seq_lens", {"seq_lens": SMALL["seq_lens"][:2]}, id="seq_lens"),
        pytest.param("query_start", {"query_start": SMALL["query_start"][:3]}, id="query_start"),
        pytest.param("row_slots", {"row_slots": SMALL["row_slots"].long()}, id="row_slots"),
        pytest.param("forces", {"forces": SMALL["forces"][:, :3]}, id="forces-shape"),
        pytest.param("forces", {"forces": SMALL["forces"][::2]}, id="forces-stride"),
        pytest.param("forces", {"forces": SMALL["forces"][:0]}, id="forces-empty"),
        pytest.param("out_table", {"out_table": SMALL["out_table"][:2]}, id="out_table-rows"),
        pytest.param("out_table", {"out_table": SMALL["out_table"][:, :6]}, id="out_table-width"),
        pytest.param("out_lens", {"out_lens": SMALL["out_lens"][:2]}, id="out_lens"),
        pytest.param("places", {"places": SMALL["places"].float()}, id="places-dtype"),
        pytest.param("places", {"places": SMALL["places"][::2]}, id="places-stride"),
    ],
)
def test_rejects(
    implementation: Implementation, name: str, changes: dict[str, Any], device: torch.device
) -> None:
    step = {
        key: to_device(value, device) if isinstance(value, Tensor) else value
        for key, value in {**SMALL, **changes}.items()
    }
    with pytest.raises(ValueError, match=rf"^{name} must .*\.$"):
        implementation(**step)


@ALL
def test_rejects_outputs_on_other_arguments(
    implementation: Implementation, device: torch.device
) -> None:
    step = make_step(3, 7, 16, device=device, ring=4)
    for output, other in [
        ("out_table", "block_table"),
        ("out_lens", "seq_lens"),
        ("places", "row_slots"),
        ("places", "out_lens"),
    ]:
        with pytest.raises(ValueError, match=f"{output} must not share memory with {other}"):
            implementation(**{**step, output: step[other]})


def test_rejects_another_device() -> None:
    changes = {"seq_lens": SMALL["seq_lens"].to("meta")}
    with pytest.raises(
        ValueError, match="seq_lens must be on cpu like the other tensors, got meta"
    ):
        compact_rows(**{**SMALL, **changes})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph_replay(device: torch.device) -> None:
    step = make_step(5, 33, 16, device=device, ring=8, seed=1)
    fresh = make_step(5, 33, 16, device=device, ring=8, seed=2)
    step["places"] = step["places"].new_zeros(300)
    fresh["places"] = fresh["places"].new_zeros(300)
    compact_rows(**step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compact_rows(**step)
    for key, value in fresh.items():
        if isinstance(value, Tensor):
            step[key].copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    compact_rows_naive(**fresh)
    for name in OUTPUTS:
        assert torch.equal(step[name], fresh[name]), name


@pytest.mark.parametrize("ring", [0, 32])
def test_compiles_for_cuda(compile_for_cuda: CompileForCuda, ring: int) -> None:
    names = ("block_table", "seq_lens", "query_start", "row_slots", "forces")
    sizes = ("n_rows", "width", "n_tokens", "dump", "protected", "stride_table", "stride_out")
    signature = dict.fromkeys((*names, *OUTPUTS), "*i32") | dict.fromkeys(sizes, "i32")
    constants: dict[str, int | None] = {"BLOCK_SIZE": 16, "RING": ring, "BLOCK": 1024}
    if not ring:
        del signature["places"]
        constants["places"] = None
    compile_for_cuda(
        "kvplug_kernels.compact_rows.kernel", "compact_rows_kernel", signature, constants
    )
