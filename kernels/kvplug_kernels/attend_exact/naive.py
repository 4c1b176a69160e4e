"""The specification of exact attention and of the merge: legal arguments, then plain loops."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ..arguments import (
    FLOAT32,
    FLOATS,
    INT32,
    attention_outputs,
    check_contiguous,
    check_separate,
    check_tensor,
    checked,
)


def check_exact(
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
) -> None:
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    device = query.device
    check_tensor("query", query, FLOATS, ("num_tokens", "num_heads", "head_size"), device)
    tokens, num_heads, head_size = query.shape
    dtype = (query.dtype,)
    check_tensor("key", key, dtype, (tokens, "kv_heads", head_size), device)
    kv_heads = key.shape[1]
    check_tensor("value", value, dtype, (tokens, kv_heads, head_size), device)
    if kv_heads < 1 or num_heads < 1 or num_heads % kv_heads:
        raise ValueError(
            f"query must have a multiple of the {kv_heads} heads of key, got {num_heads}."
        )
    check_tensor("query_start", query_start, INT32, ("rows + 1",), device)
    rows = query_start.shape[0] - 1
    if rows < 0:
        raise ValueError("query_start must have an entry, got none.")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}.")
    if not (math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap must be finite and at least 0, got {softcap}.")
    if max_query_len < 0:
        raise ValueError(f"max_query_len must be at least 0, got {max_query_len}.")
    recent = {
        "recent_key": recent_key,
        "recent_value": recent_value,
        "recent_slots": recent_slots,
        "recent_lens": recent_lens,
    }
    missing = [name for name, tensor in recent.items() if tensor is None]
    if len(missing) not in (0, 4):
        raise ValueError(f"{missing[0]} must be given with the other arguments of recent tokens.")
    if recent_key is not None and recent_value is not None:
        assert recent_slots is not None and recent_lens is not None
        shape: tuple[int | str, ...] = ("num_slots", "size", kv_heads, head_size)
        check_tensor("recent_key", recent_key, dtype, shape, device)
        check_tensor("recent_value", recent_value, dtype, tuple(recent_key.shape), device)
        check_tensor("recent_slots", recent_slots, (torch.int64,), (rows,), device)
        check_tensor("recent_lens", recent_lens, INT32, (rows,), device)
    for name, tensor, wanted in (
        ("out", out, (tokens, num_heads, head_size)),
        ("lse", lse, (tokens, num_heads)),
    ):
        if tensor is None:
            continue
        check_tensor(name, tensor, FLOAT32, wanted, device)
        check_contiguous(name, tensor)
    inputs = {"query": query, "key": key, "value": value, **recent}
    check_separate("out", out, inputs)


def check_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor) -> None:
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    device = out.device
    check_tensor("out", out, FLOATS, ("num_tokens", "num_heads", "head_size"), device)
    shape = tuple(out.shape)
    for name, tensor in (("out_a", out_a), ("out_b", out_b)):
        check_tensor(name, tensor, FLOAT32, shape, device)
    for name, tensor in (("lse_a", lse_a), ("lse_b", lse_b)):
        check_tensor(name, tensor, FLOAT32, shape[:2], device)


@checked(check_exact)
def attend_exact_naive(
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
    """Same contract as :func:`kvplug_kernels.attend_exact.attend_exact`, in float64."""
    num_heads, kv_heads = query.shape[1], key.shape[1]
    out, lse = attention_outputs(query, query.shape[2], out, lse)
    out.zero_()
    lse.fill_(float("-inf"))
    starts = query_start.tolist()
    for r, (first, end) in enumerate(itertools.pairwise(starts)):
        before = 0
        if recent_key is not None and recent_slots is not None and recent_lens is not None:
            before = min(max(int(recent_lens[r]), 0), recent_key.shape[1])
        for h in range(num_heads):
            head = h // (num_heads // kv_heads)
            keys, values = key[first:end, head].double(), value[first:end, head].double()
            if before and recent_key is not None and recent_value is not None:
                assert recent_slots is not None
                slot = int(recent_slots[r])
                keys = torch.cat([recent_key[slot, :before, head].double(), keys])
                values = torch.cat([recent_value[slot, :before, head].double(), values])
            for token in range(first, end):
                seen = before + token - first + 1
                logits = keys[:seen] @ query[token, h].double() * scale
                if softcap > 0:
                    logits = softcap * torch.tanh(logits / softcap)
                lse[token, h] = torch.logsumexp(logits, 0)
                out[token, h] = logits.softmax(0) @ values[:seen]
    return out, lse


@checked(check_merge)
def merge_attention_naive(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.attend_exact.merge_attention`, in float64."""
    for t in range(out.shape[0]):
        for h in range(out.shape[1]):
            parts = [(out_a[t, h], lse_a[t, h]), (out_b[t, h], lse_b[t, h])]
            seen = [(part.double(), lse.double()) for part, lse in parts if lse > float("-inf")]
            if not seen:
                out[t, h] = 0
                continue
            weights = torch.stack([lse for _, lse in seen]).softmax(0)
            merged = sum(w * part for w, (part, _) in zip(weights, seen, strict=True))
            out[t, h] = merged
    return out
