from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grid import grid, implementations, mostly_slow
from paged_cases import to_device
from torch import Tensor

from kvplug_kernels.coding import (
    CodedPage,
    Coding,
    decode_groups,
    decode_vectors,
    encode_groups,
    encode_vectors,
    unpack,
)
from kvplug_kernels.quant_write import quant_write
from kvplug_kernels.quant_write.cpu import quant_write_cpu
from kvplug_kernels.quant_write.kernel import (
    group_constants,
    kernel_constants,
    quant_write_triton,
)
from kvplug_kernels.quant_write.naive import quant_write_naive
from kvplug_kernels.quant_write.vectorized import quant_write_vectorized

Implementation = Callable[..., None]
Launches = list[tuple[str, tuple[int, ...]]]
CompileForCuda = Callable[[str, str, dict[str, str], dict[str, Any]], None]

FAST, ALL = implementations(
    quant_write_naive, quant_write_triton, quant_write_vectorized, quant_write_cpu
)
NO_BYTE = 0xAA
LEVELS = {
    2: [-1.51, -0.453, 0.453, 1.51],
    3: [-2.15, -1.34, -0.756, -0.245, 0.245, 0.756, 1.34, 2.15],
    4: [i / 3 - 2.4 for i in range(16)],
}


def same(coding: Coding) -> CodedPage:
    """Keys and values coded alike."""
    return CodedPage(coding, coding)


CODINGS = {
    "int8": same(Coding(64, 8)),
    "int4": same(Coding(64, 4)),
    "int3": same(Coding(64, 3)),
    "int2": same(Coding(64, 2)),
    "int4 in groups": same(Coding(128, 4, group=32)),
    "int2 in three groups": same(Coding(96, 2, group=32)),
    "int3 of 96": same(Coding(96, 3)),
    "int8 of 256": same(Coding(256, 8, group=64)),
    "sums": same(Coding(64, 4, group=16, sums=True)),
    "sums of int8": same(Coding(256, 8, sums=True)),
    "outliers": same(Coding(64, 4, outliers=4)),
    "odd outliers": same(Coding(67, 4, outliers=3)),
    "outliers and sums": same(Coding(96, 2, group=22, outliers=8, sums=True)),
    "fp8": same(Coding(64, 8, "fp8")),
    "fp8 in groups": same(Coding(96, 8, "fp8", group=32)),
    "fp8 with outliers": same(Coding(64, 8, "fp8", outliers=2)),
    "codebook of 4 bits": same(Coding(64, 4, "codebook")),
    "codebook of 3 bits": same(Coding(64, 3, "codebook")),
    "codebook of 2 bits": same(Coding(96, 2, "codebook", group=32)),
    "codebook with outliers": same(Coding(72, 3, "codebook", outliers=8)),
    "plain": same(Coding(64, 16, "plain")),
    "narrow plain": same(Coding(13, 16, "plain")),
    "fitted int4": same(Coding(64, 4, fit=2)),
    "fitted int2 in groups": same(Coding(96, 2, group=32, sums=True, outliers=0, fit=3)),
    "fitted codebook": same(Coding(64, 3, "codebook", fit=2)),
    "two kinds": CodedPage(Coding(64, 8), Coding(32, 2)),
    "kinds of its own": CodedPage(Coding(64, 8, "fp8"), Coding(48, 4, "codebook")),
    "plain keys": CodedPage(Coding(24, 16, "plain"), Coding(64, 3)),
    "tokens, 2 bits": CodedPage(Coding(64, 2, group=16, axis="tokens"), Coding(64, 2)),
    "tokens, 3 bits": CodedPage(Coding(96, 3, group=16, axis="tokens"), Coding(96, 3)),
    "tokens, 4 bits": CodedPage(Coding(64, 4, group=16, axis="tokens"), Coding(64, 4, group=32)),
    "anchored": CodedPage(
        Coding(64, 3, group=16, axis="tokens", anchored=True), Coding(64, 2, group=32)
    ),
    "tokens, 8 bits": CodedPage(Coding(128, 8, group=32, axis="tokens"), Coding(128, 16, "plain")),
}
BY_NAME = pytest.mark.parametrize("name", CODINGS)
# Every kind, number of bits, axis and field of its own.
CORE = [
    "int8",
    "int3 of 96",
    "int2 in three groups",
    "odd outliers",
    "outliers and sums",
    "fp8 in groups",
    "codebook with outliers",
    "narrow plain",
    "fitted int4",
    "plain keys",
    "tokens, 2 bits",
    "tokens, 8 bits",
]
CORE_BY_NAME = pytest.mark.parametrize("name", mostly_slow(CODINGS, CORE))


def empty_pages(
    layout: CodedPage,
    device: torch.device,
    *,
    blocks: int = 3,
    heads: int = 2,
    block_size: int = 32,
    fill: int = NO_BYTE,
) -> Tensor:
    shape = (blocks, heads, block_size, layout.bytes_per_token)
    return torch.full(shape, fill, dtype=torch.uint8, device=device)


