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

from kvplug_kernels.compact_windows import compact_windows
from kvplug_kernels.compact_windows.kernel import compact_windows_triton
from kvplug_kernels.compact_windows.naive import compact_windows_naive
from kvplug_kernels.compact_windows.vectorized import compact_windows_vectorized

Implementation = Callable[..., tuple[Tensor, Tensor]]
CompileForCuda = Callable[[str, str, dict[str, str], dict[str, int | None]], None]
Launches = list[tuple[str, tuple[int, ...]]]

FAST, ALL = implementations(
    compact_windows_naive, compact_windows_triton, compact_windows_vectorized
)
OUTPUTS = ("out_table", "out_lens")


def ints(values: Any, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def make_step(
    rows: int,
    width: int,
    block_size: int,
    *,
    device: torch.device,
    sink: int = 1,
    window: int = 2,
    padding: int = 0,
    split: bool = False,
    exempt: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """A step of random rows: decodes and chunks; ``split`` into rows of at most a block, of which
    those of decodes are as long as their source says."""
    rng = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=rng))

    whole = rows + padding
    table = torch.randint(1, 10_000, (whole, width), generator=rng)
    lens, sources, ends, starts = [], [], [], [0]
    for r in range(rows):
        n = draw(1, width * block_size + 1)
        query = min(n, draw(1, 4 * block_size + 1)) if r % 2 else 1
        lens.append(n)
        at = n - query
        while at < n:
            end = min(n, (at // block_size + 1) * block_size) if split else n
            sources.append(r)
            ends.append(end if query > 1 else 0)
            starts.append(starts[-1] + end - at)
            at = end
    made = len(sources) if split else whole
    step = {
        "block_table": ints(table.tolist(), device).view(whole, width),
        "seq_lens": ints([*lens, *[0] * padding], device),
        "query_start": ints([*starts, *[starts[-1]] * (0 if split else padding)], device),
        "block_size": block_size,
        "sink": sink,
        "window": window,
        "out_table": torch.full((made + 2, width + 3), -7, dtype=torch.int32, device=device),
        "out_lens": torch.full((made + 2,), -7, dtype=torch.int32, device=device),
    }
    if split:
        step["rows"], step["ends"] = ints(sources, device), ints(ends, device)
    if exempt:
        step["exempt"] = (torch.rand(whole, generator=rng) < 0.5).to(device)
    return step


def assert_matches_naive(implementation: Implementation, step: dict[str, Any]) -> None:
    before = {k: v.clone() for k, v in step.items() if isinstance(v, Tensor)}
    expected = {**step, **{name: before[name].clone() for name in OUTPUTS}}
    compact_windows_naive(**expected)
    made = step["query_start"].shape[0] - 1
    table, lens = implementation(**step)
    assert table.data_ptr() == step["out_table"].data_ptr()
    assert table.shape == (made, step["block_table"].shape[1])
    assert lens.data_ptr() == step["out_lens"].data_ptr() and lens.shape == (made,)
    for name in before:
        torch.testing.assert_close(step[name], expected[name], rtol=0, atol=0, msg=name)


@ALL
def test_worked_example(implementation: Implementation, device: torch.device) -> None:
    """Blocks of 4, a sink of one and a window of two. The first row decodes in its block 6, which
    hides three; the second is a chunk that starts in block 3 and hides nothing; the third is
    padding; the fourth is like the first, but exempt."""
    table = [
        [11, 12, 13, 14, 15, 16, 17],
        [21, 22, 23, 24, 25, 26, 0],
        [0] * 7,
        [41, 42, 43, 44, 45, 46, 47],
    ]
    out_table = torch.full((5, 8), -7, dtype=torch.int32, device=device)
    out_lens = torch.full((5,), -7, dtype=torch.int32, device=device)
    got = implementation(
        ints(table, device),
        ints([26, 22, 0, 26], device),
        ints([0, 1, 8, 8, 9], device),
        4,
        sink=1,
        window=2,
        out_table=out_table,
        out_lens=out_lens,
        exempt=torch.tensor([False, False, False, True], device=device),
    )
    assert got[0].tolist() == [
        [11, 15, 16, 17, -7, -7, -7],
        [21, 22, 23, 24, 25, 26, -7],
        [-7] * 7,
        [41, 42, 43, 44, 45, 46, 47],
    ]
    assert got[1].tolist() == [26 - 3 * 4, 22, 0, 26]
    assert out_table[4].tolist() == [-7] * 8 and out_table[:, 7].tolist() == [-7] * 5
    assert out_lens.tolist()[4] == -7


@ALL
def test_worked_example_of_split_rows(implementation: Implementation, device: torch.device) -> None:
    """The chunk of 7 tokens above once more, as one row in each of three blocks, beside a decode
    whose length only the device knows."""
    out_table = torch.full((4, 7), -7, dtype=torch.int32, device=device)
    out_lens = torch.full((4,), -7, dtype=torch.int32, device=device)
    got = implementation(
        ints([[11, 12, 13, 14, 15, 16, 17], [21, 22, 23, 24, 25, 26, 0]], device),
        ints([26, 22], device),
        ints([0, 1, 2, 6, 8], device),
        4,
        sink=1,
        window=1,
        out_table=out_table,
        out_lens=out_lens,
        rows=ints([1, 1, 1, 0], device)[[3, 0, 1, 2]],
        ends=ints([0, 16, 20, 22], device),
    )
    assert got[0].tolist() == [
        [11, 16, 17, -7, -7, -7, -7],
        [21, 23, 24, -7, -7, -7, -7],
        [21, 24, 25, -7, -7, -7, -7],
        [21, 25, 26, -7, -7, -7, -7],
    ]
    assert got[1].tolist() == [10, 12, 12, 10]


@grid(
    FAST,
    pytest.mark.parametrize("width", [1, 33, 130]),
    pytest.mark.parametrize(("rows", "padding"), [(1, 0), (17, 3)]),
    pytest.mark.parametrize(("sink", "window"), [(0, 0), (1, 1), (3, 40)]),
    pytest.mark.parametrize("split", [False, True]),
    pytest.mark.parametrize("exempt", [False, True]),
    pytest.mark.parametrize("block_size", [16, 24]),
)
def test_matches_naive(
    implementation: Implementation,
    rows: int,
    padding: int,
    width: int,
    sink: int,
    window: int,
    split: bool,
    exempt: bool,
    block_size: int,
    device: torch.device,
) -> None:
    step = make_step(
        rows,
        width,
        block_size,
        device=device,
        sink=sink,
        window=window,
        padding=padding,
        split=split,
        exempt=exempt,
        seed=rows * width,
    )
    assert_matches_naive(implementation, step)


@FAST
@pytest.mark.parametrize("width", [1024, 1025, 2500])
def test_rows_of_several_chunks(
    implementation: Implementation, width: int, device: torch.device
) -> None:
    step = make_step(3, width, 2, device=device, window=width // 2, seed=width)
    assert_matches_naive(implementation, step)


@FAST
def test_row_strides(implementation: Implementation, device: torch.device) -> None:
    step = make_step(5, 16, 16, device=device, seed=5)
    wide = torch.zeros((5, 48), dtype=torch.int32, device=device)
    step["block_table"] = wide[:, 16:32].copy_(step["block_table"])
    assert_matches_naive(implementation, step)


@ALL
@pytest.mark.parametrize(("rows", "width"), [(0, 4), (0, 0), (2, 0)])
def test_empty(implementation: Implementation, rows: int, width: int, device: torch.device) -> None:
    step = make_step(0, width, 16, device=device, padding=rows)
    table, lens = implementation(**step)
    assert table.shape == (rows, width) and lens.tolist() == [0] * rows


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 6),
    width=st.integers(1, 20),
    block_size=st.integers(1, 20),
    sink=st.integers(0, 3),
    window=st.integers(0, 6),
    padding=st.integers(0, 3),
    split=st.booleans(),
    exempt=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_random_steps(device: torch.device, **shape: Any) -> None:
    for implementation in (compact_windows_triton, compact_windows_vectorized):
        assert_matches_naive(implementation, make_step(device=device, **shape))


def test_one_launch(launches: Launches, device: torch.device) -> None:
    compact_windows_triton(**make_step(5, 9, 16, device=device))
    assert launches == [("compact_windows_kernel", (5,))]


def test_dispatch(launches: Launches, device: torch.device) -> None:
    assert_matches_naive(compact_windows, make_step(5, 9, 16, device=device))
    assert len(launches) == (1 if device.type == "cuda" else 0)


SMALL = make_step(3, 7, 16, device=torch.device("cpu"), split=True, exempt=True, seed=1)


@ALL
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("block_size", {"block_size": 0}, id="block_size"),
        pytest.param("sink", {"sink": -1}, id="sink"),
        pytest.param("window", {"window": -1}, id="window"),
        pytest.param("block_table", {"block_table": SMALL["block_table"].long()}, id="table-dtype"),
        pytest.param("block_table", {"block_table": SMALL["block_table"].mT}, id="table-stride"),
        pytest.param("seq_lens", {"seq_lens": SMALL["seq_lens"][:2]}, id="seq_lens"),
        pytest.param("query_start", {"query_start": SMALL["query_start"][:3]}, id="query_start"),
        pytest.param("rows", {"rows": SMALL["rows"].long()}, id="rows-dtype"),
        pytest.param("rows", {"rows": None}, id="ends-without-rows"),
        pytest.param("ends", {"ends": SMALL["ends"][:2]}, id="ends"),
        pytest.param("exempt", {"exempt": SMALL["exempt"].int()}, id="exempt-dtype"),
        pytest.param("exempt", {"exempt": SMALL["exempt"][:2]}, id="exempt"),
        pytest.param("out_table", {"out_table": SMALL["out_table"][:2]}, id="out_table-rows"),
        pytest.param("out_table", {"out_table": SMALL["out_table"][:, :6]}, id="out_table-width"),
        pytest.param("out_lens", {"out_lens": SMALL["out_lens"][:2]}, id="out_lens"),
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
    step = make_step(3, 7, 16, device=device)
    for output, other in [("out_table", "block_table"), ("out_lens", "seq_lens")]:
        with pytest.raises(ValueError, match=f"{output} must not share memory with {other}"):
            implementation(**{**step, output: step[other]})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph_replay(device: torch.device) -> None:
    step, fresh = (make_step(5, 33, 16, device=device, seed=seed) for seed in (1, 2))
    compact_windows(**step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compact_windows(**step)
    for key, value in fresh.items():
        if isinstance(value, Tensor):
            step[key].copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    compact_windows_naive(**fresh)
    for name in OUTPUTS:
        assert torch.equal(step[name], fresh[name]), name


@pytest.mark.parametrize(
    "optional", [(), ("exempt",), ("rows", "ends"), ("rows", "ends", "exempt")]
)
def test_compiles_for_cuda(compile_for_cuda: CompileForCuda, optional: tuple[str, ...]) -> None:
    names = ("block_table", "seq_lens", "query_start", "out_table", "out_lens", *optional)
    sizes = ("width", "sink", "window", "stride_table", "stride_out")
    signature = dict.fromkeys(names, "*i32") | dict.fromkeys(sizes, "i32")
    if "exempt" in optional:
        signature["exempt"] = "*i1"
    constants: dict[str, int | None] = {"BLOCK_SIZE": 16, "BLOCK": 1024}
    constants |= dict.fromkeys({"rows", "ends", "exempt"} - set(optional), None)
    compile_for_cuda(
        "kvplug_kernels.compact_windows.kernel", "compact_windows_kernel", signature, constants
    )
