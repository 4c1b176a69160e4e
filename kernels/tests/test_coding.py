from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from grid import grid
from hypothesis import given, settings
from torch import Tensor

from kvplug_kernels.coding import (
    FP16_MAX,
    CodedPage,
    Coding,
    check_coded_pages,
    decode_groups,
    decode_vectors,
    encode_groups,
    encode_vectors,
    finite,
    pack,
    plane,
    unpack,
)

LEVELS = {bits: torch.linspace(-2, 2, 1 << bits) for bits in (2, 3, 4)}
GRAINS = {2: 4, 3: 8, 4: 2, 8: 1}
"""Codes that fill a whole number of bytes."""


def halves(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.float16).float()


@grid(
    pytest.mark.parametrize("bits", [2, 3, 4, 8]),
    pytest.mark.parametrize("units", [1, 2, 3, 8, 12, 32]),
)
def test_packing_round_trips(bits: int, units: int) -> None:
    n = GRAINS[bits] * units
    rng = torch.Generator().manual_seed(n)
    codes = torch.randint(0, 1 << bits, (3, 2, n), generator=rng, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 2, n * bits // 8)
    assert torch.equal(unpack(packed, bits, n), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (8, [1, 255], [1, 255]),
        (4, [1, 2, 3, 15], [0x21, 0xF3]),
        (4, [1, 2, 3, 4, 5, 6], [0x41, 0x52, 0x63]),
        (4, [1, 2, 3, 4, 5, 6, 7, 8], [0x31, 0x75, 0x42, 0x86]),
        (2, [0, 1, 2, 3], [0b11_10_01_00]),
        (2, [3, 0, 0, 1, 0, 2, 2, 0], [0b01_00_00_11, 0b00_10_10_00]),
        (3, [0, 1, 2, 3, 4, 5, 6, 7], [0b10_00_10_00, 0b11_01_11_01, 0b11110000]),
        (3, [0, 1, 2, 3, 4, 5, 6, 7] * 2, [0x88, 0x88, 0xDD, 0xDD, 0xF0, 0xF0]),
    ],
)
def test_packing_by_hand(bits: int, codes: list[int], packed: list[int]) -> None:
    assert pack(torch.tensor(codes), bits).tolist() == packed


INT4 = {
    64: [
        ("key_codes", 0, 32),
        ("value_codes", 32, 32),
        ("key_scale", 64, 2),
        ("key_zero", 66, 2),
        ("value_scale", 68, 2),
        ("value_zero", 70, 2),
    ],
    128: [
        ("key_codes", 0, 64),
        ("value_codes", 64, 64),
        ("key_scale", 128, 2),
        ("key_zero", 130, 2),
        ("value_scale", 132, 2),
        ("value_zero", 134, 2),
    ],
}


@pytest.mark.parametrize("head_size", [64, 128])
def test_offsets_of_int4(head_size: int) -> None:
    page = CodedPage(Coding(head_size, 4), Coding(head_size, 4))
    assert [(f.name, f.offset, f.size) for f in page.fields] == INT4[head_size]
    assert page.bytes_per_token == {64: 72, 128: 136}[head_size]


def test_offsets_of_kivi() -> None:
    page = CodedPage(Coding(64, 2, group=32, axis="tokens"), Coding(64, 2))
    assert [(f.name, f.offset, f.size) for f in page.fields] == [
        ("key_codes", 0, 16),
        ("value_codes", 16, 16),
        ("key_scale", 32, 4),
        ("key_zero", 36, 4),
        ("value_scale", 40, 2),
        ("value_zero", 42, 2),
    ]
    assert page.bytes_per_token == 44


def test_saved_bytes() -> None:
    """Bytes of bfloat16 over those stored, scales and zeros included."""

    def ratio(page: CodedPage, width: int) -> float:
        return 4 * width / page.bytes_per_token

    for width, least4, least2 in ((64, 3.5, 5.0), (128, 3.7, 6.0)):
        assert ratio(CodedPage(Coding(width, 4), Coding(width, 4)), width) >= least4
        assert ratio(CodedPage(Coding(width, 2), Coding(width, 2)), width) >= least2
        kivi = CodedPage(Coding(width, 2, group=32, axis="tokens"), Coding(width, 2))
        assert ratio(kivi, width) >= least2


@st.composite
def codings(draw: st.DrawFn) -> Coding:
    kind = draw(st.sampled_from(["int", "fp8", "codebook", "plain"]))
    if kind == "plain":
        return Coding(draw(st.integers(1, 130)), draw(st.sampled_from([16, 32])), "plain")
    bits = {"int": [2, 3, 4, 8], "fp8": [8], "codebook": [2, 3, 4]}[kind]
    n_bits = draw(st.sampled_from(bits))
    group = GRAINS[n_bits] * draw(st.integers(1, 16))
    inner = group * draw(st.integers(1, 4))
    outliers = draw(st.integers(0, 9))
    sums = kind == "int" and draw(st.booleans())
    return Coding(inner + outliers, n_bits, kind, group, sums=sums, outliers=outliers)