def vectors(
    layout: CodedPage,
    n: int,
    device: torch.device,
    *,
    heads: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    key = torch.randn(n, heads, layout.key.width, generator=rng) * 3 + 1
    value = torch.randn(n, heads, layout.value.width, generator=rng)
    return key.to(device, dtype), value.to(device, dtype)


def codebooks(layout: CodedPage, device: torch.device) -> dict[str, Tensor]:
    return {
        f"{side}_levels": torch.tensor(LEVELS[coding.bits], device=device)
        for side, coding in (("key", layout.key), ("value", layout.value))
        if coding.kind == "codebook"
    }


def scattered(layout: CodedPage, n: int, device: torch.device, seed: int = 0) -> Tensor:
    """Slots in random order, a fifth of them padding; where groups run along tokens, runs."""
    rng = torch.Generator().manual_seed(seed)
    if layout.key.axis == "channels":
        slots = torch.randperm(96, generator=rng)[:n]
        slots[torch.rand(n, generator=rng) < 0.2] = -1
        return slots.to(device)
    half = n // 2
    slots = torch.cat([torch.arange(half) + 37, torch.arange(n - half) + 5])
    slots[-2:] = -1
    return slots.to(device)


def write(
    implementation: Implementation,
    layout: CodedPage,
    pages: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    **more: Any,
) -> int:
    """The implementation's count of elements that are not finite."""
    nonfinite = torch.zeros(1, dtype=torch.int64, device=pages.device)
    levels = codebooks(layout, pages.device)
    implementation(key, value, pages, slots, layout, nonfinite=nonfinite, **levels, **more)
    return int(nonfinite)


def unit_vectors(x: Tensor, coding: Coding) -> Tensor:
    """Elements as compared with a codebook's bounds, in float64: ``[..., inner]``."""
    grouped = x.double()[..., coding.outliers :].unflatten(-1, (coding.groups, -1))
    return (grouped / grouped.square().mean(-1, keepdim=True).sqrt()).flatten(-2)


def assert_same_pages(
    got: Tensor, expected: Tensor, layout: CodedPage, key: Tensor, value: Tensor, slots: Tensor
) -> None:
    """Equal bytes. Where a codebook's scale is a sum of floats, whose order is the device's own, a
    code may be the neighbour of the expected one if its element is within 1e-3 of the bound
    between them, and a scale the neighbouring float16, or 1e-3 off where a code differs."""
    got, expected = got.clone(), expected.clone()
    size = got.shape[2]
    live = slots >= 0
    block, offset = slots[live] // size, slots[live] % size
    for side, coding, x in (("key", layout.key, key), ("value", layout.value, value)):
        if coding.fit:
            assert_as_good(got, expected, layout, side, coding, x[live], block, offset)
            continue
        if coding.kind != "codebook":
            continue
        a, b = (layout.plane(p, f"{side}_codes")[block, :, offset] for p in (got, expected))
        a, b = (
            unpack(a, coding.bits, coding.inner).int(),
            unpack(b, coding.bits, coding.inner).int(),
        )
        levels = torch.tensor(LEVELS[coding.bits], dtype=torch.float64, device=x.device)
        bounds = (levels[1:] + levels[:-1]) / 2
        differs = a != b
        bound = bounds[torch.minimum(a, b).clamp_max(len(bounds) - 1).long()]
        near = (unit_vectors(x[live], coding) - bound).abs() < 1e-3
        assert ((a - b).abs() <= 1).all() and near[differs].all()
        scales = [layout.plane(p, f"{side}_scale")[block, :, offset] for p in (got, expected)]
        first, second = (s.contiguous().view(torch.float16).float() for s in scales)
        wrong = differs.unflatten(-1, (coding.groups, -1)).any(-1)
        allowed = torch.where(wrong, 1e-3, 2**-10) * second.abs() + 2**-24
        assert ((first - second).abs() <= allowed).all()
        for name in ("codes", "scale"):
            for p in (got, expected):
                layout.plane(p, f"{side}_{name}")[block, :, offset] = 0
    assert torch.equal(got, expected)


def assert_as_good(
    got: Tensor,
    expected: Tensor,
    layout: CodedPage,
    side: str,
    coding: Coding,
    x: Tensor,
    block: Tensor,
    offset: Tensor,
) -> None:
    """Fitted fields are sums of floats, round upon round: codes may part by one where they lie on
    a bound, and what is read back must be as near as the specification's. Clears the fields."""
    names = [n for n, _, _ in coding.sizes() if not n.startswith("outlier")]
    book = torch.tensor(LEVELS[coding.bits], device=x.device)
    book = book if coding.kind == "codebook" else None
    errors, codes = [], []
    for pages in (got, expected):
        fields = {
            n: layout.plane(pages, f"{side}_{n}")[block, :, offset] for n, _, _ in coding.sizes()
        }
        near = decode_vectors(fields, coding, book) - x.float()
        errors.append(near[..., coding.outliers :].square().sum(-1))
        codes.append(unpack(fields["codes"], coding.bits, coding.inner).int())
        if coding.sums:
            total = fields["sum"].contiguous().view(torch.int16).int()
            grouped = codes[-1].unflatten(-1, (coding.groups, -1))
            assert torch.equal(total, grouped.sum(-1, dtype=torch.int32))
        for n in names:
            layout.plane(pages, f"{side}_{n}")[block, :, offset] = 0
    assert ((codes[0] - codes[1]).abs() <= 1).all()
    assert (codes[0] != codes[1]).float().mean() <= 0.02
    assert ((errors[0] - errors[1]).abs() <= 0.01 * errors[1] + 1e-6).all()


def assert_matches_naive(
    implementation: Implementation,
    layout: CodedPage,
    pages: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    **more: Any,
) -> None:
    expected = pages.clone(memory_format=torch.contiguous_format)
    before = key.clone(), value.clone(), slots.clone()
    count = write(quant_write_naive, layout, expected, key, value, slots, **more)
    assert write(implementation, layout, pages, key, value, slots, **more) == count
    assert_same_pages(pages, expected, layout, key, value, slots)
    for tensor, original in zip((key, value, slots), before, strict=True):
        assert torch.equal(tensor.nan_to_num(7.5), original.nan_to_num(7.5))


@ALL
def test_worked_example(implementation: Implementation, device: torch.device) -> None:
    layout = CodedPage(Coding(4, 8), Coding(4, 4, group=2))
    pages = torch.full((2, 1, 2, layout.bytes_per_token), NO_BYTE, dtype=torch.uint8, device=device)
    key = torch.tensor([[[1.0, 0.0, 255.0, 128.0]]], device=device)
    value = torch.tensor([[[-8.0, 7.0, 0.0, 30.0]]], device=device)
    implementation(key, value, pages, torch.tensor([3], device=device), layout)
    assert [(f.name, f.offset, f.size) for f in layout.fields] == [
        ("key_codes", 0, 4),
        ("key_scale", 4, 2),
        ("key_zero", 6, 2),
        ("value_codes", 8, 2),
        ("value_scale", 10, 4),
        ("value_zero", 14, 4),
    ]
    expected = {
        "key_codes": [1, 0, 255, 128],
        "key_scale": [0x00, 0x3C],
        "key_zero": [0, 0],
        "value_codes": [0xF0, 0xF0],
        "value_scale": [0x00, 0x3C, 0x00, 0x40],
        "value_zero": [0x00, 0xC8, 0x00, 0x00],
    }
    for name, found in expected.items():
        assert layout.plane(pages, name)[1, 0, 1].tolist() == found
        assert (layout.plane(pages, name)[1, 0, 0] == NO_BYTE).all()
    assert (pages[0] == NO_BYTE).all()


@BY_NAME
def test_naive_is_the_code_of_each_vector(name: str, device: torch.device) -> None:
    """The specification reads back what the plain functions of the codes give."""
    layout = CODINGS[name]
    pages, (key, value) = empty_pages(layout, device), vectors(layout, 11, device)
    slots = torch.arange(11, device=device) + 32
    assert write(quant_write_naive, layout, pages, key, value, slots) == 0
    levels = codebooks(layout, device)
    for side, coding, x in (("key", layout.key, key), ("value", layout.value, value)):
        fields = {n: layout.plane(pages, f"{side}_{n}")[1] for n, _, _ in coding.sizes()}
        book = levels.get(f"{side}_levels")
        got = decode_vectors(fields, coding, book, torch.bfloat16)[:, :11].transpose(0, 1)
        if coding.axis == "tokens":
            wide = x.new_zeros(2, coding.group, coding.width)
            wide[:, :11] = x.transpose(0, 1)
            live = (torch.arange(coding.group, device=device) < 11).expand(2, -1)
            again = decode_groups(encode_groups(wide, coding, live), coding)[:, :11]
            expected = again.transpose(0, 1).bfloat16()
        else:
            expected = decode_vectors(encode_vectors(x, coding, book), coding, book, x.dtype)
        assert torch.equal(got, expected)


@FAST
@BY_NAME
def test_every_coding(implementation: Implementation, name: str, device: torch.device) -> None:
    layout = CODINGS[name]
    key, value = vectors(layout, 17, device)
    assert_matches_naive(
        implementation,
        layout,
        empty_pages(layout, device),
        key,
        value,
        scattered(layout, 17, device),
    )


@grid(ALL, CORE_BY_NAME)
def test_no_byte_but_those_of_the_tokens(
    implementation: Implementation, name: str, device: torch.device
) -> None:
    layout = CODINGS[name]
    key, value = vectors(layout, 5, device)
    slots = torch.tensor([34, 35, 36, 37, -1], device=device)
    first = empty_pages(layout, device)
    second = empty_pages(layout, device, fill=NO_BYTE ^ 0xFF)
    for pages in (first, second):
        write(implementation, layout, pages, key, value, slots, **ring(layout, 5, 2, device))
    expected = torch.zeros_like(first, dtype=torch.bool)
    for field in layout.fields:
        cells = layout.plane(expected, field.name)
        cells[1, :, 2:6] = True
        if layout.key.axis == "tokens" and field.name in ("key_scale", "key_zero"):
            cells[1, :, : layout.key.group] = True
        elif layout.key.axis == "tokens" and field.name == "key_codes":
            cells[1, :, :6] = True
    assert torch.equal(first == second, expected)


def ring(
    layout: CodedPage, n: int, heads: int, device: torch.device, size: int = 0, slot: int = 1
) -> dict[str, Tensor]:
    """Exact recent keys of some slots, where the layout has use of them."""
    if layout.key.axis == "channels":
        return {}
    rng = torch.Generator().manual_seed(5)
    shape = (3, size or layout.key.group, heads, layout.key.width)
    recent = torch.randn(shape, generator=rng).to(device, torch.bfloat16)
    recent_slots = torch.full((n,), slot, dtype=torch.int64, device=device)
    return {"recent_key": recent, "recent_slots": recent_slots}


@grid(
    FAST,
    pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str),
    pytest.mark.parametrize("name", ["int4", "int3", "sums", "outliers", "fp8", "tokens, 2 bits"]),
)
def test_dtypes(
    implementation: Implementation, name: str, dtype: torch.dtype, device: torch.device
) -> None:
    layout = CODINGS[name]
    key, value = vectors(layout, 9, device, dtype=dtype)
    slots = scattered(layout, 9, device).int()
    pages = empty_pages(layout, device)
    assert_matches_naive(implementation, layout, pages, key, value, slots)


