"""A format policy inside stock attention layers: what a step looks like to it, and its guard.

A layer under a format has uint8 pages of the policy's own bytes. New tokens go through
`FormatPolicy.write` where the backend would have stored them, and queries through
`FormatPolicy.attend` where it would have attended. The rest of the backend, its metadata builder
included, stays vLLM's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport

from kvplug.contract import AttendBatch, FormatPolicy, LayerView, PageLayout, Recent, WriteBatch
from kvplug.hosts.dense import attend_dense
from kvplug.hosts.vllm.worker.state import WorkerState, tail_blocks, worker_state

logger = init_logger("vllm.kvplug")


@dataclass
class TokenLanes:
    """Whose lane each token of a step belongs to, and which tokens stay at hand afterwards.

    Attributes:
        lanes: Lane of each token's request, ``[num_tokens]`` int64, or -1.
        assigned: Assignment of each token's request, ``[num_tokens]`` int64.
        kept: Tokens that are among the latest of their request, ``[n]`` int64.
        slots: Their slots, ``[n]`` int64.
    """

    lanes: Tensor
    assigned: Tensor
    kept: Tensor
    slots: Tensor


@dataclass
class FormatStep:
    """The rows of one step, as the backend's metadata sees them.

    Attributes:
        query_start: ``[num_rows + 1]`` int32.
        block_table: ``[num_rows, max_blocks]`` int32.
        seq_lens: ``[num_rows]`` int32.
        num_tokens: Tokens of the step.
        max_query_len: Most queries of a row.
        max_seq_len: Most tokens of a row.
        tokens: Lanes of the step's tokens, or None where nothing recent is kept.
    """

    query_start: Tensor
    block_table: Tensor
    seq_lens: Tensor
    num_tokens: int
    max_query_len: int
    max_seq_len: int
    tokens: TokenLanes | None

    @property
    def row_lanes(self) -> Tensor | None:
        """Lane of each row's first token, ``[num_rows]`` int64."""
        if self.tokens is None:
            return None
        first = self.query_start[:-1].long().clamp_max(max(self.tokens.lanes.shape[0] - 1, 0))
        return self.tokens.lanes[first]


class LaneBuilder:
    """Mixin placed before every other builder of a format that treats requests apart: says which
    request each token of the step belongs to, before rows are split or compacted."""

    kvplug_recent: int

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: Any,
        device: torch.device,
        *args: Any,
        **kwargs: Any,
    ):
        super().__init__(  # type: ignore[call-arg]
            kv_cache_spec, layer_names, vllm_config, device, *args, **kwargs
        )
        self._lane_state = worker_state(vllm_config)
        self.kvplug_tokens: TokenLanes | None = None

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        self.kvplug_tokens = self._token_lanes(common_attn_metadata)
        return super().build(  # type: ignore[misc]
            common_prefix_len, common_attn_metadata, fast_build
        )

    def _token_lanes(self, common: Any) -> TokenLanes:
        rows, device = common.num_reqs, common.seq_lens.device
        starts = common.query_start_loc_cpu[: rows + 1].long()
        size = self.kv_cache_spec.block_size  # type: ignore[attr-defined]
        table, lens = common.block_table_tensor[:rows], common.seq_lens[:rows]
        tails = tail_blocks(table, lens, size).tolist()
        found = self._lane_state.lanes
        by_row = torch.tensor([found.get(t, (-1, 0)) for t in tails], dtype=torch.int64)
        widths = starts[1:] - starts[:-1]
        lanes, assigned = torch.repeat_interleave(by_row.view(-1, 2), widths, 0).unbind(1)
        before_end = torch.repeat_interleave(starts[1:], widths) - torch.arange(len(lanes))
        kept = ((before_end <= self.kvplug_recent) & (lanes >= 0)).nonzero()[:, 0].to(device)
        lanes, assigned = lanes.to(device).contiguous(), assigned.to(device).contiguous()
        return TokenLanes(lanes, assigned, kept, common.slot_mapping[kept].long())


class FormatBuilder:
    """Mixin placed directly before a stock metadata builder: the rows ride on its metadata."""

    supports_update_block_table = False

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """None of whole steps: attention runs between the graphs."""
        return AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        common = common_attn_metadata
        metadata = super().build(0, common, fast_build)  # type: ignore[misc]
        rows = common.num_reqs
        metadata.kvplug_step = FormatStep(
            common.query_start_loc[: rows + 1],
            common.block_table_tensor[:rows],
            common.seq_lens[:rows],
            int(common.num_actual_tokens),
            int(common.max_query_len),
            int(common.max_seq_len),
            getattr(self, "kvplug_tokens", None),
        )
        return metadata


