"""Gather token slots of a paged KV cache into a dense tensor."""

from __future__ import annotations

from torch import Tensor

from .vectorized import gather_slots_vectorized

__all__ = ["gather_slots"]


def gather_slots(cache: Tensor, slots: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Copy the cache content of each slot, bit exact, in one launch.

    ``out[i, h, :] = cache[slots[i] // block_size, h, slots[i] % block_size, :]``; a negative
    slot is padding and yields zero bytes. Slots may repeat. The caller guarantees that every
    slot is below ``num_blocks * block_size``; this is not checked on the device and the result
    is undefined otherwise. Nothing synchronises with the host on CUDA, so with ``out`` given
    the call can be captured in a CUDA graph.

    Args:
        cache: ``[num_blocks, num_heads, block_size, content]`` of any dtype of 1, 2, 4 or 8
            bytes; the first three dimensions have any strides (head-major pages or a permuted
            view of token-major ones), the last one is contiguous. Neither ``block_size`` nor
            ``content`` needs to be a power of two.
        slots: int32 or int64 ``[n]``.
        out: ``[n, num_heads, content]`` of the dtype of ``cache``, last dimension contiguous.

    Returns:
        ``out``, or a new contiguous tensor of that shape.

    Raises:
        ValueError: an argument has the wrong dtype, shape, stride or device, or ``out`` starts
            at the address of an input.
    """
    if cache.is_cuda:
        from .kernel import gather_slots_triton

        return gather_slots_triton(cache, slots, out=out)
    return gather_slots_vectorized(cache, slots, out=out)
