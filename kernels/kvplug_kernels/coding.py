"""Layout of coded K and V in a page, and the plain specification of the codes.

A page of ``block_size`` tokens of one KV head is ``block_size * bytes_per_token`` bytes, cut into
planes: field ``f`` of token ``t`` begins at byte ``block_size * f.offset + t * f.size``. So every
field of a page is one contiguous run, and all fields of one token, put one behind the other, are
its cell: what moves when the token moves.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Kind = Literal["int", "fp8", "codebook", "plain"]
Axis = Literal["channels", "tokens"]
KINDS: dict[Kind, int] = {"int": 0, "fp8": 1, "codebook": 2, "plain": 3}
"""Numbers of kinds, to kernels."""

FP8_MAX = 448.0
"""Largest finite number of e4m3."""
FP16_MAX = 65504.0


@dataclass(frozen=True)
class Coding:
    """Coding of one vector (K or V of one token and KV head).

    Attributes:
        width: Elements of the vector.
        bits: Bits of a code: 2, 3, 4 or 8; 16 or 32 for ``plain``.
        kind: ``int``: ``x ~ scale * code + zero``, codes ``0 .. 2**bits - 1``. ``fp8``: e4m3,
            ``x ~ scale * code``. ``codebook``: ``x ~ scale * levels[code]``. ``plain``: the
            elements themselves, as float16 or bfloat16 (16 bits) or float32 (32).
        group: Elements that share a scale; it divides ``width`` (along channels) or the block size
            (along tokens).
        axis: ``channels``: a group runs along the channels of one token. ``tokens``: along the
            tokens of one channel.
        sums: Store the sum of each group's codes (``int`` along channels only): the
            correction term of a product with asymmetric codes.
        outliers: Leading elements coded apart, as 8-bit ``int`` codes with a scale and a zero of
            their own per token. They count in ``width`` and are not in the groups.
        anchored: Move the zeros of a page's first group, along tokens, so that its first token is
            coded as precisely as float16 goes. The first token of a text is often an attention
            sink: most of the softmax rests on it, so what its key is off by changes the weight of
            all others.
        fit: Times that scale (and zero) are fitted to the chosen codes by least squares and codes
            chosen again, for ``int`` along channels and ``codebook``. Each round lowers the squared
            error at no byte more.

    Raises:
        ValueError: The options do not fit each other; the message names which.
    """

    width: int
    bits: int
    kind: Kind = "int"
    group: int = 0
    axis: Axis = "channels"
    sums: bool = False
    outliers: int = 0
    fit: int = 0
    anchored: bool = False

    def __post_init__(self) -> None:
        if self.group == 0:
            object.__setattr__(self, "group", self.inner)
        allowed = {"plain": (16, 32), "fp8": (8,), "codebook": (2, 3, 4), "int": (2, 3, 4, 8)}
        if self.bits not in allowed[self.kind]:
            raise ValueError(f"{self.kind} codes have {allowed[self.kind]} bits, not {self.bits}")
        pack = {2: 4, 3: 8, 4: 2}.get(self.bits, 1)
        if self.width < 1 or self.outliers < 0 or self.inner < 1:
            raise ValueError(f"{self.outliers} outliers leave no elements of {self.width}")
        if self.inner % pack:
            raise ValueError(f"{self.inner} elements of {self.bits} bits do not fill whole bytes")
        if self.kind == "plain" and (self.outliers or self.sums):
            raise ValueError("plain vectors have neither outliers nor sums")
        if self.axis == "channels" and (self.group < 1 or self.inner % self.group):
            raise ValueError(f"a group of {self.group} does not divide {self.inner} elements")
        if self.axis == "tokens" and (self.kind != "int" or self.sums or self.outliers):
            raise ValueError("only int codes without sums or outliers are grouped along tokens")
        if self.axis == "tokens" and (self.group < 1 or self.width % self.group):
            raise ValueError(
                f"{self.width} channels cannot be spread over the {self.group} tokens of a group"
            )
        if self.sums and self.kind != "int":
            raise ValueError("only int codes have sums")
        if self.anchored and self.axis != "tokens":
            raise ValueError("only groups along tokens are anchored")
        if self.fit < 0 or (
            self.fit and (self.kind not in ("int", "codebook") or self.axis == "tokens")
        ):
            raise ValueError("only int codes along channels and codebooks are fitted")

    @property
    def inner(self) -> int:
        """Elements in groups: those that are not outliers."""
        return self.width - self.outliers

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 1 << self.bits

    @property
    def groups(self) -> int:
        """Groups of one vector; 1 where groups run along tokens."""
        return self.inner // self.group if self.axis == "channels" else 1

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of one vector, outliers not counted."""
        return self.inner * self.bits // 8

    def sizes(self) -> list[tuple[str, int, str]]:
        """Name, bytes and element type of each field of one vector."""
        if self.kind == "plain":
            wide = "float32" if self.bits == 32 else "float16 or bfloat16"
            return [("codes", self.width * self.bits // 8, wide)]
        # Along tokens, the tokens of a group carry an equal part of its channels' scales each.
        scales = 2 * (self.groups if self.axis == "channels" else self.width // self.group)
        found = [("codes", self.code_bytes, "float8_e4m3fn" if self.kind == "fp8" else "uint8")]
        found.append(("scale", scales, "float16"))
        if self.kind == "int":
            found.append(("zero", scales, "float16"))
        if self.sums:
            found.append(("sum", 2 * self.groups, "uint16"))
        if self.outliers:
            found += [
                ("outlier_codes", self.outliers, "uint8"),
                ("outlier_scale", 2, "float16"),
                ("outlier_zero", 2, "float16"),
            ]
        return found


@dataclass(frozen=True)
class Field:
    """One field of a cell.

    Attributes:
        name: ``key_`` or ``value_`` and ``codes``, ``scale``, ``zero``, ``sum``,
            ``outlier_codes``, ``outlier_scale`` or ``outlier_zero``.
        offset: Bytes before it in the cell.
        size: Its bytes.
        dtype: Its element type.
    """

    name: str
    offset: int
    size: int
    dtype: str


@dataclass(frozen=True)
class CodedPage:
    """The fields of K and V in one page.

    Attributes:
        key: How keys are coded.
        value: How values are coded; grouped along channels.
    """

    key: Coding
    value: Coding

    def __post_init__(self) -> None:
        if self.value.axis != "channels":
            raise ValueError("values are grouped along channels")

    @functools.cached_property
    def fields(self) -> tuple[Field, ...]:
        """Every field, wide ones first so that planes of codes are aligned."""
        parts = [(f"key_{n}", s, d) for n, s, d in self.key.sizes()]
        parts += [(f"value_{n}", s, d) for n, s, d in self.value.sizes()]
        # Two-byte elements behind an odd number of bytes could not be loaded as such.
        parts.sort(key=lambda part: part[2] in ("uint8", "float8_e4m3fn") and part[1] % 2)
        parts.sort(key=lambda part: not part[0].endswith("codes") or part[1] % 4 != 0)
        found, at = [], 0
        for name, size, dtype in parts:
            found.append(Field(name, at, size, dtype))
            at += size
        return tuple(found)

    @functools.cached_property
    def bytes_per_token(self) -> int:
        """Bytes of one token and KV head: the sum of the fields, rounded up to a multiple of 4."""
        last = self.fields[-1]
        return -(-(last.offset + last.size) // 4) * 4

    def field(self, name: str) -> Field:
        """The field of a name. Raises KeyError."""
        for field in self.fields:
            if field.name == name:
                return field
        raise KeyError(name)

    def plane(self, pages: Tensor, name: str) -> Tensor:
        """One field of all pages.

        Args:
            pages: uint8 ``[num_blocks, kv_heads, block_size, bytes_per_token]``, the two last
                dimensions contiguous.
            name: Name of the field.

        Returns:
            uint8 view ``[num_blocks, kv_heads, block_size, size]``.
        """
        return plane(pages, self.field(name))


class Extent(Protocol):
    """Run of bytes in a cell."""

    @property
    def offset(self) -> int:
        """Bytes before it."""

    @property
    def size(self) -> int:
        """Its bytes."""


def plane(pages: Tensor, field: Extent) -> Tensor:
    """One field of all pages, as `CodedPage.plane`."""
    blocks, heads, size, _ = pages.shape
    return pages.as_strided(
        (blocks, heads, size, field.size),
        (pages.stride(0), pages.stride(1), field.size, 1),
        pages.storage_offset() + size * field.offset,
    )


def check_coded_pages(name: str, pages: Tensor, layout: CodedPage) -> None:
    """Raise ValueError unless the tensor is a cache of pages with this layout."""
    if pages.dtype != torch.uint8 or pages.ndim != 4:
        raise ValueError(f"{name} must be uint8 with 4 dimensions, got {pages.dtype} {pages.ndim}.")
    _, _, size, content = pages.shape
    if content != layout.bytes_per_token:
        raise ValueError(f"{name} must have {layout.bytes_per_token} bytes a token, got {content}.")
    if pages.stride(3) != 1 or pages.stride(2) != content:
        raise ValueError(f"{name} must be contiguous within a page, got strides {pages.stride()}.")
    if layout.key.axis == "tokens" and size % layout.key.group:
        raise ValueError(f"groups of {layout.key.group} tokens do not fill blocks of {size}.")
    if pages.storage_offset() % 4 or any(s % 4 for s in pages.stride()[:3]):
        raise ValueError(f"{name} must be aligned to 4 bytes, got strides {pages.stride()}.")


# -- the codes, in plain torch -----------------------------------------------------------------


def unit_bits(n: int, bits: int) -> int:
    """Bits of the units that ``n`` codes are packed in: 16 where codes fill whole halfwords, else
    8. Codes of 8 bits are bytes."""
    plane = {3: 1}.get(bits, bits)
    return 16 if bits < 8 and n * plane % 16 == 0 else 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes to bytes.

    Codes of 8 bits are one byte each, in order. Fewer bits: ``n`` codes fill ``u = n * bits / 16``
    halfwords, little endian, and code ``c`` lies in halfword ``c % u`` at bit ``bits * (c // u)``.
    So the codes at one position of all halfwords are neighbouring channels, and a pair of halfwords
    becomes a pair of operands of a tensor core by one operation a position. 3 bits: the low two
    bits of all codes as 2-bit codes, then their high bits as 1-bit codes. Where ``n`` codes (of the
    high bit, for 3 bits) do not fill whole halfwords, bytes take the place of halfwords.

    Args:
        codes: Integers ``[..., n]``.
        bits: 2, 3, 4 or 8.

    Returns:
        uint8 ``[..., n * bits / 8]``.
    """
    codes = codes.to(torch.uint8)
    if bits == 8:
        return codes
    unit = unit_bits(codes.shape[-1], bits)
    if bits == 3:
        return torch.cat([_fold(codes & 3, 2, unit), _fold(codes >> 2, 1, unit)], dim=-1)
    return _fold(codes, bits, unit)


def _fold(codes: Tensor, bits: int, unit: int) -> Tensor:
    parts = unit // bits
    cut = unflatten(codes, -1, (parts, -1))
    if unit == 16:
        cut = cut.to(torch.int16)
    out = cut[..., 0, :].clone(memory_format=torch.contiguous_format)
    for i in range(1, parts):
        out |= cut[..., i, :] << (bits * i)
    return out.view(torch.uint8)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The ``n`` codes that `pack` packed, uint8 ``[..., n]``."""
    if bits == 8:
        return packed
    unit = unit_bits(n, bits)
    if bits == 3:
        low, high = packed[..., : n // 4], packed[..., n // 4 :]
        return _unfold(low, 2, unit) | (_unfold(high, 1, unit) << 2)
    return _unfold(packed, bits, unit)


def unflatten(x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """`Tensor.unflatten`, a view of the same elements; one of the sizes may be -1."""
    dim %= x.ndim
    rest = math.prod(size for size in sizes if size >= 0)
    filled = [x.shape[dim] // rest if size < 0 else size for size in sizes]
    return x.view(*x.shape[:dim], *filled, *x.shape[dim + 1 :])


def _unfold(packed: Tensor, bits: int, unit: int) -> Tensor:
    parts, mask = unit // bits, (1 << bits) - 1
    if unit == 16:
        packed = packed.contiguous().view(torch.int16)
    return torch.cat([((packed >> (bits * i)) & mask).to(torch.uint8) for i in range(parts)], -1)


def finite(x: Tensor) -> Tensor:
    """float32 with NaN and infinities as 0, and other numbers clamped to the range of float16.
    There is no negative zero, so that the smallest element has one bit pattern."""
    return torch.nan_to_num(x.float(), 0.0, 0.0, 0.0).clamp_(-FP16_MAX, FP16_MAX).add_(0.0)


def affine(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero, float16, of elements between ``low`` and ``high`` (finite float32)."""
    zero = low.half()
    # Devices agree on a product, and not on the quotient by a number known beforehand.
    scale = ((high - zero.float()).clamp_min(0) * (1.0 / ((1 << bits) - 1))).half()
    return scale, zero


def affine_codes(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes uint8 of finite float32 elements: the nearest, halves upwards."""
    step = scale.float()
    inverse = torch.where(step > 0, 1 / step, 0.0)
    codes = (x - zero.float()).mul_(inverse).add_(0.5).floor_().clamp_(0, (1 << bits) - 1)
    return codes.to(torch.uint8)


def quantize_int(x: Tensor, bits: int, fit: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric codes of the last dimension.

    The zero is the smallest element and the scale the range over ``2**bits - 1``, both rounded to
    float16 before codes are chosen with them; a constant group has scale 0 and codes 0.

    Args:
        x: Finite float32 ``[..., n]``.
        bits: Bits of a code.
        fit: Rounds of fitting scale and zero to the codes.

    Returns:
        Codes uint8 ``[..., n]``, scale and zero float16 ``[..., 1]``.
    """
    scale, zero = affine(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), bits)
    codes = affine_codes(x, scale, zero, bits)
    if not fit:
        return codes, scale, zero
    mean = x.mean(-1, keepdim=True)
    off = x - mean
    for _ in range(fit):
        c = codes.float()
        middle = c.mean(-1, keepdim=True)
        c -= middle
        spread = c.square().sum(-1, keepdim=True)
        step = (c * off).sum(-1, keepdim=True) / spread.clamp_min(1e-9)
        fitted = (step.clamp_(0, FP16_MAX) + 0.0).half()
        # A group whose codes are all the same has nothing to fit.
        scale = torch.where(spread > 0, fitted, scale)
        low = (mean - scale.float() * middle).clamp_(-FP16_MAX, FP16_MAX) + 0.0
        zero = torch.where(spread > 0, low.half(), zero)
        codes = affine_codes(x, scale, zero, bits)
    return codes, scale, zero


def quantize_codebook(x: Tensor, levels: Tensor, fit: int = 0) -> tuple[Tensor, Tensor]:
    """Codes of the nearest level of a vector scaled to root mean square 1.

    The stored scale is the one that fits the chosen levels best (least squares), which is what
    TurboQuant (arXiv 2504.19874) gets by storing the norm, without its shrinkage.

    Args:
        x: Finite float32 ``[..., n]``.
        levels: float32 ``[2**bits]``, ascending, for elements of variance 1.
        fit: Rounds of choosing codes again with the scale that was fitted.

    Returns:
        Codes uint8 ``[..., n]`` and scale float16 ``[..., 1]``.
    """
    rms = x.square().mean(-1, keepdim=True).sqrt()
    codes, scale = _nearest_levels(x, rms, levels)
    for _ in range(fit):
        codes, scale = _nearest_levels(x, scale.float(), levels)
    return codes, scale


def _nearest_levels(x: Tensor, size: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    unit = x / torch.where(size > 0, size, 1.0)
    bounds = (levels[1:] + levels[:-1]) / 2
    if x.device.type == "cpu" and x.numel() > 1 << 14:
        # Passes of comparisons are several times as fast as searches, once they are long.
        codes = torch.zeros_like(unit, dtype=torch.uint8)
        for bound in bounds:
            codes += (unit > bound).view(torch.uint8)
    else:
        codes = torch.bucketize(unit, bounds, out_int32=True)
    chosen = levels.index_select(0, codes.flatten().int()).view_as(unit)
    fit = (x * chosen).sum(-1, keepdim=True) / chosen.square().sum(-1, keepdim=True).clamp_min(1e-9)
    return codes.to(torch.uint8), (fit.clamp(0, FP16_MAX) + 0.0).half()


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes as bytes, and scale float16 ``[..., 1]``, the largest magnitude over 448."""
    scale = (x.abs().amax(-1, keepdim=True) * (1.0 / FP8_MAX)).half()
    step = scale.float()
    scaled = x * torch.where(step > 0, 1 / step, 0.0)
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8), scale


def encode_vectors(x: Tensor, coding: Coding, levels: Tensor | None = None) -> dict[str, Tensor]:
    """The fields of some vectors, grouped along channels.

    Args:
        x: float ``[..., width]``.
        coding: How; its groups run along channels.
        levels: Levels of a codebook.

    Returns:
        uint8 ``[..., size]`` of each field, by name without ``key_`` or ``value_``.
    """
    if coding.kind == "plain":
        if x.element_size() * 8 != coding.bits:
            raise ValueError(f"plain vectors of {coding.bits} bits cannot hold {x.dtype}.")
        return {"codes": _bytes(torch.nan_to_num(x, 0.0, 0.0, 0.0))}
    x = finite(x)
    found: dict[str, Tensor] = {}
    if coding.outliers:
        codes, scale, zero = quantize_int(x[..., : coding.outliers], 8)
        found["outlier_codes"] = codes
        found["outlier_scale"], found["outlier_zero"] = _bytes(scale), _bytes(zero)
        x = x[..., coding.outliers :]
    grouped = unflatten(x, -1, (coding.groups, coding.group))
    if coding.kind == "int":
        codes, scale, zero = quantize_int(grouped, coding.bits, coding.fit)
        found["zero"] = _bytes(zero.squeeze(-1))
        if coding.sums:
            # uint16 has few operations; its bytes are those of the low half of an int32.
            total = codes.sum(-1, dtype=torch.int32)
            found["sum"] = total.unsqueeze(-1).view(torch.uint8)[..., :2].flatten(-2)
    elif coding.kind == "fp8":
        codes, scale = quantize_fp8(grouped)
    else:
        assert levels is not None, "a codebook needs its levels"
        codes, scale = quantize_codebook(grouped, levels, coding.fit)
    found["codes"] = pack(codes.flatten(-2), coding.bits)
    found["scale"] = _bytes(scale.squeeze(-1))
    return found


def decode_vectors(
    fields: dict[str, Tensor],
    coding: Coding,
    levels: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The vectors that `encode_vectors` coded, ``[..., width]`` of ``dtype``.

    Args:
        fields: As `encode_vectors` returns them; of whole groups ``[..., tokens, size]``, as
            `decode_groups` takes them, where groups run along tokens.
        coding: How.
        levels: Levels of a codebook.
        dtype: Of the result; for a ``plain`` vector, what it was stored in.
    """
    if coding.kind == "plain":
        return fields["codes"].contiguous().view(dtype)
    if coding.axis == "tokens":
        return decode_groups(fields, coding, dtype)
    codes = unpack(fields["codes"], coding.bits, coding.inner)
    scale = _halves(fields["scale"]).float().unsqueeze(-1)
    grouped = unflatten(codes, -1, (coding.groups, coding.group))
    if coding.kind == "int":
        x = grouped.float() * scale + _halves(fields["zero"]).float().unsqueeze(-1)
    elif coding.kind == "fp8":
        x = grouped.contiguous().view(torch.float8_e4m3fn).float() * scale
    else:
        assert levels is not None, "a codebook needs its levels"
        x = levels[grouped.int()] * scale
    x = x.flatten(-2)
    if coding.outliers:
        step, low = _halves(fields["outlier_scale"]), _halves(fields["outlier_zero"])
        x = torch.cat([fields["outlier_codes"].float() * step.float() + low.float(), x], dim=-1)
    return x.to(dtype)


def anchor(
    x: Tensor, scale: Tensor, zero: Tensor, bits: int, opens: Tensor | None = None
) -> Tensor:
    """Zeros with which elements lie on a code: at most half a step from what they were.

    Args:
        x: Finite float32 elements ``[..., width]``.
        scale: float16, the same shape.
        zero: float16, likewise.
        bits: Bits of a code.
        opens: bool ``[..., 1]``, whose zeros are moved; all without it.

    Returns:
        float16 zeros.
    """
    code = affine_codes(x, scale, zero, bits).float()
    moved = ((x - scale.float() * code).clamp(-FP16_MAX, FP16_MAX) + 0.0).half()
    return moved if opens is None else torch.where(opens, moved, zero)


def encode_groups(
    x: Tensor, coding: Coding, live: Tensor | None = None, opens: Tensor | None = None
) -> dict[str, Tensor]:
    """The fields of some groups of tokens, grouped along tokens.

    Args:
        x: float ``[..., group, width]``.
        coding: How; its groups run along tokens.
        live: bool ``[..., group]``, the tokens that count, one at least; all without it. The codes
            of others mean nothing.
        opens: bool ``[...]``, the groups that are the first of their page, which are anchored if
            the coding says so; all without it. Their first token counts.

    Returns:
        uint8 ``[..., group, size]`` of ``codes``, ``scale`` and ``zero``. The scales of a group,
        one per channel, lie behind one another: token ``i`` of ``group`` carries those of channels
        ``i * width / group`` and on, and zeros likewise.
    """
    x = finite(x)
    low, high = x, x
    if live is not None:
        low = x.masked_fill(~live.unsqueeze(-1), float("inf"))
        high = x.masked_fill(~live.unsqueeze(-1), float("-inf"))
    scale, zero = affine(low.amin(-2), high.amax(-2), coding.bits)
    if coding.anchored:
        which = None if opens is None else opens.unsqueeze(-1)
        zero = anchor(x[..., 0, :], scale, zero, coding.bits, which)
    codes = affine_codes(x, scale.unsqueeze(-2), zero.unsqueeze(-2), coding.bits)
    return {
        "codes": pack(codes, coding.bits),
        "scale": _bytes(unflatten(scale, -1, (coding.group, -1))),
        "zero": _bytes(unflatten(zero, -1, (coding.group, -1))),
    }


def decode_groups(
    fields: dict[str, Tensor], coding: Coding, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The tokens that `encode_groups` coded, ``[..., tokens, width]`` of ``dtype``.

    Args:
        fields: uint8 ``[..., tokens, size]`` of ``codes``, ``scale`` and ``zero``, whole groups:
            e.g. the planes of whole blocks.
        coding: How.
        dtype: Of the result.
    """
    cut = (-1, coding.group)
    codes = unflatten(unpack(fields["codes"], coding.bits, coding.width), -2, cut)
    scale = unflatten(_halves(fields["scale"]), -2, cut).flatten(-2).unsqueeze(-2).float()
    zero = unflatten(_halves(fields["zero"]), -2, cut).flatten(-2).unsqueeze(-2).float()
    return (codes.float() * scale + zero).flatten(-3, -2).to(dtype)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _halves(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.float16)
