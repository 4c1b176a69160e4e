from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import triton
import triton.language as tl
from grid import grid, implementations, unless_gpu
from hypothesis import HealthCheck, given, settings
from paged_cases import NO_BLOCK, to_device
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kvplug_kernels.paged_attend_quant.kernel as kernel
import kvplug_kernels.paged_attend_quant.naive as naive
import kvplug_kernels.paged_attend_quant.planes as planes
import kvplug_kernels.paged_attend_quant.vectorized as vectorized
from kvplug_kernels.coding import CodedPage, Coding, encode_groups, encode_vectors, unpack
from kvplug_kernels.paged_attend_quant import paged_attend_quant
from kvplug_kernels.paged_attend_quant.cpu import paged_attend_quant_cpu
from kvplug_kernels.paged_attend_quant.kernel import paged_attend_quant_triton
from kvplug_kernels.paged_attend_quant.naive import paged_attend_quant_naive
from kvplug_kernels.paged_attend_quant.vectorized import paged_attend_quant_vectorized

Implementation = Callable[..., tuple[Tensor, Tensor]]
Launches = list[tuple[str, tuple[int, ...]]]
CompileForCuda = Callable[[str, str, dict[str, str], dict[str, int | None]], None]

NAN, INF = float("nan"), float("inf")
KERNELS = ["attend_kernel", "merge_splits_kernel"]
FAST, ALL = implementations(
    paged_attend_quant_naive,
    paged_attend_quant_triton,
    paged_attend_quant_vectorized,
    paged_attend_quant_cpu,
)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def both(width: int, bits: int, *args: Any, **kwargs: Any) -> CodedPage:
    coding = Coding(width, bits, *args, **kwargs)
    return CodedPage(coding, coding)


LAYOUTS = {
    "int8": both(32, 8),
    "int4": both(32, 4),
    "int3": both(32, 3),
    "int2": both(32, 2),
    "int4-groups": both(32, 4, group=8),
    "int3-groups-of-a-width-of-24": both(24, 3, group=8),
    "int4-of-a-width-of-40": both(40, 4),
    "fp8": both(32, 8, "fp8"),
    "fp8-groups": both(32, 8, "fp8", group=16),
    "codebook": CodedPage(Coding(32, 4, "codebook"), Coding(32, 3, "codebook")),
    "codebook-groups": CodedPage(Coding(32, 2, "codebook", group=8), Coding(32, 4, "codebook", 16)),
    "tokens": CodedPage(Coding(32, 2, axis="tokens", group=16), Coding(32, 2, group=8)),
    "tokens-small-groups": CodedPage(Coding(32, 4, axis="tokens", group=8), Coding(32, 4)),
    "outliers": CodedPage(Coding(40, 4, outliers=8), Coding(35, 2, outliers=3)),
    "outliers-codebook": CodedPage(Coding(36, 3, "codebook", outliers=4), Coding(32, 8)),
    "plain-32": both(32, 32, "plain"),
    "widths-apart": CodedPage(Coding(48, 4), Coding(16, 8)),
}
INTEGER = {
    "int8": CodedPage(Coding(32, 8, sums=True), Coding(32, 8)),
    "int4": CodedPage(Coding(32, 4, sums=True), Coding(32, 4)),
    "int4-without-sums": both(32, 4),
    "int2-groups": CodedPage(Coding(32, 2, group=16, sums=True), Coding(32, 2, group=8)),
    "int3-three-groups": CodedPage(Coding(48, 3, group=16, sums=True), Coding(24, 3, group=8)),
    "int8-four-bit-values": CodedPage(Coding(32, 8, group=16, sums=True), Coding(32, 4)),
}


def garbage(pages: Tensor) -> Tensor:
    """Fill with NaN of every float type there is, and with the greatest codes."""
    return pages.fill_(0xFF)


