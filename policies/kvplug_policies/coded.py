"""Base of the built-in formats: codes written and attended by kernels, after an affine map.

A `CodedFormat` codes each vector after an affine map (a rotation, a projection, a mean
taken away); attention happens in that space, with the map absorbed into the query and undone on
the weighted sum. So nothing is unpacked but in registers, and a format is little more than its
`CodedFormat.coding` and its maps.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from kvplug.contract import (
    AttendBatch,
    EngineView,
    FormatOptions,
    FormatPolicy,
    LayerView,
    PageField,
    PageLayout,
    PolicyOptions,
    WriteBatch,
    layer_range,
)
from kvplug_kernels.attend_exact import attend_exact, merge_attention
from kvplug_kernels.coding import CodedPage, decode_vectors, plane
from kvplug_kernels.paged_attend_quant import paged_attend_quant
from kvplug_kernels.quant_write import quant_write

Levels = tuple[Tensor | None, Tensor | None]
"""Levels of the codebooks of K and V."""


LAYERS = (
    "bits by layer or range of layers, e.g. {'0-1': 8, '-1': 8}; layers left out have those of "
    "the format"
)
"""Description of the option ``layers``."""


FIT = (
    "least-squares fits of scale and zero, each followed by a new choice of codes; lowers the "
    "error without extra bytes, for a little time per written token"
)
"""Description of the option ``fit``."""


class LayerOptions(FormatOptions):
    """Options of a format whose codes may have different bits in some layers.

    A format repeats the field with the bits it can have: ``Mapping[str, Literal[2, 4]]``.
    """

    layers: Mapping[str, int] = Field(default_factory=dict, description=LAYERS)

    @field_validator("layers", mode="before")
    @classmethod
    def _layer_keys_are_text(cls, value: object) -> object:
        return {str(k): v for k, v in value.items()} if isinstance(value, dict) else value

    @field_validator("layers")
    @classmethod
    def _layer_keys_are_ranges(cls, value: Mapping[str, int]) -> Mapping[str, int]:
        for layers in value:
            layer_range(layers, None)
        return value


def layer_bits(layers: Mapping[str, int], layer: LayerView, bits: int) -> int:
    """Return the bits of a layer: those of the first range that covers it, else ``bits``.

    Raises:
        ValueError: A range is outside the model.
    """
    ranges = [(layer_range(text, layer.num_layers), own) for text, own in layers.items()]
    return next((own for (low, high), own in ranges if low <= layer.index <= high), bits)


def check_group(group: int, width: int) -> int:
    """Return the group if it divides the head.

    Raises:
        ValueError: It does not divide the head; the message names groups that do.
    """
    if group and width % group:
        fits = [n for n in range(8, width) if width % n == 0]
        raise ValueError(
            f"groups of {group} channels do not divide a head of {width}; "
            f"choose 0 (the whole head){''.join(f', {n}' for n in fits)}"
        )
    return group


def past_lens(batch: AttendBatch) -> Tensor:
    """Tokens of earlier steps that each row sees, ``[num_rows]`` int32."""
    return (batch.seq_lens - batch.query_start.diff()).to(torch.int32)


class CodedFormat(FormatPolicy):
    """A format whose pages are a `CodedPage`, perhaps after an affine map of K and V.

    Subclasses say `coding` and, where they code something other than K and V themselves, the maps:
    `into` before coding, `query_into` for queries, `key_back` and `value_back` from decoded
    vectors, and `shift` for what the keys' map takes off a logit.

    Attributes:
        integer: True if products are computed on the integer codes.
        rotation: Name of the rotation applied, for `PageLayout`.
    """

    integer: ClassVar[bool] = False
    rotation: str | None = None
    graph_safe = True

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self.exact_chunk = self.options.exact_chunk
        self._codings: dict[int, CodedPage] = {}
        self._nonfinite: Tensor | None = None
        self._seen: Tensor | None = None
        self.prepare()
        for layer in engine.layers:
            self.coded(layer)

    def prepare(self) -> None:
        """Load what `coding` needs (a calibration, maps, another format), from `options`.

        Called once, before the layers are coded.

        Raises:
            ValueError: The options cannot work on this engine.
        """

    @abstractmethod
    def coding(self, layer: LayerView) -> CodedPage:
        """Return the coding of K and V of a layer. Raises ValueError if they cannot be coded."""

    def coded(self, layer: LayerView) -> CodedPage:
        """Return `coding` of a layer, computed once."""
        found = self._codings.get(layer.index)
        if found is None:
            try:
                found = self._codings[layer.index] = self.coding(layer)
            except ValueError as error:
                raise ValueError(
                    f"layer {layer.index} (head size {layer.head_size}): {error}"
                ) from None
        return found

    def levels(self, layer: LayerView, device: torch.device) -> Levels:
        """Return the codebook levels of K and V, float32 ascending, for elements of variance 1."""
        return None, None

    # -- maps ----------------------------------------------------------------------------------

    def into(self, layer: LayerView, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Map K and V to the vectors that are coded.

        Args:
            layer: The layer.
            key: ``[n, num_kv_heads, head_size]``.
            value: The same shape.

        Returns:
            ``[n, heads, width]`` each, of the layout's heads and the codings' widths.
        """
        return key, value

    def query_into(self, layer: LayerView, query: Tensor) -> Tensor:
        """Map queries ``[n, num_heads, head_size]`` to ``[n, num_heads, width]`` for coded keys.

        Their products with the keys that `into` returns, plus `shift`, equal those with the keys.
        The result may hold more heads, a whole number for each stored one.
        """
        return query

    def shift(self, layer: LayerView, query: Tensor) -> Tensor | None:
        """Return what the keys' map subtracts from a query's products; None for nothing.

        Keys less their mean have products that are smaller by the query's product with the mean.

        Returns:
            ``[n, num_heads]`` float32.
        """
        return None

    def key_back(self, layer: LayerView, coded: Tensor) -> Tensor:
        """Keys from decoded ones: ``[n, heads, width]`` to ``[n, num_kv_heads, head_size]``."""
        return coded

    def value_back(self, layer: LayerView, coded: Tensor) -> Tensor:
        """Values from decoded ones, as `key_back`."""
        return coded

    def out_back(self, layer: LayerView, out: Tensor) -> Tensor:
        """Map weighted sums of decoded values back to those of values.

        Args:
            layer: The layer.
            out: ``[n, heads, width]``, the heads of `query_into`'s result.

        Returns:
            ``[n, num_heads, head_size]``.
        """
        kv_heads = layer.num_kv_heads
        if type(self).value_back is CodedFormat.value_back:
            return out
        # value_back treats every query head of a KV head alike.
        n, heads, width = out.shape
        grouped = out.view(n, kv_heads, heads // kv_heads, width).transpose(1, 2)
        back = self.value_back(layer, grouped.reshape(-1, kv_heads, width))
        back = back.view(n, heads // kv_heads, kv_heads, -1).transpose(1, 2)
        return back.reshape(n, heads, -1)

    def lse_back(self, layer: LayerView, lse: Tensor) -> Tensor:
        """Log-sum-exps ``[n, heads]`` of `query_into`'s heads to ``[n, num_heads]``."""
        return lse

    # -- what the host calls -------------------------------------------------------------------

    def layout(self, layer: LayerView) -> PageLayout:
        page = self.coded(layer)
        key, value = page.key, page.value
        return PageLayout(
            page.bytes_per_token,
            key.bits,
            value.bits,
            group_size=key.group,
            zero_point=key.kind == "int",
            rank=key.width if key.width != layer.head_size else None,
            rotation=self.rotation,
            fields=tuple(PageField(f.name, f.offset, f.size, f.dtype) for f in page.fields),
        )

    def write(self, layer: LayerView, batch: WriteBatch, cache: Tensor) -> None:
        key, value = self.into(layer, batch.key, batch.value)
        key_levels, value_levels = self.levels(layer, cache.device)
        if self._nonfinite is None:
            self._nonfinite = torch.zeros(1, dtype=torch.int64, device=cache.device)
        quant_write(
            key,
            value,
            cache,
            batch.slots,
            self.coded(layer),
            key_levels=key_levels,
            value_levels=value_levels,
            recent_slots=batch.request_slots,
            recent_key=batch.recent.key if batch.recent is not None else None,
            nonfinite=self._nonfinite,
        )

    def read(self, layer: LayerView, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        page = self.coded(layer)
        found = []
        sides = (("key_", page.key, self.key_back), ("value_", page.value, self.value_back))
        for (name, coding, back), levels in zip(
            sides, self.levels(layer, cache.device), strict=True
        ):
            fields = {
                f.name.removeprefix(name): plane(cache, f)[blocks]
                for f in page.fields
                if f.name.startswith(name)
            }
            dtype = getattr(torch, layer.dtype) if coding.kind == "plain" else torch.float32
            vectors = decode_vectors(fields, coding, levels, dtype)
            n, heads, size, width = vectors.shape
            tokens = vectors.transpose(1, 2).reshape(n * size, heads, width)
            whole = back(layer, tokens)
            found.append(whole.reshape(n, size, *whole.shape[1:]).transpose(1, 2))
        return found[0], found[1]

    def attend(self, layer: LayerView, batch: AttendBatch, cache: Tensor, out: Tensor) -> None:
        if batch.softcap and type(self).shift is not CodedFormat.shift:
            # A capped logit needs the product whole, with what the map takes off it.
            super().attend(layer, batch, cache, out)
            return
        exact = batch.key is not None and batch.value is not None
        lens, kept = batch.seq_lens, None
        held, recent = self.recent(layer), batch.recent
        if exact:
            lens = batch.past_lens if batch.past_lens is not None else past_lens(batch)
            if held and recent is not None and batch.request_slots is not None:
                kept = batch.recent_lens
                if kept is None:
                    kept = torch.where(batch.request_slots >= 0, lens % held, 0).to(torch.int32)
                lens = lens - kept
        key_levels, value_levels = self.levels(layer, cache.device)
        past, past_lse = paged_attend_quant(
            self.query_into(layer, batch.query),
            cache,
            self.coded(layer),
            batch.block_table,
            lens,
            batch.query_start,
            batch.scale,
            key_levels=key_levels,
            value_levels=value_levels,
            causal=not exact,
            softcap=batch.softcap,
            integer=self.integer,
            max_query_len=batch.max_query_len,
            max_len=batch.max_seq_len,
        )
        past = self.out_back(layer, past)
        past_lse = self.lse_back(layer, past_lse)
        if not exact:
            out.copy_(past)
            return
        shift = self.shift(layer, batch.query)
        if shift is not None:
            past_lse = past_lse + batch.scale * shift
        assert batch.key is not None and batch.value is not None
        now, now_lse = attend_exact(
            batch.query,
            batch.key,
            batch.value,
            batch.query_start,
            batch.scale,
            softcap=batch.softcap,
            max_query_len=batch.max_query_len,
            recent_key=recent.key if kept is not None and recent is not None else None,
            recent_value=recent.value if kept is not None and recent is not None else None,
            recent_slots=batch.request_slots if kept is not None else None,
            recent_lens=kept,
        )
        merge_attention(past, past_lse, now, now_lse, out)

    def counters(self) -> dict[str, float]:
        return {"nonfinite": self._count_nonfinite()}

    def _count_nonfinite(self) -> float:
        """Elements stored as 0 so far; on a GPU, up to the report before, so as not to wait."""
        found = self._nonfinite
        if found is None:
            return 0.0
        if found.device.type == "cpu":
            return float(found.item())
        if self._seen is None:
            self._seen = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        before = float(self._seen.item())
        self._seen.copy_(found, non_blocking=True)
        return before
