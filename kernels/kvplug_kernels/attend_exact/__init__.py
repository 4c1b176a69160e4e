"""Attention among the tokens of one step, and the merge of two partial attentions."""

from __future__ import annotations

from torch import Tensor

from .cpu import attend_exact_cpu, merge_attention_cpu

__all__ = ["attend_exact", "merge_attention"]


def attend_exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_start: Tensor,
    scale: float,
    *,
    softcap: float = 0.0,
    max_query_len: int,
    recent_key: Tensor | None = None,
    recent_value: Tensor | None = None,
    recent_slots: Tensor | None = None,
    recent_lens: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of each row's queries among the row's own tokens, as they were computed.

    Before a row's own tokens come the first ``recent_lens[row]`` tokens of
    ``recent_key[recent_slots[row]]``, which every query of the row sees. Query head ``h`` reads
    head ``h // (num_heads // kv_heads)``. A logit is ``scale * q . k``, or ``softcap * tanh(scale *
    q . k / softcap)`` when ``softcap`` is positive. Logits and sums are float32; the CPU path holds
    at most 64 MB of logits at a time. Nothing synchronises with the host on CUDA.

    Args:
        query: float32, float16 or bfloat16 ``[num_tokens, num_heads, head_size]``.
        key: ``[num_tokens, kv_heads, head_size]`` of the same dtype.
        value: The same shape and dtype as ``key``.
        query_start: int32 ``[rows + 1]``, first token of each row, ascending from 0. Tokens behind
            the last row's see nothing.
        scale: Factor of the logits, finite.
        softcap: Bound of the logits, 0 for none.
        max_query_len: At least the most tokens of a row.
        recent_key: ``[num_slots, size, kv_heads, head_size]`` of the same dtype. What lies beyond
            ``recent_lens`` does not matter. Given with the next three, or all four omitted.
        recent_value: The same shape and dtype.
        recent_slots: int64 ``[rows]``, slot of each row in ``recent_key``; not read for a row
            without recent tokens.
        recent_lens: int32 ``[rows]``, clamped to ``size``.
        out: float32 ``[num_tokens, num_heads, head_size]``, contiguous.
        lse: float32 ``[num_tokens, num_heads]``, contiguous.

    Returns:
        ``out``, normalized, and ``lse``, the natural log of the sum of exponentials of the logits;
        0 and -inf where a query sees nothing.

    Raises:
        ValueError: An argument has the wrong dtype, shape, stride or device, some but not all of
            the arguments of recent tokens are given, or an output starts at the address of an
            input.
    """
    if query.is_cuda:
        from .kernel import attend_exact_triton

        implementation = attend_exact_triton
    else:
        implementation = attend_exact_cpu
    return implementation(
        query,
        key,
        value,
        query_start,
        scale,
        softcap=softcap,
        max_query_len=max_query_len,
        recent_key=recent_key,
        recent_value=recent_value,
        recent_slots=recent_slots,
        recent_lens=recent_lens,
        out=out,
        lse=lse,
    )


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor
) -> Tensor:
    """Attention over two sets of keys from the attention over each.

    Args:
        out_a: float32 ``[num_tokens, num_heads, head_size]``, normalized over the first set.
        lse_a: float32 ``[num_tokens, num_heads]``, log-sum-exp of its logits; -inf where nothing
            was seen, and then ``out_a`` is not read.
        out_b: As ``out_a``, over the second set.
        lse_b: As ``lse_a``.
        out: ``[num_tokens, num_heads, head_size]``, float32, float16 or bfloat16; it may be
            ``out_a`` or ``out_b``. 0 is written where both saw nothing.

    Returns:
        ``out``.

    Raises:
        ValueError: An argument has the wrong dtype, shape, stride or device.
    """
    if out.is_cuda:
        from .kernel import merge_attention_triton

        return merge_attention_triton(out_a, lse_a, out_b, lse_b, out)
    return merge_attention_cpu(out_a, lse_a, out_b, lse_b, out)
