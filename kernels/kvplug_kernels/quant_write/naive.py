"""The specification of the coded write: legal arguments, then plain loops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import FLOAT32, FLOATS, INTEGERS, check_tensor, checked
from ..coding import (
    CodedPage,
    Coding,
    check_coded_pages,
    decode_groups,
    encode_groups,
    encode_vectors,
)


def check_arguments(
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
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    check_coded_pages("pages", pages, layout)
    device, heads, size = pages.device, pages.shape[1], pages.shape[2]
    _check_side("key", key, layout.key, heads, key_levels, device)
    _check_side("value", value, layout.value, heads, value_levels, device)
    if value.shape[0] != key.shape[0]:
        raise ValueError(f"value must have {key.shape[0]} tokens like key, got {value.shape[0]}.")
    check_tensor("slots", slots, INTEGERS, (key.shape[0],), device)
    if layout.key.axis == "tokens" and recent_key is not None:
        shape = ("num_slots", "size", heads, layout.key.width)
        check_tensor("recent_key", recent_key, FLOATS, shape, device)
        ring_size = recent_key.shape[1]
        if ring_size < 1 or ring_size % layout.key.group or size % ring_size:
            raise ValueError(
                f"recent_key must hold a multiple of the {layout.key.group} tokens of a group that "
                f"divides blocks of {size}, got {ring_size}."
            )
        if recent_slots is None:
            raise ValueError("recent_slots must be given with recent_key.")
        check_tensor("recent_slots", recent_slots, INTEGERS, (key.shape[0],), device)
    if nonfinite is not None:
        check_tensor("nonfinite", nonfinite, (torch.int64,), (1,), device)


def _check_side(
    name: str, x: Tensor, coding: Coding, heads: int, levels: Tensor | None, device: torch.device
) -> None:
    check_tensor(name, x, FLOATS, ("n", heads, coding.width), device)
    if coding.kind == "plain" and x.element_size() * 8 != coding.bits:
        raise ValueError(f"{name} must have {coding.bits} bits an element, got {x.dtype}.")
    if coding.kind == "codebook":
        if levels is None:
            raise ValueError(f"{name}_levels must be given for codebook {name}s.")
        check_tensor(f"{name}_levels", levels, FLOAT32, (coding.levels,), device)


@checked(check_arguments)
def quant_write_naive(
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
    size = pages.shape[2]
    for i, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        block, offset = divmod(slot, size)
        sides = [("value", value, layout.value, value_levels)]
        if layout.key.axis == "channels":
            sides.append(("key", key, layout.key, key_levels))
        for name, x, coding, levels in sides:
            for field, found in encode_vectors(x[i], coding, levels).items():
                layout.plane(pages, f"{name}_{field}")[block, :, offset] = found
        if nonfinite is not None:
            nonfinite += (~key[i].isfinite()).sum() + (~value[i].isfinite()).sum()
    if layout.key.axis == "tokens":
        _write_groups(key, pages, slots.tolist(), layout, recent_slots, recent_key)


def _write_groups(
    key: Tensor,
    pages: Tensor,
    slots: list[int],
    layout: CodedPage,
    recent_slots: Tensor | None,
    recent_key: Tensor | None,
) -> None:
    group, size = layout.key.group, pages.shape[2]
    planes = {f: layout.plane(pages, f"key_{f}") for f in ("codes", "scale", "zero")}
    start = 0
    while start < len(slots):
        slot, stop = slots[start], start + 1
        while stop < len(slots) and slots[stop] // group == slot // group:
            stop += 1
        if slot >= 0:
            block, first = slot // size, slot % size
            cells = slice(first - first % group, first - first % group + group)
            fields = {name: plane[block, :, cells] for name, plane in planes.items()}
            tokens = decode_groups(fields, layout.key)
            if (
                recent_key is not None
                and recent_slots is not None
                and int(recent_slots[start]) >= 0
            ):
                at = torch.arange(cells.start, cells.stop, device=key.device) % recent_key.shape[1]
                tokens = recent_key[int(recent_slots[start]), at].transpose(0, 1).float()
            live = torch.arange(group, device=key.device) < first % group
            for i in range(start, stop):
                tokens[:, slots[i] % group] = key[i].float()
                live[slots[i] % group] = True
            found = encode_groups(
                tokens,
                layout.key,
                live.expand(tokens.shape[:2]),
                torch.full((len(tokens),), cells.start == 0, device=key.device),
            )
            fields["codes"][:, live] = found["codes"][:, live]
            fields["scale"].copy_(found["scale"])
            fields["zero"].copy_(found["zero"])
        start = stop
