"""Attention over coded pages in vectorized torch."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import attention_outputs, checked
from ..coding import CodedPage, Coding, unit_bits
from ..paging import bucket_rows, live_table
from .naive import WEIGHT_TILE, check_arguments, quantize_query, quantize_weights

LOGITS_BYTES = 4 << 20
"""Logits of a tile: a few megabytes stay in the CPU's cache between the passes over them."""
VECTORS_BYTES = 8 << 20
"""Decoded K and V of a tile, at least one block of one row."""
SKEW_TOKENS = 4096
"""Padded tokens from which rows of different lengths go apart."""
FEW_QUERIES = 48
"""Queries times groups up to which reading the vectors once is worth products with zeros."""
FP8_UNIT = 256.0
"""Factor from the bits of an e4m3 number, read as a float16, to the number."""


_scratch = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor whose memory is used again by the next call of the same name, device and thread.
    Fresh memory of this size comes from the kernel page by page, which takes longer than filling
    it."""
    size = math.prod(shape) * dtype.itemsize
    kept: dict[tuple[str, torch.device], Tensor] = vars(_scratch).setdefault("kept", {})
    memory = kept.get((name, device))
    if memory is None or memory.numel() < size:
        memory = torch.empty(size, dtype=torch.uint8, device=device)
        if size <= 2 * VECTORS_BYTES:
            kept[name, device] = memory
    return memory[:size].view(dtype).view(shape)


@dataclass
class DecodedTile:
    """K or V of some rows and a tile of tokens.

    Attributes:
        x: float32 ``[rows, heads, tokens, width]``: codes, or vectors where nothing is left to
            apply.
        scale: float32 ``[rows, heads, tokens, groups]`` to be applied, or None.
        zero: The same of what is to be added, or None.
        sums: float32 ``[rows, heads, tokens, groups]``, sums of the codes, where they are needed.
    """

    x: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    sums: Tensor | None = None


@dataclass
class AttendCall:
    """Arguments that do not change from tile to tile."""

    query: Tensor
    pages: Tensor
    layout: CodedPage
    scale: float
    levels: dict[str, Tensor | None]
    softcap: float
    integer: bool
    out: Tensor
    lse: Tensor


@checked(check_arguments)
def paged_attend_quant_vectorized(
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
    """Same contract as :func:`kvplug_kernels.paged_attend_quant.paged_attend_quant`.

    Integer products are taken by the float32 matrix product, whose every intermediate is an
    integer below 2**24 here: torch has no batched one of 8-bit integers.
    """
    num_heads = query.shape[1]
    _, heads, block_size, _ = pages.shape
    out, lse = attention_outputs(query, layout.value.width, out, lse)
    out.zero_()
    lse.fill_(float("-inf"))
    call = AttendCall(
        query,
        pages,
        layout,
        scale,
        {"key_": key_levels, "value_": value_levels},
        softcap,
        integer,
        out,
        lse,
    )
    resident = lens.long().clamp(0, min(block_table.shape[1] * block_size, max_len))
    starts = query_start.long()
    widths = starts[1:] - starts[:-1]
    table = live_table(block_table, resident, block_size).long()
    for rows in _buckets(widths, resident):
        width, longest = int(widths[rows].max()), int(resident[rows].max())
        token_bytes = heads * (layout.key.width + layout.value.width) * 4
        at_once = min(
            LOGITS_BYTES // (width * num_heads * longest * 4),
            VECTORS_BYTES // (longest * token_bytes),
        )
        for part in torch.split(rows, max(1, at_once)):
            _attend_rows(call, table[part], resident[part], starts[part], widths[part], causal)
    return out, lse


def _buckets(widths: Tensor, resident: Tensor) -> Iterator[Tensor]:
    """Indices of the rows that see something, those alike in queries and in length together."""
    for rows in bucket_rows(torch.where(resident > 0, widths, 0)):
        lens = resident[rows]
        if int(lens.max()) * len(rows) - int(lens.sum()) <= SKEW_TOKENS:
            yield rows
            continue
        for part in bucket_rows(lens):
            yield rows[part]


def _attend_rows(
    call: AttendCall, table: Tensor, resident: Tensor, starts: Tensor, widths: Tensor, causal: bool
) -> None:
    """Attend some rows, tile by tile of tokens and of queries."""
    pages, layout = call.pages, call.layout
    _, heads, block_size, _ = pages.shape
    rows, longest, width = len(table), int(resident.max()), int(widths.max())
    num_heads = call.query.shape[1]
    group = num_heads // heads
    device = pages.device
    step = torch.arange(width, device=device)
    mine = step < widths[:, None]
    token = (starts[:, None] + step).clamp_max(call.query.shape[0] - 1)
    seen = resident[:, None].expand(rows, width)
    if causal:
        seen = (resident[:, None] - widths[:, None] + step + 1).clamp_min(0)
        seen = torch.where(mine, seen, resident[:, None])
    query = call.query[token].float()
    query = query.view(rows, width, heads, group, -1).permute(0, 2, 3, 1, 4)

    token_bytes = rows * heads * (layout.key.width + layout.value.width) * 4
    blocks = max(1, VECTORS_BYTES // (token_bytes * block_size))
    if call.integer:
        # Tiles of weights begin at multiples of their length.
        least = max(1, WEIGHT_TILE // block_size)
        blocks = max(least, blocks // least * least)
    tile = min(blocks * block_size, longest)
    q_tile = max(1, min(width, LOGITS_BYTES // (rows * num_heads * tile * 4)))
    top = total = sums = None
    if tile < longest:
        shape = (rows, heads, group, width)
        top = torch.full(shape, float("-inf"), device=device)
        total = torch.zeros(shape, device=device)
        sums = torch.zeros((*shape, layout.value.width), device=device)
    for at in range(0, longest, tile):
        n = min(tile, longest - at)
        lens = resident - at
        width_pages = -(-n // block_size)
        first = at // block_size
        live = table[:, first : first + width_pages]
        # Whole pages: one run of bytes for each block, and every field is a view of them.
        shape = (live.numel(), *pages.shape[1:])
        gathered = scratch("pages", shape, torch.uint8, device)
        torch.index_select(pages, 0, live.flatten(), out=gathered)
        gathered = gathered.view(*live.shape, *pages.shape[1:])
        key = _read(call, "key_", gathered, n, lens, width * group)
        value = _read(call, "value_", gathered, n, lens, width * group)
        for q_at in range(0, width, q_tile):
            in_q = slice(q_at, min(q_at + q_tile, width))
            logits = _logits(call, query[:, :, :, in_q], key)
            hidden = seen[:, in_q] - at
            if int(hidden.amin()) < n:
                beyond = torch.arange(n, device=device) >= hidden[..., None]
                logits.masked_fill_(beyond[:, None, None], float("-inf"))
            high = logits.amax(-1)
            if top is not None:
                high = torch.maximum(top[:, :, :, in_q], high)
            # A query that has seen nothing yet has no maximum to take off.
            base = torch.where(high == float("-inf"), 0.0, high)
            weights = logits.sub_(base[..., None]).exp_()
            norm = weights.sum(-1)
            found = _sums(call, weights, value)
            if top is not None:
                assert total is not None and sums is not None
                shrink = (top[:, :, :, in_q] - base).exp()
                norm += total[:, :, :, in_q] * shrink
                found += sums[:, :, :, in_q] * shrink[..., None]
                top[:, :, :, in_q], total[:, :, :, in_q] = high, norm
                sums[:, :, :, in_q] = found
            if at + n == longest:
                found = found / norm.clamp_min(1e-37)[..., None]
                spread = norm.log() + base
                own = mine[:, in_q]
                to = token[:, in_q]
                found = found.permute(0, 3, 1, 2, 4).flatten(2, 3)
                spread = spread.permute(0, 3, 1, 2).flatten(2, 3)
                call.out[to[own]], call.lse[to[own]] = found[own], spread[own]


def _logits(call: AttendCall, query: Tensor, key: DecodedTile) -> Tensor:
    """``[rows, heads, group, queries, tokens]``, scaled and capped."""
    rows, heads, group, width, _ = query.shape
    q = query.reshape(rows, heads, group * width, -1)
    coding = call.layout.key
    if call.integer:
        found = _integer_products(q, key, coding).mul_(call.scale)
    else:
        q = q * call.scale
        if key.scale is None:
            shape = (rows, heads, q.shape[2], key.x.shape[2])
            found = torch.matmul(q, key.x.mT, out=scratch("logits", shape, torch.float32, q.device))
        else:
            grouped = torch.unflatten(q, -1, (coding.groups, coding.group))
            sums = grouped.sum(-1)
            terms = []
            for g, products in enumerate(_by_group(grouped, key.x)):
                products.mul_(key.scale[:, :, None, :, g])
                if key.zero is not None:
                    products.addcmul_(sums[..., g : g + 1], key.zero[:, :, None, :, g])
                terms.append(products)
            found = _add_up(terms)
    if call.softcap:
        found.div_(call.softcap).tanh_().mul_(call.softcap)
    return found.view(rows, heads, group, width, -1)


def _by_group(q: Tensor, x: Tensor) -> Iterator[Tensor]:
    """Products of queries with vectors, for each group of channels.

    Args:
        q: ``[rows, heads, queries, groups, group]``.
        x: ``[rows, heads, tokens, groups * group]``.

    Yields:
        ``[rows, heads, queries, tokens]`` of each group.
    """
    rows, heads, m, groups, size = q.shape
    if groups == 1:
        found = scratch("logits", (rows, heads, m, x.shape[2]), torch.float32, x.device)
        yield torch.matmul(q[:, :, :, 0], x.mT, out=found)
    elif m * groups <= FEW_QUERIES:
        # One pass over the vectors: each group's query, with zeros for the other groups.
        wide = q.new_zeros(rows, heads, groups, m, groups, size)
        for g in range(groups):
            wide[:, :, g, :, g] = q[:, :, :, g]
        found = wide.view(rows, heads, groups * m, groups * size) @ x.mT
        yield from found.view(rows, heads, groups, m, -1).unbind(2)
    else:
        for g in range(groups):
            yield q[:, :, :, g] @ x[..., g * size : (g + 1) * size].mT


def _integer_products(q: Tensor, key: DecodedTile, coding: Coding) -> Tensor:
    """Products ``[rows, heads, queries, tokens]`` of quantized queries with coded keys."""
    codes, scale, zero = quantize_query(q, coding)
    assert key.scale is not None and key.zero is not None and key.sums is not None
    offset = scale * codes.sum(-1, keepdim=True) + coding.group * zero
    terms = []
    for g, products in enumerate(_by_group(codes, key.x)):
        # Of a group: sk (sq (cq . ck) + zq sum(ck)) + zk (sq sum(cq) + n zq).
        products.mul_(scale[:, :, :, g])
        products.addcmul_(zero[:, :, :, g], key.sums[:, :, None, :, g])
        products.mul_(key.scale[:, :, None, :, g])
        products.addcmul_(offset[:, :, :, g], key.zero[:, :, None, :, g])
        terms.append(products)
    return _add_up(terms)


def _add_up(terms: list[Tensor]) -> Tensor:
    for term in terms[1:]:
        terms[0].add_(term)
    return terms[0]


def _sums(call: AttendCall, weights: Tensor, value: DecodedTile) -> Tensor:
    """``[rows, heads, group, queries, width]`` of weights ``[..., tokens]``."""
    rows, heads, group, width, n = weights.shape
    w = weights.view(rows, heads, group * width, n)
    coding = call.layout.value
    if value.scale is None:
        found = w @ value.x
    else:
        weigh = _integer_sums if call.integer else _scaled_sums
        parts = weigh(w, value, coding)
        found = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        if value.zero is not None:
            # [rows, heads, queries, groups], spread over the channels of each group.
            torch.unflatten(found, -1, (coding.groups, -1)).add_((w @ value.zero).unsqueeze(-1))
    return found.view(rows, heads, group, width, -1)


def _scaled_sums(w: Tensor, value: DecodedTile, coding: Coding) -> list[Tensor]:
    """Sums over coded values, without their zeros, of each group of channels."""
    rows, heads, m, n = w.shape
    assert value.scale is not None
    if coding.groups == 1:
        return [(w * value.scale.mT) @ value.x]
    scaled = w[:, :, None] * value.scale.mT.unsqueeze(3)
    found = scaled.reshape(rows, heads, coding.groups * m, n) @ value.x
    found = found.view(rows, heads, coding.groups, m, coding.groups, coding.group)
    return [found[:, :, g, :, g] for g in range(coding.groups)]


def _integer_sums(w: Tensor, value: DecodedTile, coding: Coding) -> list[Tensor]:
    """Sums as in `_scaled_sums`, of weights quantized tile by tile."""
    rows, heads, m, n = w.shape
    assert value.scale is not None
    whole = n // WEIGHT_TILE * WEIGHT_TILE
    parts = []
    for g in range(coding.groups):
        channels = slice(g * coding.group, (g + 1) * coding.group)
        terms = []
        for first, end in ((0, whole), (whole, n)):
            if first == end:
                continue
            tiles = max((end - first) // WEIGHT_TILE, 1)
            shape = (rows, heads, tiles, m, (end - first) // tiles)
            cut = w[..., first:end].view(rows, heads, m, tiles, -1).transpose(2, 3)
            scale = value.scale[:, :, first:end, g].reshape(rows, heads, tiles, 1, -1)
            scaled = torch.mul(cut, scale, out=scratch("scaled", shape, torch.float32, w.device))
            codes, step = quantize_weights(scaled)
            codes_v = value.x[:, :, first:end, channels]
            codes_v = codes_v.reshape(rows, heads, tiles, -1, coding.group)
            terms.append((codes @ codes_v).mul_(step).sum(2))
        parts.append(_add_up(terms))
    return parts


def _read(
    call: AttendCall, side: str, pages: Tensor, n: int, lens: Tensor, queries: int
) -> DecodedTile:
    """K or V of some blocks of each row.

    Args:
        call: The call.
        side: ``key_`` or ``value_``.
        pages: uint8 ``[rows, blocks, heads, block_size, bytes_per_token]``, contiguous.
        n: Tokens of the tile.
        lens: Tokens of each row in the tile.
        queries: How many queries the vectors meet: with few it is less work to apply the scales to
            what comes out of the product.
    """
    coding = call.layout.key if side == "key_" else call.layout.value
    rows, blocks, heads, size, content = pages.shape
    fields = {f.name: f for f in call.layout.fields}

    def plane(name: str, dtype: torch.dtype = torch.uint8) -> Tensor:
        """A field, ``[rows, heads, blocks, block_size, elements]``."""
        field = fields[side + name]
        wide = pages.view(dtype)
        unit = dtype.itemsize
        run = field.size // unit
        page = size * content // unit
        strides = (blocks * heads * page, page, heads * page, run, 1)
        at = wide.storage_offset() + size * field.offset // unit
        return wide.as_strided((rows, heads, blocks, size, run), strides, at)

    def flat(x: Tensor) -> Tensor:
        return x.flatten(2, 3)[:, :, :n]

    beyond = None
    if int(lens.amin()) < n:
        beyond = (torch.arange(n, device=pages.device) >= lens[:, None])[:, None, :, None]

    def clean(x: Tensor) -> Tensor:
        """Without what lies beyond the resident tokens: nothing times NaN is NaN."""
        return x if beyond is None else x.masked_fill_(beyond, 0.0)

    def halves(name: str) -> Tensor:
        return clean(flat(plane(name, torch.float16).to(torch.float32, copy=True)))

    if coding.kind == "plain":
        dtype = torch.float32 if coding.bits == 32 else call.query.dtype
        x = scratch(side, (rows, heads, blocks, size, coding.width), torch.float32, pages.device)
        return DecodedTile(clean(flat(x.copy_(plane("codes", dtype)))))
    codes = plane("codes")
    x = scratch(side, (rows, heads, blocks, size, coding.inner), torch.float32, pages.device)
    if coding.kind == "fp8":
        _floats(codes, x)
    elif coding.kind == "codebook":
        levels = call.levels[side]
        assert levels is not None
        x = _look_up(codes, coding, levels)
    else:
        _unpack(codes, coding, x)
    if coding.axis == "tokens":
        # The scales of a group of tokens lie behind one another, one for each channel.
        steps, lows = (
            torch.unflatten(plane(name, torch.float16), 3, (-1, coding.group)).flatten(4)
            for name in ("scale", "zero")
        )
        grouped = torch.unflatten(x, 3, (-1, coding.group))
        grouped.mul_(steps.unsqueeze(4)).add_(lows.unsqueeze(4))
        return DecodedTile(clean(flat(x)))
    vectors = flat(x)
    scale = halves("scale")
    zero = halves("zero") if coding.kind == "int" else None
    if coding.kind == "fp8":
        scale.mul_(FP8_UNIT)
        clean(vectors)
    if call.integer:
        sums = None
        if side == "key_" and coding.sums:
            sums = flat((plane("sum", torch.int16).int() & 0xFFFF).float())
        elif side == "key_":
            sums = torch.unflatten(vectors, -1, (coding.groups, coding.group)).sum(-1)
        elif zero is not None:
            middle = coding.levels // 2
            vectors.sub_(middle)
            zero.add_(scale, alpha=middle)
        return DecodedTile(vectors, scale, zero, sums)
    if not coding.outliers and queries * coding.groups < coding.inner:
        return DecodedTile(vectors, scale, zero)
    grouped = torch.unflatten(vectors, -1, (coding.groups, coding.group)).mul_(scale[..., None])
    if zero is not None:
        grouped.add_(zero[..., None])
    if coding.outliers:
        outliers = flat(plane("outlier_codes").float()) * halves("outlier_scale")
        vectors = torch.cat([outliers.add_(halves("outlier_zero")), vectors], -1)
    return DecodedTile(vectors)


def _unpack(codes: Tensor, coding: Coding, out: Tensor) -> None:
    """Packed codes ``[..., code_bytes]`` to numbers ``[..., inner]``, of any dtype."""
    bits = coding.bits
    if bits == 8:
        out.copy_(codes)
        return
    unit = unit_bits(coding.inner, bits)
    units = codes.contiguous().view(torch.int16 if unit == 16 else torch.uint8)
    if bits == 3:
        part = coding.inner // unit
        low, high = units[..., : 2 * part], units[..., 2 * part :]
        for i in range(unit):
            at = slice(i % 2 * part, (i % 2 + 1) * part)
            found = (low[..., at] >> (i // 2 * 2)).bitwise_and_(3)
            top = (high >> i).bitwise_and_(1).bitwise_left_shift_(2)
            out[..., i * part : (i + 1) * part] = found.bitwise_or_(top)
        return
    parts = unit // bits
    part = coding.inner // parts
    for i in range(parts):
        found = (units >> (bits * i)).bitwise_and_((1 << bits) - 1)
        out[..., i * part : (i + 1) * part] = found


def _floats(codes: Tensor, out: Tensor) -> None:
    """e4m3 numbers over `FP8_UNIT`: their bits are those of a float16 but for the place and the
    bias of the exponent. What `torch.float8_e4m3fn` converts one by one."""
    wide = codes.view(torch.int8).to(torch.int16)
    wide = wide.bitwise_left_shift_(7).bitwise_and_(-0x4080)
    out.copy_(wide.view(torch.float16))


def _look_up(codes: Tensor, coding: Coding, levels: Tensor) -> Tensor:
    """Levels of packed codes, two at a time: a table of pairs takes half the look-ups."""
    found = torch.empty((*codes.shape[:-1], coding.inner), dtype=torch.uint8, device=codes.device)
    _unpack(codes, coding, found)
    pairs = levels.new_zeros(coding.levels, 256, 2)
    pairs[:, : coding.levels, 0] = levels
    pairs[:, : coding.levels, 1] = levels[:, None]
    table = pairs.view(torch.float64).flatten()
    at = found.view(torch.int16).int().flatten()
    return table.index_select(0, at).view(torch.float32).view(found.shape)
