from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from grid import implementations
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from kvplug_kernels.compact_kv import plan_moves
from kvplug_kernels.plan_survivors import plan_survivors
from kvplug_kernels.plan_survivors.kernel import plan_survivors_triton
from kvplug_kernels.plan_survivors.naive import plan_survivors_naive
from kvplug_kernels.plan_survivors.vectorized import plan_survivors_vectorized
from kvplug_kernels.select_top import select_top

Implementation = Callable[..., Tensor]
Launches = list[tuple[str, tuple[int, ...]]]

FAST, ALL = implementations(plan_survivors_naive, plan_survivors_triton, plan_survivors_vectorized)
INF, NAN = math.inf, math.nan


def make_case(
    device: torch.device,
    *,
    rows: int = 2,
    heads: int = 2,
    n: int = 40,
    candidates: int = 37,
    count: int = 16,
    levels: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, heads, n, generator=rng)
    if levels:
        scores = torch.randint(0, levels, (rows, heads, n), generator=rng).float()
    order = [torch.randperm(2 * n, generator=rng)[:n] for _ in range(rows * heads)]
    positions = torch.stack(order).view(rows, heads, n) if order else torch.zeros(rows, heads, n)
    return {
        "scores": scores.to(device),
        "positions": positions.int().to(device),
        "num_tokens": torch.full((rows,), 2 * n, dtype=torch.int32, device=device),
        "candidates": candidates,
        "count": count,
        "sink": 3,
        "recent": 5,
    }


def assert_matches_naive(implementation: Implementation, case: dict[str, Any]) -> None:
    assert torch.equal(implementation(**case), plan_survivors_naive(**case))


@ALL
@pytest.mark.parametrize(
    ("scores", "count", "expected"),
    [
        ([3, 1, 2, 5, 9], 2, [0, 3]),
        ([1, 5, 2, 3, 9], 2, [3, 1]),
        ([1, 1, 1, 1, 9], 3, [0, 1, 2]),
        ([NAN, -INF, -3.4e38, NAN, 9], 2, [0, 2]),
        ([INF, 3.4028234663852886e38, 0, INF, 9], 2, [0, 1]),
        ([-0.0, 0.0, 1.0, 0.0, 9], 3, [0, 1, 2]),
    ],
    ids=str,
)
def test_worked_examples(
    implementation: Implementation,
    scores: list[float],
    count: int,
    expected: list[int],
    device: torch.device,
) -> None:
    """Of four candidates; the fifth token is none."""
    got = implementation(
        torch.tensor([[scores]], dtype=torch.float32, device=device),
        torch.arange(5, dtype=torch.int32, device=device)[None, None],
        torch.tensor([5], dtype=torch.int32, device=device),
        candidates=4,
        count=count,
        sink=0,
        recent=0,
    )
    assert got.tolist() == [[expected]]


@ALL
def test_first_and_latest_tokens_come_first(
    implementation: Implementation, device: torch.device
) -> None:
    """Whatever their score, and in whatever slot."""
    positions = torch.tensor([[[9, 3, 0, 8, 1, 5]]], dtype=torch.int32, device=device)
    scores = torch.tensor([[[-INF, 7, -INF, NAN, 6, INF]]], device=device)
    got = implementation(
        scores,
        positions,
        torch.tensor([10], dtype=torch.int32, device=device),
        candidates=6,
        count=4,
        sink=1,
        recent=2,
    )
    assert got.tolist() == [[[0, 5, 2, 3]]]


@FAST
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"levels": 1},
        {"levels": 3},
        {"count": 37},
        {"count": 1},
        {"rows": 64, "heads": 1, "n": 9, "candidates": 9, "count": 4},
        {"rows": 1, "heads": 1, "n": 4500, "candidates": 4400, "count": 2100},
        {"rows": 1, "heads": 1, "n": 4500, "candidates": 4500, "count": 2048, "levels": 2},
        {"rows": 1, "heads": 1, "n": 16390, "candidates": 16385, "count": 8193},
    ],
    ids=str,
)
def test_matches_naive(
    implementation: Implementation, changes: dict[str, Any], device: torch.device
) -> None:
    assert_matches_naive(implementation, make_case(device, **changes))


