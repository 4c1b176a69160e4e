"""K and V as 8-bit floating-point numbers, one scale per token and KV head.

e4m3 of Micikevicius et al., arXiv 2209.05433: four bits of exponent, three of mantissa. The scale
is the largest magnitude of the vector over 448, the largest e4m3 number, so an element is off by a
sixteenth of itself at most, or by some millionths of the largest where it is tiny.
"""

from __future__ import annotations

from kvplug.contract import LayerView
from kvplug_kernels.coding import CodedPage, Coding
from kvplug_policies.coded import CodedFormat


class Fp8(CodedFormat):
    """K and V in e4m3, scaled per token and KV head."""

    name = "fp8"
    changes = "stores K and V as 8-bit floating-point numbers, scaled per token and KV head"
    paper = "FP8 Formats for Deep Learning, arXiv 2209.05433"

    def coding(self, layer: LayerView) -> CodedPage:
        both = Coding(layer.head_size, 8, "fp8")
        return CodedPage(both, both)
