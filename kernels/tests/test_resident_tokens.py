from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grid import implementations
from torch import Tensor

from kvplug_kernels.paging import FoldedLayers
from kvplug_kernels.resident_tokens import (
    LatestQueries,
    LayerSlice,
    ResidentTokens,
    resident_tokens,
)
from kvplug_kernels.resident_tokens.kernel import resident_tokens_triton
from kvplug_kernels.resident_tokens.naive import resident_tokens_naive
from kvplug_kernels.resident_tokens.vectorized import resident_tokens_vectorized

Implementation = Callable[..., ResidentTokens]
Launches = list[tuple[str, tuple[int, ...]]]

FAST, ALL = implementations(
    resident_tokens_naive, resident_tokens_triton, resident_tokens_vectorized
)
HEADS, SIZE, RING = 2, 4, 6


def make_case(
    device: torch.device,
    *,
    rows: int = 3,
    blocks: int = 3,
    short: int = 1,
    size: int = SIZE,
    layers: LayerSlice | None = None,
    totals: bool = True,
    window: int = 4,
    dtype: torch.dtype = torch.float32,
    begins: bool = False,
) -> dict[str, Any]:
    """Rows of ``blocks`` blocks, the last one ``short`` of full; the first row holds no survivors,
    the others in more and more blocks."""
    rng = torch.Generator().manual_seed(0)
    layers = layers or LayerSlice(1, 2, 2, 3)
    width = 2 * blocks
    numbers = torch.randperm(4 * width, generator=rng)[: 4 * width].view(4, width).int()
    pages = numbers.numel() * layers.block_step + 8 * layers.layer_step
    stored = torch.randint(0, 99, (pages, HEADS, 2 * size), generator=rng).int()[..., :size]
    order = [torch.randperm(width, generator=rng)[:blocks] for _ in range(rows)]
    logical = torch.stack(order).int() if rows else torch.zeros(0, blocks).int()
    # Columns of one copy from the host, as a caller has them.
    packed = torch.stack([torch.arange(rows) % 4, torch.arange(rows), torch.arange(rows) * 5], 1)
    packed = packed.int().to(device)
    case: dict[str, Any] = {
        "block_table": numbers.to(device),
        "rows": packed[:, 0],
        "logical": logical.to(device),
        "mixed": packed[:, 1],
        "stored": stored.to(device),
        "layers": layers,
        "count": blocks * size - short,
    }
    if totals:
        case["totals"] = torch.randn(stored.shape, generator=rng).to(device)
    if window:
        last = layers.first + layers.num_layers
        queries = torch.randn(last * (rows + 1) * RING, 2, 3, generator=rng)
        case["latest"] = LatestQueries(
            queries.to(device, dtype),
            (torch.arange(last) * (rows + 1) * RING).flip(0).to(device),
            packed[:, 0] * 0 + torch.arange(rows, device=device).int() * RING,
            packed[:, 2],
            RING,
            window,
            packed[:, 2] - 2 if begins else None,
        )
    return case


def assert_same(got: ResidentTokens, expected: ResidentTokens) -> None:
    for field in dataclasses.fields(ResidentTokens):
        found, wanted = getattr(got, field.name), getattr(expected, field.name)
        assert (found is None) == (wanted is None), field.name
        if wanted is not None:
            assert found.dtype == wanted.dtype, field.name
            assert torch.equal(found, wanted), field.name


