"""Adding attention mass as one Triton launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import checked
from .naive import check_arguments

MAX_TILE = 1024


@triton.jit(do_not_specialize=["n", "n_old", "stride_br"])
def add_mass_kernel(
    totals,
    block_table,
    mass,
    n,
    n_old,
    stride_tb,
    stride_th,
    stride_br,
    stride_mr,
    stride_mh,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program adds to the totals of BLOCK tokens of one row and KV head."""
    i_p = tl.program_id(0).to(tl.int64)
    i_r, i_h = i_p // KV_HEADS, i_p % KV_HEADS
    o_t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < n
    p_mass = mass + i_r * stride_mr + i_h * GROUP * stride_mh + o_t
    b_mass = tl.load(p_mass, mask=m_t, other=0)
    for i_g in range(1, GROUP):
        b_mass += tl.load(p_mass + i_g * stride_mh, mask=m_t, other=0)
    i_b = tl.load(block_table + i_r * stride_br + o_t // BLOCK_SIZE, mask=m_t, other=0)
    p_total = totals + i_b.to(tl.int64) * stride_tb + i_h * stride_th + o_t % BLOCK_SIZE
    b_total = tl.load(p_total, mask=m_t & (o_t < n_old), other=0)
    tl.store(p_total, b_total + b_mass / GROUP, mask=m_t)


@checked(check_arguments)
def add_mass_triton(totals: Tensor, block_table: Tensor, mass: Tensor, *, new: int) -> None:
    """Same contract as :func:`kvplug_kernels.add_mass.add_mass`."""
    kv_heads, size = totals.shape[1:]
    rows, num_heads, n = mass.shape
    if rows * n == 0:
        return
    block = min(triton.next_power_of_2(n), MAX_TILE)
    with torch.cuda.device_of(totals):
        add_mass_kernel[(rows * kv_heads, triton.cdiv(n, block))](
            totals,
            block_table,
            mass,
            n,
            n - new,
            totals.stride(0),
            totals.stride(1),
            block_table.stride(0),
            mass.stride(0),
            mass.stride(1),
            KV_HEADS=kv_heads,
            GROUP=num_heads // kv_heads,
            BLOCK_SIZE=size,
            BLOCK=block,
        )
