"""KIVI: keys quantized per channel, values per token, the latest tokens exact.

Liu et al., arXiv 2402.02750: a few channels of the keys are large in every token, so a scale per
channel, shared by a group of tokens, wastes no codes on them; values have no such channels and a
scale per token suits them.

A group's scales are final once its last token is computed. Until then its keys and values are
kept exact beside the pages, in a ring of tokens per request, and attended there. The ring holds the
tokens of a block (`recent`), and all of those behind the last full one are attended in it. The
pages hold valid codes of them too, rewritten with every token of an open group, so that a reader of
only pages (a shared block, a tier, another worker) finds them whole.

Differences from the paper:

* K, V and queries are rotated first (`rotate`). What a key is off by is then shared by all of its
  channels: at 4 bits the divergence from the full cache is a third smaller, at 2 bits a half.
* The zeros of a block's first group are moved so that its first token is coded exactly
  (`anchor`): the first token of a text takes most of the attention in many heads, and with 2 bits
  what its key is off by is most of the damage.
* The paper keeps up to 128 residual tokens and quantizes the keys of all of them at once; here
  codes are written as tokens come, and at most `recent` - 1 stored tokens are exact.
* Values become codes with their keys, not one by one behind a window.
* A value's scale spans the whole head unless `value_group` says otherwise; the authors' code
  groups channels too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kvplug.contract import LayerView, Recent, WriteBatch
from kvplug_kernels.coding import CodedPage, Coding
from kvplug_policies.coded import FIT, LAYERS, LayerOptions, check_group, layer_bits
from kvplug_policies.turned import TurnedFormat

Bits = Literal[2, 3, 4]
LayerBits = Literal[2, 3, 4, 8]

MOST_RECENT = 128
"""Most tokens that are kept exact of a request unless more are asked for, as in the paper."""

PRICE = (
    "Perplexity added on SmolLM2 135M and Gemma 3 270M: 0.2 % at 4 bits, 3 % with key_bits: 3 and "
    "value_bits: 2, 7 % and 33 % at 2 bits"
)


class Kivi(TurnedFormat):
    """Keys in codes per channel and group of tokens, values in codes per token."""

    name = "kivi"
    changes = "stores keys as 2- to 4-bit codes per channel, values per token, the latest exact"
    paper = "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, arXiv 2402.02750"
    moves_tokens = False

    class Options(LayerOptions):
        """Options of `Kivi`."""

        bits: Bits = Field(4, description=f"bits of a code. {PRICE}")
        key_bits: Bits | None = Field(None, description="bits of a key's code, if different")
        value_bits: Bits | None = Field(None, description="bits of a value's code, if different")
        group: int = Field(
            32, ge=4, le=256, description="tokens whose keys share a scale per channel"
        )
        recent: int = Field(
            0,
            ge=0,
            le=1024,
            description="tokens of a request that are kept exact beside the pages: those behind "
            "the last whole multiple of this many are attended exactly; whole groups that divide a "
            f"block; 0: as many as a block has, at most {MOST_RECENT}",
        )
        value_group: int = Field(
            0, ge=0, le=1024, description="channels of a value that share a scale; 0: all of them"
        )
        rotate: bool = Field(
            True, description="rotate K, V and queries by a random Hadamard matrix before coding"
        )
        anchor: bool = Field(
            True,
            description="code the key of each block's first token exactly, at no byte more: the "
            "first token of a text bears most of the attention of many heads",
        )
        fit: int = Field(2, ge=0, le=8, description=f"of values: {FIT}")
        layers: Mapping[str, LayerBits] = Field(default_factory=dict, description=LAYERS)

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
        super().prepare()
        self.rotation = "hadamard" if self.options.rotate else None
        group, size = self.options.group, self.engine.block_size
        if size % group:
            raise ValueError(
                f"groups of {group} tokens do not fill blocks of {size}: start with "
                f"--block-size {-(-size // group) * group}, or choose a group that "
                f"divides {size}"
            )
        fits = [n for n in range(group, size + 1, group) if size % n == 0]
        self._recent = self.options.recent or max(n for n in fits if n <= max(MOST_RECENT, group))
        if self._recent not in fits:
            raise ValueError(
                f"recent: {self._recent} is not a number of whole groups of {group} tokens that "
                f"divides blocks of {size}; choose {' or '.join(map(str, fits))}"
            )

    def coding(self, layer: LayerView) -> CodedPage:
        options, width = self.options, layer.head_size
        if width % options.group:
            raise ValueError(
                f"the scales of {width} channels cannot be spread over the {options.group} tokens "
                f"of a group: choose a group that divides {width}"
            )
        self.check_width(width)
        key = layer_bits(options.layers, layer, options.key_bits or options.bits)
        value = layer_bits(options.layers, layer, options.value_bits or options.bits)
        return CodedPage(
            Coding(width, key, "int", options.group, "tokens", anchored=options.anchor),
            Coding(
                width,
                value,
                "int",
                check_group(options.value_group, width),
                fit=0 if value == 8 else options.fit,
            ),
        )

    def recent(self, layer: LayerView) -> int:
        return self._recent

    def write(self, layer: LayerView, batch: WriteBatch, cache: Tensor) -> None:
        if self.rotation is not None and batch.recent is not None:
            batch = self._turned(batch, batch.recent, cache.shape[2])
        super().write(layer, batch, cache)

    def _turned(self, batch: WriteBatch, recent: Recent, block_size: int) -> WriteBatch:
        """The batch with rotated keys in its ring: of each token's group where tokens are few, of
        all requests where they are many. Which of them is known from shapes."""
        slots, of = batch.slots, batch.request_slots
        assert of is not None
        requests, size = recent.key.shape[:2]
        group = self.options.group
        if len(slots) * group >= requests * size:
            return replace(batch, recent=Recent(self.turn(recent.key), recent.value))
        step = torch.arange(group, device=slots.device)
        first = slots.clamp_min(0) % block_size // group * group
        earlier = recent.key[of.clamp_min(0)[:, None], (first[:, None] + step) % size]
        own = torch.arange(len(slots), device=slots.device)
        return replace(
            batch,
            request_slots=torch.where(of >= 0, own, -1),
            recent=Recent(self.turn(earlier), recent.value),
        )
