"""K and V as 4-bit integers with a scale and a zero point per token, KV head and group, rotated.

Fine-grained group-wise quantization of FlexGen, arXiv 2303.06865, along the channels of one token:
nothing is shared between tokens, so a token can be written, moved and freed by itself. Single
layers can have other widths.

A few channels of a key are far larger than the others and would take all 16 levels for themselves,
so K, V and queries are rotated first (`rotate`), as in `rotated`: one scale then suits a whole
head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from kvplug.contract import LayerView
from kvplug_kernels.coding import CodedPage, Coding
from kvplug_policies.coded import FIT, LAYERS, LayerOptions, check_group, layer_bits
from kvplug_policies.turned import TurnedFormat


class Int4(TurnedFormat):
    """K and V in 4-bit integer codes, per token and KV head."""

    name = "int4"
    changes = "stores K and V rotated, in 4-bit integers with a scale and a zero per token and head"
    paper = "FlexGen: High-Throughput Generative Inference of LLMs, arXiv 2303.06865"

    class Options(LayerOptions):
        """Options of `Int4`."""

        group: int = Field(
            0, ge=0, le=1024, description="channels of a head that share a scale; 0: all of them"
        )
        rotate: bool = Field(
            True, description="rotate K, V and queries by a random Hadamard matrix before coding"
        )
        # A fit gives up what is far out, on which attention may depend.
        fit: int = Field(0, ge=0, le=8, description=FIT)
        layers: Mapping[str, Literal[2, 3, 4, 8]] = Field(default_factory=dict, description=LAYERS)

    options: Options

    def prepare(self) -> None:
        super().prepare()
        self.rotation = "hadamard" if self.options.rotate else None

    def coding(self, layer: LayerView) -> CodedPage:
        options = self.options
        group = check_group(options.group, layer.head_size)
        bits = layer_bits(options.layers, layer, 4)
        both = Coding(layer.head_size, bits, "int", group, fit=0 if bits == 8 else options.fit)
        self.check_width(layer.head_size)
        return CodedPage(both, both)