class FormatLayer:
    """One layer under a format: its pages, what is kept recent, and the guard around the policy.

    Args:
        policy: The format.
        layer: The layer.
        state: The worker's.
        scale: Softmax scale.
        softcap: Soft cap of logits; 0 for none.
    """

    def __init__(
        self,
        policy: FormatPolicy,
        layer: LayerView,
        state: WorkerState,
        scale: float,
        softcap: float,
    ):
        self.policy = policy
        self.layer = layer
        self.state = state
        self.scale = scale
        self.softcap = softcap
        self.layout = policy.layout(layer)
        self.recent_size = policy.recent(layer)
        self.apart = bool(self.recent_size) or len(policy.assignments()) > 1
        self.exact_chunk = bool(getattr(policy.options, "exact_chunk", True))
        self._recent: Recent | None = None

    def recent(self, tokens: TokenLanes | None, like: Tensor) -> Recent | None:
        """What is kept of earlier tokens, with room for every lane of the step."""
        if not self.recent_size or tokens is None:
            return None
        lanes = max(self.state.lane_count, 1)
        if self._recent is None or self._recent.key.shape[0] < lanes:
            room = max(lanes, 16 if self._recent is None else 2 * self._recent.key.shape[0])
            shape = (room, self.recent_size, *like.shape[1:])
            grown = Recent(like.new_zeros(shape), like.new_zeros(shape))
            if self._recent is not None:
                grown.key[: self._recent.key.shape[0]] = self._recent.key
                grown.value[: self._recent.value.shape[0]] = self._recent.value
            self._recent = grown
        return self._recent

    def write(
        self, step: FormatStep | None, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor
    ) -> None:
        """Store a step's tokens; blocks that could not be written are reported, not served."""
        tokens = step.tokens if step is not None else None
        n = slots.shape[0]
        batch = WriteBatch(
            key[:n],
            value[:n],
            slots,
            tokens.lanes[:n] if tokens is not None else None,
            self.recent(tokens, key),
            tokens.assigned[:n] if tokens is not None else None,
        )
        if self.state.unwritten and self is next(iter(self.state.format_layers.values())):
            size = cache.shape[2]
            begun = slots[(slots >= 0) & (slots % size == 0)] // size
            self.state.unwritten.difference_update(begun.tolist())
        try:
            self.policy.write(self.layer, batch, cache)
        except Exception as error:
            self.state.format_error("write", self.policy.name, error)
            written = slots[slots >= 0]
            blocks = torch.unique(written // cache.shape[2])
            cache[blocks] = 0
            self.state.unwritten.update(blocks.tolist())
        self.state.counters.format_tokens += n
        self.state.waits_for_counters = cache.device.type != "cpu"

    def attend(
        self,
        step: FormatStep,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: Tensor,
        out: Tensor,
    ) -> None:
        """Attend a step's queries; by reading back where the policy's own way fails."""
        n = step.num_tokens
        exact = self.exact_chunk and key is not None and value is not None
        recent = self.recent(step.tokens, key) if exact else None
        batch = AttendBatch(
            query=query[:n],
            query_start=step.query_start,
            block_table=step.block_table,
            seq_lens=step.seq_lens,
            scale=self.scale,
            max_query_len=step.max_query_len,
            max_seq_len=step.max_seq_len,
            key=key[:n] if exact else None,
            value=value[:n] if exact else None,
            softcap=self.softcap,
            lanes=step.row_lanes,
            recent=recent,
        )
        try:
            self.policy.attend(self.layer, batch, cache, out[:n])
        except Exception as error:
            self.state.format_error("attend", self.policy.name, error)
            try:
                attend_dense(self.policy, self.layer, batch, cache, out[:n])
            except Exception as second:
                self.state.format_error("read", self.policy.name, second)
                out[:n].zero_()
                self.state.unwritten.update(step.block_table[:, :1].flatten().tolist())

    def remember(self, tokens: TokenLanes, key: Tensor, value: Tensor) -> None:
        """Keep the step's latest tokens of each request, once they have been attended."""
        kept = self.recent(tokens, key)
        assert kept is not None
        at = (tokens.lanes[tokens.kept], tokens.slots % self.recent_size)
        kept.key[at] = key[tokens.kept]
        kept.value[at] = value[tokens.kept]


class FormatPages:
    """The pages of a layer under a format, with the interface of `pages.Pages`.

    Args:
        layer: The layer.
        cache: Its cache.
        dtype: What keys and values are read as.
    """

    views = None

    def __init__(self, layer: FormatLayer, cache: Tensor, dtype: torch.dtype):
        self._layer = layer
        self._cache = cache
        self._dtype = dtype
        self._planes = layer.layout.planes(cache)
        self._read: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def gather(self, which: int, blocks: Tensor) -> Tensor:
        """Keys (0) or values (1) of whole blocks, as `pages.Pages.gather`."""
        # Values are always asked for right after the keys of the same blocks.
        if which == 0 or self._read is None or self._read[0] is not blocks:
            policy = self._layer.policy
            self._read = (blocks, policy.read(self._layer.layer, self._cache, blocks.flatten()))
        found = self._read[1][which].to(self._dtype)
        rows, n = blocks.shape
        _, heads, size, width = found.shape
        if which == 1:
            self._read = None
        taken = found.view(rows, n, heads, size, width).transpose(1, 2)
        return taken.reshape(rows, heads, n * size, width).contiguous()

    def move(
        self,
        heads: Tensor,
        from_blocks: Tensor,
        from_slots: Tensor,
        to_blocks: Tensor,
        to_slots: Tensor,
    ) -> None:
        """Copy single tokens of single heads, codes and scales alike, as `pages.Pages.move`."""
        for plane in self._planes:
            plane[to_blocks, heads, to_slots] = plane[from_blocks, heads, from_slots]

    def write(
        self, heads: Tensor, blocks: Tensor, slots: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Store single tokens of single heads, as `pages.Pages.write`."""
        n, count, size = len(heads), self._cache.shape[1], self._cache.shape[2]
        scratch = self._cache.new_zeros((-(-n // size), *self._cache.shape[1:]))
        place = torch.arange(n, device=heads.device)
        wide = (
            key[:, None].expand(-1, count, -1).contiguous(),
            value[:, None].expand(-1, count, -1).contiguous(),
        )
        self._layer.policy.write(self._layer.layer, WriteBatch(*wide, place), scratch)
        made = self._layer.layout.planes(scratch)
        for plane, own in zip(self._planes, made, strict=True):
            plane[blocks, heads, slots] = own[place // size, heads, place % size]


class FormatImpl:
    """Mixin placed directly before a stock attention implementation."""

    kvplug_format: FormatPolicy
    kvplug_format_state: WorkerState

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        if kvplug_layout(layer) is None:
            super().do_kv_cache_update(  # type: ignore[misc]
                layer, key, value, kv_cache, slot_mapping
            )
            return
        found = self.kvplug_layer(layer)
        step = _current_step(layer.layer_name) if found.apart else None
        found.write(step, key, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        step = getattr(attn_metadata, "kvplug_step", None)
        if step is None or kvplug_layout(layer) is None:
            out: Tensor = super().forward(  # type: ignore[misc]
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
            return out
        found = self.kvplug_layer(layer)
        found.attend(step, query, key, value, kv_cache, output)
        if found.recent_size and step.tokens is not None:
            found.remember(step.tokens, key, value)
        return output

    def kvplug_layer(self, layer: Any) -> FormatLayer:
        """The layer's state, made on first use."""
        layers = self.kvplug_format_state.format_layers
        found = layers.get(layer.layer_name)
        if found is None:
            from vllm.model_executor.models.utils import extract_layer_index

            view = self.kvplug_format.engine.layers[extract_layer_index(layer.layer_name)]
            softcap = float(getattr(self, "logits_soft_cap", 0) or 0)
            found = layers[layer.layer_name] = FormatLayer(
                self.kvplug_format,
                view,
                self.kvplug_format_state,
                self.scale,  # type: ignore[attr-defined]
                softcap,
            )
        return found

    def kvplug_pages(self, layer: Any, cache: Tensor, dtype: torch.dtype) -> FormatPages:
        """The layer's pages, for what moves tokens in them."""
        return FormatPages(self.kvplug_layer(layer), cache, dtype)


def kvplug_layout(layer: Any) -> PageLayout | None:
    """The layout of an attention layer's pages, or None where they are the backend's own."""
    found: PageLayout | None = getattr(layer.attn_backend, "kvplug_layout", None)
    return found


def _current_step(layer_name: str) -> FormatStep | None:
    from vllm.forward_context import get_forward_context

    metadata = get_forward_context().attn_metadata
    own = metadata.get(layer_name) if isinstance(metadata, dict) else None
    return getattr(own, "kvplug_step", None)