@FAST
@pytest.mark.parametrize(
    ("bits", "dtype"), [(16, torch.float16), (16, torch.bfloat16), (32, torch.float32)], ids=str
)
def test_plain_vectors_keep_their_bits(
    implementation: Implementation, bits: int, dtype: torch.dtype, device: torch.device
) -> None:
    layout = CodedPage(Coding(24, bits, "plain"), Coding(64, 4))
    key, value = vectors(layout, 4, device, dtype=dtype)
    key[0, 0, 0] = -0.0
    key[1, 0] = float("inf")
    pages, slots = empty_pages(layout, device), torch.arange(4, device=device)
    assert write(implementation, layout, pages, key, value, slots) == 24
    stored = layout.plane(pages, "key_codes")[0, :, :4].contiguous().view(dtype).transpose(0, 1)
    key[1, 0] = 0.0
    as_bytes = (x.contiguous().view(torch.uint8) for x in (stored, key))
    assert torch.equal(*as_bytes)


@grid(
    FAST,
    pytest.mark.parametrize("block_size", [16, 32, 64, 128]),
    pytest.mark.parametrize("head_size", [64, 96, 128, 256]),
)
def test_shapes(
    implementation: Implementation, head_size: int, block_size: int, device: torch.device
) -> None:
    for key in (Coding(head_size, 4), Coding(head_size, 2, group=16, axis="tokens")):
        layout = CodedPage(key, Coding(head_size, 2, group=32))
        x, y = vectors(layout, 3, device, heads=3, dtype=torch.float16)
        slots = torch.arange(3, device=device) + block_size + 14
        pages = empty_pages(layout, device, heads=3, block_size=block_size)
        assert_matches_naive(implementation, layout, pages, x, y, slots)


