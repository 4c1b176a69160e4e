"""The Hadamard transform as one Triton launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import checked
from .naive import block_width, check_arguments

LOW = 64
"""Widest matrix that vectors are multiplied with; wider transforms are composed."""
TILE = 4096
"""Elements of a program."""


@triton.jit
def _signs(b_bits, dtype: tl.constexpr):
    """1 where an even number of the eight lowest bits is set, and -1 elsewhere."""
    b_bits = b_bits ^ (b_bits >> 4)
    b_bits = b_bits ^ (b_bits >> 2)
    b_bits = b_bits ^ (b_bits >> 1)
    return (1 - 2 * (b_bits & 1)).to(dtype)


@triton.jit(do_not_specialize=["n_blocks"])
def hadamard_kernel(
    x,
    signs,
    out,
    n_blocks,
    stride_xn,
    stride_xh,
    stride_on,
    stride_oh,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    SCALE: tl.constexpr,
    INVERSE: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Each program transforms BLOCK_R blocks of HIGH * LOW elements. The matrix is the Kronecker
    product of those of HIGH and LOW: a matrix product with the second, then HIGH sums."""
    i_p = tl.program_id(0).to(tl.int64)
    # A row is one run of LOW elements of a block.
    o_row = i_p * (BLOCK_R * HIGH) + tl.arange(0, BLOCK_R * HIGH)
    o_block, o_high = o_row // HIGH, o_row % HIGH
    m_row = o_block < n_blocks
    o_vector, o_part = o_block // PARTS, o_block % PARTS
    o_c = tl.arange(0, LOW)
    o_e = (o_part * HIGH + o_high)[:, None] * LOW + o_c[None, :]
    p_x = x + (o_vector // HEADS) * stride_xn + (o_vector % HEADS) * stride_xh
    b_x = tl.load(p_x[:, None] + o_e, mask=m_row[:, None], other=0.0)
    if WIDEN:
        b_x = b_x.to(tl.float32)
    if signs is not None and not INVERSE:
        b_x = b_x * tl.load(signs + o_e).to(b_x.dtype)
    b_matrix = _signs(o_c[:, None] & o_c[None, :], b_x.dtype)
    b_low = tl.reshape(tl.dot(b_x, b_matrix, input_precision="tf32x3"), [BLOCK_R, HIGH, LOW])

    o_block = i_p * BLOCK_R + tl.arange(0, BLOCK_R)
    m_block = o_block < n_blocks
    o_vector, o_part = o_block // PARTS, o_block % PARTS
    p_out = out + (o_vector // HEADS) * stride_on + (o_vector % HEADS) * stride_oh
    o_high = tl.arange(0, HIGH)
    # The result may replace the vectors: nothing is stored before all is loaded.
    tl.debug_barrier()
    for i_h in tl.static_range(HIGH):
        b_sign = _signs(o_high & i_h, tl.float32)
        b_sum = tl.sum(b_low * b_sign[None, :, None], 1) * SCALE
        o_e = (o_part * HIGH + i_h)[:, None] * LOW + o_c[None, :]
        if signs is not None and INVERSE:
            b_sum = b_sum * tl.load(signs + o_e)
        tl.store(p_out[:, None] + o_e, b_sum.to(out.dtype.element_ty), mask=m_block[:, None])


def _as_heads(x: Tensor) -> Tensor:
    """``[..., d]`` as ``[n, heads, d]``, a view where strides allow."""
    while x.ndim < 3:
        x = x.unsqueeze(0)
    return x.flatten(0, -3)


@checked(check_arguments)
def hadamard_triton(
    x: Tensor, signs: Tensor | None = None, *, inverse: bool = False, out: Tensor | None = None
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.hadamard.hadamard`."""
    if out is None:
        out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    source, target = _as_heads(x), _as_heads(out)
    n, heads, d = source.shape
    block = block_width(d)
    low = min(block, LOW)
    high = block // low
    n_blocks = n * heads * (d // block)
    with torch.cuda.device_of(x):
        block_r = max(min(TILE // block, triton.next_power_of_2(n_blocks)), 16 // high, 1)
        hadamard_kernel[(triton.cdiv(n_blocks, block_r),)](
            source,
            signs,
            target,
            n_blocks,
            source.stride(0),
            source.stride(1),
            target.stride(0),
            target.stride(1),
            HEADS=heads,
            PARTS=d // block,
            HIGH=high,
            LOW=low,
            SCALE=block**-0.5,
            INVERSE=inverse,
            # Triton's interpreter multiplies the bits of a bfloat16 matrix as if integers.
            WIDEN=triton.knobs.runtime.interpret and x.dtype == torch.bfloat16,
            BLOCK_R=block_r,
        )
    if target.data_ptr() != out.data_ptr():
        out.copy_(target.view(out.shape))
    return out
