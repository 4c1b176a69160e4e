"""How vectors are coded, as the compiled code reads it: ``KVPlugCoding`` of ``coded.h``."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..coding import KINDS, CodedPage, Coding, unit_bits
from .call import DTYPES, structure

__all__ = ["coding_struct"]

CodingStruct = structure(
    "KVPlugCoding",
    "kind bits unit width outliers group groups along_tokens plain_dtype codes codes_size scale "
    "scale_size zero zero_size sum sum_size outlier_codes outlier_scale outlier_zero",
)


@functools.lru_cache(maxsize=256)
def coding_struct(layout: CodedPage, side: str, dtype: torch.dtype) -> Any:
    """How K (``side`` is ``key_``) or V is coded, for the compiled code.

    Args:
        layout: The layout.
        side: ``key_`` or ``value_``.
        dtype: Of 16-bit ``plain`` vectors.
    """
    coding: Coding = layout.key if side == "key_" else layout.value
    fields = {f.name.removeprefix(side): f for f in layout.fields if f.name.startswith(side)}

    def place(name: str) -> int:
        return fields[name].offset if name in fields else 0

    def size(name: str) -> int:
        return fields[name].size if name in fields else 0

    return CodingStruct(
        KINDS[coding.kind],
        coding.bits,
        unit_bits(coding.inner, coding.bits) if coding.kind != "plain" else 8,
        coding.width,
        coding.outliers,
        coding.group,
        coding.groups,
        coding.axis == "tokens",
        DTYPES[torch.float32 if coding.bits == 32 else dtype] if coding.kind == "plain" else 0,
        place("codes"),
        size("codes"),
        place("scale"),
        size("scale"),
        place("zero"),
        size("zero"),
        place("sum"),
        size("sum"),
        place("outlier_codes"),
        place("outlier_scale"),
        place("outlier_zero"),
    )