@FAST
def test_is_selection_and_then_the_plan(
    implementation: Implementation, device: torch.device
) -> None:
    case = make_case(device) | {"sink": 0, "recent": 0}
    keep = select_top(case["scores"][..., :37].contiguous(), 16)
    assert torch.equal(implementation(**case), plan_moves(keep, 16))


@FAST
def test_strides(implementation: Implementation, device: torch.device) -> None:
    case = make_case(device)
    expected = implementation(**case)
    for name in ("scores", "positions"):
        wide = torch.zeros(2, 3, 50, dtype=case[name].dtype, device=device)
        case[name] = wide[:, 1:, 5:45].copy_(case[name])
    pair = torch.stack([case["num_tokens"] * 0, case["num_tokens"]], 1)
    case["num_tokens"] = pair[:, 1]
    out = torch.zeros(2, 2, 16, dtype=torch.int32, device=device)
    assert implementation(**case, out=out) is out
    assert torch.equal(out, expected)


@FAST
def test_layers_folded_into_rows_share_their_texts(
    implementation: Implementation, device: torch.device
) -> None:
    case = make_case(device, rows=6)
    case["num_tokens"] = torch.tensor([80, 40], dtype=torch.int32, device=device)
    assert_matches_naive(implementation, case)
    whole = {**case, "num_tokens": case["num_tokens"].repeat(3)}
    assert torch.equal(implementation(**case), implementation(**whole))


@FAST
@pytest.mark.parametrize("changes", [{"rows": 0}, {"count": 0}, {"candidates": 0, "count": 0}])
def test_empty(
    implementation: Implementation, changes: dict[str, Any], device: torch.device
) -> None:
    assert implementation(**make_case(device, **changes)).numel() == 0


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_properties(data: st.DataObject, device: torch.device) -> None:
    n = data.draw(st.integers(1, 60))
    candidates = data.draw(st.integers(0, n))
    case = make_case(
        device,
        rows=1,
        n=n,
        candidates=candidates,
        count=data.draw(st.integers(0, candidates)),
        levels=data.draw(st.sampled_from([0, 1, 4])),
        seed=data.draw(st.integers(0, 99)),
    )
    case["sink"], case["recent"] = data.draw(st.integers(0, n)), data.draw(st.integers(0, n))
    for implementation in (plan_survivors_triton, plan_survivors_vectorized):
        assert_matches_naive(implementation, case)


def test_one_launch(launches: Launches, device: torch.device) -> None:
    plan_survivors_triton(**make_case(device))
    assert [name for name, _ in launches] == ["plan_survivors_kernel"]


def test_dispatch(launches: Launches, device: torch.device) -> None:
    assert_matches_naive(plan_survivors, make_case(device))
    assert len(launches) == (1 if device.type == "cuda" else 0)


@ALL
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("scores", {"scores": torch.zeros(2, 2, 40).half()}),
        ("positions", {"positions": torch.zeros(2, 2, 39, dtype=torch.int32)}),
        ("num_tokens", {"num_tokens": torch.zeros(2)}),
        ("num_tokens", {"num_tokens": torch.zeros(3, dtype=torch.int32)}),
        ("candidates", {"candidates": 41}),
        ("count", {"count": 38}),
        ("sink", {"sink": -1}),
        ("recent", {"recent": -1}),
        ("out", {"out": torch.zeros(2, 2, 15, dtype=torch.int32)}),
    ],
)
def test_rejects(
    implementation: Implementation, name: str, changes: dict[str, Any], device: torch.device
) -> None:
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=rf"^{name} must .*\.$"):
        implementation(**make_case(device) | given)
