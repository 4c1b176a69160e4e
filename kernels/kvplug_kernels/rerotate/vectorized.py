"""The rotation in place in vectorized torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import checked
from ..coding import CodedPage, decode_vectors, encode_vectors
from ..paging import as_runs
from .naive import check_arguments, check_coded_arguments, cos_sin, plain_keys, rotate

CHUNK_BYTES = 256 << 10
"""float32 elements at a time: their copies stay in a CPU's cache."""
WORDS = (torch.int64, torch.int32, torch.int16)


def _shifted(slots: Tensor, shift: int | Tensor) -> tuple[Tensor, int | Tensor]:
    """The slots that are no padding and move, and by how much."""
    live = slots >= 0
    if isinstance(shift, Tensor):
        live &= shift != 0
    elif shift == 0:
        return slots[:0], shift
    if bool(live.all()):
        return slots.long(), shift
    return slots[live].long(), shift[live] if isinstance(shift, Tensor) else shift


def _rotate_in_place(x: Tensor, cosine: Tensor, sine: Tensor, *, interleaved: bool) -> None:
    """`rotate` in place, in as few passes over memory as torch has."""
    pairs = cosine.shape[-1]
    if interleaved:
        of_a, of_b = x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
    else:
        of_a, of_b = x[..., :pairs], x[..., pairs : 2 * pairs]
    a, b = of_a.float(), of_b.float()
    rotated = (a * cosine).sub_(b * sine), (b * cosine).add_(a * sine)
    of_a.copy_(rotated[0])
    of_b.copy_(rotated[1])


@checked(check_arguments)
def rerotate_vectorized(
    keys: Tensor,
    slots: Tensor,
    shift: int | Tensor,
    frequencies: Tensor,
    *,
    interleaved: bool = False,
) -> None:
    """Same contract as :func:`kvplug_kernels.rerotate.rerotate`."""
    slots, shift = _shifted(slots, shift)
    heads, size, width = keys.shape[1:]
    pairs = frequencies.shape[0]
    if slots.numel() == 0 or pairs == 0:
        return
    runs = as_runs(keys, width)
    head = torch.arange(heads, device=keys.device)
    cosine, sine = cos_sin(shift, frequencies)
    at_once = max(CHUNK_BYTES // (heads * width * 4), 1)
    for low in range(0, len(slots), at_once):
        part = slice(low, low + at_once)
        block, offset = slots[part] // size, slots[part] % size
        mine = part if cosine.shape[0] > 1 else slice(0, 1)
        angle = (cosine[mine, None], sine[mine, None])
        if runs is None:
            at = (block[:, None], head[None], offset[:, None])
            found = keys[at]
            _rotate_in_place(found, *angle, interleaved=interleaved)
            keys[at] = found
            continue
        by_block, by_head, by_slot = (stride // width for stride in keys.stride()[:3])
        rows = ((block * by_block + offset * by_slot)[:, None] + head * by_head).flatten()
        found = runs.index_select(0, rows).view(-1, heads, width)
        _rotate_in_place(found, *angle, interleaved=interleaved)
        runs.index_copy_(0, rows, found.view(-1, width))


def _as_words(plane: Tensor) -> Tensor:
    """Bytes ``[..., size]`` as the widest integers their layout allows: fewer to gather."""
    extents = (*plane.stride()[:-1], plane.storage_offset(), plane.shape[-1])
    for word in WORDS:
        if all(extent % word.itemsize == 0 for extent in extents):
            return plane.view(word)
    return plane


@checked(check_coded_arguments)
def rerotate_coded_vectorized(
    pages: Tensor,
    slots: Tensor,
    shift: int | Tensor,
    layout: CodedPage,
    frequencies: Tensor,
    *,
    interleaved: bool = False,
    key_levels: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Same contract as :func:`kvplug_kernels.rerotate.rerotate_coded`."""
    coding, (_, heads, size, _) = layout.key, pages.shape
    if pages.numel() == 0:
        return
    if coding.kind == "plain" and dtype is not None:
        keys = plain_keys(pages, layout, dtype)
        rerotate_vectorized(keys, slots, shift, frequencies, interleaved=interleaved)
        return
    slots, shift = _shifted(slots, shift)
    if slots.numel() == 0 or frequencies.shape[0] == 0:
        return
    planes = {name: _as_words(layout.plane(pages, f"key_{name}")) for name, _, _ in coding.sizes()}
    head = torch.arange(heads, device=pages.device)
    cosine, sine = cos_sin(shift, frequencies)
    at_once = max(CHUNK_BYTES // (heads * coding.width * 4), 1)
    for low in range(0, len(slots), at_once):
        part = slice(low, low + at_once)
        at = ((slots[part] // size)[:, None], head[None], (slots[part] % size)[:, None])
        mine = part if cosine.shape[0] > 1 else slice(0, 1)
        cells = {name: plane[at].view(torch.uint8) for name, plane in planes.items()}
        found = decode_vectors(cells, coding, key_levels)
        found = rotate(found, cosine[mine, None], sine[mine, None], interleaved=interleaved)
        for name, field in encode_vectors(found, coding, key_levels).items():
            planes[name][at] = field.contiguous().view(planes[name].dtype)