@pytest.mark.parametrize("block_size", [1, 7])
def test_blocks_of_odd_sizes(block_size: int, device: torch.device) -> None:
    for name in ("int4", "odd outliers"):
        layout = CODINGS[name]
        key, value = vectors(layout, 5, device)
        slots = torch.tensor([0, 3, -1, 5, 6], device=device)
        for implementation in (quant_write_triton, quant_write_vectorized):
            pages = empty_pages(layout, device, blocks=7, block_size=block_size)
            assert_matches_naive(implementation, layout, pages, key, value, slots)


@FAST
def test_keys_and_values_of_one_codebook(
    implementation: Implementation, device: torch.device
) -> None:
    layout = CODINGS["codebook of 3 bits"]
    key, value = vectors(layout, 9, device)
    slots, book = scattered(layout, 9, device), torch.tensor(LEVELS[3], device=device)
    pages, expected = empty_pages(layout, device), empty_pages(layout, device)
    levels = {"key_levels": book, "value_levels": book}
    implementation(key, value, pages, slots, layout, **levels)
    quant_write_naive(key, value, expected, slots, layout, **levels)
    assert_same_pages(pages, expected, layout, key, value, slots)


@FAST
@pytest.mark.parametrize("name", ["int4", "outliers", "plain", "tokens, 3 bits"])
def test_strides(implementation: Implementation, name: str, device: torch.device) -> None:
    """Keys and values cut out of one projection; pages of several layers in one allocation."""
    layout = CODINGS[name]
    width = max(layout.key.width, layout.value.width)
    rng = torch.Generator().manual_seed(1)
    wide = torch.randn(9, 3, 2, width + 3, generator=rng).to(device, torch.bfloat16)
    key, value = wide[:, 0, :, 1 : layout.key.width + 1], wide[:, 2, :, : layout.value.width]
    memory = torch.full((2, 3, 3, 32, layout.bytes_per_token), NO_BYTE, dtype=torch.uint8)
    memory = memory.to(device)
    pages = memory[:, :, 1].transpose(0, 1)
    slots = scattered(layout, 9, device)
    assert_matches_naive(implementation, layout, pages, key, value, slots)
    pages.fill_(NO_BYTE)
    assert (memory == NO_BYTE).all()


