from __future__ import annotations

import math
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from grid import grid, implementations
from hypothesis import HealthCheck, given, settings
from paged_cases import to_device
from torch import Tensor

from kvplug_kernels.select_top import select_top
from kvplug_kernels.select_top.kernel import select_top_triton
from kvplug_kernels.select_top.naive import select_top_naive
from kvplug_kernels.select_top.vectorized import select_top_vectorized

Implementation = Callable[..., Tensor]
Launches = list[tuple[str, tuple[int, ...]]]
CompileForCuda = Callable[[str, str, dict[str, str], dict[str, int | None]], None]

FAST, ALL = implementations(select_top_naive, select_top_triton, select_top_vectorized)
INF, NAN = math.inf, math.nan


def make_scores(
    rows: int, heads: int, n: int, *, levels: int = 0, device: torch.device, seed: int = 0
) -> Tensor:
    """Normal scores, or integers of so many levels where ties are wanted."""
    rng = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(0, levels, (rows, heads, n), generator=rng).float().to(device)
    return torch.randn(rows, heads, n, generator=rng).to(device)


def assert_matches_naive(
    implementation: Implementation, scores: Tensor, count: int, lens: Tensor | None = None
) -> None:
    before = scores.clone()
    got = implementation(scores, count, lens)
    expected = select_top_naive(scores, count, lens)
    assert got.dtype == torch.int32 and got.shape == expected.shape
    assert torch.equal(got, expected)
    assert torch.equal(scores.view(torch.int32), before.view(torch.int32))


@ALL
@pytest.mark.parametrize(
    ("scores", "count", "expected"),
    [
        ([3, 1, 2, 5], 2, [0, 3]),
        ([1, 1, 1, 1], 3, [0, 1, 2]),
        ([1, 7, 1, 7, 1], 3, [0, 1, 3]),
        ([-1, -3, -2], 2, [0, 2]),
        ([NAN, -INF, -1e30, NAN], 3, [0, 1, 2]),
        ([-INF, NAN, 5, -INF], 2, [0, 2]),
        ([INF, 9, INF, 8, INF], 3, [0, 2, 4]),
        ([INF, 9, INF, 8, INF], 4, [0, 1, 2, 4]),
        ([-0.0, 0.0, -0.0, 0.0], 2, [0, 1]),
        ([0.0, -1e-45, 1e-45, -0.0], 2, [0, 2]),
        ([4], 1, [0]),
        ([4, 5], 0, []),
    ],
)
def test_worked_examples(
    implementation: Implementation,
    scores: list[float],
    count: int,
    expected: list[int],
    device: torch.device,
) -> None:
    tensor = torch.tensor([[scores]], dtype=torch.float32, device=device)
    assert implementation(tensor, count).tolist() == [[expected]]


@ALL
@pytest.mark.parametrize(
    ("resident", "expected"),
    [
        (9, [1, 4, 5]),
        (6, [1, 4, 5]),
        (4, [0, 1, 3]),
        (3, [0, 1, 2]),
        (2, [0, 1, 2]),
        (0, [0, 1, 2]),
        (-4, [0, 1, 2]),
    ],
)
def test_only_resident_tokens_take_part(
    implementation: Implementation, resident: int, expected: list[int], device: torch.device
) -> None:
    """A row with fewer than count keeps them all and the next indices."""
    scores = torch.tensor([[[-INF, 3, NAN, -2, INF, 8]]], device=device)
    lens = torch.tensor([resident], dtype=torch.int32, device=device)
    assert implementation(scores, 3, lens).tolist() == [[expected]]


