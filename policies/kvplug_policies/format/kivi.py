"""KIVI: keys quantized per channel, values per token, the latest tokens exact.

Liu et al., arXiv 2402.02750: a few channels of the keys are large in every token, so a scale per
channel, shared by a group of tokens, wastes no codes on them; values have no such channels and a
scale per token suits them.

A group's scales are final once its last token is computed. Until then its keys and values are
kept exact beside the pages, in a ring of `group` tokens per request, and attended there. The pages
hold valid codes of the open group too, rewritten with every token, so that a reader of only
pages (a shared block, a tier, another worker) finds them whole.

Differences from the paper:

* The paper keeps up to 128 residual tokens and quantizes the keys of all of them at once; here a
  group is quantized as soon as it is full, so that at most `group` - 1 stored tokens are exact.
* Values become codes with their group, not one by one behind a window.
* A value's scale spans the whole head unless `value_group` says otherwise; the authors' code
  groups channels too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from kvplug.contract import LayerView
from kvplug_kernels.coding import CodedPage, Coding
from kvplug_policies.coded import FIT, LAYERS, CodedFormat, LayerOptions, check_group, layer_bits


class Kivi(CodedFormat):
    """Keys in codes per channel and group of tokens, values in codes per token."""

    name = "kivi"
    changes = "stores keys as 2- or 4-bit codes per channel, values per token, the latest exact"
    paper = "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, arXiv 2402.02750"
    moves_tokens = False

    class Options(LayerOptions):
        """Options of `Kivi`."""

        bits: Literal[2, 4] = Field(2, description="bits of a code")
        group: int = Field(
            32, ge=4, le=256, description="tokens whose keys share a scale per channel"
        )
        value_group: int = Field(
            0, ge=0, le=1024, description="channels of a value that share a scale; 0: all of them"
        )
        fit: int = Field(2, ge=0, le=8, description=f"of values: {FIT}")
        layers: Mapping[str, Literal[2, 4, 8]] = Field(default_factory=dict, description=LAYERS)

        @model_validator(mode="after")
        def _open_groups_are_exact(self) -> Self:
            if not self.exact_chunk:
                raise ValueError(
                    "kivi does not support exact_chunk: false. A group's scales depend on which of "
                    "its tokens are computed, so an open group is attended exactly; int4 and "
                    "rotated support it"
                )
            return self

    options: Options

    def prepare(self) -> None:
        group, size = self.options.group, self.engine.block_size
        if size % group:
            raise ValueError(
                f"groups of {group} tokens do not fill blocks of {size}: start with "
                f"--block-size {-(-size // group) * group}, or choose a group that "
                f"divides {size}"
            )

    def coding(self, layer: LayerView) -> CodedPage:
        options, width = self.options, layer.head_size
        if width % options.group:
            raise ValueError(
                f"the scales of {width} channels cannot be spread over the {options.group} tokens "
                f"of a group: choose a group that divides {width}"
            )
        bits = layer_bits(options.layers, layer, options.bits)
        return CodedPage(
            Coding(width, bits, "int", options.group, "tokens"),
            Coding(
                width,
                bits,
                "int",
                check_group(options.value_group, width),
                fit=0 if bits == 8 else options.fit,
            ),
        )

    def recent(self, layer: LayerView) -> int:
        return self.options.group
