"""Components of K and V over all layers and heads, each in the bits that it is worth.

KVTC, arXiv 2511.01815: keys are rotated back, tokens of all layers and heads are one vector, its
principal components are stored instead of it, each rounded to a step of its own, and the codes are
entropy coded. Steps are chosen by dynamic programming so that the error is least for the bits. The
first tokens of a text, which all others attend to, are stored as they are.

Here errors are weighed before the components are taken, by what queries and outputs make of them
(`kvplug_lab.calibrate.transform`), and K and V share one budget. Components that are mostly zero
are packed several to a byte before Huffman coding, which spends a bit on a byte at least. The paper
also stores the latest 128 tokens as they are; a chunk does not know what will follow it, so here
only `sinks` are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from kvplug.contract import (
    CorruptPayload,
    EngineView,
    Feature,
    PlaneShape,
    PolicyOptions,
    TransferCodec,
)
from kvplug_policies.entropy import Bytes, expand, squeeze
from kvplug_policies.planes import PlaneCodec, names, plane_dtype, take
from kvplug_policies.transform import GROUP, PLANES, Transform, allocate, load, rotate

UNIT = 4.0
"""Bits a token that the allocation tells apart."""

FRAMES = 0.975
"""Part of the bytes left for codes: frames have tables, and Huffman codes whole bits."""

BANDS = ((0.25, 2, 3), (0.85, 7, 2), (1.7, 127, 1), (3.4, 127, 1), (6.8, 127, 1), (20.0, 127, 1))
"""Bands of components by deviation over step: the upper end, the largest code, and the codes that
share a byte. Each has Huffman codes of its own. What is above the last takes two bytes a code."""

WIDE = 32767

DEAD = 0.4
"""Part of a step that is rounded away from zero; the rest is rounded towards it."""

Codes = NDArray[np.int16]


def band_of(ratio: NDArray[np.float64]) -> NDArray[np.int64]:
    """Band of components by their deviation over their step; the number of bands for wide ones."""
    return np.digitize(ratio, [top for top, _, _ in BANDS])


def largest(band: NDArray[np.int64]) -> NDArray[np.int64]:
    """Largest code of each band."""
    return np.array([most for _, most, _ in BANDS] + [WIDE])[band]


def quantize(z: Tensor, step: Tensor, most: Tensor) -> Tensor:
    """Codes of components ``[tokens, n]``, float32 with whole values."""
    unit = z / step
    return unit.abs().add_(DEAD).floor_().minimum(most).copysign_(unit)


class _Side:
    """K or V: what is kept of the transform.

    Args:
        transform: The transform.
        plane: ``key`` or ``value``.
        chosen: Index of each group's step; the number of steps for none.
    """

    def __init__(self, transform: Transform, plane: str, chosen: NDArray[np.int64]):
        of = {
            name.removeprefix(f"{plane}."): tensor
            for name, tensor in transform.tensors.items()
            if name.startswith(f"{plane}.")
        }
        steps = of["steps"].double().numpy()
        each = np.repeat(chosen, GROUP)
        kept = np.flatnonzero(each < len(steps))
        step = steps[each[kept]]
        band = band_of(of["deviation"].double().numpy()[kept] / step)
        order = np.argsort(band, kind="stable")
        kept, band, step = kept[order], band[order], step[order]
        self.mean = of["mean"].reshape(-1)
        self.weight = of["weight"].reshape(-1)
        # Rows are components. bfloat16 rounds a token by far less than steps do, and is quicker.
        self.basis = of["basis"][:, torch.from_numpy(kept)].T.bfloat16().contiguous()
        self.step = torch.from_numpy(step).float()
        self.most = torch.from_numpy(largest(band)).float()
        self.counts = [int((band == b).sum()) for b in range(len(BANDS) + 1)]

    def components(self, x: Tensor) -> Tensor:
        """Components ``[tokens, n]`` of tokens ``[tokens, layers * heads * size]``."""
        return (((x - self.mean) * self.weight).bfloat16() @ self.basis.T).float()

    def tokens(self, codes: Tensor) -> Tensor:
        """Tokens from their codes, float32; the inverse of `components` and `quantize`."""
        return ((codes * self.step).bfloat16() @ self.basis).float() / self.weight + self.mean


class Kvtc(PlaneCodec):
    """A transform learned from the model's own KV."""

    name = "kvtc"
    exact = False
    changes = "stores KV outside the pool as principal components, rounded and entropy coded"
    paper = "KV Cache Transform Coding, arXiv 2511.01815"
    supports = TransferCodec.supports - {Feature.TENSOR_PARALLEL, Feature.PIPELINE_PARALLEL}

    class Options(PolicyOptions):
        """Options of `kvtc`."""

        transform: str = Field(
            "transform.safetensors",
            min_length=1,
            description="file written by kvplug calibrate transfer for this model",
        )
        ratio: float = Field(
            8.0, ge=2, le=64, description="bytes of K and V over those stored, without sinks"
        )
        sinks: int = Field(
            4, ge=0, le=1024, description="tokens at the start of a text stored as they are"
        )

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self._sides: dict[str, _Side] = {}
        self._transform: Transform | None = None
        if not engine.layers and not Path(self.options.transform).exists():
            return  # `kvplug check` on another machine.
        transform = self._transform = load(self.options.transform)
        transform.check(engine)
        self._rope = (transform.rope, transform.interleaved)
        tables = [
            tuple(
                transform.tensors[f"{plane}.{name}"].double().numpy() * GROUP
                for name in ("rate", "loss")
            )
            for plane in PLANES
        ]
        widths = {table[0].shape[1] for table in tables}
        if len(widths) != 1:
            raise ValueError(f"transform {transform.path} has other steps for keys than for values")
        budget = FRAMES * 2 * 16 * math.prod(transform.geometry) / self.options.ratio
        chosen = allocate(
            np.concatenate([rate for rate, _ in tables]),
            np.concatenate([loss for _, loss in tables]),
            budget,
            UNIT,
        )
        half = len(tables[0][0])
        for plane, picks in zip(PLANES, (chosen[:half], chosen[half:]), strict=True):
            self._sides[plane] = _Side(transform, plane, picks)

    def fingerprint(self) -> str:
        checksum = self._transform.checksum if self._transform is not None else ""
        return f"{checksum} ratio={self.options.ratio} sinks={self.options.sinks}"

    def cut(self, name: str, plane: Tensor, start: int) -> dict[str, Tensor]:
        side = self._sides.get(name)
        if side is None or plane.dtype == torch.uint8 or not self._fits(plane.shape):
            return {}
        sinks = self._sinks(plane.shape[1], start)
        if sinks == plane.shape[1]:
            return {}
        x = torch.nan_to_num(plane[:, sinks:].float(), 0.0, 0.0, 0.0)
        if name == "key":
            x = rotate(x, start + sinks, *self._rope, back=True)
        flat = x.transpose(0, 1).reshape(x.shape[1], -1)
        codes = quantize(side.components(flat), side.step, side.most).to(torch.int16).numpy()
        parts = {"sinks": plane[:, :sinks].contiguous()}
        at = 0
        for band, count in enumerate(side.counts):
            parts |= _packed(band, codes[:, at : at + count])
            at += count
        return parts

    def join(self, name: str, parts: Mapping[str, Tensor], plane: PlaneShape, start: int) -> Tensor:
        side = self._sides.get(name)
        if side is None or not self._fits(plane.shape) or plane.dtype == "uint8":
            raise CorruptPayload(f"a plane {name} of {plane.dtype} {plane.shape} is never coded")
        layers, tokens, heads, size = plane.shape
        dtype = plane_dtype(plane)
        sinks = self._sinks(tokens, start)
        left = tokens - sinks
        bands = range(len(BANDS) + 1)
        names(parts, ("sinks", *(f"band{b}" for b in bands), "high"))
        first = take(parts, "sinks", dtype, (layers, sinks, heads, size))
        codes = [_unpacked(b, parts, left, side.counts[b]) for b in bands]
        both = torch.from_numpy(np.concatenate(codes, 1)).float()
        x = side.tokens(both).view(-1, layers, heads, size).transpose(0, 1)
        if name == "key":
            x = rotate(x, start + sinks, *self._rope)
        return torch.cat([first, x.to(dtype)], 1)

    def _fits(self, shape: Any) -> bool:
        layers, _, heads, size = shape
        assert self._transform is not None
        return self._transform.geometry == (layers, heads, size)

    def _sinks(self, tokens: int, start: int) -> int:
        """Tokens of a chunk that stay as they are."""
        return min(max(self.options.sinks - start, 0), tokens)