@settings(max_examples=100, deadline=None)
@given(key=codings(), value=codings(), block_size=st.sampled_from([16, 32, 48, 128]))
def test_fields_fill_a_cell_without_overlap(key: Coding, value: Coding, block_size: int) -> None:
    page = CodedPage(key, value)
    at = 0
    for field in page.fields:
        assert field.offset == at and field.size > 0
        at += field.size
        # An element of two or four bytes can be loaded as one.
        element = {"float16": 2, "uint16": 2, "float16 or bfloat16": 2, "float32": 4}
        size = element.get(field.dtype, 1)
        assert (block_size * field.offset) % size == 0 and field.size % size == 0
    assert page.bytes_per_token % 4 == 0 and 0 <= page.bytes_per_token - at < 4
    pages = torch.zeros(2, 3, block_size, page.bytes_per_token, dtype=torch.uint8)
    for field in page.fields:
        plane(pages, field).add_(1)
    assert pages.max() == 1, "fields overlap"
    assert int(pages.sum()) == 2 * 3 * block_size * at


@settings(max_examples=100, deadline=None)
@given(coding=codings(), seed=st.integers(0, 99))
def test_encoded_fields_have_the_sizes_of_the_layout(coding: Coding, seed: int) -> None:
    x = torch.randn(2, 3, coding.width, generator=torch.Generator().manual_seed(seed))
    x = x.half() if coding.bits == 16 else x
    levels = LEVELS.get(coding.bits)
    fields = encode_vectors(x, coding, levels)
    assert {n: f.shape[-1] for n, f in fields.items()} == {n: s for n, s, _ in coding.sizes()}
    assert all(f.dtype == torch.uint8 and f.shape[:-1] == (2, 3) for f in fields.values())
    assert decode_vectors(fields, coding, levels, x.dtype).shape == x.shape


@grid(
    pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 300.0, 3e4]),
    pytest.mark.parametrize("shift", [0.0, 10.0, -5000.0]),
    pytest.mark.parametrize("bits", [2, 3, 4, 8]),
    pytest.mark.parametrize("group", [0, 16]),
    pairs=[("bits", "scale")],
)
def test_int_codes_are_half_a_step_off_at_most(
    bits: int, group: int, scale: float, shift: float
) -> None:
    coding = Coding(64, bits, group=group)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(bits)) * scale + shift
    x = x.clamp(-FP16_MAX, FP16_MAX)
    fields = encode_vectors(x, coding)
    off = (decode_vectors(fields, coding) - x).abs().unflatten(-1, (coding.groups, -1)).amax(-1)
    step, zero = halves(fields["scale"]), halves(fields["zero"])
    # Scale and zero are float16: half a unit of their last place, the scale's for each step.
    rounding = zero.abs() * 2**-11 + step * (coding.levels - 1) * 2**-10 + 2**-24 * coding.levels
    assert (off <= step / 2 + rounding).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_ends_of_a_range_are_codes(bits: int) -> None:
    top = (1 << bits) - 1
    x = torch.arange(top + 1.0).repeat(8)[: 8 * (top + 1)]
    fields = encode_vectors(x, Coding(len(x), bits))
    assert torch.equal(unpack(fields["codes"], bits, len(x)), x.to(torch.uint8))
    assert halves(fields["scale"]).tolist() == [1.0] and halves(fields["zero"]).tolist() == [0.0]


@pytest.mark.parametrize("value", [0.0, -0.0, 3.0, -1.5])
def test_constant_vectors(value: float) -> None:
    x = torch.full((16,), value)
    fields = encode_vectors(x, Coding(16, 8))
    assert not halves(fields["scale"]).any() and not fields["codes"].any()
    assert torch.equal(decode_vectors(fields, Coding(16, 8)), x + 0.0)
    fp8 = Coding(16, 8, "fp8")
    torch.testing.assert_close(
        decode_vectors(encode_vectors(x, fp8), fp8), x, rtol=2**-11, atol=0, check_stride=False
    )


def test_fp8_error() -> None:
    coding = Coding(64, 8, "fp8")
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    fields = encode_vectors(x, coding)
    off = (decode_vectors(fields, coding) - x).abs()
    # Three bits of mantissa; below 2**-6 of the scale, steps of 2**-9.
    assert (off <= x.abs() * 2**-4 * 1.01 + halves(fields["scale"]) * 2**-10 * 1.01).all()