@ALL
def test_worked_example(implementation: Implementation, device: torch.device) -> None:
    """Two tokens a block. Of blocks 2 and 0 of a row the latter carries survivors; layer 1 lies
    a hundred blocks behind layer 0."""

    def integers(*values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    stored = torch.zeros(110, 1, 2, dtype=torch.int32, device=device)
    stored[107, 0] = integers(40, 41)
    latest = LatestQueries(
        torch.arange(8.0, device=device).view(8, 1, 1),
        torch.tensor([0, 4], device=device),
        integers(0),
        integers(2),
        3,
        3,
    )
    got = implementation(
        integers([7, 8, 9]),
        integers(0),
        integers([2, 0]),
        integers(1),
        stored,
        LayerSlice(1, 1, 1, 100),
        count=4,
        latest=latest,
    )
    assert got.table.tolist() == [[[109, 107]]] * 2
    assert got.positions.tolist() == [[[[4, 5, 40, 41]]]] * 2
    assert got.lens.tolist() == [4]
    assert got.query_positions is not None and got.queries is not None
    assert got.query_positions.tolist() == [[-1, 0, 1]]
    assert got.queries.flatten().tolist() == [6, 4, 5]
    assert got.totals is None


@FAST
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"totals": False, "window": 0},
        {"short": 0, "window": RING},
        {"rows": 1, "blocks": 70, "size": 16, "layers": LayerSlice(0, 1, 1, 1), "window": 1},
        {"rows": 64, "blocks": 1, "layers": LayerSlice(0, 2, 1, 300)},
        {"dtype": torch.bfloat16, "size": 3, "begins": True},
    ],
    ids=str,
)
def test_matches_naive(
    implementation: Implementation, changes: dict[str, Any], device: torch.device
) -> None:
    case = make_case(device, **changes)
    assert_same(implementation(**case), resident_tokens_naive(**case))


@FAST
@pytest.mark.parametrize("changes", [{"rows": 0}, {"blocks": 0, "short": 0}], ids=str)
def test_empty(
    implementation: Implementation, changes: dict[str, Any], device: torch.device
) -> None:
    got = implementation(**make_case(device, **{"window": 0, **changes}))
    assert got.positions.numel() == 0


@FAST
def test_folded_layers_are_numbered_as_they_are_stored(
    implementation: Implementation, device: torch.device
) -> None:
    whole = torch.arange(5 * 3 * 2 * 4, dtype=torch.float32).view(5, 3, 1, 2, 4).to(device)
    fold = FoldedLayers.of([whole[:, layer] for layer in range(3)])
    assert fold is not None
    case = make_case(device, rows=2, blocks=2, totals=False, window=0)
    case["block_table"] = case["block_table"] % 5
    case["layers"] = LayerSlice(0, 3, fold.block_step, fold.layer_step)
    case["mixed"] = torch.zeros_like(case["mixed"])
    got = implementation(**case).table[0]
    blocks = case["block_table"][case["rows"].long()].gather(1, case["logical"].long())
    expected = whole[blocks].permute(2, 0, 1, 3, 4, 5)
    assert torch.equal(fold.pages[got.long()].view(3, -1), expected.reshape(3, -1))


def test_one_launch(launches: Launches, device: torch.device) -> None:
    resident_tokens_triton(**make_case(device))
    assert [name for name, _ in launches] == ["resident_tokens_kernel"]


def test_dispatch(launches: Launches, device: torch.device) -> None:
    case = make_case(device)
    assert_same(resident_tokens(**case), resident_tokens_naive(**case))
    assert len(launches) == (1 if device.type == "cuda" else 0)


@ALL
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("block_table", {"block_table": torch.zeros(4, 6)}),
        ("rows", {"rows": torch.zeros(3)}),
        ("logical", {"logical": torch.zeros(2, 3, dtype=torch.int32)}),
        ("mixed", {"mixed": torch.zeros(2, dtype=torch.int32)}),
        ("stored", {"stored": torch.zeros(9, 2, 4)}),
        ("count", {"count": 13}),
        ("count", {"count": 8}),
        ("totals", {"totals": torch.zeros(9, 2, 4)}),
        ("latest.window", {"window": RING + 1}),
        ("latest.queries", {"queries": torch.zeros(80, 2, 3).double()}),
        ("latest.starts", {"starts": torch.zeros(2, dtype=torch.int64)}),
        ("latest.places", {"places": torch.zeros(2, dtype=torch.int32)}),
        ("latest.ends", {"ends": torch.zeros(3)}),
    ],
)
def test_rejects(
    implementation: Implementation, name: str, changes: dict[str, Any], device: torch.device
) -> None:
    case = make_case(device)
    for key, value in changes.items():
        given = value.to(device) if isinstance(value, Tensor) else value
        if name.startswith("latest"):
            case["latest"] = dataclasses.replace(case["latest"], **{key: given})
        else:
            case[key] = given
    with pytest.raises(ValueError, match=rf"^{name} must .*\.$"):
        implementation(**case)