def _packed(band: int, codes: Codes) -> dict[str, Tensor]:
    """Codes of a band ``[tokens, n]``, entropy coded."""
    if band == len(BANDS):
        pair = np.ascontiguousarray(codes).view(np.uint8).reshape(*codes.shape, 2)
        return {f"band{band}": squeeze(pair[..., 0]), "high": squeeze(pair[..., 1])}
    _, most, share = BANDS[band]
    digits = (codes + most).astype(np.uint8).reshape(-1)
    if share > 1:
        lacking = -digits.size % share
        whole = np.concatenate([digits, np.zeros(lacking, np.uint8)]).reshape(-1, share)
        base, digits = 2 * most + 1, np.zeros(len(whole), np.uint8)
        for i in range(share):
            digits = digits * np.uint8(base) + whole[:, i]
    return {f"band{band}": squeeze(digits)}


def _unpacked(band: int, parts: Mapping[str, Tensor], tokens: int, count: int) -> Codes:
    """The codes that `_packed` packed. Raises CorruptPayload if they are none of the band."""
    n = tokens * count
    if band == len(BANDS):
        low, high = (expand(parts[name], n) for name in (f"band{band}", "high"))
        pair = np.stack([low, high], -1)
        found: Codes = pair.view(np.int16).reshape(tokens, count)
        return found
    _, most, share = BANDS[band]
    digits: Bytes = expand(parts[f"band{band}"], -(-n // share))
    base = 2 * most + 1
    if digits.size and int(digits.max()) >= base**share:
        raise CorruptPayload(f"codes of band {band} above {base**share - 1}")
    if share > 1:
        whole = np.empty((len(digits), share), np.uint8)
        for i in range(share - 1, -1, -1):
            digits, whole[:, i] = np.divmod(digits, np.uint8(base))
        digits = whole.reshape(-1)[:n]
    return (digits.astype(np.int16) - np.int16(most)).reshape(tokens, count)
