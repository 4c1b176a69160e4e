"""Entropy coding of bytes: the Huffman stage of zstandard, without its search for repetitions.

Codes and exponents of KV are skewed, but runs of them hardly ever come again: matches cost more
bits than the symbols that they stand for, and most of the time. A hash table of 64 entries and
matches of seven bytes and more leave what a long run of zeros needs.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from kvplug.contract import CorruptPayload

Bytes = NDArray[np.uint8]

PLAIN_BITS = 7.6
"""Entropy of a byte above which coding it saves less than it takes time."""

_SAMPLE = 8192
"""Bytes that an entropy is estimated from."""


class _Contexts(threading.local):
    """A compressor and a decompressor of each thread, which may not be shared."""

    def __init__(self) -> None:
        few_matches = zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST,
            window_log=17,
            hash_log=6,
            chain_log=6,
            min_match=7,
            target_length=0,
            write_content_size=True,
            write_checksum=False,
            write_dict_id=False,
        )
        self.compressor = zstandard.ZstdCompressor(compression_params=few_matches)
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def bits_of(x: Bytes) -> float:
    """Entropy of single bytes, in bits, from a sample of them."""
    flat = x.reshape(-1)
    if not flat.size:
        return 0.0
    step = -(-flat.size // _SAMPLE)
    counts = np.bincount(flat[::step], minlength=256)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def squeeze(x: Bytes) -> Tensor:
    """Bytes in as few as may be: a zstandard frame, or as they are where that is no longer.

    Args:
        x: Any shape.

    Returns:
        uint8 ``[n]``; as many as were given if they are as they were.
    """
    flat = np.ascontiguousarray(x).reshape(-1)
    if flat.size and bits_of(flat) < PLAIN_BITS:
        frame = _contexts.compressor.compress(flat.data)
        if len(frame) < flat.size:
            return torch.frombuffer(bytearray(frame), dtype=torch.uint8)
    return torch.from_numpy(flat)


def expand(coded: Tensor, size: int) -> Bytes:
    """The bytes that `squeeze` coded, ``[size]``; perhaps a view, and read-only.

    Args:
        coded: Any tensor that stands where one of `squeeze` should.
        size: Bytes that it must hold. Never are more than these allocated.

    Raises:
        CorruptPayload: It does not hold them.
    """
    if coded.dtype != torch.uint8 or coded.ndim != 1 or len(coded) > size:
        raise CorruptPayload(f"{coded.dtype} {list(coded.shape)} cannot hold {size} coded bytes")
    data = coded.contiguous().numpy()
    if len(data) == size:
        return data
    try:
        said = zstandard.get_frame_parameters(data.data).content_size
        if said != size:
            raise CorruptPayload(f"a frame of {said} bytes instead of {size}")
        found = _contexts.decompressor.decompress(data.data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptPayload(f"a frame that cannot be read: {error}") from None
    if len(found) != size:
        raise CorruptPayload(f"a frame of {len(found)} bytes instead of {size}")
    return np.frombuffer(found, np.uint8)
