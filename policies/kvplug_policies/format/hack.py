"""HACK: attention by integer products of the codes themselves.

Zhang et al., arXiv 2502.03589. With ``q ~ s_q a + z_q`` and ``k ~ s_k b + z_k`` over a group of
``n`` channels, ``q . k = s_q s_k (a . b) + s_q z_k sum(a) + s_k z_q sum(b) + n z_q z_k``: one
integer product and three corrections, of which ``sum(b)`` is stored with the key. The same holds
for probabilities and values. Nothing is dequantized.

A query is quantized to 8 bits per token, head and group. For the second product the scale of a
token's value is folded into its probability, which then is quantized to 8 bits per query and tile.
The softmax between the two products is floating point, as in the paper.

Differences from the paper:

* HACK quantizes values along tokens, and keeps the last, unfinished group of them exact. Here each
  token's value has a scale of its own: a page is finished as soon as it is written, tokens can be
  moved, and the scale moves into the probabilities instead.
* The paper rounds stochastically, here codes are the nearest, after their scale was fitted.
* K, V and queries are rotated first (`rotate`), as in `rotated`: whole heads then bear one scale.
* The tokens of the running step see each other exactly (`exact_chunk`), so the prefill of a fresh
  prompt is floating point; the paper's is integer too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from kvplug.contract import LayerView
from kvplug_kernels.coding import CodedPage, Coding
from kvplug_policies.coded import FIT, LAYERS, LayerOptions, check_group, layer_bits
from kvplug_policies.turned import TurnedFormat


class Hack(TurnedFormat):
    """K and V in integer codes that are multiplied as integers."""

    name = "hack"
    changes = "stores K and V as integer codes and multiplies queries with them as integers"
    paper = "HACK: Homomorphic Acceleration via Compression of the KV Cache, arXiv 2502.03589"
    integer: ClassVar[bool] = True

    class Options(LayerOptions):
        """Options of `Hack`."""

        bits: Literal[2, 4, 8] = Field(4, description="bits of a code")
        group: int = Field(
            0, ge=0, le=1024, description="channels of a head that share a scale; 0: all of them"
        )
        rotate: bool = Field(
            True, description="rotate K, V and queries by a random Hadamard matrix before coding"
        )
        fit: int = Field(2, ge=0, le=8, description=FIT)
        layers: Mapping[str, Literal[2, 4, 8]] = Field(default_factory=dict, description=LAYERS)

    options: Options

    def prepare(self) -> None:
        super().prepare()
        self.rotation = "hadamard" if self.options.rotate else None

    def coding(self, layer: LayerView) -> CodedPage:
        options, width = self.options, layer.head_size
        bits, group = (
            layer_bits(options.layers, layer, options.bits),
            check_group(options.group, width),
        )
        self.check_width(width)
        fit = 0 if bits == 8 else options.fit
        return CodedPage(
            Coding(width, bits, "int", group, sums=True, fit=fit),
            Coding(width, bits, "int", group, fit=fit),
        )
