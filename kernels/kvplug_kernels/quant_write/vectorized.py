"""The coded write in vectorized torch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..arguments import checked
from ..coding import CodedPage, decode_groups, encode_groups, encode_vectors, unflatten
from .naive import check_arguments

CHUNK_BYTES = 512 << 10
"""float32 elements coded at a time: their copies stay in a CPU's cache."""
FEW_BYTES = 64 << 10
"""Size up to which all fields are stored by one operation, whatever the width of its words."""
WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@checked(check_arguments)
def quant_write_vectorized(
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
    """Same contract as :func:`kvplug_kernels.quant_write.quant_write`."""
    live = slots >= 0
    if not bool(live.all()):
        key, value, slots = key[live], value[live], slots[live]
        recent_slots = recent_slots[live] if recent_slots is not None else None
    if slots.numel() == 0 or pages.shape[1] == 0:
        return
    slots = slots.long()
    sides = [("value_", value, layout.value, value_levels)]
    if layout.key.axis == "tokens":
        if nonfinite is not None:
            nonfinite += (~key.isfinite()).sum()
        _write_groups(key, pages, slots, layout, recent_slots, recent_key)
    else:
        sides.insert(0, ("key_", key, layout.key, key_levels))
    together = len(sides) == 2 and layout.key == layout.value and key.dtype == value.dtype
    together = together and (key_levels is value_levels)
    heads = pages.shape[1]
    widest = max(coding.width for _, _, coding, _ in sides)
    at_once = max(CHUNK_BYTES // (heads * widest * 4), 1)
    for low in range(0, len(slots), at_once):
        part = slice(low, low + at_once)
        fields = {}
        if together:
            # Half as many operations, which is what the few tokens of a step take time for.
            both = torch.cat([key[part], value[part]], 1)
            if nonfinite is not None:
                nonfinite += (~both.isfinite()).sum()
            for name, found in encode_vectors(both, layout.key, key_levels).items():
                fields[f"key_{name}"], fields[f"value_{name}"] = found[:, :heads], found[:, heads:]
        else:
            for prefix, x, coding, levels in sides:
                if nonfinite is not None:
                    nonfinite += (~x[part].isfinite()).sum()
                found_fields = encode_vectors(x[part], coding, levels)
                fields |= {prefix + name: found for name, found in found_fields.items()}
        _store(fields, pages, slots[part], layout)


def _store(fields: dict[str, Tensor], pages: Tensor, slots: Tensor, layout: CodedPage) -> None:
    """Store fields, bytes ``[n, heads, size]`` each, in words as wide as fit: what a CPU takes time
    for is the number of operations and of elements, not of bytes."""
    n, (_, heads, size, content) = len(slots), pages.shape
    few = n * heads * content <= FEW_BYTES
    block, offset = slots // size, slots % size
    stored = [f for f in layout.fields if f.name in fields]
    for part in [stored] if few else [[f] for f in stored]:
        strides = (pages.stride(0), pages.stride(1), pages.storage_offset(), size * content)
        extents = (*strides, *(f.size for f in part), *(size * f.offset for f in part))
        word = next(w for w in WORDS if all(extent % w.itemsize == 0 for extent in extents))
        names = tuple(f.name for f in part)
        start, step = _places(
            layout, names, heads, size, pages.stride(1), word.itemsize, pages.device
        )
        last = (pages.shape[0] - 1) * strides[0] + (heads - 1) * strides[1] + size * content
        memory = pages.as_strided((last,), (1,)).view(word)
        at = (block * (strides[0] // word.itemsize))[:, None, None] + start
        at += offset[:, None, None] * step
        found = fields[names[0]] if len(part) == 1 else torch.cat([fields[f] for f in names], -1)
        memory[at.flatten()] = found.contiguous().view(word).flatten()


@functools.lru_cache(maxsize=64)
def _places(
    layout: CodedPage,
    names: tuple[str, ...],
    heads: int,
    size: int,
    by_head: int,
    word: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Offsets of the words of some fields of a block's first token, ``[heads, words]``, and the
    steps to those of the next token, ``[words]``."""
    starts, steps = [], []
    for name in names:
        field = layout.field(name)
        words = field.size // word
        starts.append(torch.arange(words, device=device) + size * field.offset // word)
        steps.append(torch.full((words,), words, device=device))
    head = torch.arange(heads, device=device)[:, None] * (by_head // word)
    return torch.cat(starts) + head, torch.cat(steps)


def _write_groups(
    key: Tensor,
    pages: Tensor,
    slots: Tensor,
    layout: CodedPage,
    recent_slots: Tensor | None,
    recent_key: Tensor | None,
) -> None:
    coding = layout.key
    heads, size, group = pages.shape[1], pages.shape[2], coding.group
    ids, offset = slots // group, slots % group
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[1:] = ids[1:] != ids[:-1]
    start, run = begins.nonzero()[:, 0], begins.cumsum(0) - 1
    n = len(start)
    first, block, part = offset[start], slots[start] // size, slots[start] % size // group
    # Groups of tokens as a dimension of their own.
    planes = {
        f: unflatten(layout.plane(pages, f"key_{f}"), 2, (-1, group))
        for f in ("codes", "scale", "zero")
    }
    step = torch.arange(group, device=key.device)
    live = step < first[:, None]
    begun = live.any(1)
    ring_slot = torch.full_like(start, -1)
    if recent_slots is not None and recent_key is not None:
        ring_slot = recent_slots[start].long()
    live[run, offset] = True
    at_once = max(CHUNK_BYTES // (heads * group * coding.width * 4), 1)
    for low in range(0, n, at_once):
        mine = slice(low, min(low + at_once, n))
        found = key.new_zeros((mine.stop - low, heads, group, coding.width), dtype=torch.float32)
        kept = (begun[mine] & (ring_slot[mine] >= 0)).nonzero()[:, 0]
        if recent_key is not None and len(kept):
            at = (part[mine][kept][:, None] * group + step) % recent_key.shape[1]
            found[kept] = recent_key[ring_slot[mine][kept][:, None], at].transpose(1, 2).float()
        coded = (begun[mine] & (ring_slot[mine] < 0)).nonzero()[:, 0]
        if len(coded):
            page, cut = block[mine][coded], part[mine][coded]
            found[coded] = decode_groups({f: p[page, :, cut] for f, p in planes.items()}, coding)
        first_token = int(start[low])
        stop_token = int(start[mine.stop]) if mine.stop < n else len(slots)
        tokens = slice(first_token, stop_token)
        found[run[tokens] - low, :, offset[tokens]] = key[tokens].float()
        seen = live[mine][:, None].expand(found.shape[:3])
        opens = (part[mine] == 0)[:, None].expand(found.shape[:2])
        fields = encode_groups(found, coding, seen, opens)
        page, cut = block[mine], part[mine]
        codes = planes["codes"]
        codes[page, :, cut] = torch.where(seen[..., None], fields["codes"], codes[page, :, cut])
        for name in ("scale", "zero"):
            planes[name][page, :, cut] = fields[name]
