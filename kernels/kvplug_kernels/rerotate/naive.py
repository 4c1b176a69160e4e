"""The specification of the rotation in place: legal arguments, then plain loops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import FLOAT32, FLOATS, INTEGERS, check_tensor, checked
from ..coding import CodedPage, check_coded_pages, decode_vectors, encode_vectors
from ..paging import check_pages


def check_arguments(
    keys: Tensor,
    slots: Tensor,
    shift: int | Tensor,
    frequencies: Tensor,
    *,
    interleaved: bool = False,
) -> None:
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    check_pages("keys", keys, keys.device)
    _check_shift(slots, shift, frequencies, keys.shape[3], keys.device)


def check_coded_arguments(
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
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    check_coded_pages("pages", pages, layout)
    coding = layout.key
    if coding.axis == "tokens":
        raise ValueError(
            "layout must group keys along channels to re-rotate them one by one, got groups of "
            f"{coding.group} tokens."
        )
    _check_shift(slots, shift, frequencies, coding.width, pages.device)
    if coding.kind == "codebook":
        if key_levels is None:
            raise ValueError("key_levels must be given for codebook keys.")
        check_tensor("key_levels", key_levels, FLOAT32, (coding.levels,), pages.device)
    if coding.kind == "plain" and (
        dtype is None or dtype not in FLOATS or dtype.itemsize * 8 != coding.bits
    ):
        raise ValueError(f"dtype must be that of plain keys of {coding.bits} bits, got {dtype}.")


def _check_shift(
    slots: Tensor, shift: int | Tensor, frequencies: Tensor, width: int, device: torch.device
) -> None:
    check_tensor("slots", slots, INTEGERS, ("n",), device)
    if isinstance(shift, Tensor):
        check_tensor("shift", shift, INTEGERS, (slots.shape[0],), device)
    check_tensor("frequencies", frequencies, FLOAT32, ("p",), device)
    if 2 * frequencies.shape[0] > width:
        raise ValueError(
            f"frequencies must rotate at most the {width} elements of a key, got "
            f"{frequencies.shape[0]} pairs."
        )


def plain_keys(pages: Tensor, layout: CodedPage, dtype: torch.dtype) -> Tensor:
    """The keys of coded pages that store them as they are, ``[num_blocks, heads, block_size,
    width]``, a view."""
    return layout.plane(pages, "key_codes").view(dtype)


def cos_sin(shift: int | Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each pair's angle, float32 ``[n, p]``, ``[1, p]`` for one shift."""
    if isinstance(shift, Tensor):
        angle = shift.double()[:, None] * frequencies.double()
    else:
        angle = frequencies.double()[None] * float(shift)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, *, interleaved: bool) -> Tensor:
    """Vectors ``[..., d]`` rotated by angles ``[..., p]``, float32."""
    pairs = cosine.shape[-1]
    found = x.float()
    rotated = found[..., : 2 * pairs]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
    else:
        a, b = rotated[..., :pairs], rotated[..., pairs:]
    turned = (a * cosine - b * sine, b * cosine + a * sine)
    whole = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([whole, found[..., 2 * pairs :]], -1)


@checked(check_arguments)
def rerotate_naive(
    keys: Tensor,
    slots: Tensor,
    shift: int | Tensor,
    frequencies: Tensor,
    *,
    interleaved: bool = False,
) -> None:
    """Same contract as :func:`kvplug_kernels.rerotate.rerotate`."""
    size = keys.shape[2]
    for i, slot in enumerate(slots.tolist()):
        by = int(shift[i]) if isinstance(shift, Tensor) else shift
        if slot >= 0 and by != 0:
            key = keys[slot // size, :, slot % size, : 2 * frequencies.shape[0]]
            cosine, sine = cos_sin(by, frequencies)
            key.copy_(rotate(key, cosine, sine, interleaved=interleaved))


@checked(check_coded_arguments)
def rerotate_coded_naive(
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
    coding, size = layout.key, pages.shape[2]
    if coding.kind == "plain" and dtype is not None:
        keys = plain_keys(pages, layout, dtype)
        rerotate_naive(keys, slots, shift, frequencies, interleaved=interleaved)
        return
    planes = {name: layout.plane(pages, f"key_{name}") for name, _, _ in coding.sizes()}
    for i, slot in enumerate(slots.tolist()):
        by = int(shift[i]) if isinstance(shift, Tensor) else shift
        if slot < 0 or by == 0 or frequencies.shape[0] == 0:
            continue
        cells = {name: plane[slot // size, :, slot % size] for name, plane in planes.items()}
        key = decode_vectors(cells, coding, key_levels)
        rotated = rotate(key, *cos_sin(by, frequencies), interleaved=interleaved)
        for name, found in encode_vectors(rotated, coding, key_levels).items():
            cells[name].copy_(found)
