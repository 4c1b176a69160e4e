"""Fewer bits for the same KV: exponents by their distance from their channel's largest.

The exponent bytes of K and V have an entropy of 2.5 to 3 bits, mantissas and signs of nearly 8. So
a chunk is cut into planes of bytes: exponents are taken from the largest of their channel in the
chunk, since channels of keys differ more than tokens do, and Huffman coded; the rest is stored as
it is. The cut is that of ZipNN, arXiv 2411.05239, and SplitZip, arXiv 2605.01708.

Cells of a format are cut by the byte's place in the cell, since scales, zeros and codes each have
their own statistics. A byte may be taken from the same one of the token before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvplug.contract import CorruptPayload, PlaneShape
from kvplug_policies.entropy import PLAIN_BITS, Bytes, expand, squeeze
from kvplug_policies.planes import PlaneCodec, names, plane_dtype, take

TOP_MANTISSA = {torch.bfloat16: 0, torch.float16: 3, torch.float32: 0}
"""Bits of mantissa that share a byte with the exponent."""

CLASSES = (3.0, 5.5, PLAIN_BITS)
"""Entropies in bits that part the places of a cell: each class has its own Huffman codes, and
above the last the bytes stay as they are."""

DELTA = 8
"""Added to the class of a place whose bytes are differences from the token before."""

DELTA_GAIN = 0.3
"""Bits that a difference must save."""

_ROWS = 2048
"""Cells that the entropy of a place is estimated from."""


class Lossless(PlaneCodec):
    """Exponents and codes Huffman coded, to the bit."""

    name = "lossless"
    exact = True
    changes = "stores KV outside the pool in fewer bytes, from which it comes back to the bit"
    paper = "ZipNN, arXiv 2411.05239; SplitZip, arXiv 2605.01708"

    def cut(self, name: str, plane: Tensor, start: int) -> dict[str, Tensor]:
        return _cut_cells(plane) if plane.dtype == torch.uint8 else _cut_numbers(plane)

    def join(self, name: str, parts: Mapping[str, Tensor], plane: PlaneShape, start: int) -> Tensor:
        return (_join_cells if plane.dtype == "uint8" else _join_numbers)(parts, plane)


# -- numbers ---------------------------------------------------------------------------------------


def _words(plane: Tensor) -> NDArray[Any]:
    size = plane.element_size()
    signed = plane.view(torch.int16 if size == 2 else torch.int32)
    words: NDArray[Any] = signed.numpy().view(np.uint16 if size == 2 else np.uint32)
    return words


def _cut_numbers(plane: Tensor) -> dict[str, Tensor]:
    """Parts of numbers ``[layers, tokens, heads, head_size]``: ``top``, the bytes with the
    exponent, below ``peak``, that of the channel; and ``low0`` and on, the others."""
    words = _words(plane)
    bits = 8 * words.itemsize
    # The sign goes behind the mantissa, so that the exponent fills a byte.
    turned = (words << 1) | (words >> (bits - 1))
    split = turned.view(np.uint8).reshape(*words.shape, -1)
    top = np.ascontiguousarray(split[..., -1])
    peak = top.max(axis=1, keepdims=True) | ((1 << TOP_MANTISSA[plane.dtype]) - 1)
    np.subtract(peak, top, out=top)
    parts = {"peak": squeeze(peak), "top": squeeze(top)}
    for i in range(words.itemsize - 1):
        parts[f"low{i}"] = squeeze(np.ascontiguousarray(split[..., i]))
    return parts


def _join_numbers(parts: Mapping[str, Tensor], plane: PlaneShape) -> Tensor:
    dtype, shape = plane_dtype(plane), plane.shape
    size, n = dtype.itemsize, math.prod(shape)
    names(parts, ["peak", "top", *(f"low{i}" for i in range(size - 1))])
    layers, _, heads, width = shape
    peak = expand(parts["peak"], layers * heads * width).reshape(layers, 1, heads, width)
    top = expand(parts["top"], n).reshape(shape)
    lows = [expand(parts[f"low{i}"], n).reshape(shape) for i in range(size - 1)]
    split = np.empty((*shape, size), np.uint8)
    for i, low in enumerate(lows):
        split[..., i] = low
    np.subtract(peak, top, out=split[..., -1])
    turned: NDArray[Any] = split.view(np.uint16 if size == 2 else np.uint32)[..., 0]
    words = (turned >> 1) | (turned << (8 * size - 1))
    return torch.from_numpy(words.view(np.int16 if size == 2 else np.int32)).view(dtype)


# -- cells -----------------------------------------------------------------------------------------


def _entropies(rows: Bytes) -> NDArray[np.float64]:
    """Entropy of each column of ``[n, places]``, bits."""
    n, places = rows.shape
    at = rows.astype(np.int64) + 256 * np.arange(places)
    share = np.bincount(at.reshape(-1), minlength=256 * places).reshape(places, 256) / n
    # Of a sample, entropy comes out too small by the symbols that it holds.
    seen = (share > 0).sum(axis=1)
    logs = np.log2(share, out=np.zeros_like(share), where=share > 0)
    found: NDArray[np.float64] = -(share * logs).sum(axis=1) + (seen - 1) / (2 * n * math.log(2))
    return found


def _cut_cells(plane: Tensor) -> dict[str, Tensor]:
    """Parts of cells ``[layers, tokens, heads, bytes]``: ``how``, what was done to each place, and
    ``class0`` and on, the places of a class behind one another."""
    cells = plane.numpy()
    difference = cells.copy()
    difference[:, 1:] -= cells[:, :-1]
    step = -(-cells[..., 0].size // _ROWS)
    plain = _entropies(cells.reshape(-1, cells.shape[-1])[::step])
    delta = _entropies(difference.reshape(-1, cells.shape[-1])[::step])
    taken = delta < plain - DELTA_GAIN
    how = np.digitize(np.where(taken, delta, plain), CLASSES).astype(np.uint8)
    taken &= how < len(CLASSES)
    how += DELTA * taken.astype(np.uint8)
    parts = {"how": torch.from_numpy(how)}
    source = np.where(taken, difference, cells)
    for of in range(len(CLASSES) + 1):
        places = np.flatnonzero(how % DELTA == of)
        chosen = np.ascontiguousarray(np.moveaxis(source[..., places], -1, 0))
        whole = of == len(CLASSES)
        parts[f"class{of}"] = torch.from_numpy(chosen.reshape(-1)) if whole else squeeze(chosen)
    return parts


def _join_cells(parts: Mapping[str, Tensor], plane: PlaneShape) -> Tensor:
    *front, width = plane.shape
    classes = range(len(CLASSES) + 1)
    names(parts, ["how", *(f"class{of}" for of in classes)])
    how = take(parts, "how", torch.uint8, (width,)).numpy()
    if (how % DELTA > len(CLASSES)).any() or (how >= 2 * DELTA).any():
        raise CorruptPayload("places of an unknown class")
    cells = np.empty(plane.shape, np.uint8)
    for of in classes:
        places = np.flatnonzero(how % DELTA == of)
        found = expand(parts[f"class{of}"], len(places) * math.prod(front))
        cells[..., places] = np.moveaxis(found.reshape(len(places), *front), 0, -1)
    summed = np.flatnonzero(how >= DELTA)
    cells[..., summed] = np.cumsum(cells[..., summed], axis=1, dtype=np.uint8)
    return torch.from_numpy(cells)
