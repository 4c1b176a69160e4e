"""The coded write in compiled C++, and in vectorized torch where there is none."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..arguments import checked
from ..coding import CodedPage, Coding
from ..cpu import compiled
from ..cpu.call import DTYPES, pointer, structure
from ..cpu.coded import coding_struct
from .naive import check_arguments
from .vectorized import quant_write_vectorized

WriteStruct = structure(
    "KVPlugWrite",
    "*k *k_x k_dtype k_by_token k_by_head *v *v_x v_dtype v_by_token v_by_head num_sides *pages "
    "blocks by_block by_head block_size heads *slots wide_slots tokens threads *nonfinite",
)


def has_code(coding: Coding) -> bool:
    """Whether the compiled code writes vectors of a coding."""
    if coding.kind == "plain":
        return True
    return coding.kind == "int" and coding.axis == "channels" and not coding.fit


@checked(check_arguments)
def quant_write_cpu(
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
    """Same contract as :func:`kvplug_kernels.quant_write.quant_write`.

    Codebooks, 8-bit floats, fitted scales and groups of tokens are written by torch.

    Raises:
        IndexError: A slot does not exist; nothing was written then.
    """
    able = has_code(layout.key) and has_code(layout.value)
    found = compiled("quant_write") if able else None
    if found is None:
        quant_write_vectorized(
            key,
            value,
            pages,
            slots,
            layout,
            key_levels=key_levels,
            value_levels=value_levels,
            recent_slots=recent_slots,
            recent_key=recent_key,
            nonfinite=nonfinite,
        )
        return
    blocks, heads, block_size, _ = pages.shape
    codings = [
        coding_struct(layout, side, x.dtype) for side, x in (("key_", key), ("value_", value))
    ]
    sides = [
        (ctypes.addressof(coding), x.data_ptr(), DTYPES[x.dtype], x.stride(0), x.stride(1))
        for coding, x in zip(codings, (key, value), strict=True)
    ]
    call = WriteStruct(
        *sides[0],
        *sides[1],
        2,
        pages.data_ptr(),
        blocks,
        pages.stride(0),
        pages.stride(1),
        block_size,
        heads,
        slots.data_ptr(),
        slots.dtype == torch.int64,
        key.shape[0],
        torch.get_num_threads(),
        pointer(nonfinite),
    )
    if found.library.kvplug_quant_write(ctypes.byref(call)):
        raise IndexError("slots names a slot that pages does not have.")
