"""Format policies: how K and V of each layer are stored in their pages, and attended there."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from kvplug.contract.policy import Kind, LayerView, Policy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class PageField:
    """One field of a stored token (or page), at a fixed byte offset.

    Attributes:
        name: E.g. ``key_codes``, ``key_scale``, ``zero_point``.
        offset: Bytes from the start of the cell.
        size: Bytes.
        dtype: Name of the element type, e.g. ``uint8``, ``float16``.
    """

    name: str
    offset: int
    size: int
    dtype: str


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Bytes of one layer's page.

    Attributes:
        bytes_per_token_head: Bytes of K and V of one token and one KV head; a multiple of 4.
        key_bits: Bits of a key element; 16 for unquantized.
        value_bits: Bits of a value element.
        group_size: Tokens (per channel) or channels (per token) that share a scale; 0 for none.
        zero_point: Whether codes are asymmetric.
        rank: Stored dimensions per head when projected, else None.
        rotation: Name of the rotation applied before coding, else None.
        fields: The cell as a table of byte offsets.
    """

    bytes_per_token_head: int
    key_bits: int
    value_bits: int
    group_size: int = 0
    zero_point: bool = False
    rank: int | None = None
    rotation: str | None = None
    fields: tuple[PageField, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.bytes_per_token_head < 4 or self.bytes_per_token_head % 4:
            raise ValueError(
                f"bytes_per_token_head must be a positive multiple of 4, "
                f"got {self.bytes_per_token_head}"
            )
        for f in self.fields:
            if f.offset < 0 or f.offset + f.size > self.bytes_per_token_head:
                raise ValueError(f"field {f.name} does not fit a cell: {f}")


@dataclass(frozen=True, slots=True)
class AttendBatch:
    """The queries of one step for one layer.

    Attributes:
        query: ``[num_tokens, num_heads, head_size]``.
        query_start: ``[num_rows + 1]`` int32, first query token of each row.
        block_table: ``[num_rows, max_blocks]`` int32.
        seq_lens: ``[num_rows]`` int32, KV tokens each row sees, its own queries included.
        scale: Softmax scale.
    """

    query: Tensor
    query_start: Tensor
    block_table: Tensor
    seq_lens: Tensor
    scale: float


class FormatPolicy(Policy):
    """Stores and attends KV in its own bytes. One object per worker.

    The format's `fingerprint` is part of a block's identity: blocks of another format never match.
    """

    kind: ClassVar[Kind] = Kind.FORMAT
    exact: ClassVar[bool] = False

    @abstractmethod
    def layout(self, layer: LayerView) -> PageLayout:
        """The page layout of a layer. Raises ValueError for a head size it cannot pack."""

    @abstractmethod
    def write(
        self, layer: LayerView, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor
    ) -> None:
        """Encode and store new tokens.

        Args:
            layer: The layer.
            key: ``[num_tokens, num_kv_heads, head_size]``.
            value: The same shape.
            cache: ``[num_blocks, num_kv_heads, block_size, bytes_per_token_head]`` uint8.
            slots: ``[num_tokens]`` int64, block * block_size + offset; negative is padding.
        """

    @abstractmethod
    def attend(self, layer: LayerView, batch: AttendBatch, cache: Tensor, out: Tensor) -> None:
        """Attention of ``batch`` over the stored codes, written to ``out`` (shape of the query)."""

    def fingerprint(self) -> str:
        """Identity of the stored bytes: name and every option."""
        return f"{self.name}:{self.options.model_dump_json()}"