def make_case(
    layout: CodedPage,
    lens: list[int],
    widths: list[int],
    *,
    heads: int = 2,
    group: int = 2,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    causal: bool = False,
    padding: int = 0,
    spread: bool = False,
    device: torch.device,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of a call: garbage wherever no token is stored, and in the table beyond."""
    rng = torch.Generator().manual_seed(seed)
    rows, columns = len(lens), max(-(-max(lens, default=0) // block_size), 1)
    num_blocks = rows * columns + 1
    shape = (num_blocks, heads, block_size, layout.bytes_per_token)
    pages = garbage(torch.zeros(shape, dtype=torch.uint8))
    if spread:
        wide = garbage(torch.zeros((num_blocks, 2, heads + 1, *shape[2:]), dtype=torch.uint8))
        pages = wide[:, 1, 1:]
    table = torch.randperm(num_blocks, generator=rng)[: rows * columns].view(rows, columns)
    levels: dict[str, Tensor | None] = {}
    for side, coding in (("key", layout.key), ("value", layout.value)):
        levels[side] = None
        if coding.kind == "codebook":
            levels[side] = torch.randn(coding.levels, generator=rng).sort().values
        vectors = torch.randn(rows, columns, heads, block_size, coding.width, generator=rng)
        if coding.kind == "plain":
            vectors = vectors.to(torch.float32 if coding.bits == 32 else dtype)
        if coding.axis == "tokens":
            cut = vectors.unflatten(-2, (-1, coding.group))
            fields = {k: v.flatten(-3, -2) for k, v in encode_groups(cut, coding).items()}
        else:
            fields = encode_vectors(vectors, coding, levels[side])
        for r, c in itertools.product(range(rows), range(columns)):
            n = min(max(lens[r] - c * block_size, 0), block_size)
            for name, field in fields.items():
                held = n
                if coding.axis == "tokens" and name != "codes":
                    held = -(-n // coding.group) * coding.group
                plane = layout.plane(pages, f"{side}_{name}")
                plane[table[r, c], :, :held] = field[r, c, :, :held]
    live = torch.arange(columns) * block_size < torch.tensor(lens).view(-1, 1)
    tokens = sum(widths)
    query = torch.full((tokens + padding, heads * group, layout.key.width), NAN)
    query[:tokens] = torch.randn(tokens, heads * group, layout.key.width, generator=rng)
    starts = [0, *itertools.accumulate(widths)]
    return {
        "query": query.to(device, dtype),
        "pages": to_device(pages, device),
        "layout": layout,
        "block_table": table.masked_fill(~live, NO_BLOCK).int().to(device),
        "lens": torch.tensor(lens, dtype=torch.int32, device=device),
        "query_start": torch.tensor(starts, dtype=torch.int32, device=device),
        "scale": 1.5 * layout.key.width**-0.5,
        "key_levels": None if levels["key"] is None else levels["key"].to(device),
        "value_levels": None if levels["value"] is None else levels["value"].to(device),
        "causal": causal,
        "max_query_len": max(widths, default=0),
        "max_len": max(lens, default=0),
    }


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], tolerance: float) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_integer_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """Equal but for weights at the border of two codes, which another order of float32 operations
    may round the other way: few elements, by less than a 255th of the largest value."""
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)
    off = (got[0] - want[0]).abs()
    assert float(off.max()) < 5 / 255
    assert float((off > 2e-5).float().mean()) < 0.1


def decoded(case: dict[str, Any], row: int) -> tuple[Tensor, Tensor]:
    """K and V of a row, float64 ``[heads, tokens, width]``."""
    layout, size = case["layout"], case["pages"].shape[2]
    slots = torch.arange(int(case["lens"][row]), device=case["pages"].device)
    blocks = case["block_table"][row, slots // size].long()
    found = []
    for side, coding in (("key", layout.key), ("value", layout.value)):
        heads = []
        for head in range(case["pages"].shape[1]):
            fields = naive.read_fields(
                case["pages"], layout, f"{side}_", blocks, slots % size, head
            )
            levels = case[f"{side}_levels"]
            heads.append(naive.decode_fields(fields, coding, levels, case["query"].dtype).double())
        found.append(torch.stack(heads))
    return found[0], found[1]


def dense_attention(case: dict[str, Any], softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    """Softmax attention over decoded K and V."""
    query, heads = case["query"].double(), case["pages"].shape[1]
    shape = (*query.shape[:2], case["layout"].value.width)
    out = torch.zeros(shape, dtype=torch.float64, device=query.device)
    lse = torch.full(shape[:2], -INF, dtype=torch.float64, device=query.device)
    starts = case["query_start"].tolist()
    for row, (first, end) in enumerate(itertools.pairwise(starts)):
        n = int(case["lens"][row])
        if first == end or n == 0:
            continue
        key, value = decoded(case, row)
        grouped = query[first:end].unflatten(1, (heads, -1))
        logits = torch.einsum("qhgd,htd->qhgt", grouped, key) * case["scale"]
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        seen = torch.full((end - first,), n)
        if case["causal"]:
            seen = n - (end - first) + 1 + torch.arange(end - first)
        hidden = torch.arange(n) >= seen[:, None]
        logits = logits.masked_fill(hidden[:, None, None].to(query.device), -INF)
        weights = logits.softmax(-1).nan_to_num(0.0)
        out[first:end] = torch.einsum("qhgt,htd->qhgd", weights, value).flatten(1, 2)
        lse[first:end] = logits.logsumexp(-1).flatten(1)
    return out.float(), lse.float()


# -- The codes -------------------------------------------------------------------------------------


@grid(
    ALL, pytest.mark.parametrize("causal", [False, True]), pytest.mark.parametrize("name", LAYOUTS)
)
def test_every_coding(
    implementation: Implementation, name: str, causal: bool, device: torch.device
) -> None:
    """Against softmax attention over what the pages decode to, written here."""
    lens, widths = ([37, 20, 0, 3], [3, 1, 2, 5]) if causal else ([37, 0, 16], [1, 2, 3])
    case = make_case(LAYOUTS[name], lens, widths, causal=causal, padding=2, device=device)
    assert_same(implementation(**case), dense_attention(case), TOLERANCE[torch.float32])


@grid(
    FAST,
    pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str),
    pytest.mark.parametrize(
        "layout",
        [LAYOUTS["int4"], LAYOUTS["outliers"], LAYOUTS["codebook"], both(32, 16, "plain")],
        ids=["int4", "outliers", "codebook", "plain-16"],
    ),
)
def test_narrow_queries(
    implementation: Implementation, layout: CodedPage, dtype: torch.dtype, device: torch.device
) -> None:
    case = make_case(layout, [37, 20], [2, 1], dtype=dtype, causal=True, device=device)
    want = paged_attend_quant_naive(**case)
    assert_same(implementation(**case), want, TOLERANCE[dtype])


@FAST
@pytest.mark.parametrize(
    ("block_size", "width", "heads", "group", "bits"),
    [
        (16, 64, 1, 3, 4),
        (32, 96, 2, 1, 4),
        (64, 128, 1, 4, 2),
        (128, 256, 1, 2, 4),
        (8, 96, 1, 7, 2),
        (16, 64, 1, 2, 3),
        (16, 128, 1, 1, 3),
    ],
)
def test_shapes(
    implementation: Implementation,
    block_size: int,
    width: int,
    heads: int,
    group: int,
    bits: int,
    device: torch.device,
) -> None:
    case = make_case(
        both(width, bits),
        [2 * block_size - 3, block_size + 1],
        [1, 1],
        heads=heads,
        group=group,
        block_size=block_size,
        device=device,
    )
    assert_same(implementation(**case), paged_attend_quant_naive(**case), 1e-5)


@FAST
def test_softcap(implementation: Implementation, device: torch.device) -> None:
    case = make_case(LAYOUTS["int4"], [37, 20], [2, 1], device=device)
    capped = implementation(**case, softcap=0.5)
    assert_same(capped, dense_attention(case, 0.5), 1e-5)
    assert not torch.allclose(capped[0], implementation(**case)[0], atol=1e-3)


@grid(
    ALL,
    pytest.mark.parametrize("softcap", [0.0, 0.5]),
    pytest.mark.parametrize("name", ["fp8", "outliers", "int4", "plain-32"]),
)
def test_what_is_not_a_number_stays_in_its_head(
    implementation: Implementation, name: str, softcap: float, device: torch.device
) -> None:
    _assert_nan_stays(implementation, LAYOUTS[name], torch.float32, softcap, device)


@ALL
@pytest.mark.parametrize("name", INTEGER)
def test_integer_products_lose_nothing_that_is_not_a_number(
    implementation: Implementation, name: str, device: torch.device
) -> None:
    _assert_nan_stays(implementation, INTEGER[name], torch.float32, 0.0, device, integer=True)


def _assert_nan_stays(
    implementation: Implementation,
    layout: CodedPage,
    dtype: torch.dtype,
    softcap: float,
    device: torch.device,
    *,
    integer: bool = False,
) -> None:
    case = make_case(layout, [137, 20], [2, 1], group=2, dtype=dtype, causal=True, device=device)
    query = case["query"]
    query[1, 2, 3] = NAN
    query[2, 1] = NAN
    out, lse = implementation(**case, softcap=softcap, integer=integer)
    gone = torch.zeros(3, 4, dtype=torch.bool, device=device)
    gone[1, 2] = gone[2, 1] = True
    assert torch.equal(lse.isnan(), gone)
    assert torch.equal(out.isnan(), gone[..., None].expand_as(out))
    assert out[~gone].isfinite().all() and lse[~gone].isfinite().all()


# -- Planes ----------------------------------------------------------------------------------------

PLANES = {
    "int8": both(128, 8),
    "int4": both(128, 4),
    "int2": both(128, 2),
    "int8-of-64": both(64, 8),
    "int4-of-64": both(64, 4),
    "int2-of-64-fills-half-an-operand": both(64, 2),
    "int4-of-96": both(96, 4),
    "int4-of-256": both(256, 4),
    "int4-groups-of-a-plane": both(128, 4, group=32),
    "int2-groups-of-two-planes": both(128, 2, group=32),
    "int8-keys-int4-values": CodedPage(Coding(64, 8), Coding(128, 4, group=64)),
    "kivi-of-4-bits": CodedPage(Coding(128, 4, axis="tokens", group=16), Coding(128, 4, group=32)),
    "kivi-of-2-bits": CodedPage(Coding(64, 2, axis="tokens", group=16), Coding(64, 2)),
    "int4-keys-int2-values": CodedPage(Coding(128, 4, sums=True), Coding(64, 2)),
}


def assert_planes_same(
    got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], keys: float = 5e-5
) -> None:
    """Keys are exact but for those with scales along tokens, which are rounded to float16 as
    weights are, whatever the queries are."""
    torch.testing.assert_close(got[0], want[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(got[1], want[1], rtol=keys, atol=keys)


@grid(
    pytest.mark.parametrize("name", PLANES),
    pytest.mark.parametrize("block_size", [16, 32, 64, 128]),
    pytest.mark.parametrize("group", [1, 4, 7, 8, 16]),
    pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str),
    pairs=[("block_size", "group"), ("block_size", "dtype")],
)
def test_planes(
    name: str,
    block_size: int,
    group: int,
    dtype: torch.dtype,
    launches: Launches,
    device: torch.device,
) -> None:
    """Decode: rows of some tiles, the last one not whole, and of none."""
    case = make_case(
        PLANES[name],
        [200, 0, 70],
        [1, 1, 1],
        heads=1,
        group=group,
        block_size=block_size,
        dtype=dtype,
        padding=1,
        device=device,
    )
    got = paged_attend_quant_triton(**case)
    assert [launched for launched, _ in launches] == ["attend_planes_kernel", KERNELS[1]]
    keys = 2e-3 if PLANES[name].key.axis == "tokens" else 5e-5
    assert_planes_same(got, paged_attend_quant_naive(**case), keys)


@grid(
    pytest.mark.parametrize("name", ["int4", "int8-of-64", "int2-groups-of-two-planes"]),
    pytest.mark.parametrize("widths", [[3, 1, 0, 5], [20, 2, 1]], ids=["few", "many"]),
    pytest.mark.parametrize("causal", [False, True]),
    pairs=[("name", "widths"), ("name", "causal"), ("widths", "causal")],
)
def test_planes_of_several_queries(
    name: str, widths: list[int], causal: bool, device: torch.device
) -> None:
    """As many columns as a warp has, and as several have; queries that see nothing."""
    case = make_case(
        PLANES[name],
        [130, 40, 7, 3][: len(widths)],
        widths,
        heads=1,
        group=4,
        dtype=torch.bfloat16,
        causal=causal,
        padding=2,
        device=device,
    )
    assert_planes_same(paged_attend_quant_triton(**case), paged_attend_quant_naive(**case))


@pytest.mark.parametrize("scale", [0.0, -0.1, 0.1])
@pytest.mark.parametrize("softcap", [0.0, 0.7])
def test_planes_with_any_scale(scale: float, softcap: float, device: torch.device) -> None:
    case = make_case(PLANES["int4"], [150, 33], [1, 1], dtype=torch.bfloat16, device=device)
    case["scale"] = scale
    got = paged_attend_quant_triton(**case, softcap=softcap)
    assert_planes_same(got, paged_attend_quant_naive(**case, softcap=softcap))


@grid(
    pytest.mark.parametrize(
        "name", ["int8-of-64", "int4-of-96", "int4-groups-of-a-plane", "kivi-of-2-bits"]
    ),
    pytest.mark.parametrize("softcap", [0.0, 0.5]),
)
def test_what_is_not_a_number_stays_in_its_column(
    name: str, softcap: float, device: torch.device
) -> None:
    _assert_nan_stays(paged_attend_quant_triton, PLANES[name], torch.bfloat16, softcap, device)


@pytest.mark.parametrize("size", [1e-30, 1e-4, 3e4, 1e30])
def test_planes_take_queries_of_any_size(size: float, device: torch.device) -> None:
    """A bfloat16 query may be far out of the range of float16, and so may a row beside it."""
    case = make_case(PLANES["int4"], [150, 33], [1, 1], dtype=torch.bfloat16, device=device)
    case["query"][0] *= size
    case["query"][1, 1] = 0
    case["scale"] /= size
    got, want = paged_attend_quant_triton(**case), paged_attend_quant_naive(**case)
    torch.testing.assert_close(got[0][0], want[0][0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(got[1][0], want[1][0], rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(got[1][1, 1], want[1][1, 1], rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("name", ["int8", "int4", "int2-groups-of-two-planes"])
@pytest.mark.parametrize("size", [1e-6, 1e-2, 200.0])
def test_planes_take_values_of_any_size(name: str, size: float, device: torch.device) -> None:
    """A step of the values may be a number that float16 has few digits for."""
    case = make_case(PLANES[name], [200, 70], [1, 1], heads=1, dtype=torch.bfloat16, device=device)
    layout = case["layout"]
    for field in ("value_scale", "value_zero"):
        numbers = layout.plane(case["pages"], field).view(torch.float16)
        numbers.copy_(numbers.float() * size)
        # The values of one block are larger than all before.
        numbers[case["block_table"][0, 9].item()] *= 3
    got, want = paged_attend_quant_triton(**case), paged_attend_quant_naive(**case)
    torch.testing.assert_close(got[0], want[0], rtol=2e-3, atol=2e-3 * size)


@pytest.mark.parametrize("multiprocessors", [1, 64])
def test_planes_in_splits(
    multiprocessors: int,
    launches: Launches,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    """More splits than the merge takes at a time, most of them empty for a short row."""
    monkeypatch.setattr(planes, "multiprocessors", lambda _: multiprocessors)
    case = make_case(
        PLANES["int8-of-64"], [5000, 20, 0], [1] * 3, heads=1, dtype=torch.bfloat16, device=device
    )
    assert_planes_same(paged_attend_quant_triton(**case), paged_attend_quant_naive(**case))
    if device.type == "cpu":
        assert launches[0][1][2] == (2 if multiprocessors == 1 else 40)


def test_count_splits() -> None:
    """As many programs as there are slots and no more, or whole waves of them."""
    assert planes.count_splits(256, 1056, 100) == 4
    assert planes.count_splits(8, 1056, 100) == 100
    assert planes.count_splits(1056, 1056, 100) == 1
    assert planes.count_splits(1100, 1056, 100) == 4
    assert planes.count_splits(1100, 1056, 1) == 1


@pytest.mark.parametrize(
    ("layout", "dtype", "block_size"),
    [
        (both(128, 3), torch.bfloat16, 16),
        (both(128, 8, "fp8"), torch.bfloat16, 16),
        (both(128, 4, "codebook"), torch.bfloat16, 16),
        (both(128, 4, group=16), torch.bfloat16, 16),
        (both(128, 8, group=64), torch.bfloat16, 16),
        (both(20, 4), torch.bfloat16, 16),
        (both(128, 4), torch.float32, 16),
        (both(128, 4), torch.bfloat16, 24),
        (CodedPage(Coding(128, 4, outliers=64), Coding(128, 4)), torch.bfloat16, 16),
        (CodedPage(Coding(128, 4, axis="tokens", group=8), Coding(128, 4)), torch.bfloat16, 16),
    ],
    ids=lambda value: None,
)
def test_what_planes_do_not_fit(layout: CodedPage, dtype: torch.dtype, block_size: int) -> None:
    assert not planes.planes_fit(layout, torch.zeros(1, 1, 1, dtype=dtype), block_size, False)


INTEGER_PLANES = {
    "int4": CodedPage(Coding(128, 4, sums=True), Coding(128, 4)),
    "int2-groups": CodedPage(Coding(128, 2, group=32, sums=True), Coding(128, 2, group=32)),
    "int4-of-64": CodedPage(Coding(64, 4, sums=True), Coding(64, 4, group=32)),
}


@pytest.mark.parametrize("name", INTEGER_PLANES)
def test_integer_planes_lose_nothing_that_is_not_a_number(name: str, device: torch.device) -> None:
    layout = INTEGER_PLANES[name]
    _assert_nan_stays(paged_attend_quant_triton, layout, torch.bfloat16, 0.0, device, integer=True)


@pytest.mark.parametrize("group", [4, 7, 16])
@pytest.mark.parametrize("name", INTEGER_PLANES)
def test_integer_planes(name: str, group: int, launches: Launches, device: torch.device) -> None:
    """Exact products, but for weights that are rounded to the other code, in tiles of weights as
    the specification has them."""
    case = make_case(
        INTEGER_PLANES[name],
        [100, 33],
        [1, 2],
        heads=1,
        group=group,
        block_size=64 if group == 7 else 16,
        dtype=torch.bfloat16,
        causal=group == 4,
        device=device,
    )
    got = paged_attend_quant_triton(**case, integer=True)
    assert [launched for launched, _ in launches] == ["attend_planes_kernel", KERNELS[1]]
    assert_integer_same(got, paged_attend_quant_naive(**case, integer=True))


def test_what_integer_planes_do_not_fit() -> None:
    query = torch.zeros(1, 1, 1, dtype=torch.bfloat16)
    assert planes.planes_fit(INTEGER_PLANES["int4"], query, 16, True)
    for layout in (both(128, 4), CodedPage(Coding(128, 8, sums=True), Coding(128, 4))):
        assert not planes.planes_fit(layout, query, 16, True)
    assert not planes.planes_fit(INTEGER_PLANES["int4"], query, 48, True)


def run_ptx(text: str, pairs: Tensor) -> list[Tensor]:
    """What inline PTX writes to its outputs.

    Args:
        text: Instructions ``shl``, ``shr``, ``prmt`` and ``lop3`` as ``(a & b) | c``.
        pairs: int64 ``[n]``, its one input, numbers of 32 bits.
    """
    text = text.replace("{", "").replace("}", "")
    lines = [line.strip() for line in text.split(";") if line.strip()]
    outputs = sum(f"${i}" in text for i in range(9)) - 1
    registers = {f"${outputs}": pairs}

    def read(operand: str) -> Any:
        return registers[operand] if operand in registers else int(operand, 0)

    for line in lines:
        name, rest = line.split(maxsplit=1)
        to, *operands = (operand.strip() for operand in rest.split(","))
        if name == ".reg":
            continue
        a, *others = (read(operand) for operand in operands)
        if name == "shl.b32":
            found = a << others[0]
        elif name == "shr.u32":
            found = a >> others[0]
        elif name == "lop3.b32":
            assert others[2] == 0xEA
            found = (a & others[0]) | others[1]
        else:
            assert name == "prmt.b32"
            both_operands = a | (others[0] << 32)
            found = torch.zeros_like(a)
            for byte in range(4):
                chosen = (others[1] >> (4 * byte)) & 15
                assert chosen < 8
                found |= ((both_operands >> (8 * chosen)) & 0xFF) << (8 * byte)
        registers[to] = found & 0xFFFFFFFF
    return [registers[f"${i}"] for i in range(outputs)]


@triton.jit
def unpack_all(
    halves,
    out,
    BITS: tl.constexpr,  # noqa: N803
    COUNT: tl.constexpr,  # noqa: N803
    INTERPRETED: tl.constexpr,  # noqa: N803
):
    o = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    found = planes.unpack_planes(tl.load(halves + o), BITS, INTERPRETED)
    for i in tl.static_range(COUNT):
        tl.store(out + i * 65536 + o, found[i])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_halfword_is_unpacked(bits: int, device: torch.device) -> None:
    """The instructions, on a pair of any halfword and another, and their stand-in find the offset
    of the plane and the code that the specification unpacks."""
    every = torch.arange(65536)
    codes = unpack(every.to(torch.uint16).view(torch.uint8).view(-1, 2), bits, 16 // bits).long()
    offsets = [planes.plane_offset.fn(i, bits) for i in range(16 // bits)]
    want = (codes + torch.tensor(offsets)).T
    other = (every * 40503 + 12345) % 65536
    text = {2: planes.PTX_2, 4: planes.PTX_4, 8: planes.PTX_8}[bits].value
    for shift, pairs in ((0, every | (other << 16)), (16, other | (every << 16))):
        for found, numbers in zip(run_ptx(text, pairs), want, strict=True):
            halves = ((found >> shift) & 0xFFFF).to(torch.uint16).view(torch.float16)
            assert torch.equal(halves.float(), numbers.float())
    for interpreted in {device.type == "cpu", True}:
        out = torch.zeros(16 // bits, 65536, dtype=torch.float16, device=device)
        halves = every.to(torch.uint16).view(torch.int16).to(device)
        unpack_all[(64,)](halves, out, bits, 16 // bits, interpreted)
        assert torch.equal(out.cpu().float(), want.float())


# -- Integer products ------------------------------------------------------------------------------


@grid(
    FAST, pytest.mark.parametrize("causal", [False, True]), pytest.mark.parametrize("name", INTEGER)
)
def test_integer(
    implementation: Implementation, name: str, causal: bool, device: torch.device
) -> None:
    """Rows of several tiles of weights, the last one not whole."""
    case = make_case(INTEGER[name], [300, 128, 0], [2, 1, 1], causal=causal, device=device)
    want = paged_attend_quant_naive(**case, integer=True)
    assert_integer_same(implementation(**case, integer=True), want)


@ALL
@pytest.mark.parametrize("name", INTEGER)
def test_homomorphic_identity(
    implementation: Implementation, name: str, device: torch.device
) -> None:
    """HACK's identity: products of codes and corrections are the products of what the codes stand
    for, the same quantized query and weights given."""
    layout = INTEGER[name]
    case = make_case(layout, [150], [1], heads=1, device=device)
    key, value = decoded(case, 0)
    codes, step, zero = naive.quantize_query(case["query"][0], layout.key)
    query = (codes * step + zero).flatten(1).double()
    logits = query @ key[0].T * case["scale"]
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    slots = torch.arange(150, device=device)
    blocks = case["block_table"][0, slots // 16].long()
    fields = naive.read_fields(case["pages"], layout, "value_", blocks, slots % 16, 0)
    scale = fields["scale"].contiguous().view(torch.float16).float()
    groups = value[0].unflatten(-1, (layout.value.groups, -1))
    middle = layout.value.levels // 2
    zeros = fields["zero"].contiguous().view(torch.float16).float() + middle * scale
    want = torch.einsum("mt,tg->mg", weights, zeros.double())[..., None]
    want = want.expand(-1, -1, layout.value.group).clone()
    for at in range(0, 150, naive.WEIGHT_TILE):
        part = slice(at, at + naive.WEIGHT_TILE)
        scaled = weights[:, None, part].float() * scale[part].T
        rounded, unit = naive.quantize_weights(scaled)
        # Dequantized: weights without the scale they were quantized with, times decoded values.
        mean = torch.where(scale[part].T > 0, rounded * unit / scale[part].T, 0.0).double()
        from_middle = groups[part] - zeros[part, :, None]
        want += torch.einsum("mgt,tgd->mgd", mean, from_middle)
    want = (want / weights.sum(-1)[:, None, None]).flatten(1)
    out, lse = implementation(**case, integer=True)
    torch.testing.assert_close(lse[0].double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
    off = (out[0].double() - want).abs()
    assert float(off.max()) < 5 / 255 and float((off > 2e-5).float().mean()) < 0.1


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_float_products_of_codes_are_exact(bits: int) -> None:
    """The largest codes there can be: the float32 product is the integer product."""
    rng = torch.Generator().manual_seed(bits)
    top = (1 << bits) - 1
    for shape, length, most in (((3, 2, 5), 256, 255), ((3, 2, 5), naive.WEIGHT_TILE, 255)):
        a = torch.randint(0, most + 1, (*shape, length), generator=rng)
        b = torch.randint(0, top + 1, (3, 2, 40, length), generator=rng)
        a[:, :, 0], b[:, :, 0] = most, top
        got = a.float() @ b.float().mT
        assert torch.equal(got.long(), a @ b.mT) and torch.equal(got, got.round())
        assert float(got.max()) == length * most * top < 2**24


def test_integer_logits_are_exact(device: torch.device) -> None:
    """Whole-number scales make every term a whole number: not one bit may be lost."""
    layout = CodedPage(Coding(64, 8, sums=True), Coding(64, 8))
    case = make_case(layout, [40], [1], heads=1, device=device)
    for name, value in (("key_scale", 1.0), ("key_zero", -128.0)):
        layout.plane(case["pages"], name).view(torch.float16).fill_(value)
    rng = torch.Generator().manual_seed(3)
    whole = torch.randint(-127, 128, case["query"].shape, generator=rng)
    whole[..., 0], whole[..., 1] = -127, 128
    case["query"] = whole.to(device, torch.float32)
    case["scale"] = 2.0**-14
    slots = torch.arange(40, device=device)
    blocks = case["block_table"][0, slots // 16].long()
    codes = layout.plane(case["pages"], "key_codes")[blocks, 0, slots % 16].long() - 128
    logits = (whole[0].to(device).double() @ codes.double().T) * 2.0**-14
    for implementation in (paged_attend_quant_vectorized, paged_attend_quant_triton):
        _, lse = implementation(**case, integer=True)
        torch.testing.assert_close(lse[0].double(), logits.logsumexp(-1), rtol=1e-6, atol=1e-6)


class NoIntegerProducts(TorchDispatchMode):
    """Fails on a product of integer matrices: CUDA has none."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm", "mv", "dot"):
            assert args[0].is_floating_point(), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "implementation", [paged_attend_quant_naive, paged_attend_quant_vectorized]
)
def test_torch_multiplies_no_integer_matrices(
    implementation: Implementation, device: torch.device
) -> None:
    case = make_case(INTEGER["int4"], [40], [1], device=device)
    with NoIntegerProducts():
        implementation(**case, integer=True)