@grid(ALL, CORE_BY_NAME, pytest.mark.parametrize("bad", [float("nan"), float("inf")]))
def test_what_is_not_finite_is_zero_and_counted(
    implementation: Implementation, name: str, bad: float, device: torch.device
) -> None:
    layout = CODINGS[name]
    key, value = vectors(layout, 6, device)
    slots = torch.arange(6, device=device) + 33
    slots[-1] = -1
    for x in (key, value):
        x[1, 0, 3] = x[2, 1, x.shape[2] - 1] = x[5, 0, 1] = 0.0
    expected, pages = empty_pages(layout, device), empty_pages(layout, device)
    more = ring(layout, 6, 2, device)
    assert write(implementation, layout, expected, key, value, slots, **more) == 0
    for x in (key, value):
        x[1, 0, 3] = x[2, 1, x.shape[2] - 1] = x[5, 0, 1] = bad
    assert write(implementation, layout, pages, key, value, slots, **more) == 4
    assert torch.equal(pages, expected)


@grid(
    FAST,
    pytest.mark.parametrize("name", ["int2", "fp8", "codebook of 4 bits", "tokens, 2 bits"]),
    pytest.mark.parametrize("content", ["zeros", "constant", "huge", "tiny", "signed zeros"]),
    pairs=[("name", "content")],
)
def test_extreme_vectors(
    implementation: Implementation, name: str, content: str, device: torch.device
) -> None:
    layout = CODINGS[name]
    key, value = vectors(layout, 3, device, dtype=torch.float32)
    for x in (key, value):
        if content == "zeros":
            x.zero_()
        elif content == "constant":
            x.fill_(-3.3)
        elif content == "huge":
            x.mul_(1e30)
        elif content == "tiny":
            x.mul_(1e-9)
        else:
            x.copy_(torch.where(x > 0, 0.0, -0.0))
    pages, slots = empty_pages(layout, device), torch.tensor([3, 4, 5], device=device)
    if name != "codebook of 4 bits" or content in ("zeros", "signed zeros"):
        assert_matches_naive(implementation, layout, pages, key, value, slots)
    else:
        write(implementation, layout, pages, key, value, slots)
        expected = empty_pages(layout, device)
        write(quant_write_naive, layout, expected, key, value, slots)
        # All elements may lie on bounds here: what is read back is what counts.
        for side, coding in (("key", layout.key), ("value", layout.value)):
            read = [
                decode_vectors(
                    {n: layout.plane(p, f"{side}_{n}")[0, :, 3:6] for n in ("codes", "scale")},
                    coding,
                    torch.tensor(LEVELS[coding.bits], device=device),
                )
                for p in (pages, expected)
            ]
            torch.testing.assert_close(*read, rtol=2e-3, atol=1e-7)


