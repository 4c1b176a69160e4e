"""K and V as the model computes them: the layers of `mixed` that must stay exact."""

from __future__ import annotations

from kvplug.contract import LayerView
from kvplug_kernels.coding import CodedPage, Coding
from kvplug_policies.coded import CodedFormat


def plain_bits(dtype: str) -> int:
    """Bits of an element of a layer's dtype. Raises ValueError for one that is not stored."""
    found = {"float32": 32, "bfloat16": 16, "float16": 16}.get(dtype)
    if found is None:
        raise ValueError(f"K and V of type {dtype or 'unknown'!r} cannot be stored unquantized")
    return found


class Plain(CodedFormat):
    """Stores K and V unchanged, in token-major pages."""

    name = "plain"
    exact = True
    changes = "nothing: K and V are stored as computed, in pages of kvplug's own"

    def coding(self, layer: LayerView) -> CodedPage:
        coding = Coding(layer.head_size, plain_bits(layer.dtype), "plain")
        return CodedPage(coding, coding)
