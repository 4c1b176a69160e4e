"""Format policies: store K and V of each layer in their pages, and attend them there."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from kvplug.contract.policy import ALL_FEATURES, Feature, Kind, LayerView, Policy, PolicyOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class PageField:
    """One field of a stored token.

    A page of one KV head is divided into planes: the field of token ``t`` starts at byte
    ``block_size * offset + t * size`` of it.

    Attributes:
        name: E.g. ``key_codes``, ``key_scale``, ``value_zero``.
        offset: Bytes of the fields before it, per token.
        size: Bytes per token.
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
        bytes_per_token_head: Bytes of K and V of one token and one stored head; a multiple of 4.
        key_bits: Bits of a key element; 16 for unquantized.
        value_bits: Bits of a value element.
        group_size: Tokens (per channel) or channels (per token) that share a scale; 0 for none.
        zero_point: True for asymmetric codes.
        rank: Stored dimensions per head if projected, else None.
        rotation: Name of the rotation applied before coding, else None.
        heads: Stored heads; None for one per KV head of the layer.
        fields: The fields of a token, as planes of the page; one plane of opaque bytes by
            default.
    """

    bytes_per_token_head: int
    key_bits: int
    value_bits: int
    group_size: int = 0
    zero_point: bool = False
    rank: int | None = None
    rotation: str | None = None
    heads: int | None = None
    fields: tuple[PageField, ...] = field(default=())

    def __post_init__(self) -> None:
        size = self.bytes_per_token_head
        if size < 4 or size % 4:
            raise ValueError(f"bytes_per_token_head must be a positive multiple of 4, got {size}")
        if self.heads is not None and self.heads < 1:
            raise ValueError(f"heads must be at least 1, got {self.heads}")
        if not self.fields:
            object.__setattr__(self, "fields", (PageField("cell", 0, size, "uint8"),))
        at = 0
        for f in self.fields:
            if f.offset != at or f.size < 1 or at + f.size > size:
                raise ValueError(f"fields must be contiguous and fit {size} bytes, got {f}")
            at += f.size

    def stored_heads(self, layer: LayerView) -> int:
        """Return the number of heads in a layer's pages."""
        return layer.num_kv_heads if self.heads is None else self.heads

    def token_bytes(self, layer: LayerView) -> int:
        """Return the bytes of K and V of one token in a layer, all heads."""
        return self.stored_heads(layer) * self.bytes_per_token_head

    def pages(
        self,
        layer: LayerView,
        blocks: int,
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Allocate a zeroed cache, ``[blocks, heads, block_size, bytes_per_token_head]`` uint8."""
        import torch

        shape = (blocks, self.stored_heads(layer), block_size, self.bytes_per_token_head)
        return torch.zeros(shape, dtype=torch.uint8, device=device)

    def planes(self, cache: Tensor) -> list[Tensor]:
        """View a cache as one uint8 tensor ``[num_blocks, heads, block_size, size]`` per field.

        Args:
            cache: ``[num_blocks, heads, block_size, bytes_per_token_head]`` uint8, the last two
                dimensions contiguous.
        """
        from kvplug_kernels.coding import plane

        return [plane(cache, f) for f in self.fields]


@dataclass(frozen=True, slots=True)
class Recent:
    """Exact K and V of each request's latest tokens, kept by the host beside the pages.

    The token at index ``s`` of a request lies at ``[slot, s % size]`` until the token ``size``
    places later is computed.

    Attributes:
        key: ``[request_slots, size, num_kv_heads, head_size]``.
        value: The same shape.
    """

    key: Tensor
    value: Tensor


@dataclass(frozen=True, slots=True)
class WriteBatch:
    """The new tokens of one step for one layer.

    Attributes:
        key: ``[num_tokens, num_kv_heads, head_size]``.
        value: The same shape.
        slots: ``[num_tokens]`` int64, block * block_size + offset; negative is padding. The tokens
            of a request follow each other.
        request_slots: Slot of each token's request, ``[num_tokens]`` int64, -1 for none; None if
            the format keeps nothing recent.
        recent: Recent tokens before these; these are added after they were attended.
        assigned: Assignment of each token's request, ``[num_tokens]`` int64, if the format has
            several; see `FormatPolicy.assignments`.
    """

    key: Tensor
    value: Tensor
    slots: Tensor
    request_slots: Tensor | None = None
    recent: Recent | None = None
    assigned: Tensor | None = None


@dataclass(frozen=True, slots=True)
class AttendBatch:
    """The queries of one step for one layer.

    Attributes:
        query: ``[num_tokens, num_heads, head_size]``.
        query_start: ``[num_rows + 1]`` int32, first query token of each row.
        block_table: ``[num_rows, max_blocks]`` int32.
        seq_lens: ``[num_rows]`` int32, stored tokens each row sees, including its own.
        scale: Softmax scale.
        max_query_len: Largest number of queries of a row.
        max_seq_len: Largest number of tokens of a row.
        key: Exact keys of the query tokens, ``[num_tokens, num_kv_heads, head_size]``, or None
            to read them from the pages too.
        value: Exact values, likewise.
        softcap: Soft cap of logits; 0 for none.
        request_slots: Slot of each row's request, ``[num_rows]`` int64, or -1; None as in
            `WriteBatch`.
        recent: Recent tokens before this step's.
        past_lens: Tokens of earlier steps that each row sees, ``[num_rows]`` int32; None to take
            ``seq_lens`` less the row's queries.
        recent_lens: How many of these lie in ``recent``, ``[num_rows]`` int32: all after the last
            whole multiple of its size where the request has a slot; None to compute it.
    """

    query: Tensor
    query_start: Tensor
    block_table: Tensor
    seq_lens: Tensor
    scale: float
    max_query_len: int
    max_seq_len: int
    key: Tensor | None = None
    value: Tensor | None = None
    softcap: float = 0.0
    request_slots: Tensor | None = None
    recent: Recent | None = None
    past_lens: Tensor | None = None
    recent_lens: Tensor | None = None


class ReadBack(Exception):
    """Raised by `FormatPolicy.attend` to leave a step to the host.

    The host then reads stored tokens back with `FormatPolicy.read` and attends them itself.
    """


class FormatOptions(PolicyOptions):
    """Options of every format."""

    exact_chunk: bool = Field(
        True,
        description="the tokens of one step attend each other as computed, and earlier ones as "
        "stored; false: all are read back, so nothing depends on how a prompt is chunked",
    )


class FormatPolicy(Policy):
    """Stores and attends KV in its own bytes. One object per worker.

    A minimal format is three methods: `layout` says how many bytes a token takes, `encode` makes
    them and `decode` reads them. The host scatters the bytes, and attends by reading them back. A
    format with a kernel overrides `write` and `attend`.

    The format's `fingerprint` is part of a block's identity: blocks of another format never match.

    Attributes:
        moves_tokens: True if a token's bytes can be moved to another slot by themselves. False
            if tokens share a scale; then policies that move tokens are refused.
        graph_safe: True if a CUDA graph can hold `write` and `attend`. They then depend on nothing
            but the tensors of their batches and on shapes: they read no number back to the host,
            allocate nothing whose size depends on data, keep no state in Python from step to step,
            never raise `ReadBack` where logits are not capped, and are right when
            ``max_seq_len`` is the longest sequence of the engine, rows have no tokens and slots are
            negative. Steps in which every request decodes are then replayed as one graph. False:
            graphs end at attention, which runs between them.
    """

    kind: ClassVar[Kind] = Kind.FORMAT
    exact: ClassVar[bool] = False
    moves_tokens: bool = True
    graph_safe: bool = False
    supports: ClassVar[frozenset[Feature]] = ALL_FEATURES - {
        Feature.QUANTIZED_KV_CACHE,
        Feature.CONTEXT_PARALLEL,
        Feature.DISAGGREGATED_PREFILL,
        Feature.KV_SHARING,
        Feature.SLIDING_WINDOW_LAYERS,
        Feature.SPECULATIVE_DECODING,
        Feature.DRAFT_MODEL,
        Feature.MULTIMODAL,
    }

    class Options(FormatOptions):
        """Options of every format."""

    options: FormatOptions

    @abstractmethod
    def layout(self, layer: LayerView) -> PageLayout:
        """Return the page layout of a layer. Raises ValueError for a head size it cannot pack."""

    def encode(self, layer: LayerView, key: Tensor, value: Tensor) -> Tensor:
        """Encode tokens to bytes.

        Args:
            layer: The layer.
            key: ``[num_tokens, num_kv_heads, head_size]``.
            value: The same shape.

        Returns:
            uint8 ``[num_tokens, heads, bytes_per_token_head]``, the layout's fields in order.
        """
        raise NotImplementedError(f"{type(self).__name__} must override encode or write")

    def decode(self, layer: LayerView, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Decode K and V of tokens, as precisely as the bytes hold them.

        Args:
            layer: The layer.
            cells: uint8 ``[num_tokens, heads, bytes_per_token_head]``.

        Returns:
            Keys and values ``[num_tokens, num_kv_heads, head_size]``, any floating dtype.
        """
        raise NotImplementedError(f"{type(self).__name__} must override decode or read")

    def recent(self, layer: LayerView) -> int:
        """Return how many latest tokens of each request the host keeps exactly; 0 for none.

        It must divide the block size.
        """
        return 0

    def write(self, layer: LayerView, batch: WriteBatch, cache: Tensor) -> None:
        """Encode and store new tokens.

        Args:
            layer: The layer.
            batch: The tokens.
            cache: ``[num_blocks, heads, block_size, bytes_per_token_head]`` uint8.
        """
        slots, size = batch.slots, cache.shape[2]
        if not len(slots):
            return
        cells, valid = self.encode(layer, batch.key, batch.value), slots >= 0
        if cache.device.type == "cpu":
            if not bool(valid.all()):
                cells, slots = cells[valid], slots[valid]
        else:
            # How many tokens are padding only the device knows, so padding writes what the first
            # other token does. A step of nothing else writes to block 0, which no request has.
            first = valid.long().argmax(0, keepdim=True)
            cells = cells.where(valid[:, None, None], cells[first])
            slots = slots.where(valid, slots[first]).clamp_min(0)
        layout = self.layout(layer)
        blocks, offsets = slots // size, slots % size
        for f, plane in zip(layout.fields, layout.planes(cache), strict=True):
            plane[blocks, :, offsets] = cells[..., f.offset : f.offset + f.size]

    def read(self, layer: LayerView, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Read K and V of whole blocks, as precisely as the pages hold them.

        Args:
            layer: The layer.
            cache: As in `write`.
            blocks: Block ids, ``[n]`` int64.

        Returns:
            Keys and values ``[n, num_kv_heads, block_size, head_size]``, any floating dtype.
        """
        layout = self.layout(layer)
        heads, size = cache.shape[1], cache.shape[2]
        cells = cache.new_zeros((len(blocks), size, heads, layout.bytes_per_token_head))
        for f, plane in zip(layout.fields, layout.planes(cache), strict=True):
            cells[..., f.offset : f.offset + f.size] = plane[blocks].transpose(1, 2)
        key, value = self.decode(layer, cells.flatten(0, 1))

        def pages(tokens: Tensor) -> Tensor:
            return tokens.reshape(len(blocks), size, *tokens.shape[1:]).transpose(1, 2)

        return pages(key), pages(value)

    def attend(self, layer: LayerView, batch: AttendBatch, cache: Tensor, out: Tensor) -> None:
        """Attend the queries to the stored tokens and write the result to ``out``.

        The default leaves it to the host, which attends what `read` returns.

        Args:
            layer: The layer.
            batch: The queries.
            cache: As in `write`; this step's tokens are stored already.
            out: ``[num_tokens, num_heads, head_size]``, the dtype of the query.

        Raises:
            ReadBack: The host shall attend by reading pages back.
        """
        raise ReadBack

    def fingerprint(self) -> str:
        """Return the identity of the stored bytes: name and every option."""
        return f"{self.name}:{self.options.model_dump_json()}"

    # -- formats that choose per request -------------------------------------------------------

    def assignments(self) -> Sequence[str]:
        """Return the fingerprints of the storage variants a request can be assigned.

        They share one page layout. If there are several, each request is assigned one on arrival
        (`assign`), and its blocks match only requests with the same one.
        """
        return (self.fingerprint(),)

    def assign(self) -> int:
        """Choose the assignment of a new request. Called in the scheduler."""
        return 0

    def signals(self) -> Sequence[float] | None:
        """Return what a worker measured since the last call, or None for nothing.

        Called after each step; the host sums the numbers over the ranks and passes them to
        `observe`.
        """
        return None

    def observe(self, signals: Sequence[float]) -> str | None:
        """Receive the workers' measurements, in the scheduler.

        Returns:
            A sentence to log if a decision was made, else None.
        """
        return None
