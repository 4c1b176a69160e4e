"""Code new K and V and store the codes in their slots."""

from __future__ import annotations

from torch import Tensor

from ..coding import CodedPage
from .cpu import quant_write_cpu

__all__ = ["quant_write"]


def quant_write(
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    slots: Tensor,
    layout: CodedPage,
    *,
    key_levels: Tensor | None = None,
    value_levels: Tensor | None = None,
    recent_slots: Tensor | None = None,
    recent_key: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> None:
    """Quantize, pack and scatter the keys and values of one step, in one launch.

    The codes are those of `kvplug_kernels.coding`, bit for bit; only where a codebook's scale is
    a sum of floats may a code whose element lies on the bound between two levels differ, and a
    scale in its last place. Only the fields of the written tokens change; bytes that pad a cell
    are not written.

    Where keys are grouped along tokens, each group that a token falls in is coded again from all
    of its tokens so far: those of this step, and before them the exact ones of ``recent_key``, or
    their codes where the token has no slot there. So the codes of an open group are valid at any
    time, and unwritten slots do not affect the scale. The tokens of a group must follow each
    other, in consecutive slots.

    NaN and infinities are stored as 0, so that they affect no neighbour's scale, and counted. A
    finite element beyond what float16 holds is stored as its largest number.

    The caller guarantees that slots are below ``num_blocks * block_size`` and recent_slots below
    ``num_slots``, which is not checked on the device. Nothing synchronises with the host on CUDA,
    and the grid depends on shapes alone, so a CUDA graph can hold the call.

    Args:
        key: float32, float16 or bfloat16 ``[n, heads, layout.key.width]``, any strides with the
            last dimension contiguous.
        value: The same of ``[n, heads, layout.value.width]``; it may have a dtype of its own.
        pages: uint8 ``[num_blocks, heads, block_size, layout.bytes_per_token]``, changed in place.
        slots: int64 or int32 ``[n]``, ``block * block_size + offset``; negative is padding.
        layout: The fields of a page and how they are coded.
        key_levels: float32 ``[2**bits]`` ascending, the codebook of keys coded by one.
        value_levels: The same of values.
        recent_slots: int64 or int32 ``[n]``, each token's slot in ``recent_key``, or -1.
        recent_key: ``[num_slots, size, heads, layout.key.width]``, exact keys before this step's;
            the token of page slot ``s`` lies at ``[recent_slot, s % size]``. ``size`` is a multiple
            of the group and divides the block size. Not read where keys are grouped along channels.
        nonfinite: int64 ``[1]``, incremented by the number of NaN and infinite elements of tokens
            that are not padding.

    Raises:
        ValueError: an argument has the wrong dtype, shape, stride or device, a codebook has no
            levels, or ``recent_key`` comes without ``recent_slots``.
    """
    if pages.is_cuda:
        from .kernel import quant_write_triton

        implementation = quant_write_triton
    else:
        implementation = quant_write_cpu
    implementation(
        key,
        value,
        pages,
        slots,
        layout,
        key_levels=key_levels,
        value_levels=value_levels,
        recent_slots=recent_slots,
        recent_key=recent_key,
        nonfinite=nonfinite,
    )