def test_scratch_memory_of_each_device_is_its_own() -> None:
    for device in map(torch.device, ("cpu", "meta", "cpu")):
        assert vectorized.scratch("test", (4, 8), torch.float32, device).device == device


def test_stored_sums_are_used(device: torch.device) -> None:
    """With wrong sums in the pages the logits are wrong: nothing adds the codes up again."""
    case = make_case(INTEGER["int4"], [40], [1], device=device)
    for implementation in (
        paged_attend_quant_naive,
        paged_attend_quant_vectorized,
        paged_attend_quant_triton,
    ):
        _, before = implementation(**case, integer=True)
        changed = {**case, "pages": case["pages"].clone()}
        changed["layout"].plane(changed["pages"], "key_sum").fill_(0)
        _, after = implementation(**changed, integer=True)
        assert not torch.allclose(before, after, atol=1e-2)


def test_integer_is_near_the_floating_point_path(device: torch.device) -> None:
    for name, layout in INTEGER.items():
        case = make_case(layout, [200, 64], [1, 1], device=device)
        plain, _ = paged_attend_quant_vectorized(**case)
        integer, _ = paged_attend_quant_vectorized(**case, integer=True)
        assert 0 < float((plain - integer).abs().max()) < 0.05, name


# -- Rows ------------------------------------------------------------------------------------------


