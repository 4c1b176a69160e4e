"""The specification of packing: legal arguments, then plain loops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import FLOATS, INTEGERS, check_contiguous, check_tensor, checked
from ..coding import Coding, decode_vectors, encode_vectors, unit_bits
from ..move_tokens.layers import LayerCaches
from .packed import ALIGNMENT, Packed, expected

KINDS = ("int", "fp8")
BITS = (4, 8)


def check_arguments(
    caches: LayerCaches, blocks: Tensor, packed: Packed, coding: Coding | None = None
) -> None:
    """Raise ValueError naming the first argument that breaks the contract. Host-only."""
    _, _, size, content = caches.shape
    check_tensor("blocks", blocks, INTEGERS, ("chunks", "n"), caches.device)
    if coding is not None:
        check_coding(coding, caches.caches[0].dtype, content)
    chunks = blocks.shape[0]
    tokens = packed.content.shape[2] if packed.content.ndim == 5 else 0
    if not (blocks.shape[1] - 1) * size < tokens <= blocks.shape[1] * size and chunks:
        raise ValueError(
            f"packed.content must have tokens that fill {blocks.shape[1]} blocks of {size}, but "
            f"for a part of the last, got {tuple(packed.content.shape)}."
        )
    wanted = expected(caches, chunks, tokens, coding)
    if set(wanted) != set(packed.fields):
        raise ValueError(f"packed must have fields {list(wanted)}, got {list(packed.fields)}.")
    for name, tensor in packed.fields.items():
        shape, dtype = wanted[name]
        check_tensor(f"packed.{name}", tensor, (dtype,), shape, caches.device)
        check_contiguous(f"packed.{name}", tensor)
        if tensor.data_ptr() % ALIGNMENT:
            raise ValueError(f"packed.{name} must be aligned to {ALIGNMENT} bytes.")


def check_coding(coding: Coding, dtype: torch.dtype, width: int) -> None:
    """Raise ValueError unless elements of a type can be packed in a coding."""
    if dtype not in FLOATS:
        raise ValueError(f"caches must have dtype {FLOATS} to be coded, got {dtype}.")
    if coding.width != width:
        raise ValueError(f"coding must have the width of a slot, {width}, got {coding.width}.")
    if coding.kind not in KINDS or coding.bits not in BITS or coding.axis != "channels":
        raise ValueError(
            f"coding must be int or fp8 of 4 or 8 bits along channels, got {coding.kind} of "
            f"{coding.bits} along {coding.axis}."
        )
    if coding.sums or coding.outliers or coding.fit:
        raise ValueError("coding must have no sums, outliers or rounds of fitting.")
    run = coding.inner // parts_of(coding)
    if coding.group % run and (run % coding.group or run & (run - 1)):
        raise ValueError(
            f"coding must have groups of whole runs of {run} channels, got {coding.group}."
        )


def parts_of(coding: Coding) -> int:
    """Runs of channels of a vector whose codes share units, or that a thread loads apart."""
    if coding.bits == 8:
        return 4 if coding.inner % 32 == 0 else 1
    return unit_bits(coding.inner, coding.bits) // coding.bits


@checked(check_arguments)
def pack_pages_naive(
    caches: LayerCaches, blocks: Tensor, packed: Packed, coding: Coding | None = None
) -> None:
    """Same contract as :func:`kvplug_kernels.pack_pages.pack_pages`."""
    size = caches.shape[2]
    for c, table in enumerate(blocks.tolist()):
        for i, cache in enumerate(caches.caches):
            for t in range(packed.content.shape[2]):
                for h in range(cache.shape[1]):
                    slot = cache[table[t // size], h, t % size].reshape(-1)
                    if coding is None:
                        packed.content[c, i, t, h] = slot.view(torch.uint8)
                        continue
                    fields = encode_vectors(slot, coding)
                    packed.content[c, i, t, h] = fields["codes"]
                    for name in ("scale", "zero"):
                        field = getattr(packed, name)
                        if field is not None:
                            field[c, i, t, h] = fields[name].view(torch.float16)


@checked(check_arguments)
def unpack_pages_naive(
    caches: LayerCaches, blocks: Tensor, packed: Packed, coding: Coding | None = None
) -> None:
    """Same contract as :func:`kvplug_kernels.pack_pages.unpack_pages`."""
    size = caches.shape[2]
    for c, table in enumerate(blocks.tolist()):
        for i, cache in enumerate(caches.caches):
            for t in range(packed.content.shape[2]):
                for h in range(cache.shape[1]):
                    content = packed.content[c, i, t, h]
                    if coding is None:
                        slot = content.view(cache.dtype)
                    else:
                        fields = {"codes": content}
                        for name in ("scale", "zero"):
                            field = getattr(packed, name)
                            if field is not None:
                                fields[name] = field[c, i, t, h].view(torch.uint8)
                        slot = decode_vectors(fields, coding, dtype=cache.dtype)
                    cache[table[t // size], h, t % size] = slot.view(cache.shape[3:])
