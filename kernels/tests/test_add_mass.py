from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grid import implementations
from torch import Tensor

from kvplug_kernels.add_mass import add_mass
from kvplug_kernels.add_mass.kernel import add_mass_triton
from kvplug_kernels.add_mass.naive import add_mass_naive
from kvplug_kernels.add_mass.vectorized import add_mass_vectorized

Implementation = Callable[..., None]
Launches = list[tuple[str, tuple[int, ...]]]

FAST, ALL = implementations(add_mass_naive, add_mass_triton, add_mass_vectorized)


def make_case(
    device: torch.device,
    *,
    rows: int = 2,
    kv_heads: int = 2,
    group: int = 3,
    size: int = 4,
    n: int = 10,
    new: int = 3,
) -> dict[str, Any]:
    """The last ``new`` tokens have totals of NaN."""
    rng = torch.Generator().manual_seed(0)
    width = -(-n // size)
    table = torch.randperm(rows * width + 2, generator=rng)[: rows * width].view(rows, width)
    wide = torch.rand(rows * width + 2, kv_heads + 1, size + 2, generator=rng)
    totals = wide[:, 1:, 1 : size + 1]
    for t in range(n - new, n):
        totals[table[:, t // size], :, t % size] = float("nan")
    strided = torch.empty_strided(totals.shape, totals.stride(), device=device)
    return {
        "totals": strided.copy_(totals),
        "block_table": table.int().to(device),
        "mass": torch.rand(rows, kv_heads * group, n, generator=rng).to(device),
        "new": new,
    }


@ALL
def test_worked_example(implementation: Implementation, device: torch.device) -> None:
    totals = torch.tensor([[[7.0, 8]], [[1, 2]], [[3, 4]]], device=device)
    implementation(
        totals,
        torch.tensor([[2, 0]], dtype=torch.int32, device=device),
        torch.tensor([[[1.0, 2, 3], [3, 4, 5]]], device=device),
        new=1,
    )
    assert totals.flatten().tolist() == [4, 8, 1, 2, 5, 7]


@FAST
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"group": 1, "n": 8, "new": 8},
        {"new": 0, "size": 3},
        {"rows": 1, "kv_heads": 1, "n": 2100, "size": 16, "new": 32},
        {"rows": 64, "kv_heads": 1, "n": 4},
    ],
    ids=str,
)
def test_matches_naive(
    implementation: Implementation, changes: dict[str, Any], device: torch.device
) -> None:
    got, expected = make_case(device, **changes), make_case(device, **changes)
    implementation(**got)
    add_mass_naive(**expected)
    torch.testing.assert_close(got["totals"], expected["totals"], rtol=1e-6, atol=1e-7)


@FAST
def test_empty(implementation: Implementation, device: torch.device) -> None:
    case = make_case(device, n=0, new=0)
    before = case["totals"].clone()
    implementation(**case)
    assert torch.equal(case["totals"], before)


def test_one_launch(launches: Launches, device: torch.device) -> None:
    add_mass_triton(**make_case(device))
    assert [name for name, _ in launches] == ["add_mass_kernel"]


def test_dispatch(launches: Launches, device: torch.device) -> None:
    add_mass(**make_case(device))
    assert len(launches) == (1 if device.type == "cuda" else 0)


@ALL
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("totals", {"totals": torch.zeros(8, 2, 4).half()}),
        ("block_table", {"block_table": torch.zeros(2, 3)}),
        ("mass", {"mass": torch.zeros(2, 5, 10)}),
        ("mass", {"mass": torch.zeros(2, 6, 13)}),
        ("new", {"new": 11}),
    ],
)
def test_rejects(
    implementation: Implementation, name: str, changes: dict[str, Any], device: torch.device
) -> None:
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=rf"^{name} must .*\.$"):
        implementation(**make_case(device) | given)
