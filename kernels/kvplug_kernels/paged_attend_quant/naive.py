"""The specification of attention over coded pages: legal arguments, then plain loops."""

from __future__ import annotations

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
from ..coding import CodedPage, Coding, check_coded_pages, decode_vectors, unpack

WEIGHT_TILE = 32
"""Tokens whose softmax weights share a scale where products are integer."""
MAX_INTEGER_GROUP = 256
"""Most channels of a group in an integer product: 256 products of 8-bit codes stay below 2**24,
so that float32 holds every partial sum exactly."""


def check_arguments(
    query: Tensor,
    pages: Tensor,
    layout: CodedPage,
    block_table: Tensor,
    lens: Tensor,
    query_start: Tensor,
    scale: float,
    *,
    key_levels: Tensor | None = None,
    value_levels: Tensor | None = None,
    causal: bool,
    softcap: float = 0.0,
    integer: bool = False,
    max_query_len: int,
    max_len: int,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> None:
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    device = pages.device
    check_coded_pages("pages", pages, layout)
    _, heads, block_size, _ = pages.shape
    if heads < 1 or block_size < 1:
        raise ValueError(f"pages must not have empty pages, got shape {tuple(pages.shape)}.")
    check_tensor("query", query, FLOATS, ("num_tokens", "num_heads", layout.key.width), device)
    tokens, num_heads, _ = query.shape
    if num_heads < 1 or num_heads % heads:
        raise ValueError(
            f"query must have a multiple of the {heads} heads of pages, got {num_heads}."
        )
    check_tensor("block_table", block_table, INT32, ("rows", "width"), device)
    rows = block_table.shape[0]
    check_tensor("lens", lens, INT32, (rows,), device)
    check_tensor("query_start", query_start, INT32, (rows + 1,), device)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}.")
    if not (math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap must be finite and at least 0, got {softcap}.")
    for name, limit in (("max_query_len", max_query_len), ("max_len", max_len)):
        if limit < 0:
            raise ValueError(f"{name} must be at least 0, got {limit}.")
    for name, coding, levels in (
        ("key", layout.key, key_levels),
        ("value", layout.value, value_levels),
    ):
        if coding.kind == "codebook":
            if levels is None:
                raise ValueError(f"{name}_levels must be given for codebook {name}s.")
            check_tensor(f"{name}_levels", levels, FLOAT32, (coding.levels,), device)
        if coding.kind == "plain" and coding.bits == 16 and query.element_size() != 2:
            raise ValueError(f"query must have the 16-bit dtype of plain {name}s, got float32.")
        if integer and (coding.kind != "int" or coding.axis != "channels" or coding.outliers):
            raise ValueError(
                f"integer must be False: {name}s must be int codes along channels without outliers."
            )
        if integer and coding.group > MAX_INTEGER_GROUP:
            raise ValueError(
                f"integer must be False: a group of {name}s may have at most {MAX_INTEGER_GROUP} "
                f"channels to be summed exactly, got {coding.group}."
            )
    inputs = {
        "query": query,
        "pages": pages,
        "block_table": block_table,
        "lens": lens,
        "query_start": query_start,
    }
    for name, tensor, wanted in (
        ("out", out, (tokens, num_heads, layout.value.width)),
        ("lse", lse, (tokens, num_heads)),
    ):
        if tensor is not None:
            check_tensor(name, tensor, FLOAT32, wanted, device)
            check_contiguous(name, tensor)
            check_separate(name, tensor, inputs)


def quantize_query(query: Tensor, coding: Coding) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric 8-bit codes of queries, a scale and a zero for each group of channels.

    Args:
        query: ``[..., width]``.
        coding: Of the keys.

    Returns:
        Codes as float32 integers 0 to 255 ``[..., groups, group]``, scale and zero float32
        ``[..., groups, 1]``: ``query ~ scale * code + zero``.
    """
    grouped = torch.unflatten(query.float(), -1, (coding.groups, coding.group))
    zero = grouped.amin(-1, keepdim=True)
    scale = (grouped.amax(-1, keepdim=True) - zero) / 255
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return (grouped - zero).mul_(inverse).add_(0.5).floor_().clamp_(0, 255), scale, zero


def quantize_weights(weights: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes of weights that are at least 0, a scale for the last dimension.

    Args:
        weights: float32 ``[..., n]``, one tile; overwritten by the codes.

    Returns:
        Codes as float32 integers 0 to 255 ``[..., n]``, scale float32 ``[..., 1]``.
    """
    scale = weights.amax(-1, keepdim=True) / 255
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    # The inverse of a subnormal scale is infinite; such weights are nothing beside the others.
    inverse = inverse.masked_fill(torch.isinf(inverse), 0.0)
    return weights.mul_(inverse).add_(0.5).floor_(), scale


def read_fields(
    pages: Tensor, layout: CodedPage, side: str, blocks: Tensor, offsets: Tensor, head: int
) -> dict[str, Tensor]:
    """Fields of K (``side`` is ``key_``) or V of some slots of a head, ``[n, size]`` each. Scales
    and zeros along tokens become those of every channel, ``[n, 2 * width]``."""
    coding = layout.key if side == "key_" else layout.value
    found = {}
    for field in layout.fields:
        if not field.name.startswith(side):
            continue
        name = field.name.removeprefix(side)
        plane = layout.plane(pages, field.name)[:, head]
        if coding.axis == "tokens" and name in ("scale", "zero"):
            first = offsets // coding.group * coding.group
            of_group = first[:, None] + torch.arange(coding.group, device=pages.device)
            found[name] = plane[blocks[:, None], of_group].flatten(1)
        else:
            found[name] = plane[blocks, offsets]
    return found


def decode_fields(
    fields: dict[str, Tensor], coding: Coding, levels: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The vectors of `read_fields`, float32 ``[n, width]``."""
    if coding.axis == "tokens":
        codes = unpack(fields["codes"], coding.bits, coding.width).float()
        scale, zero = (fields[n].contiguous().view(torch.float16) for n in ("scale", "zero"))
        return codes * scale.float() + zero.float()
    wide = torch.float32 if coding.bits == 32 else dtype
    stored = wide if coding.kind == "plain" else torch.float32
    return decode_vectors(fields, coding, levels, stored).float()


def _grouped(fields: dict[str, Tensor], coding: Coding) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int64 ``[n, groups, group]``, scale and zero float32 ``[n, groups]``."""
    codes = unpack(fields["codes"], coding.bits, coding.width)
    scale, zero = (fields[n].contiguous().view(torch.float16).float() for n in ("scale", "zero"))
    return torch.unflatten(codes.long(), -1, (coding.groups, coding.group)), scale, zero


def integer_logits(query: Tensor, fields: dict[str, Tensor], coding: Coding) -> Tensor:
    """Products ``[n]`` of a query ``[width]``, quantized, with coded keys."""
    codes, scale, zero = _grouped(fields, coding)
    q_codes, q_scale, q_zero = quantize_query(query, coding)
    products = (q_codes.long()[None] * codes).sum(-1)
    sums = codes.sum(-1)
    if coding.sums:
        stored = fields["sum"].contiguous().view(torch.int16).long() & 0xFFFF
        sums = stored
    q_scale, q_zero = q_scale[..., 0].double(), q_zero[..., 0].double()
    terms = q_scale * scale * products + q_scale * zero * q_codes.sum(-1)
    terms = terms + q_zero * scale * sums + coding.group * q_zero * zero
    return terms.sum(-1)


def integer_sums(weights: Tensor, fields: dict[str, Tensor], coding: Coding) -> Tensor:
    """Weighted sum ``[width]`` of coded values by weights ``[n]``, quantized tile by tile.

    The middle code is taken off the codes, so that what a weight is rounded by meets small numbers.
    """
    codes, scale, zero = _grouped(fields, coding)
    middle = coding.levels // 2
    codes, zero = codes - middle, zero + middle * scale
    total = torch.zeros(coding.groups, coding.group, dtype=torch.float64, device=weights.device)
    for at in range(0, len(weights), WEIGHT_TILE):
        part = slice(at, at + WEIGHT_TILE)
        w_codes, w_scale = quantize_weights((weights[part, None].float() * scale[part]).T)
        # Exact, and CUDA has no product of integer matrices.
        products = torch.einsum("gt,tgd->gd", w_codes.double(), codes[part].double())
        total += w_scale.double() * products
        total += (weights[part, None].double() * zero[part]).sum(0)[:, None]
    return total.flatten()


@checked(check_arguments)
def paged_attend_quant_naive(
    query: Tensor,
    pages: Tensor,
    layout: CodedPage,
    block_table: Tensor,
    lens: Tensor,
    query_start: Tensor,
    scale: float,
    *,
    key_levels: Tensor | None = None,
    value_levels: Tensor | None = None,
    causal: bool,
    softcap: float = 0.0,
    integer: bool = False,
    max_query_len: int,
    max_len: int,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`kvplug_kernels.paged_attend_quant.paged_attend_quant`, in float64,
    the integer products in int64."""
    num_heads = query.shape[1]
    _, heads, block_size, _ = pages.shape
    out, lse = attention_outputs(query, layout.value.width, out, lse)
    out.zero_()
    lse.fill_(float("-inf"))
    limit = min(block_table.shape[1] * block_size, max_len)
    starts = query_start.tolist()
    for r, n in enumerate(lens.clamp(0, limit).tolist()):
        slots = torch.arange(n, device=pages.device)
        blocks, offsets = block_table[r].long()[slots // block_size], slots % block_size
        for h in range(num_heads):
            head = h // (num_heads // heads)
            keys = read_fields(pages, layout, "key_", blocks, offsets, head)
            values = read_fields(pages, layout, "value_", blocks, offsets, head)
            for i, token in enumerate(range(starts[r], starts[r + 1])):
                seen = n - (starts[r + 1] - starts[r]) + i + 1 if causal else n
                if seen <= 0:
                    continue
                k = {name: field[:seen] for name, field in keys.items()}
                v = {name: field[:seen] for name, field in values.items()}
                if integer:
                    logits = integer_logits(query[token, h], k, layout.key) * scale
                else:
                    key = decode_fields(k, layout.key, key_levels, query.dtype).double()
                    logits = key @ query[token, h].double() * scale
                if softcap > 0:
                    logits = softcap * torch.tanh(logits / softcap)
                lse[token, h] = torch.logsumexp(logits, 0)
                if integer:
                    weights = (logits - logits.amax()).exp()
                    out[token, h] = integer_sums(weights, v, layout.value) / weights.sum()
                else:
                    value = decode_fields(v, layout.value, value_levels, query.dtype).double()
                    out[token, h] = logits.softmax(0) @ value
    return out, lse
