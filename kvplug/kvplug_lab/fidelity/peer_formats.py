"""vLLM's own KV-cache formats, for comparison: the same bytes and the same rounding, in torch.

Written from reading vLLM 0.32.0, whose Triton kernels run on no CPU:

* ``vllm_int8``, ``vllm_fp8``: ``v1/attention/ops/triton_reshape_and_cache_flash.py``
  (``int8_per_token_head``, ``fp8_per_token_head``);
* ``vllm_int4``: ``v1/attention/ops/int4_per_token_head.py`` (``int4_per_token_head``);
* ``turboquant_...``: ``v1/attention/ops/triton_turboquant_store.py`` and
  ``..._decode.py``, ``v1/attention/backends/turboquant_attn.py`` and
  ``model_executor/layers/quantization/turboquant/{config,centroids}.py``.

They are not plugins and serve nothing; only `kvplug_lab.fidelity` uses them. By default each reads
what vLLM's backend reads from the cache and what it takes as computed. Arithmetic after decoding
is in float32; vLLM's is in float32 and, in places, in the query's type.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field as Knob
from torch import Tensor

from kvplug.contract import (
    AttendBatch,
    EngineView,
    FormatOptions,
    FormatPolicy,
    LayerView,
    PageLayout,
    PolicyOptions,
)

INT_STEP, LEAST_SCALE = 0.5, 1e-6
FP8_MAX = 448.0


class PeerFormat(FormatPolicy):
    """A format of vLLM's, with the bytes that vLLM counts for it."""

    key_bits: ClassVar[int]
    value_bits: ClassVar[int]
    rotation: ClassVar[str | None] = None
    zero_point: ClassVar[bool] = False

    @abstractmethod
    def published_bytes(self, layer: LayerView) -> int:
        """Bytes of K and V of one token and KV head in vLLM."""

    def layout(self, layer: LayerView) -> PageLayout:
        # A page here holds whole words; what vLLM counts is `published_bytes`.
        return PageLayout(
            -(-self.published_bytes(layer) // 4) * 4,
            self.key_bits,
            self.value_bits,
            group_size=layer.head_size,
            zero_point=self.zero_point,
            rotation=self.rotation,
        )

    def encode(self, layer: LayerView, key: Tensor, value: Tensor) -> Tensor:
        cells = key.new_zeros(
            (*key.shape[:2], self.layout(layer).bytes_per_token_head), dtype=torch.uint8
        )
        parts = torch.cat(self._bytes(layer, key, value), dim=-1)
        cells[..., : parts.shape[-1]] = parts
        return cells

    @abstractmethod
    def _bytes(self, layer: LayerView, key: Tensor, value: Tensor) -> list[Tensor]:
        """The parts of a cell, uint8, one behind the other."""


class Bf16(PeerFormat):
    """No compression: what an engine that computes in bfloat16 holds."""

    name, changes = "bf16", "keeps K and V as bfloat16"
    paper = "vLLM 0.32, --kv-cache-dtype auto"
    key_bits = value_bits = 16

    def published_bytes(self, layer: LayerView) -> int:
        return 4 * layer.head_size

    def _bytes(self, layer: LayerView, key: Tensor, value: Tensor) -> list[Tensor]:
        return [_as_bytes(key.to(torch.bfloat16)), _as_bytes(value.to(torch.bfloat16))]

    def decode(self, layer: LayerView, cells: Tensor) -> tuple[Tensor, Tensor]:
        key, value = (
            cells[..., : 4 * layer.head_size].contiguous().view(torch.bfloat16).chunk(2, -1)
        )
        return key, value


class PerTokenHeadOptions(FormatOptions):
    """vLLM's kernel reads every token from the cache, those of the step among them."""

    exact_chunk: bool = Knob(
        False, description="the tokens of one step see each other as computed; vLLM reads them back"
    )


class PerTokenHead(PeerFormat):
    """A float32 scale for each of K and V of a token and head, behind its elements."""

    class Options(PerTokenHeadOptions):
        """The same as in vLLM."""

    def published_bytes(self, layer: LayerView) -> int:
        return (self.key_bits + self.value_bits) * layer.head_size // 8 + 2 * 4

    def _bytes(self, layer: LayerView, key: Tensor, value: Tensor) -> list[Tensor]:
        return [part for x in (key, value) for part in self._coded(x)]

    def decode(self, layer: LayerView, cells: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.key_bits * layer.head_size // 8
        found = []
        for cell in cells[..., : 2 * (codes + 4)].chunk(2, -1):
            scale = cell[..., codes:].contiguous().view(torch.float32)
            found.append(self._decoded(cell[..., :codes], scale))
        return found[0], found[1]

    @abstractmethod
    def _coded(self, x: Tensor) -> list[Tensor]:
        """Bytes of the codes and of the scale of vectors ``[..., head_size]``."""

    @abstractmethod
    def _decoded(self, codes: Tensor, scale: Tensor) -> Tensor:
        """The vectors of codes ``[..., bytes]`` and scales ``[..., 1]`` float32."""


class Int8(PerTokenHead):
    """``int8_per_token_head``: symmetric, the largest magnitude over 127."""

    name, changes = "vllm_int8", "keeps K and V in 8-bit codes"
    paper = "vLLM 0.32, --kv-cache-dtype int8_per_token_head"
    key_bits = value_bits = 8

    def _coded(self, x: Tensor) -> list[Tensor]:
        scale, scaled = _absmax(x, 127.0)
        codes = torch.where(scaled >= 0, scaled + INT_STEP, scaled - INT_STEP).clamp(-128.0, 127.0)
        return [_as_bytes(codes.trunc().to(torch.int8)), _as_bytes(scale)]

    def _decoded(self, codes: Tensor, scale: Tensor) -> Tensor:
        return codes.contiguous().view(torch.int8).float() * scale


class Fp8(PerTokenHead):
    """``fp8_per_token_head``: e4m3, the largest magnitude over 448."""

    name, changes = "vllm_fp8", "keeps K and V as e4m3"
    paper = "vLLM 0.32, --kv-cache-dtype fp8_per_token_head"
    key_bits = value_bits = 8

    def _coded(self, x: Tensor) -> list[Tensor]:
        scale, scaled = _absmax(x, FP8_MAX)
        return [_as_bytes(_e4m3(scaled)), _as_bytes(scale)]

    def _decoded(self, codes: Tensor, scale: Tensor) -> Tensor:
        return codes.contiguous().view(torch.float8_e4m3fn).float() * scale


class Int4(PerTokenHead):
    """``int4_per_token_head``: randomized Hadamard rotation of K and V, 16 levels between smallest
    and largest, the zero point in the four lowest bits of the scale."""

    name, changes = "vllm_int4", "keeps rotated K and V in 4-bit codes"
    paper = "vLLM 0.32, --kv-cache-dtype int4_per_token_head"
    key_bits = value_bits = 4
    rotation, zero_point = "randomized Hadamard", True

    def _coded(self, x: Tensor) -> list[Tensor]:
        # The rotation is not scaled to length 1, and its result is rounded to the KV dtype.
        rotated = randomized_hadamard(x.float()).to(x.dtype).float()
        low, high = rotated.amin(-1, keepdim=True), rotated.amax(-1, keepdim=True)
        scale = ((high - low) / 15.0).clamp_min(LEAST_SCALE)
        zero = _half_away(-low / scale).clamp(0.0, 15.0)
        codes = _half_away(rotated * (1.0 / scale) + zero).clamp(0.0, 15.0).to(torch.uint8)
        packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
        hidden = (scale.view(torch.int32) & -16) | zero.to(torch.int32)
        return [packed, _as_bytes(hidden)]

    def _decoded(self, codes: Tensor, scale: Tensor) -> Tensor:
        bits = scale.contiguous().view(torch.int32)
        zero, step = (bits & 15).float(), (bits & -16).view(torch.float32)
        nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
        return randomized_hadamard((nibbles.float() - zero) * step, inverse=True)


class TurboQuantOptions(FormatOptions):
    """Options of the comparison."""

    reread: int = Knob(
        128,
        ge=0,
        description="a step of at most so many tokens behind others reads its own tokens back "
        "too, as vLLM does",
    )
    boundary: int = Knob(
        2, ge=0, description="first and last layers kept as bfloat16, so many each, as vLLM does"
    )


class TurboQuant(PeerFormat):
    """Keys rotated by Hadamard and coded by Lloyd-Max levels, with their norm; values uniform.

    Keys of 8 bits are e4m3 as they are. ``corrected``: the chosen levels are scaled to norm 1
    before the stored norm is applied (the ``nc`` of vLLM's names).
    """

    corrected: ClassVar[bool] = True
    rotation: ClassVar[str | None] = "Hadamard"
    zero_point = True
    paper = "vLLM 0.32; TurboQuant, arXiv 2504.19874"

    class Options(TurboQuantOptions):
        """Options of the comparison."""

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        assert isinstance(options, TurboQuantOptions)
        self.reread, self.boundary = options.reread, options.boundary
        self._plain = Bf16(Bf16.Options.model_validate({}), engine)
        for layer in engine.layers:
            if layer.head_size & (layer.head_size - 1) or layer.head_size < 8:
                raise ValueError(
                    f"layer {layer.index}, {layer.head_size} a head: the Hadamard rotation needs "
                    "a power of two"
                )

    def skipped(self, layer: LayerView) -> bool:
        """True for the first and last layers, which vLLM leaves in bfloat16."""
        edge = min(self.boundary, layer.num_layers // 2)
        return layer.index < edge or layer.index >= layer.num_layers - edge

    def published_bytes(self, layer: LayerView) -> int:
        if self.skipped(layer):
            return self._plain.published_bytes(layer)
        key, value = self._sizes(layer.head_size)
        return (key + value + 4 + 1) // 2 * 2

    def _sizes(self, width: int) -> tuple[int, int]:
        """Bytes of a key, and of a value's codes."""
        key = width if self.key_bits == 8 else -(-width * self.key_bits // 8) + 2
        return key, -(-width * self.value_bits // 8)

    def _bytes(self, layer: LayerView, key: Tensor, value: Tensor) -> list[Tensor]:
        if self.skipped(layer):
            return [self._plain.encode(layer, key, value)]
        return [*self._key_bytes(key), *self._value_bytes(value)]

    def _key_bytes(self, key: Tensor) -> list[Tensor]:
        if self.key_bits == 8:
            return [_as_bytes(_e4m3(key.float()))]
        key = key.float()
        norm = key.norm(dim=-1, keepdim=True)
        rotated = hadamard(key / (norm + 1e-8)) / math.sqrt(key.shape[-1])
        levels = lloyd_max(key.shape[-1], self.key_bits).to(key.device)
        bounds = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(rotated.contiguous(), bounds, right=True)
        return [_packed(codes, self.key_bits), _as_bytes(norm.half())]

    def _value_bytes(self, value: Tensor) -> list[Tensor]:
        value = value.float()
        top = (1 << self.value_bits) - 1
        low, high = value.amin(-1, keepdim=True), value.amax(-1, keepdim=True)
        scale = ((high - low) / top).clamp_min(1e-8)
        codes = ((value - low) / scale + 0.5).int().clamp(0, top)
        return [
            _packed(codes, self.value_bits),
            _as_bytes(scale.half()),
            _as_bytes(low.half()),
        ]

    def decode(self, layer: LayerView, cells: Tensor) -> tuple[Tensor, Tensor]:
        if self.skipped(layer):
            return self._plain.decode(layer, cells)
        width = layer.head_size
        key_size, codes_size = self._sizes(width)
        key, value = cells[..., :key_size], cells[..., key_size:]
        codes = _unpacked(value[..., :codes_size], self.value_bits)
        steps = value[..., codes_size : codes_size + 4].contiguous().view(torch.float16).float()
        values = codes.float() * steps[..., :1] + steps[..., 1:]
        if self.key_bits == 8:
            return key.contiguous().view(torch.float8_e4m3fn).float(), values
        levels = lloyd_max(width, self.key_bits).to(cells.device)
        chosen = levels[_unpacked(key[..., :-2], self.key_bits).long()]
        if self.corrected:
            chosen = chosen / (chosen.square().sum(-1, keepdim=True) + 1e-16).sqrt()
        norm = key[..., -2:].contiguous().view(torch.float16).float()
        return hadamard(chosen) / math.sqrt(width) * norm, values

    def attend(self, layer: LayerView, batch: AttendBatch, cache: Tensor, out: Tensor) -> None:
        behind = batch.max_seq_len > batch.max_query_len
        if behind and batch.max_query_len <= self.reread and not self.skipped(layer):
            batch = replace(batch, key=None, value=None)
        super().attend(layer, batch, cache, out)


class TurboQuantK8V4(TurboQuant):
    """``turboquant_k8v4``."""

    name, changes = "turboquant_k8v4", "keeps keys as e4m3 and values in 4-bit codes"
    key_bits, value_bits = 8, 4
    rotation = None


class TurboQuant4(TurboQuant):
    """``turboquant_4bit_nc``."""

    name, changes = "turboquant_4bit_nc", "keeps rotated keys and values in 4-bit codes"
    key_bits, value_bits = 4, 4


class TurboQuantK3V4(TurboQuant):
    """``turboquant_k3v4_nc``."""

    name, changes = "turboquant_k3v4_nc", "keeps rotated keys in 3-bit and values in 4-bit codes"
    key_bits, value_bits = 3, 4


class TurboQuant3(TurboQuant):
    """``turboquant_3bit_nc``."""

    name, changes = "turboquant_3bit_nc", "keeps rotated keys and values in 3-bit codes"
    key_bits, value_bits = 3, 3


PEERS: tuple[type[PeerFormat], ...] = (
    Bf16,
    Fp8,
    Int8,
    Int4,
    TurboQuantK8V4,
    TurboQuant4,
    TurboQuantK3V4,
    TurboQuant3,
)
"""Every peer, for `kvplug_lab.fidelity.variants`."""


# -- what vLLM computes with -----------------------------------------------------------------------


def hadamard(x: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of the last dimension, a power of two, in Sylvester's order and
    not scaled."""
    width = x.shape[-1]
    half = 1
    while half < width:
        pairs = x.reshape(*x.shape[:-1], -1, 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        half *= 2
    return x


def randomized_hadamard(x: Tensor, inverse: bool = False) -> Tensor:
    """vLLM's ``single_rht``: signs and `hadamard` in blocks of the largest power of two that
    divides the width; the inverse is scaled so that it undoes it."""
    width = x.shape[-1]
    block = width & -width
    signs = rotation_signs(block).to(x.device)
    parts = x.reshape(*x.shape[:-1], -1, block)
    turned = hadamard(parts) * signs / block if inverse else hadamard(parts * signs)
    return turned.flatten(-2)


@functools.cache
def rotation_signs(width: int) -> Tensor:
    """The signs vLLM draws for a block of this width, float32 ``[width]``."""
    source = torch.Generator().manual_seed(0x9E3779B9)
    drawn = torch.bernoulli(torch.full((width,), 0.5), generator=source)
    return 2.0 * drawn - 1.0


@functools.cache
def lloyd_max(width: int, bits: int) -> Tensor:
    """Levels of the best scalar quantizer of N(0, 1/width), float32 ``[2**bits]`` ascending.

    Found as vLLM finds them, conditional means by the trapezoid rule over 200 steps a cell and
    truncated at 10.5 standard deviations, so that the levels are its own.
    """
    count = 1 << bits
    levels = -3.5 + 7.0 * (torch.arange(count, dtype=torch.float64) + 0.5) / count
    ends = torch.tensor([-10.5, 10.5], dtype=torch.float64)
    for _ in range(200):
        edges = torch.cat([ends[:1], (levels[1:] + levels[:-1]) / 2, ends[1:]])
        steps = torch.linspace(0.0, 1.0, 201, dtype=torch.float64)
        at = edges[:-1, None] + (edges[1:] - edges[:-1])[:, None] * steps
        weight = (-at * at / 2).exp()
        weight[:, [0, -1]] /= 2
        levels = (at * weight).sum(-1) / weight.sum(-1)
    return (levels / math.sqrt(width)).float()


def _absmax(x: Tensor, top: float) -> tuple[Tensor, Tensor]:
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / top).clamp_min(LEAST_SCALE)
    return scale, x * (1.0 / scale)


def _half_away(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x + 0.5, x - 0.5).trunc()


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes as one string of bits, lowest first."""
    shifts = torch.arange(bits, device=codes.device)
    string = ((codes[..., None].int() >> shifts) & 1).view(*codes.shape[:-1], -1, 8)
    weights = 1 << torch.arange(8, device=codes.device)
    return (string * weights).sum(-1).to(torch.uint8)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    string = (packed[..., None].int() >> torch.arange(8, device=packed.device)) & 1
    weights = 1 << torch.arange(bits, device=packed.device)
    codes: Tensor = (string.view(*packed.shape[:-1], -1, bits) * weights).sum(-1)
    return codes