def test_codebook_picks_the_nearest_level_and_fits_the_scale() -> None:
    coding, levels = Coding(32, 3, "codebook"), LEVELS[3]
    x = 7 * torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    fields = encode_vectors(x, coding, levels)
    unit = x / x.square().mean(-1, keepdim=True).sqrt()
    nearest = (unit[..., None] - levels).abs().argmin(-1)
    assert torch.equal(unpack(fields["codes"], 3, 32).long(), nearest)
    decoded = decode_vectors(fields, coding, levels)
    for other in (0.99, 1.01):
        assert ((decoded - x).norm(dim=-1) <= (decoded * other - x).norm(dim=-1)).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebooks_of_few_and_of_many_vectors(bits: int) -> None:
    coding, levels = Coding(32, bits, "codebook"), LEVELS[bits]
    x = torch.randn(1024, 32, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    many = encode_vectors(x, coding, levels)
    few = [encode_vectors(part, coding, levels) for part in x.split(64)]
    for name, found in many.items():
        assert torch.equal(found, torch.cat([part[name] for part in few]))


def test_outliers_are_coded_apart() -> None:
    coding = Coding(64, 2, outliers=4)
    x = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    x[:, :4] *= 1000
    fields = encode_vectors(x, coding)
    without = encode_vectors(x[:, 4:], Coding(60, 2))
    assert all(torch.equal(fields[name], found) for name, found in without.items())
    off = (decode_vectors(fields, coding) - x)[:, :4].abs()
    assert (off <= halves(fields["outlier_scale"]) * 0.51 + 4).all()


def test_sums_are_those_of_the_codes() -> None:
    coding = Coding(256, 8, group=128, sums=True)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    x[0] = 1.0
    x[0, ::128] = 0.0
    fields = encode_vectors(x, coding)
    codes = fields["codes"].unflatten(-1, (2, 128)).long().sum(-1)
    low, high = fields["sum"].unflatten(-1, (2, 2)).long().unbind(-1)
    assert torch.equal(low + 256 * high, codes)
    assert codes[0, 0] == 127 * 255


def test_groups_along_tokens() -> None:
    coding = Coding(64, 4, group=16, axis="tokens")
    x = torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(0))
    fields = encode_groups(x, coding)
    assert {n: f.shape[-1] for n, f in fields.items()} == {n: s for n, s, _ in coding.sizes()}
    by_channel = encode_vectors(x.mT, Coding(16, 4))
    codes = unpack(by_channel["codes"], 4, 16).mT
    assert torch.equal(unpack(fields["codes"], 4, 64), codes)
    # Token i carries the scales of channels 4 i to 4 i + 3.
    assert torch.equal(halves(fields["scale"]).flatten(1), halves(by_channel["scale"])[..., 0])
    assert torch.equal(halves(fields["zero"]).flatten(1), halves(by_channel["zero"])[..., 0])
    decoded = decode_groups(fields, coding)
    assert torch.equal(decoded, decode_vectors(by_channel, Coding(16, 4)).mT)
    assert torch.equal(decode_vectors(fields, coding), decoded)
    two = {n: f[:2].flatten(0, 1) for n, f in fields.items()}
    assert torch.equal(decode_groups(two, coding), decoded[:2].flatten(0, 1))


def test_tokens_that_do_not_count_do_not_change_the_others() -> None:
    coding = Coding(32, 2, group=16, axis="tokens")
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    live = torch.arange(16) < 5
    other = torch.where(live[:, None], x, 1e4)
    a, b = encode_groups(x, coding, live), encode_groups(other, coding, live)
    assert torch.equal(a["scale"], b["scale"]) and torch.equal(a["zero"], b["zero"])
    assert torch.equal(a["codes"][:5], b["codes"][:5])


ALL_KINDS = [
    Coding(32, 4),
    Coding(32, 2, group=8, sums=True),
    Coding(32, 3, outliers=8),
    Coding(32, 8, "fp8"),
    Coding(32, 4, "codebook"),
    Coding(32, 32, "plain"),
]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("coding", ALL_KINDS, ids=lambda c: f"{c.kind}{c.bits}")
def test_what_is_not_finite_is_coded_as_zero(coding: Coding, bad: float) -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    x[1, [3, 20]] = bad
    zeroed = x.masked_fill(~x.isfinite(), 0)
    levels = LEVELS.get(coding.bits)
    got, expected = encode_vectors(x, coding, levels), encode_vectors(zeroed, coding, levels)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert decode_vectors(got, coding, levels).isfinite().all()


