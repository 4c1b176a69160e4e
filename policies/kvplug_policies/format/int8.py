"""K and V as 8-bit integers with a scale and a zero point per token and KV head.

Token-wise quantization of ZeroQuant, arXiv 2206.01861, asymmetric: the codes 0 to 255 span the
smallest to the largest element, so an element is off by half a 255th of that range at most.
"""

from __future__ import annotations

from pydantic import Field

from kvplug.contract import FormatOptions, LayerView
from kvplug_kernels.coding import CodedPage, Coding
from kvplug_policies.coded import CodedFormat, check_group


class Int8(CodedFormat):
    """K and V in 8-bit integer codes, per token and KV head."""

    name = "int8"
    changes = "stores K and V as 8-bit integers with a scale and a zero per token and KV head"
    paper = "ZeroQuant: Efficient and Affordable Post-Training Quantization, arXiv 2206.01861"

    class Options(FormatOptions):
        """Options of `Int8`."""

        group: int = Field(
            0, ge=0, le=1024, description="channels of a head that share a scale; 0: all of them"
        )

    options: Options

    def coding(self, layer: LayerView) -> CodedPage:
        group = check_group(self.options.group, layer.head_size)
        both = Coding(layer.head_size, 8, "int", group)
        return CodedPage(both, both)