@FAST
@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_rows_of_all_sorts(
    implementation: Implementation, causal: bool, integer: bool, device: torch.device
) -> None:
    """Rows without queries, without tokens, with more queries than tokens, with many."""
    lens, widths = [5, 33, 0, 16, 130, 2], [0, 20, 3, 1, 2, 6]
    case = make_case(
        INTEGER["int4"], lens, widths, causal=causal, padding=4, heads=1, device=device
    )
    got = implementation(**case, integer=integer)
    want = paged_attend_quant_naive(**case, integer=integer)
    if integer:
        assert_integer_same(got, want)
    else:
        assert_same(got, want, 1e-5)
    assert not got[0][-4:].any() and (got[1][-4:] == -INF).all()
    assert not got[0][20:23].any() and (got[1][20:23] == -INF).all()


@FAST
@pytest.mark.parametrize("multiprocessors", [1, 64])
def test_splits(
    implementation: Implementation,
    multiprocessors: int,
    launches: Launches,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    """Many splits, most of them empty for a short row."""
    monkeypatch.setattr(kernel, "multiprocessors", lambda _: multiprocessors)
    for layout, integer in ((LAYOUTS["int4"], False), (INTEGER["int4"], True)):
        case = make_case(layout, [1100, 20, 0], [1, 1, 1], heads=1, device=device)
        got = implementation(**case, integer=integer)
        want = paged_attend_quant_naive(**case, integer=integer)
        if integer:
            assert_integer_same(got, want)
        else:
            assert_same(got, want, 1e-5)
    if implementation is paged_attend_quant_triton and device.type == "cpu":
        assert launches[0][1][2] == (2 if multiprocessors == 1 else 8)


@FAST
def test_pages_with_other_strides(implementation: Implementation, device: torch.device) -> None:
    case = make_case(LAYOUTS["int4"], [37, 20], [1, 2], spread=True, device=device)
    assert not case["pages"].is_contiguous()
    assert_same(implementation(**case), dense_attention(case), 1e-5)


@FAST
def test_lengths_are_cut(implementation: Implementation, device: torch.device) -> None:
    case = make_case(LAYOUTS["int4"], [32, 32, 32], [1, 1, 1], device=device)
    want = make_case(LAYOUTS["int4"], [32, 32, 32], [1, 1, 1], device=device)
    case["lens"][0], case["lens"][1] = -3, 1000
    want["lens"][0] = 0
    assert_same(implementation(**case), dense_attention(want), 1e-5)
    case["max_len"] = 20
    want["lens"][1] = want["lens"][2] = 20
    assert_same(implementation(**case), dense_attention(want), 1e-5)


@ALL
def test_writes_into_the_given_outputs(
    implementation: Implementation, device: torch.device
) -> None:
    case = make_case(LAYOUTS["int4"], [20, 0], [1, 2], padding=1, device=device)
    out = torch.full((4, 4, 32), NAN, device=device)
    lse = torch.full((4, 4), NAN, device=device)
    got = implementation(**case, out=out, lse=lse)
    assert got[0] is out and got[1] is lse
    assert_same(got, dense_attention(case), 1e-5)


@ALL
@pytest.mark.parametrize(("lens", "widths"), [([], []), ([0, 0], [1, 1]), ([5, 5], [0, 0])])
def test_nothing_to_do(
    implementation: Implementation, lens: list[int], widths: list[int], device: torch.device
) -> None:
    case = make_case(LAYOUTS["int4"], lens, widths, padding=2, device=device)
    out, lse = implementation(**case)
    assert out.shape[0] == sum(widths) + 2
    assert not out.any() and (lse == -INF).all()


@FAST
def test_a_strided_query(implementation: Implementation, device: torch.device) -> None:
    case = make_case(LAYOUTS["int4"], [37, 20], [2, 1], device=device)
    want = dense_attention(case)
    wide = torch.cat([case["query"], torch.full_like(case["query"], NAN)], 1)
    case["query"] = wide[:, :4]
    assert_same(implementation(**case), want, 1e-5)


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_memory_bound(causal: bool, integer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, queries and tokens are cut as the bounds get tighter; the result stays."""
    device = torch.device("cpu")
    layout = INTEGER["int2-groups"]
    case = make_case(layout, [300, 37, 200, 5], [3, 1, 9, 2], causal=causal, device=device)
    want = paged_attend_quant_naive(**case, integer=integer)
    sizes: list[int] = []
    mask, exp = Tensor.amax, Tensor.exp_

    def seen(self: Tensor) -> Tensor:
        sizes.append(self.numel() * 4)
        return exp(self)

    monkeypatch.setattr(Tensor, "exp_", seen)
    assert mask is Tensor.amax
    for logits, vectors in ((1 << 20, 1 << 22), (20_000, 1 << 22), (20_000, 40_000), (1000, 1)):
        sizes.clear()
        monkeypatch.setattr(vectorized, "LOGITS_BYTES", logits)
        monkeypatch.setattr(vectorized, "VECTORS_BYTES", vectors)
        got = paged_attend_quant_vectorized(**case, integer=integer)
        if integer:
            assert_integer_same(got, want)
        else:
            assert_same(got, want, 1e-5)
        # At least one query of one row and one tile: a page, or a tile of weights.
        least = 4 * 4 * (naive.WEIGHT_TILE if vectors < 50_000 else 300)
        assert sizes and max(sizes) <= max(logits, least)


def test_rows_of_very_different_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    monkeypatch.setattr(vectorized, "SKEW_TOKENS", 100)
    case = make_case(LAYOUTS["int4"], [500, 3, 20, 17, 1], [1] * 5, device=device)
    assert_same(paged_attend_quant_vectorized(**case), dense_attention(case), 1e-5)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_properties(data: st.DataObject, device: torch.device) -> None:
    lens = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=3))
    widths = data.draw(st.lists(st.integers(0, 4), min_size=len(lens), max_size=len(lens)))
    case = make_case(
        data.draw(st.sampled_from(list(LAYOUTS.values()))),
        lens,
        widths,
        heads=data.draw(st.integers(1, 2)),
        group=data.draw(st.integers(1, 3)),
        block_size=data.draw(st.sampled_from([16, 32])),
        causal=data.draw(st.booleans()),
        padding=data.draw(st.integers(0, 1)),
        spread=data.draw(st.booleans()),
        device=device,
        seed=data.draw(st.integers(0, 99)),
    )
    softcap = data.draw(st.sampled_from([0.0, 2.0]))
    want = paged_attend_quant_naive(**case, softcap=softcap)
    assert_same(paged_attend_quant_vectorized(**case, softcap=softcap), want, 1e-5)
    assert_same(paged_attend_quant_triton(**case, softcap=softcap), want, 1e-5)


def test_triton_is_two_launches(launches: Launches, device: torch.device) -> None:
    paged_attend_quant_triton(**make_case(LAYOUTS["int4"], [37, 20], [1, 1], device=device))
    assert [name for name, _ in launches] == KERNELS


def test_dispatch(launches: Launches, device: torch.device) -> None:
    case = make_case(LAYOUTS["int4"], [37, 20], [1, 1], device=device)
    assert_same(paged_attend_quant(**case), dense_attention(case), 1e-5)
    assert [name for name, _ in launches] == (KERNELS if device.type == "cuda" else [])


# -- Errors ----------------------------------------------------------------------------------------


def integers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


INT4 = LAYOUTS["int4"]
ARGUMENTS: dict[str, Any] = {
    "query": torch.zeros(3, 4, 32),
    "pages": torch.zeros(5, 2, 16, INT4.bytes_per_token, dtype=torch.uint8),
    "layout": INT4,
    "block_table": integers(2, 3),
    "lens": integers(2),
    "query_start": integers(3),
    "scale": 1.0,
    "causal": False,
    "max_query_len": 2,
    "max_len": 48,
}
BOOK = LAYOUTS["codebook"]
BOOK_PAGES = torch.zeros(5, 2, 16, BOOK.bytes_per_token, dtype=torch.uint8)


def pages_of(layout: CodedPage) -> dict[str, Any]:
    pages = torch.zeros(5, 2, 32, layout.bytes_per_token, dtype=torch.uint8)
    query = torch.zeros(3, 4, layout.key.width)
    return {"layout": layout, "pages": pages, "query": query}


@ALL
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("pages", {"pages": torch.zeros(5, 2, 16, 8)}, id="pages-dtype"),
        pytest.param("pages", {"pages": ARGUMENTS["pages"][..., :8]}, id="pages-bytes"),
        pytest.param("pages", {"pages": ARGUMENTS["pages"][:, :, ::2]}, id="pages-strides"),
        pytest.param("pages", {"pages": ARGUMENTS["pages"][:, :0]}, id="pages-empty"),
        pytest.param("query", {"query": torch.zeros(3, 4, 32).double()}, id="query-dtype"),
        pytest.param("query", {"query": torch.zeros(3, 4, 33)}, id="query-width"),
        pytest.param("query", {"query": torch.zeros(3, 5, 32)}, id="query-heads"),
        pytest.param("query", pages_of(both(32, 16, "plain")), id="query-plain"),
        pytest.param("block_table", {"block_table": torch.zeros(2, 3)}, id="table-dtype"),
        pytest.param("lens", {"lens": integers(3)}, id="lens"),
        pytest.param("query_start", {"query_start": integers(2)}, id="query_start"),
        pytest.param("scale", {"scale": INF}, id="scale"),
        pytest.param("softcap", {"softcap": -1.0}, id="softcap"),
        pytest.param("max_query_len", {"max_query_len": -1}, id="max_query_len"),
        pytest.param("max_len", {"max_len": -1}, id="max_len"),
        pytest.param("key_levels", pages_of(BOOK), id="levels"),
        pytest.param(
            "value_levels",
            {**pages_of(BOOK), "key_levels": torch.zeros(16), "value_levels": torch.zeros(16)},
            id="levels-number",
        ),
        pytest.param("integer", {**pages_of(LAYOUTS["fp8"]), "integer": True}, id="integer-fp8"),
        pytest.param("integer", {**pages_of(LAYOUTS["tokens"]), "integer": True}, id="tokens"),
        pytest.param("integer", {**pages_of(LAYOUTS["outliers"]), "integer": True}, id="outliers"),
        pytest.param("integer", {**pages_of(both(512, 4)), "integer": True}, id="integer-wide"),
        pytest.param("out", {"out": torch.zeros(3, 4, 32).half()}, id="out-dtype"),
        pytest.param("out", {"out": torch.zeros(3, 4, 33)}, id="out-shape"),
        pytest.param("out", {"out": torch.zeros(3, 8, 32)[:, ::2]}, id="out-strides"),
        pytest.param("lse", {"lse": torch.zeros(3, 5)}, id="lse-shape"),
        pytest.param("lse", {"lse": torch.zeros(3, 8)[:, ::2]}, id="lse-strides"),
    ],
)
def test_rejects(
    implementation: Implementation, name: str, changes: dict[str, Any], device: torch.device
) -> None:
    arguments = {
        key: to_device(value, device) if isinstance(value, Tensor) else value
        for key, value in {**ARGUMENTS, **changes}.items()
    }
    with pytest.raises(ValueError, match=rf"^{name} must .*\.$"):
        implementation(**arguments)


def test_rejects_output_on_input() -> None:
    out = ARGUMENTS["query"].view(3, 4, 32)
    with pytest.raises(ValueError, match="out must not share memory with query"):
        paged_attend_quant(**ARGUMENTS, out=out)
    with pytest.raises(ValueError, match="lse must not share memory with query"):
        paged_attend_quant(**ARGUMENTS, lse=out.flatten()[:12].view(3, 4))


# -- CUDA ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("integer", [False, True])
def test_cuda_graph_replay(integer: bool, device: torch.device) -> None:
    case = make_case(INTEGER["int4"], [37, 20], [1, 1], device=device)
    fresh = make_case(INTEGER["int4"], [30, 7], [1, 1], device=device, seed=1)
    fresh["block_table"] = torch.nn.functional.pad(fresh["block_table"], (0, 1), value=NO_BLOCK)
    out, lse = torch.zeros(2, 4, 32, device=device), torch.zeros(2, 4, device=device)
    paged_attend_quant(**case, integer=integer, out=out, lse=lse)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged_attend_quant(**case, integer=integer, out=out, lse=lse)
    pages = torch.zeros_like(case["pages"])
    pages[: len(fresh["pages"])] = fresh["pages"]
    case["pages"].copy_(pages)
    for name in ("query", "block_table", "lens"):
        case[name].copy_(fresh[name])
    graph.replay()
    torch.cuda.synchronize()
    assert_integer_same((out, lse), paged_attend_quant_naive(**fresh, integer=integer))


COMPILED: list[tuple[str, CodedPage, str, bool, int]] = [
    ("int4", both(128, 4), "bf16", False, 16),
    ("int4-prefill", both(96, 4), "fp16", False, 64),
    ("hack", CodedPage(Coding(128, 4, sums=True), Coding(128, 4)), "bf16", True, 16),
    (
        "hack-2",
        CodedPage(Coding(64, 2, group=32, sums=True), both(64, 2, group=32).value),
        "fp16",
        True,
        16,
    ),
    (
        "kivi",
        CodedPage(Coding(64, 2, axis="tokens", group=32), Coding(64, 2, group=32)),
        "bf16",
        False,
        16,
    ),
    (
        "rotated",
        CodedPage(Coding(64, 4, "codebook"), Coding(64, 3, "codebook")),
        "bf16",
        False,
        16,
    ),
    ("fp8", both(128, 8, "fp8"), "bf16", False, 16),
    ("outliers", CodedPage(Coding(64, 4, outliers=8), Coding(64, 8)), "fp16", False, 16),
    ("plain", CodedPage(Coding(64, 16, "plain"), Coding(64, 32, "plain")), "bf16", False, 16),
    ("float32", both(64, 4), "fp32", False, 16),
]


# Others show all that these two do.
SLOW_TO_COMPILE = ("int4", "hack-2")


@pytest.mark.parametrize(
    ("layout", "element", "integer", "tile"),
    [pytest.param(*c[1:], id=c[0], marks=unless_gpu(c[0] in SLOW_TO_COMPILE)) for c in COMPILED],
)
def test_compiles_for_cuda(
    compile_for_cuda: CompileForCuda, layout: CodedPage, element: str, integer: bool, tile: int
) -> None:
    elements = {
        f"{side}_elements": {"plain-32": "*fp32", "plain-16": f"*{element}"}.get(
            f"{coding.kind}-{coding.bits}", "*fp16"
        )
        for side, coding in (("key", layout.key), ("value", layout.value))
    }
    strides = [n for n in kernel.attend_kernel.arg_names if n.startswith("stride")]
    block_k, groups_k = kernel.tiles(layout.key, integer)
    block_v, groups_v = kernel.tiles(layout.value, integer)
    compile_for_cuda(
        "kvplug_kernels.paged_attend_quant.kernel",
        "attend_kernel",
        {
            "query": f"*{element}",
            "pages": "*u8",
            "halves": "*fp16",
            **elements,
            **dict.fromkeys(("key_levels", "value_levels"), f"*{element}"),
            **dict.fromkeys(("block_table", "lens", "query_start"), "*i32"),
            **dict.fromkeys(("partial", "partial_lse"), "*fp32"),
            **dict.fromkeys(("scale", "softcap"), "fp32"),
            **dict.fromkeys(("limit", *strides), "i32"),
        },
        {
            "HEADS": 8,
            "QUERY_GROUP": 4,
            "BLOCK_SIZE": 32,
            **kernel.field_offsets(layout, "key", layout.key),
            **kernel.field_offsets(layout, "value", layout.value),
            "CAUSAL": tile > 16,
            "SOFTCAP": tile > 16,
            "INTEGER": integer,
            "SPLITS": 3,
            "BLOCK_M": tile,
            "BLOCK_T": kernel.token_tile(block_k, block_v, integer, element == "fp32"),
            "BLOCK_K": block_k,
            "BLOCK_V": block_v,
            "GROUPS_K": groups_k,
            "GROUPS_V": groups_v,
            "WIDEN": False,
        },
    )


def test_merge_compiles_for_cuda(compile_for_cuda: CompileForCuda) -> None:
    compile_for_cuda(
        "kvplug_kernels.paged_attend_quant.kernel",
        "merge_splits_kernel",
        {
            **dict.fromkeys(("partial", "partial_lse", "out", "lse"), "*fp32"),
            "query_start": "*i32",
            **dict.fromkeys(("n_rows", "n_splits"), "i32"),
        },
        {"HEADS": 32, "WIDTH": 96, "BLOCK_S": 8, "BLOCK_D": 64},
    )


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.parametrize("splits", [1, 3])
def test_the_baseline_of_the_benchmark(
    splits: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    decode = importlib.import_module("bf16_paged_decode").paged_decode
    case = make_case(both(48, 16, "plain"), [150, 17], [1, 1], dtype=torch.float16, device=device)
    planes = (case["layout"].plane(case["pages"], f"{x}_codes") for x in ("key", "value"))
    key, value = (plane.view(torch.float16) for plane in planes)
    out, lse = torch.zeros(2, 4, 48, device=device), torch.zeros(2, 4, device=device)
    table = case["block_table"]
    decode(case["query"], key, value, table, case["lens"], case["scale"], out, lse, splits)
    assert_same((out, lse), dense_attention(case), TOLERANCE[torch.float16])


def test_the_baseline_of_the_benchmark_compiles_for_cuda(
    compile_for_cuda: CompileForCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    arguments = importlib.import_module("bf16_paged_decode").decode_kernel.arg_names
    compile_for_cuda(
        "bf16_paged_decode",
        "decode_kernel",
        {
            **dict.fromkeys(("query", "key", "value"), "*bf16"),
            **dict.fromkeys(("block_table", "lens"), "*i32"),
            **dict.fromkeys(("partial_out", "partial_lse"), "*fp32"),
            "scale": "fp32",
            **dict.fromkeys((n for n in arguments if n.startswith("stride")), "i32"),
        },
        {
            "HEADS": 8,
            "QUERY_GROUP": 4,
            "BLOCK_SIZE": 16,
            "HEAD_SIZE": 128,
            "SPLITS": 3,
            "BLOCK_M": 16,
            "BLOCK_T": 64,
            "BLOCK_D": 128,
        },
    )