def test_what_float16_cannot_hold_is_its_largest_number() -> None:
    x = torch.tensor([1e30, -1e30, 65504.0, 65519.0, -0.0])
    got = finite(x)
    assert got.tolist() == [65504.0, -65504.0, 65504.0, 65504.0, 0.0]
    assert not torch.signbit(got[-1])
    for coding in (Coding(4, 2), Coding(4, 8, "fp8"), Coding(4, 4, "codebook")):
        fields = encode_vectors(x[:4], coding, LEVELS.get(coding.bits))
        assert decode_vectors(fields, coding, LEVELS.get(coding.bits)).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 64, "bits": 5}, "int codes have"),
        ({"width": 64, "bits": 4, "kind": "fp8"}, "fp8 codes have"),
        ({"width": 64, "bits": 8, "kind": "plain"}, "plain codes have"),
        ({"width": 64, "bits": 8, "kind": "codebook"}, "codebook codes have"),
        ({"width": 66, "bits": 2}, "66 elements of 2 bits do not fill whole bytes"),
        ({"width": 63, "bits": 4}, "63 elements of 4 bits do not fill whole bytes"),
        ({"width": 100, "bits": 3}, "100 elements of 3 bits do not fill whole bytes"),
        ({"width": 64, "bits": 4, "outliers": 3}, "61 elements of 4 bits"),
        ({"width": 64, "bits": 4, "outliers": 64}, "64 outliers leave no elements of 64"),
        ({"width": 0, "bits": 4}, "leave no elements"),
        ({"width": 64, "bits": 4, "group": 24}, "group of 24 does not divide 64"),
        ({"width": 64, "bits": 4, "group": -8}, "group of -8 does not divide"),
        ({"width": 64, "bits": 4, "group": 48, "axis": "tokens"}, "64 channels cannot be spread"),
        ({"width": 64, "bits": 4, "axis": "tokens", "sums": True, "group": 16}, "only int codes"),
        ({"width": 64, "bits": 4, "kind": "codebook", "sums": True}, "only int codes have sums"),
        ({"width": 64, "bits": 16, "kind": "plain", "outliers": 4}, "plain vectors have neither"),
    ],
)
def test_refused_codings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Coding(**arguments)


def test_values_are_not_grouped_along_tokens() -> None:
    with pytest.raises(ValueError, match="values are grouped along channels"):
        CodedPage(Coding(64, 4), Coding(64, 4, group=16, axis="tokens"))


def test_plain_needs_its_dtype() -> None:
    with pytest.raises(ValueError, match="16 bits cannot hold"):
        encode_vectors(torch.zeros(4), Coding(4, 16, "plain"))


def test_unknown_fields() -> None:
    with pytest.raises(KeyError):
        CodedPage(Coding(64, 8, "fp8"), Coding(64, 4)).field("key_zero")


PAGE = CodedPage(Coding(64, 4, group=16, axis="tokens"), Coding(64, 4))


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        (torch.zeros(2, 3, 16, PAGE.bytes_per_token), "pages must be uint8 with 4 dimensions"),
        (torch.zeros(3, 16, PAGE.bytes_per_token, dtype=torch.uint8), "with 4 dimensions"),
        (torch.zeros(2, 3, 16, 72, dtype=torch.uint8), "bytes a token, got 72"),
        (
            torch.zeros(2, 16, 3, PAGE.bytes_per_token, dtype=torch.uint8).transpose(1, 2),
            "pages must be contiguous within a page",
        ),
        (
            torch.zeros(2, 3, 24, PAGE.bytes_per_token, dtype=torch.uint8),
            "groups of 16 tokens do not fill blocks of 24",
        ),
        (
            torch.zeros(1 + 16 * PAGE.bytes_per_token, dtype=torch.uint8)[1:].view(
                1, 1, 16, PAGE.bytes_per_token
            ),
            "pages must be aligned to 4 bytes",
        ),
    ],
)
def test_refused_pages(pages: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_coded_pages("pages", pages, PAGE)


@pytest.mark.parametrize(
    ("kind", "bits"), [("int", 2), ("int", 3), ("int", 4), ("codebook", 3), ("codebook", 4)]
)
def test_fitting_lowers_the_error(kind: Any, bits: int) -> None:
    """Round by round, on vectors with a heavy tail; a constant vector is left as it is."""
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(500, 2, 64, generator=rng) * torch.randn(500, 2, 64, generator=rng).exp()
    x[0, 0] = 1.5
    levels = torch.linspace(-2.5, 2.5, 1 << bits) if kind == "codebook" else None
    errors = []
    for fit in range(4):
        coding = Coding(64, bits, kind, group=32, fit=fit)
        read = decode_vectors(encode_vectors(x, coding, levels), coding, levels)
        errors.append((read - x).square().sum(-1))
    assert errors[0].sum() > errors[1].sum() > errors[2].sum() > errors[3].sum()
    assert errors[2].sum() < 0.97 * errors[0].sum()
    if kind == "int":
        assert all(error[0, 0] == 0 for error in errors)


@pytest.mark.parametrize("options", [{"kind": "fp8", "bits": 8}, {"axis": "tokens", "group": 16}])
def test_only_codes_with_something_to_fit_are_fitted(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="only int codes along channels and codebooks are fitted"):
        Coding(**{"width": 64, "bits": 4, "fit": 1} | options)
