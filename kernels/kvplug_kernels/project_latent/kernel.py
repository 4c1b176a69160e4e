"""The projection as one Triton launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import checked
from .naive import check_arguments

MAX_TOKENS = 64
MAX_RANK = 64
MAX_INNER = 64


@triton.jit(do_not_specialize=["n"])
def project_latent_kernel(
    x,
    basis,
    mean,
    out,
    n,
    stride_xn,
    stride_xh,
    stride_bh,
    stride_bd,
    stride_mh,
    stride_on,
    stride_oh,
    D: tl.constexpr,
    RANK: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Each program projects BLOCK_M vectors of one head on BLOCK_N of its basis vectors."""
    i_h = tl.program_id(1).to(tl.int64)
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < n, o_n < RANK
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_shift = tl.zeros([BLOCK_N], tl.float32)
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        p_x = x + o_m[:, None] * stride_xn + i_h * stride_xh + o_d[None, :]
        b_x = tl.load(p_x, mask=m_m[:, None] & m_d[None, :], other=0.0)
        p_basis = basis + i_h * stride_bh + o_d[:, None].to(tl.int64) * stride_bd + o_n[None, :]
        b_basis = tl.load(p_basis, mask=m_d[:, None] & m_n[None, :], other=0.0)
        if WIDEN:
            b_x, b_basis = b_x.to(tl.float32), b_basis.to(tl.float32)
        if mean is not None:
            b_mean = tl.load(mean + i_h * stride_mh + o_d, mask=m_d, other=0.0)
        if b_basis.dtype == tl.float32:
            b_x = b_x.to(tl.float32)
            if mean is not None:
                b_x = b_x - b_mean[None, :]
        elif mean is not None:
            # The difference would be rounded to the narrow type; the sums are not.
            b_shift += tl.sum(b_mean[:, None] * b_basis.to(tl.float32), 0)
        b_sum = tl.dot(b_x, b_basis, b_sum, input_precision="tf32x3")
    b_sum = (b_sum - b_shift[None, :]).to(out.dtype.element_ty)
    p_out = out + o_m[:, None] * stride_on + i_h * stride_oh + o_n[None, :]
    tl.store(p_out, b_sum, mask=m_m[:, None] & m_n[None, :])


@checked(check_arguments)
def project_latent_triton(
    x: Tensor, basis: Tensor, mean: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.project_latent.project_latent`."""
    n, heads, d = x.shape
    rank = basis.shape[2]
    if out is None:
        out = x.new_empty((n, heads, rank))
    if out.numel() == 0:
        return out
    block_m = max(min(triton.next_power_of_2(n), MAX_TOKENS), 16)
    block_n = max(min(triton.next_power_of_2(rank), MAX_RANK), 16)
    with torch.cuda.device_of(x):
        project_latent_kernel[(triton.cdiv(n, block_m), heads, triton.cdiv(rank, block_n))](
            x,
            basis,
            mean,
            out,
            n,
            x.stride(0),
            x.stride(1),
            basis.stride(0),
            basis.stride(1),
            0 if mean is None else mean.stride(0),
            out.stride(0),
            out.stride(1),
            D=d,
            RANK=rank,
            # Triton's interpreter multiplies the bits of a bfloat16 matrix as if integers.
            WIDEN=triton.knobs.runtime.interpret and basis.dtype == torch.bfloat16,
            BLOCK_M=block_m,
            BLOCK_D=max(min(triton.next_power_of_2(d), MAX_INNER), 16),
            BLOCK_N=block_n,
        )
    return out
