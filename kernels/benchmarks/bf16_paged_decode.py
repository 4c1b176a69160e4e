"""Baseline of decoding over quantized pages: the fastest paged decode over 16-bit pages.

That is the Triton kernel below, written for the purpose, or FlashInfer's or vLLM's FlashAttention
where one can be imported; every one that runs is timed, and the fastest counts.
"""

# Triton's compile-time arguments are upper case by its own convention.
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvplug_kernels.paged_attend_quant.kernel import merge_splits

Call = Callable[[], object]


@triton.jit
def decode_kernel(
    query,
    key,
    value,
    block_table,
    lens,
    partial_out,
    partial_lse,
    scale,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_br,
    HEADS: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One query of each row: a program for each row, KV head and split of the tokens."""
    i_p = tl.program_id(0).to(tl.int64)
    i_s = tl.program_id(1)
    i_r, i_h = i_p // HEADS, i_p % HEADS
    n_resident = tl.load(lens + i_r)
    o_m, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < QUERY_GROUP, o_d < HEAD_SIZE
    o_head = i_h * QUERY_GROUP + o_m
    p_query = query + i_r * stride_qt + o_head[:, None] * stride_qh + o_d[None, :]
    b_query = tl.load(p_query, mask=m_m[:, None] & m_d[None, :], other=0)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_norm = tl.zeros([BLOCK_M], tl.float32)
    b_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    n_chunk = (n_resident + SPLITS * BLOCK_T - 1) // (SPLITS * BLOCK_T) * BLOCK_T
    for i_t in range(i_s * n_chunk, tl.minimum((i_s + 1) * n_chunk, n_resident), BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T)
        m_t = o_t < n_resident
        m = m_t[:, None] & m_d[None, :]
        p_table = block_table + i_r * stride_br + o_t // BLOCK_SIZE
        i_b = tl.load(p_table, mask=m_t, other=0).to(tl.int64)
        o_in = o_t % BLOCK_SIZE
        p_key = key + i_b * stride_kb + i_h * stride_kh + o_in * stride_kt
        p_value = value + i_b * stride_vb + i_h * stride_vh + o_in * stride_vt
        b_key = tl.load(p_key[:, None] + o_d[None, :], mask=m, other=0)
        b_value = tl.load(p_value[:, None] + o_d[None, :], mask=m, other=0)
        b_logit = tl.dot(b_query, tl.trans(b_key)) * scale
        b_logit = tl.where(m_t[None, :], b_logit, float("-inf"))
        b_top = tl.maximum(b_max, tl.max(b_logit, 1))
        b_weight = tl.exp(b_logit - b_top[:, None])
        b_shrink = tl.exp(b_max - b_top)
        b_norm = b_norm * b_shrink + tl.sum(b_weight, 1)
        b_sum = tl.dot(b_weight.to(b_value.dtype), b_value, b_sum * b_shrink[:, None])
        b_max = b_top
    m_any = b_norm > 0
    b_norm = tl.where(m_any, b_norm, 1.0)
    o_part = (i_r * (HEADS * QUERY_GROUP) + o_head) * SPLITS + i_s
    b_lse = tl.where(m_any, b_max + tl.log(b_norm), float("-inf"))
    tl.store(partial_lse + o_part, b_lse, mask=m_m)
    p_out = partial_out + o_part[:, None] * HEAD_SIZE + o_d[None, :]
    tl.store(p_out, b_sum / b_norm[:, None], mask=m_m[:, None] & m_d[None, :])


def paged_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    lens: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    splits: int,
) -> None:
    """Attend one query ``[rows, num_heads, head_size]`` of each row to pages of the same dtype,
    ``[num_blocks, kv_heads, block_size, head_size]``; ``out`` and ``lse`` are float32."""
    rows, num_heads, head_size = query.shape
    heads, block_size = key.shape[1:3]
    group = num_heads // heads
    part = query.new_empty((rows, num_heads, splits, head_size), dtype=torch.float32)
    part_lse = query.new_empty((rows, num_heads, splits), dtype=torch.float32)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=query.device)
    block_d = triton.next_power_of_2(head_size)
    decode_kernel[(rows * heads, splits)](
        query,
        key,
        value,
        block_table,
        lens,
        part,
        part_lse,
        scale,
        *query.stride()[:2],
        *key.stride()[:3],
        *value.stride()[:3],
        block_table.stride(0),
        HEADS=heads,
        QUERY_GROUP=group,
        BLOCK_SIZE=block_size,
        HEAD_SIZE=head_size,
        SPLITS=splits,
        BLOCK_M=max(16, triton.next_power_of_2(group)),
        BLOCK_T=64,
        BLOCK_D=block_d,
    )
    merge_splits(part, part_lse, starts, out, lse)


def _flashinfer(query: Tensor, pages: Tensor, table: Tensor, lens: Tensor, scale: float) -> Call:
    import flashinfer

    rows, num_heads, head_size = query.shape
    _, _, heads, block_size, _ = pages.shape
    width = table.shape[1]
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=query.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    last = (lens - 1) % block_size + 1
    starts = torch.arange(rows + 1, dtype=torch.int32, device=query.device) * width
    wrapper.plan(
        starts,
        table.flatten(),
        last,
        num_heads,
        heads,
        head_size,
        block_size,
        q_data_type=query.dtype,
        kv_data_type=query.dtype,
        sm_scale=scale,
    )
    return partial(wrapper.run, query, pages)


def _flash_attention(
    query: Tensor, pages: Tensor, table: Tensor, lens: Tensor, scale: float
) -> Call:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    rows = query.shape[0]
    # Its pages are token-major: the same numbers, laid out again.
    key, value = (pages[:, side].transpose(1, 2).contiguous() for side in (0, 1))
    starts = torch.arange(rows + 1, dtype=torch.int32, device=query.device)
    return partial(
        flash_attn_varlen_func,
        query,
        key,
        value,
        max_seqlen_q=1,
        cu_seqlens_q=starts,
        max_seqlen_k=int(lens.max()),
        seqused_k=lens,
        softmax_scale=scale,
        causal=True,
        block_table=table,
    )


def decoders(
    query: Tensor, pages: Tensor, table: Tensor, lens: Tensor, scale: float
) -> dict[str, Call]:
    """Every 16-bit paged decode that runs here, by name.

    Args:
        query: ``[rows, num_heads, head_size]``, float16 or bfloat16.
        pages: ``[num_blocks, 2, kv_heads, block_size, head_size]``, keys and values.
        table: int32 ``[rows, width]``, full.
        lens: int32 ``[rows]``.
        scale: Of the logits.
    """
    rows, num_heads, head_size = query.shape
    out = query.new_zeros((rows, num_heads, head_size), dtype=torch.float32)
    lse = query.new_zeros((rows, num_heads), dtype=torch.float32)
    found: dict[str, Call] = {}
    for splits in (1, 2, 4, 8, 16):
        found[f"Triton bf16 paged decode, {splits} splits"] = partial(
            paged_decode, query, pages[:, 0], pages[:, 1], table, lens, scale, out, lse, splits
        )
    for name, make in (("FlashInfer", _flashinfer), ("vLLM's FlashAttention", _flash_attention)):
        try:
            call = make(query, pages, table, lens, scale)
            call()
        except Exception as error:  # Anything that keeps it from running is reported.
            print(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[:1]}")
        else:
            found[name] = call
    return found
