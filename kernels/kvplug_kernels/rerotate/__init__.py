"""Re-rotate keys of a paged cache to other positions, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from ..coding import CodedPage
from .vectorized import rerotate_coded_vectorized, rerotate_vectorized

__all__ = ["rerotate", "rerotate_coded"]


def rerotate(
    keys: Tensor,
    slots: Tensor,
    shift: int | Tensor,
    frequencies: Tensor,
    *,
    interleaved: bool = False,
) -> None:
    """Rotate keys by a number of positions under a rotary embedding (arXiv 2104.09864).

    Rotations add up, so a key that was rotated for position ``s`` becomes that of position ``s +
    shift``, whatever scaling made the table of frequencies, and whatever factor the table's
    cosines and sines carry: only the frequencies matter. Pair ``i`` of a key turns by ``shift *
    frequencies[i]``; the pair is elements ``i`` and ``i + p`` (NeoX) or ``2i`` and ``2i + 1``
    (GPT-J, ``interleaved``) of the first ``2p``; the rest stays. Angles are taken in float64 and
    sums in float32, so a key is rounded once, to its own dtype, however large the shift.

    Keys with a shift of 0 keep their bytes. Everything else in the pages stays as it is. On CUDA
    nothing synchronises with the host, and the keys are re-rotated by one launch.

    The caller guarantees that slots are distinct and below ``num_blocks * block_size``, which is
    not checked on the device.

    Args:
        keys: float32, float16 or bfloat16 ``[num_blocks, heads, block_size, head_size]``, any
            strides with the last dimension contiguous, changed in place.
        slots: int64 or int32 ``[n]``, ``block * block_size + offset``; negative is padding.
        shift: Positions to shift by, of either sign: one number for all slots, or int64 or int32
            ``[n]``.
        frequencies: float32 ``[p]``, radians a position, the model's own table after its scaling
            (``inv_freq``); ``2p <= head_size``.
        interleaved: Pairs lie side by side (GPT-J).

    Raises:
        ValueError: an argument has the wrong dtype, shape, stride or device, or more elements
            would be rotated than a key has.
    """
    if keys.is_cuda:
        from .kernel import rerotate_triton

        rerotate_triton(keys, slots, shift, frequencies, interleaved=interleaved)
    else:
        rerotate_vectorized(keys, slots, shift, frequencies, interleaved=interleaved)


def rerotate_coded(
    pages: Tensor,
    slots: Tensor,
    shift: int | Tensor,
    layout: CodedPage,
    frequencies: Tensor,
    *,
    interleaved: bool = False,
    key_levels: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """:func:`rerotate` of keys that are stored as codes: unpack, rotate, pack, in one launch.

    Each key is coded again by itself, as :func:`kvplug_kernels.quant_write.quant_write` would code
    the rotated one, so it is quantized a second time: the codes of ``plain`` keys lose one
    rounding, others up to half a step of their own. Values and the bytes that pad a cell stay.

    The codes must be those of the keys themselves. A format that codes them in another basis (a
    Hadamard rotation, a projection, channels in another order) must undo that first.

    Args:
        pages: uint8 ``[num_blocks, heads, block_size, layout.bytes_per_token]``, changed in place.
        slots: As `rerotate`.
        shift: As `rerotate`.
        layout: The fields of a page and how they are coded; the groups of keys run along channels.
        frequencies: As `rerotate`; ``2p <= layout.key.width``.
        interleaved: As `rerotate`.
        key_levels: float32 ``[2**bits]`` ascending, the codebook of keys coded by one.
        dtype: What ``plain`` keys are: float16, bfloat16 or float32.

    Raises:
        ValueError: an argument has the wrong dtype, shape, stride or device, keys are grouped
            along tokens (one key cannot be coded again without its neighbours), a codebook has no
            levels, or ``plain`` keys come without a ``dtype`` of their bits.
    """
    if pages.is_cuda:
        from .kernel import rerotate_coded_triton

        implementation = rerotate_coded_triton
    else:
        implementation = rerotate_coded_vectorized
    implementation(
        pages,
        slots,
        shift,
        layout,
        frequencies,
        interleaved=interleaved,
        key_levels=key_levels,
        dtype=dtype,
    )
