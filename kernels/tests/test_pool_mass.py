from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grid import implementations
from torch import Tensor

from kvplug_kernels.pool_mass import pool_mass
from kvplug_kernels.pool_mass.kernel import pool_mass_triton
from kvplug_kernels.pool_mass.naive import pool_mass_naive
from kvplug_kernels.pool_mass.vectorized import pool_mass_vectorized

Implementation = Callable[..., Tensor]
Launches = list[tuple[str, tuple[int, ...]]]

FAST, ALL = implementations(pool_mass_naive, pool_mass_triton, pool_mass_vectorized)
KEPT = 1e30


def make_case(
    device: torch.device,
    *,
    rows: int = 2,
    kv_heads: int = 2,
    group: int = 3,
    n: int = 40,
    span: int = 70,
    latest: int | list[int] = 6,
    window: int | None = 5,
    kernel: int = 5,
    how: str = "max",
    in_order: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """``n`` distinct positions below ``span``, in any order."""
    rng = torch.Generator().manual_seed(seed)
    order = [torch.randperm(span, generator=rng)[:n] for _ in range(rows * kv_heads)]
    positions = torch.stack(order).view(rows, kv_heads, n) if order else torch.zeros(rows, 2, n)
    case: dict[str, Any] = {
        "mass": torch.rand(rows, kv_heads * group, n, generator=rng).to(device),
        "positions": (positions.sort(-1).values if in_order else positions).int().to(device),
        "num_tokens": torch.full((rows,), span, dtype=torch.int32, device=device),
        "latest": latest,
        "longest": span,
        "kernel": kernel,
        "how": how,
        "kept": KEPT,
    }
    if isinstance(latest, list):
        case["latest"] = torch.tensor(latest, dtype=torch.int32, device=device)
    if window is not None:
        last = torch.arange(-window, 0)[None] + torch.arange(rows)[:, None] + 3
        case["query_positions"] = last.clamp_min(-1).int().to(device)
    return case


def assert_matches_naive(implementation: Implementation, case: dict[str, Any]) -> None:
    got, expected = implementation(**case), pool_mass_naive(**case)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@ALL
@pytest.mark.parametrize(
    ("how", "expected"), [("max", [2, 4, 4, KEPT]), ("mean", [2 / 3, 2, 2, KEPT])]
)
def test_worked_example(
    implementation: Implementation, how: str, expected: list[float], device: torch.device
) -> None:
    """Two query heads and two queries. Position 5 has neighbours on both sides, position 1 has
    none; that of the latest token, 7, counts as 0."""
    got = implementation(
        torch.tensor([[[2.0, 6, 3, 50], [6, 10, 5, 50]]], device=device),
        torch.tensor([[[1, 5, 4, 6]]], dtype=torch.int32, device=device),
        torch.tensor([7], dtype=torch.int32, device=device),
        latest=1,
        longest=7,
        query_positions=torch.tensor([[-1, 5, 6]], dtype=torch.int32, device=device),
        kernel=3,
        how=how,
        kept=KEPT,
    )
    assert got[0, 0].tolist() == pytest.approx(expected)


@FAST
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"how": "mean"},
        {"kernel": 1},
        {"kernel": 1, "latest": [0, 70], "window": None, "group": 1},
        {"kernel": 63, "latest": [3, 0]},
        {"in_order": True, "n": 70, "kernel": 7},
        {"window": 40},
        {"rows": 64, "kv_heads": 1, "group": 1, "n": 4, "span": 5, "kernel": 3, "latest": 1},
        {"rows": 1, "kv_heads": 1, "n": 2500, "span": 70000, "kernel": 7},
        {"rows": 1, "kv_heads": 1, "n": 2500, "span": 2500, "kernel": 7, "how": "mean"},
    ],
    ids=str,
)
def test_matches_naive(
    implementation: Implementation, changes: dict[str, Any], device: torch.device
) -> None:
    assert_matches_naive(implementation, make_case(device, **changes))


@FAST
def test_longest_may_be_any_bound(implementation: Implementation, device: torch.device) -> None:
    case = make_case(device)
    assert torch.equal(implementation(**case), implementation(**case | {"longest": 1 << 16}))


@FAST
def test_strides(implementation: Implementation, device: torch.device) -> None:
    case = make_case(device)
    expected = implementation(**case)
    for name in ("mass", "positions"):
        heads = case[name].shape[1]
        wide = torch.zeros(2, heads + 1, 50, dtype=case[name].dtype, device=device)
        case[name] = wide[:, 1:, 5:45].copy_(case[name])
    case["query_positions"] = case["query_positions"].t().contiguous().t()
    out = torch.zeros_like(expected)
    assert implementation(**case, out=out) is out
    assert torch.equal(out, expected)


@FAST
@pytest.mark.parametrize("changes", [{"rows": 0}, {"n": 0}])
def test_empty(
    implementation: Implementation, changes: dict[str, Any], device: torch.device
) -> None:
    assert implementation(**make_case(device, **changes)).numel() == 0


def test_one_launch(launches: Launches, device: torch.device) -> None:
    for kernel in (1, 7):
        launches.clear()
        pool_mass_triton(**make_case(device, kernel=kernel))
        assert [name for name, _ in launches] == ["pool_mass_kernel"]


def test_dispatch(launches: Launches, device: torch.device) -> None:
    assert_matches_naive(pool_mass, make_case(device))
    assert len(launches) == (1 if device.type == "cuda" else 0)


@ALL
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mass", {"mass": torch.zeros(2, 6, 40).half()}),
        ("mass", {"mass": torch.zeros(2, 5, 40)}),
        ("positions", {"positions": torch.zeros(2, 2, 39, dtype=torch.int32)}),
        ("num_tokens", {"num_tokens": torch.zeros(2)}),
        ("latest", {"latest": torch.zeros(2)}),
        ("longest", {"longest": -1}),
        ("query_positions", {"query_positions": torch.zeros(2, 5)}),
        ("kernel", {"kernel": 4}),
        ("how", {"how": "least"}),
        ("out", {"out": torch.zeros(2, 6, 40)}),
    ],
)
def test_rejects(
    implementation: Implementation, name: str, changes: dict[str, Any], device: torch.device
) -> None:
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=rf"^{name} must .*\.$"):
        implementation(**make_case(device) | given)