@grid(
    FAST,
    pytest.mark.parametrize("levels", [0, 1, 3]),
    pytest.mark.parametrize("n", [1, 2, 31, 64, 65, 5000]),
)
def test_sizes(implementation: Implementation, n: int, levels: int, device: torch.device) -> None:
    scores = make_scores(2, 2, n, levels=levels, device=device)
    lens = torch.tensor([n, n // 2 + 1], dtype=torch.int32, device=device)
    for count in sorted({1, n // 3, n // 2, n - 1, n}):
        assert_matches_naive(implementation, scores, count, lens)


@FAST
def test_scores_that_differ_in_their_last_bits(
    implementation: Implementation, device: torch.device
) -> None:
    bits = 0x3F800000 + make_scores(2, 1, 700, levels=300, device=device).int()
    assert_matches_naive(implementation, bits.view(torch.float32), 350)
    assert_matches_naive(implementation, -bits.view(torch.float32), 350)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_properties(data: st.DataObject, device: torch.device) -> None:
    n = data.draw(st.integers(1, 40))
    values = st.one_of(
        st.floats(width=32), st.sampled_from([0.0, -0.0, INF, -INF, NAN, 1.0, 1e-45, -1e-45])
    )
    rows = data.draw(st.lists(st.lists(values, min_size=n, max_size=n), min_size=1, max_size=2))
    scores = torch.tensor(rows, device=device)[:, None]
    lens = torch.tensor(
        [data.draw(st.integers(0, n)) for _ in rows], dtype=torch.int32, device=device
    )
    count = data.draw(st.integers(0, n))
    for implementation in (select_top_triton, select_top_vectorized):
        assert_matches_naive(implementation, scores, count, lens)
        assert_matches_naive(implementation, scores, count)


@ALL
def test_strides_and_persistent_buffer(
    implementation: Implementation, device: torch.device
) -> None:
    scores = make_scores(3, 4, 90, levels=9, device=device).transpose(0, 1)[:, :2, 5:70]
    lens = torch.tensor([65, 30, 64, 20], dtype=torch.int32, device=device)
    expected = select_top_naive(scores.contiguous(), 20, lens)
    buffer = torch.full((6, 3, 30), 99, dtype=torch.int32, device=device)
    out = buffer[1:5, 1:, 7:27]
    got = implementation(scores, 20, lens, out=out)
    assert got.data_ptr() == out.data_ptr() and torch.equal(got, expected)
    out.fill_(99)
    assert (buffer == 99).all()


@FAST
@pytest.mark.parametrize(("rows", "heads", "n"), [(0, 2, 4), (3, 0, 4), (3, 2, 0)])
def test_empty(
    implementation: Implementation, rows: int, heads: int, n: int, device: torch.device
) -> None:
    scores = torch.zeros(rows, heads, n, device=device)
    assert implementation(scores, min(n, 2)).shape == (rows, heads, min(n, 2))


def test_triton_is_one_launch(launches: Launches, device: torch.device) -> None:
    select_top_triton(make_scores(2, 3, 50, device=device), 20)
    assert [name for name, _ in launches] == ["select_top_kernel"]


def test_dispatch(launches: Launches, device: torch.device) -> None:
    scores = make_scores(2, 3, 50, device=device)
    assert torch.equal(select_top(scores, 20), select_top_naive(scores, 20))
    assert len(launches) == (1 if device.type == "cuda" else 0)


SCORES = torch.zeros(2, 3, 16)


@ALL
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("scores", {"scores": SCORES.half()}, id="scores-dtype"),
        pytest.param("scores", {"scores": SCORES[0]}, id="scores-ndim"),
        pytest.param("scores", {"scores": SCORES[..., ::2]}, id="scores-stride"),
        pytest.param("count", {"count": 17}, id="count-above"),
        pytest.param("count", {"count": -1}, id="count-below"),
        pytest.param("lens", {"lens": torch.zeros(2)}, id="lens-dtype"),
        pytest.param("lens", {"lens": torch.zeros(3, dtype=torch.int32)}, id="lens-rows"),
        pytest.param("out", {"out": torch.zeros(2, 3, 5)}, id="out-dtype"),
        pytest.param("out", {"out": torch.zeros(2, 3, 6, dtype=torch.int32)}, id="out-shape"),
    ],
)
def test_rejects(
    implementation: Implementation,
    name: str,
    changes: dict[str, Tensor | int],
    device: torch.device,
) -> None:
    arguments = {"scores": SCORES, "count": 5, **changes}
    moved = {k: to_device(v, device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=rf"^{name} must .*\.$"):
        implementation(**moved)


@ALL
def test_rejects_output_on_input(implementation: Implementation, device: torch.device) -> None:
    scores = make_scores(2, 3, 16, device=device)
    out = scores.view(torch.int32).flatten()[:30].view(2, 3, 5)
    with pytest.raises(ValueError, match="out must not share memory with scores"):
        implementation(scores, 5, out=out)


def test_rejects_another_device() -> None:
    lens = torch.zeros(2, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="lens must be on cpu like the other tensors, got meta"):
        select_top(SCORES, 5, lens)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph_replay(device: torch.device) -> None:
    scores = make_scores(2, 3, 500, device=device)
    fresh = make_scores(2, 3, 500, levels=4, device=device, seed=1)
    out = torch.zeros(2, 3, 200, dtype=torch.int32, device=device)
    select_top(scores, 200, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        select_top(scores, 200, out=out)
    scores.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, select_top_naive(fresh, 200))


@pytest.mark.parametrize("with_lens", [False, True])
def test_compiles_for_cuda(compile_for_cuda: CompileForCuda, with_lens: bool) -> None:
    strides = ("stride_sr", "stride_sh", "stride_or", "stride_oh")
    constants: dict[str, int | None] = {"HEADS": 8, "BLOCK": 2048}
    compile_for_cuda(
        "kvplug_kernels.select_top.kernel",
        "select_top_kernel",
        {
            "scores": "*fp32",
            "out": "*i32",
            **({"lens": "*i32"} if with_lens else {}),
            **dict.fromkeys(("count", "n", *strides), "i32"),
        },
        constants if with_lens else {**constants, "lens": None},
    )


@FAST
def test_one_long_row(implementation: Implementation, device: torch.device) -> None:
    assert_matches_naive(implementation, make_scores(1, 1, 16390, device=device), 8193)


@FAST
def test_many_short_rows(implementation: Implementation, device: torch.device) -> None:
    assert_matches_naive(implementation, make_scores(64, 1, 5, levels=3, device=device), 3)