@FAST
def test_every_e4m3_rounding(implementation: Implementation, device: torch.device) -> None:
    """A vector whose scale is 1 holds every code, every tie between two and both its sides."""
    codes = torch.arange(0x7F, dtype=torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    above, below = (torch.nextafter(ties, torch.tensor(to)) for to in (1e9, -1e9))
    x = torch.cat([numbers, ties, above, below, torch.tensor([2**-10, 2**-11, 1e-30, 447.9])])
    x = torch.cat([x, -x]).clamp(-448, 448)
    x = torch.cat([x, x.new_zeros(-len(x) % 4)])
    layout = same(Coding(len(x), 8, "fp8"))
    vector = x.to(device).view(1, 1, -1)
    pages = empty_pages(layout, device, heads=1, blocks=1)
    write(implementation, layout, pages, vector, vector, torch.zeros(1, device=device).long())
    assert layout.plane(pages, "key_scale")[0, 0, 0].tolist() == [0x00, 0x3C]
    expected = x.to(torch.float8_e4m3fn).view(torch.uint8).to(device)
    # The specification has no negative zero before it scales.
    expected = torch.where((x == 0).to(device), 0, expected)
    assert torch.equal(layout.plane(pages, "key_codes")[0, 0, 0], expected)


@ALL
@pytest.mark.parametrize("steps", [[40], [1] * 40, [7, 1, 1, 16, 15], [33, 7], [20, 12, 8]])
def test_groups_end_as_if_written_at_once(
    implementation: Implementation, steps: list[int], device: torch.device
) -> None:
    """Whatever the steps, tokens kept exact between them give the codes of all their tokens, and
    those of an open group are the codes of its tokens so far."""
    if implementation is quant_write_triton and len(steps) > 30:
        steps = [5] * 8
    layout, group = CODINGS["tokens, 2 bits"], 16
    key, value = vectors(layout, 40, device)
    table = [2, 0]
    slots = torch.tensor([table[t // 32] * 32 + t % 32 for t in range(40)], device=device)
    recent = torch.full((2, group, 2, 64), float("nan"), dtype=key.dtype, device=device)
    pages = empty_pages(layout, device)
    done = 0
    for n in steps:
        part = slice(done, done + n)
        recent_slots = torch.ones(n, dtype=torch.int64, device=device)
        write(
            implementation,
            layout,
            pages,
            key[part],
            value[part],
            slots[part],
            recent_key=recent,
            recent_slots=recent_slots,
        )
        for t in range(done, done + n):
            recent[1, t % group] = key[t]
        done += n
        expected = empty_pages(layout, device)
        write(quant_write_naive, layout, expected, key[:done], value[:done], slots[:done])
        assert torch.equal(pages, expected)


@grid(
    FAST,
    pytest.mark.parametrize("name", ["tokens, 2 bits", "tokens, 3 bits", "tokens, 8 bits"]),
    pytest.mark.parametrize("rings", [1, 2]),
)
def test_recent_keys_and_codes_before_a_step(
    implementation: Implementation, name: str, rings: int, device: torch.device
) -> None:
    """Groups that begin before the step, with a recent slot and without one, in one call."""
    layout = CODINGS[name]
    group = layout.key.group
    key, value = vectors(layout, 9, device)
    pages = empty_pages(layout, device, block_size=64)
    first, second = vectors(layout, 7, device, seed=3)
    for start in (0, 64, 64 + group):
        at = torch.arange(7, device=device) + start
        write(quant_write_naive, layout, pages, first, second, at)
    runs = [range(7, 10), range(71, 74), range(64 + group + 7, 64 + group + 10)]
    slots = torch.tensor([s for run in runs for s in run], device=device)
    more = ring(layout, 9, 2, device, size=group * rings)
    more["recent_slots"] = torch.tensor([2, 2, 2, -1, -1, -1, 0, 0, 0], device=device).int()
    # One element of the recent keys is not finite; it was counted when it came.
    more["recent_key"][0, 1, 1, 5] = float("nan")
    assert_matches_naive(implementation, layout, pages, key, value, slots, **more)


@pytest.mark.parametrize("name", ["tokens, 2 bits", "tokens, 3 bits", "tokens, 8 bits"])
def test_a_program_codes_the_groups_of_a_window(
    name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Of no token, of one for each, of some that go on in the next window; all heads but one in
    the first tile."""
    monkeypatch.setattr("kvplug_kernels.quant_write.kernel.FEW_TOKENS", 0)
    monkeypatch.setattr("kvplug_kernels.quant_write.kernel.TILE", 2 * 32 * 128)
    layout, group = CODINGS[name], CODINGS[name].key.group
    runs = [[-1] * group, range(64, 64 + group + 9), [5, 37, 192 + 3, -1, 192 + group + 1]]
    slots = torch.tensor([s for run in runs for s in run], device=device)
    key, value = vectors(layout, len(slots), device, heads=3)
    pages = empty_pages(layout, device, blocks=8, heads=3)
    assert_matches_naive(quant_write_triton, layout, pages, key, value, slots)


@ALL
def test_codes_of_an_open_group_drift_little_without_recent_keys(
    implementation: Implementation, device: torch.device
) -> None:
    layout = CODINGS["tokens, 8 bits"]
    key, value = vectors(layout, 12, device)
    pages = empty_pages(layout, device)
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        slots = torch.arange(12, device=device)[part]
        write(implementation, layout, pages, key[part], value[part], slots)
    fields = {n: layout.plane(pages, f"key_{n}")[0] for n in ("codes", "scale", "zero")}
    off = (decode_groups(fields, layout.key)[:, :12].transpose(0, 1) - key.float()).abs()
    step = (key.float().amax(0) - key.float().amin(0)) / 255
    assert (off <= 1.6 * step + 0.01).all()


@FAST
@pytest.mark.parametrize("padding", [-1, -7, -(2**40)])
def test_every_slot_is_padding(
    implementation: Implementation, padding: int, device: torch.device
) -> None:
    for name in ("int4", "tokens, 2 bits"):
        layout = CODINGS[name]
        key, value = vectors(layout, 3, device)
        key[1] = float("nan")
        pages = empty_pages(layout, device)
        slots = torch.full((3,), padding, device=device)
        assert write(implementation, layout, pages, key, value, slots) == 0
        assert (pages == NO_BYTE).all()


@FAST
@pytest.mark.parametrize(("n", "heads"), [(0, 2), (2, 0)])
def test_empty(implementation: Implementation, n: int, heads: int, device: torch.device) -> None:
    for name in ("int4", "tokens, 2 bits"):
        layout = CODINGS[name]
        key, value = vectors(layout, n, device, heads=heads)
        pages = empty_pages(layout, device, heads=heads)
        slots = torch.arange(n, device=device)
        assert write(implementation, layout, pages, key, value, slots) == 0
        assert (pages == NO_BYTE).all()


@FAST
def test_without_a_counter(implementation: Implementation, device: torch.device) -> None:
    layout = CODINGS["int4"]
    key, value = vectors(layout, 3, device)
    slots = torch.arange(3, device=device)
    pages, expected = empty_pages(layout, device), empty_pages(layout, device)
    implementation(key, value, pages, slots, layout)
    write(quant_write_naive, layout, expected, key, value, slots)
    assert torch.equal(pages, expected)


@FAST
def test_the_counter_adds_up(implementation: Implementation, device: torch.device) -> None:
    layout = CODINGS["int4"]
    key, value = vectors(layout, 3, device)
    key[0, 0, :5] = float("nan")
    count = torch.tensor([2**40], device=device)
    for _ in range(2):
        implementation(
            key,
            value,
            empty_pages(layout, device),
            torch.arange(3, device=device),
            layout,
            nonfinite=count,
        )
    assert int(count) == 2**40 + 10


@pytest.mark.parametrize("bound", ["CHUNK_BYTES", "FEW_BYTES"])
@pytest.mark.parametrize("name", ["int4", "odd outliers", "narrow plain", "tokens, 2 bits"])
def test_vectorized_in_parts(
    name: str, bound: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    import kvplug_kernels.quant_write.vectorized as vectorized

    monkeypatch.setattr(vectorized, bound, 1)
    layout = CODINGS[name]
    key, value = vectors(layout, 40, device)
    slots, more = scattered(layout, 40, device), ring(layout, 40, 2, device)
    pages = empty_pages(layout, device)
    assert_matches_naive(quant_write_vectorized, layout, pages, key, value, slots, **more)


def test_triton_is_one_launch(launches: Launches, device: torch.device) -> None:
    for name in ("int4", "tokens, 2 bits"):
        layout = CODINGS[name]
        key, value = vectors(layout, 3, device)
        write(
            quant_write_triton,
            layout,
            empty_pages(layout, device),
            key,
            value,
            torch.arange(3, device=device),
        )
        assert [kernel for kernel, _ in launches] == ["quant_write_kernel"]
        launches.clear()


def test_dispatch(launches: Launches, device: torch.device) -> None:
    layout = CODINGS["int4"]
    key, value = vectors(layout, 3, device)
    slots = torch.arange(3, device=device)
    pages, expected = empty_pages(layout, device), empty_pages(layout, device)
    write(quant_write, layout, pages, key, value, slots)
    assert len(launches) == (1 if device.type == "cuda" else 0)
    write(quant_write_naive, layout, expected, key, value, slots)
    assert torch.equal(pages, expected)


TOKENS = CODINGS["tokens, 2 bits"]
BOOK = CodedPage(Coding(64, 3, "codebook"), Coding(64, 3, "codebook"))
PLAIN = CODINGS["plain"]
RECENT = torch.zeros(2, 16, 2, 64)


@ALL
@pytest.mark.parametrize(
    ("message", "layout", "changes"),
    [
        pytest.param(r"key must have dtype", None, {"key": torch.zeros(5, 2, 64).int()}, id="key"),
        pytest.param(r"key must have shape", None, {"key": torch.zeros(5, 3, 64)}, id="heads"),
        pytest.param(r"key must have shape", None, {"key": torch.zeros(5, 2, 60)}, id="width"),
        pytest.param(
            r"key must be contiguous", None, {"key": torch.zeros(5, 2, 128)[..., ::2]}, id="stride"
        ),
        pytest.param(
            r"value must have shape", None, {"value": torch.zeros(5, 2, 32)}, id="value-width"
        ),
        pytest.param(r"value must have 5 tokens", None, {"value": torch.zeros(4, 2, 64)}, id="n"),
        pytest.param(r"key must have 16 bits", PLAIN, {}, id="plain-dtype"),
        pytest.param(r"pages must be uint8", None, {"pages": torch.zeros(2, 2, 16, 72)}, id="page"),
        pytest.param(
            r"pages must have 72 bytes a token",
            None,
            {"pages": torch.zeros(2, 2, 16, 76, dtype=torch.uint8)},
            id="page-bytes",
        ),
        pytest.param(r"slots must have dtype", None, {"slots": torch.zeros(5)}, id="slots"),
        pytest.param(
            r"slots must have shape",
            None,
            {"slots": torch.zeros(4, dtype=torch.int64)},
            id="n-slot",
        ),
        pytest.param(r"key_levels must be given", BOOK, {}, id="no-levels"),
        pytest.param(
            r"key_levels must have shape", BOOK, {"key_levels": torch.zeros(4)}, id="levels-shape"
        ),
        pytest.param(
            r"value_levels must have dtype",
            BOOK,
            {"key_levels": torch.zeros(8), "value_levels": torch.zeros(8).half()},
            id="levels-dtype",
        ),
        pytest.param(r"recent_slots must be given", TOKENS, {"recent_key": RECENT}, id="no-slots"),
        pytest.param(
            r"recent_slots must have dtype",
            TOKENS,
            {"recent_key": RECENT, "recent_slots": torch.zeros(5)},
            id="recent_slots-dtype",
        ),
        pytest.param(
            r"recent_key must have shape", TOKENS, {"recent_key": RECENT[:, :, :1]}, id="recent"
        ),
        pytest.param(
            r"recent_key must hold a multiple", TOKENS, {"recent_key": RECENT[:, :8]}, id="ring"
        ),
        pytest.param(
            r"nonfinite must have dtype",
            None,
            {"nonfinite": torch.zeros(1, dtype=torch.int32)},
            id="nonfinite",
        ),
    ],
)
def test_rejects(
    implementation: Implementation,
    message: str,
    layout: CodedPage | None,
    changes: dict[str, Any],
    device: torch.device,
) -> None:
    layout = layout or CODINGS["int4"]
    arguments: dict[str, Any] = {
        "key": torch.zeros(5, 2, 64),
        "value": torch.zeros(5, 2, 64),
        "pages": torch.zeros(2, 2, 16, layout.bytes_per_token, dtype=torch.uint8),
        "slots": torch.zeros(5, dtype=torch.int64),
        **changes,
    }
    moved = {name: to_device(tensor, device) for name, tensor in arguments.items()}
    with pytest.raises(ValueError, match=rf"^{message}.*\.$"):
        implementation(**moved, layout=layout)


def test_rejects_another_device() -> None:
    layout = CODINGS["int4"]
    key, value = vectors(layout, 3, torch.device("cpu"))
    pages = empty_pages(layout, torch.device("cpu"))
    with pytest.raises(ValueError, match="slots must be on cpu like the other tensors, got meta"):
        quant_write(key, value, pages, torch.zeros(3, dtype=torch.int64, device="meta"), layout)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", ["int4", "fp8", "tokens, 2 bits"])
def test_cuda_graph_replay(name: str, device: torch.device) -> None:
    layout = CODINGS[name]
    key, value = vectors(layout, 9, device)
    fresh = vectors(layout, 9, device, seed=2)
    slots, others = scattered(layout, 9, device), scattered(layout, 9, device, seed=4)
    pages, expected = empty_pages(layout, device), empty_pages(layout, device)
    count = torch.zeros(1, dtype=torch.int64, device=device)
    quant_write(key, value, empty_pages(layout, device), slots, layout, nonfinite=count)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quant_write(key, value, pages, slots, layout, nonfinite=count)
    key.copy_(fresh[0])
    value.copy_(fresh[1])
    slots.copy_(others)
    graph.replay()
    torch.cuda.synchronize()
    write(quant_write_naive, layout, expected, key, value, slots)
    assert_same_pages(pages, expected, layout, key, value, slots)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a cache beyond 2**31 bytes")
@pytest.mark.parametrize("name", ["int4", "tokens, 2 bits"])
def test_offsets_beyond_int32(name: str, device: torch.device) -> None:
    layout = CODINGS[name]
    pages = empty_pages(layout, device, blocks=2**20, heads=2, block_size=32)
    assert pages.numel() > 2**31
    key, value = vectors(layout, 1, device)
    slots = torch.tensor([pages.shape[0] * 32 - 32], device=device)
    write(quant_write_triton, layout, pages, key, value, slots)
    expected = empty_pages(layout, device, blocks=1)
    write(quant_write_naive, layout, expected, key, value, torch.zeros_like(slots))
    assert torch.equal(pages[-1], expected[0])


COMPILED = {
    "int4": CodedPage(Coding(128, 4), Coding(128, 4)),
    "int3 in groups, outliers and sums": same(Coding(104, 3, group=32, outliers=8, sums=True)),
    "fp8 and plain": CodedPage(Coding(96, 8, "fp8"), Coding(96, 16, "plain")),
    "codebook": same(Coding(256, 4, "codebook")),
    "tokens": CodedPage(
        Coding(128, 2, group=32, axis="tokens", anchored=True), Coding(128, 2, group=32)
    ),
    "tokens, 3 bits": CodedPage(Coding(96, 3, group=32, axis="tokens"), Coding(96, 3)),
}


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        COMPILED, ["int3 in groups, outliers and sums", "fp8 and plain", "codebook", "tokens"]
    ),
)
def test_compiles_for_cuda(compile_for_cuda: CompileForCuda, name: str) -> None:
    layout = COMPILED[name]
    constants: dict[str, Any] = {**kernel_constants(layout, 8, 32), "RING": 32}
    constants |= group_constants(layout, 8, 4096)
    strides = ("kn", "kh", "vn", "vh", "pb", "ph", "rl", "rt", "rh")
    signature = {
        **dict.fromkeys(("key", "value"), "*bf16"),
        **dict.fromkeys(("slots", "nonfinite"), "*i64"),
        **dict.fromkeys(("n", "n_key", *(f"stride_{s}" for s in strides)), "i32"),
        "pages": "*u8",
        "halves": "*i16",
    }
    for side, coding in (("key", layout.key), ("value", layout.value)):
        signature |= {f"{side}_words": "*i16"} if coding.kind == "plain" else {}
        signature |= {f"{side}_levels": "*fp32"} if coding.kind == "codebook" else {}
    if layout.key.axis == "tokens":
        signature |= {"recent": "*bf16", "recent_slots": "*i64"}
    for name_ in (
        "key_words",
        "value_words",
        "key_levels",
        "value_levels",
        "recent",
        "recent_slots",
    ):
        if name_ not in signature:
            constants[name_] = None
    compile_for_cuda(
        "kvplug_kernels.quant_write.kernel", "quant_write_kernel", signature, constants
    )
