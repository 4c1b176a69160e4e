"""Attention memory inside stock attention layers: decode rows that reuse their far attention.

A step's decode rows of requests that allow approximate reuse are attended here, layer by layer, by
an `AttentionMemo`; every other row goes to the backend, unchanged. Which rows those are is the same
in all layers, so `MemoBuilder` says it once a step, and builds the backend's metadata of the others
beside that of all rows. Without the builder a step is taken over only where all its rows are of the
kind.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport

from kvplug.hosts.vllm.worker.pages import Pages, order_of
from kvplug.hosts.vllm.worker.state import WorkerState, tail_blocks, worker_state
from kvplug.reuse.settings import Memo
from kvplug_attention_memo.memory import AttentionMemo

logger = init_logger("vllm.kvplug")

LANES = 256
"""Requests remembered at most."""


@dataclass
class MemoStep:
    """The rows of one step that attention memory takes over.

    Attributes:
        lanes: Lane of each row.
        owners: Which request has the lane, a number of its own.
        lens: Tokens of each row.
        tokens: Its token among the step's, ``[rows]`` int64.
        table: Its blocks, ``[rows, max_blocks]`` int64.
        rest: The backend's metadata of all other rows; None where there is none.
        rest_tokens: Their tokens among the step's, ``[n]`` int64.
    """

    lanes: list[int]
    owners: list[int]
    lens: list[int]
    tokens: Tensor
    table: Tensor
    rest: Any = None
    rest_tokens: Tensor | None = None


class LaneOwners:
    """Says when a lane has become another request's.

    A request grows by one token a decode step, and its full blocks stay what they are. A row whose
    lane was shorter or as long before, or had other full blocks, is another request, or the same
    one begun anew.

    Args:
        block_size: Tokens per block.
    """

    def __init__(self, block_size: int):
        self.block_size = block_size
        self._numbers = itertools.count()
        self._seen: OrderedDict[int, tuple[int, int, list[int]]] = OrderedDict()

    def owner(self, lane: int, length: int, blocks: list[int]) -> int:
        """The number of the request that has a lane.

        Args:
            lane: The lane.
            length: Tokens of the request, this step's among them.
            blocks: Its block ids.
        """
        number, before, had = self._seen.get(lane, (-1, 0, []))
        full = before // self.block_size
        if number < 0 or length <= before or blocks[:full] != had[:full]:
            number = next(self._numbers)
        self._seen[lane] = (number, length, blocks)
        self._seen.move_to_end(lane)
        while len(self._seen) > 4 * LANES:
            self._seen.popitem(last=False)
        return number

    def forget(self, lane: int) -> None:
        """The lane's request does something else than decoding."""
        self._seen.pop(lane, None)


class MemoRows:
    """Finds the rows of a step, once for all layers.

    Args:
        memo: When a query is alike.
        state: The worker's.
    """

    def __init__(self, memo: Memo, state: WorkerState):
        self.memo = memo
        self.state = state
        self._owners: dict[int, LaneOwners] = {}

    def find(
        self, query_start: Sequence[int], seq_lens: Tensor, table: Tensor, block_size: int
    ) -> tuple[MemoStep, list[int], list[int]] | None:
        """The rows to take over, their numbers and those of the others, or None for none.

        Args:
            query_start: First token of each row, and the end, ``[rows + 1]``.
            seq_lens: Tokens of each row, ``[rows]``.
            table: Blocks of each row, ``[rows, max_blocks]``.
            block_size: Tokens per block.
        """
        lanes = self.state.memo_lanes
        if not lanes:
            return None
        owners = self._owners.setdefault(block_size, LaneOwners(block_size))
        rows = len(query_start) - 1
        tails = tail_blocks(table[:rows], seq_lens[:rows], block_size).tolist()
        lens = seq_lens[:rows].tolist()
        mine: list[int] = []
        rest: list[int] = []
        found: list[tuple[int, int, int]] = []
        for row in range(rows):
            width = query_start[row + 1] - query_start[row]
            lane = lanes.get(tails[row]) if width > 0 and lens[row] > 0 else None
            if lane is None:
                rest.append(row)
                continue
            far = max(lens[row] - self.memo.near, 0) // block_size
            if width != 1 or far == 0:
                owners.forget(lane)
                rest.append(row)
                continue
            own = table[row, : -(-lens[row] // block_size)].tolist()
            mine.append(row)
            found.append((lane, owners.owner(lane, lens[row], own), lens[row]))
        if not mine:
            return None
        device = table.device
        step = MemoStep(
            [lane for lane, _, _ in found],
            [owner for _, owner, _ in found],
            [length for _, _, length in found],
            torch.tensor([query_start[row] for row in mine], device=device),
            table[torch.tensor(mine, device=device)].long(),
        )
        return step, mine, rest


class MemoBuilder:
    """Mixin placed before every other builder, so that theirs see each part of a step as one: the
    step's rows ride on its metadata."""

    kvplug_memo: Memo
    supports_update_block_table = False

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
        self._memo_rows = MemoRows(self.kvplug_memo, worker_state(vllm_config))

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """None of whole steps: which rows reuse is decided in each layer."""
        return AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        common = common_attn_metadata
        rows = common.num_reqs
        found = None
        if _causal(common):
            found = self._memo_rows.find(
                common.query_start_loc_cpu[: rows + 1].tolist(),
                common.seq_lens,
                common.block_table_tensor,
                self.kv_cache_spec.block_size,  # type: ignore[attr-defined]
            )
        build = super().build  # type: ignore[misc]
        if found is None:
            metadata = build(common_prefix_len, common, fast_build)
            metadata.kvplug_memo = None
            return metadata
        step, _, rest = found
        if rest:
            part, step.rest_tokens = _rows_of(common, rest)
            step.rest = build(0, part, fast_build)
        # The backend's own metadata of every row: what an error falls back on.
        metadata = build(0, common, fast_build)
        metadata.kvplug_memo = step
        return metadata


class MemoImpl:
    """Mixin placed before a stock attention implementation, and before that of a format."""

    kvplug_memo: Memo
    kvplug_memo_state: WorkerState
    kvplug_memo_rows: MemoRows

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
        attend = super().forward  # type: ignore[misc]
        everything = (layer, query, key, value, kv_cache, attn_metadata, output)
        plain = not args and all(extra is None for extra in kwargs.values())
        step = (
            self._memo_step(attn_metadata, kv_cache) if plain and self._memo_fits(layer) else None
        )
        if step is None:
            out: Tensor = attend(*everything, *args, **kwargs)
            return out
        try:
            memo = self._memo_of(layer, kv_cache)
            made = memo.attend(step, query)
        except Exception as error:
            self._memo_failed(error)
            out = attend(*everything, *args, **kwargs)
            return out
        if step.rest is not None and step.rest_tokens is not None:
            t = step.rest_tokens
            part = torch.empty_like(output[t])
            attend(layer, query[t], key[t], value[t], kv_cache, step.rest, part, *args, **kwargs)
            output[t] = part
        output[step.tokens] = made.view(-1, *output.shape[1:]).to(output.dtype)
        return output

    def _memo_fits(self, layer: Any) -> bool:
        """Whether the layer attends in the one way that is known here."""
        window = getattr(self, "sliding_window", None)
        if _coded(layer) and self.kvplug_layer(layer).recent_size:  # type: ignore[attr-defined]
            # The format keeps exact tokens of the rows it attends, and would miss these.
            return False
        return (
            getattr(self, "kvplug_memo_broken", None) is None
            and window in (None, -1, (-1, -1))
            and getattr(self, "alibi_slopes", None) is None
            and getattr(self, "sinks", None) is None
            and getattr(self, "attn_type", "decoder") == "decoder"
        )

    def _memo_step(self, metadata: Any, cache: Tensor) -> MemoStep | None:
        if metadata is None or not self.kvplug_memo_state.memo_lanes:
            return None
        # The builder says so, or the step's first layer.
        if hasattr(metadata, "kvplug_memo"):
            step: MemoStep | None = metadata.kvplug_memo
            return step
        step = None
        if _causal(metadata):
            found = self.kvplug_memo_rows.find(
                metadata.query_start_loc.tolist(),
                metadata.seq_lens,
                metadata.block_table,
                cache.shape[2],
            )
            if found is not None and not found[2]:
                step = found[0]
        metadata.kvplug_memo = step
        return step

    def _memo_of(self, layer: Any, cache: Tensor) -> LayerMemo:
        found: dict[str, LayerMemo] = self.__dict__.setdefault("_kvplug_memos", {})
        memo = found.get(layer.layer_name)
        if memo is None or memo.cache_at != cache.data_ptr():
            memo = found[layer.layer_name] = LayerMemo(self, layer, cache, self.kvplug_memo)
            memo.state = self.kvplug_memo_state
        return memo

    def _memo_failed(self, error: Exception) -> None:
        """Retire the memory of this layer: the backend attends from now on."""
        self.kvplug_memo_broken = f"{type(error).__name__}: {error}"
        logger.error(
            "attention memory failed and is retired for a layer; the backend attends instead: %s",
            self.kvplug_memo_broken,
            exc_info=error,
        )


class LayerMemo:
    """One layer's memory, on its pages.

    Args:
        impl: Its attention implementation.
        layer: vLLM's attention layer.
        cache: Its cache.
        memo: When a query is alike.
    """

    state: WorkerState

    def __init__(self, impl: Any, layer: Any, cache: Tensor, memo: Memo):
        self.cache_at = cache.data_ptr()
        self.block_size = int(cache.shape[2])
        if _coded(layer):
            self._pages = impl.kvplug_pages(layer, cache, torch.float32)
        else:
            self._pages = Pages(cache, order_of(impl, layer, cache))
        self._memo = AttentionMemo(
            memo,
            impl.num_heads,
            impl.num_kv_heads,
            impl.head_size,
            float(impl.scale),
            softcap=float(getattr(impl, "logits_soft_cap", 0) or 0),
            align=self.block_size,
            lanes=LANES,
            device=cache.device,
        )

    def attend(self, step: MemoStep, query: Tensor) -> Tensor:
        """Attention of a step's rows, ``[rows, num_heads, head_size]`` float32."""
        size = self.block_size

        def gather(
            rows: Sequence[int], starts: Sequence[int], ends: Sequence[int]
        ) -> tuple[Tensor, Tensor]:
            # Starts are multiples of the block size.
            first = torch.tensor([start // size for start in starts], device=step.table.device)
            last = torch.tensor([-(-end // size) for end in ends], device=step.table.device)
            widest = int((last - first).max())
            column = first[:, None] + torch.arange(widest, device=step.table.device)
            table = step.table[torch.tensor(list(rows), device=step.table.device)]
            blocks = table.gather(1, column.clamp_max(table.shape[1] - 1))
            # What stands behind a row's last block names no block of its own.
            blocks = blocks.masked_fill(column >= last[:, None], 0)
            return self._pages.gather(0, blocks), self._pages.gather(1, blocks)

        mine = query[step.tokens].view(len(step.lens), *query.shape[1:])
        found = self._memo.attend(mine, step.lanes, step.owners, step.lens, gather)
        asked, reused = self.state.memo_rows
        self.state.memo_rows = (asked + found.rows, reused + found.skipped)
        return found.out


def _coded(layer: Any) -> bool:
    """Whether a layer's pages are in a format."""
    return getattr(layer.attn_backend, "kvplug_layout", None) is not None


def _causal(metadata: Any) -> bool:
    """Whether every row attends causally, as far as its metadata can tell."""
    return getattr(metadata, "causal", True) is True


def _rows_of(common: Any, rows: list[int]) -> tuple[Any, Tensor]:
    """The common metadata of some rows, and their tokens among the step's, ``[n]`` int64."""
    device = common.seq_lens.device
    starts = common.query_start_loc_cpu.tolist()
    tokens = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in rows])
    index = torch.tensor(rows)
    at = index.to(device)
    widths = torch.tensor([starts[row + 1] - starts[row] for row in rows], dtype=torch.int32)
    query_start = torch.zeros(len(rows) + 1, dtype=torch.int32)
    torch.cumsum(widths, 0, out=query_start[1:])
    lens = common.seq_lens[at]
    lens_cpu = lens.cpu()
    prefilling = common.is_prefilling
    part = common.replace(
        num_reqs=len(rows),
        num_actual_tokens=len(tokens),
        query_start_loc=query_start.to(device),
        query_start_loc_cpu=query_start,
        seq_lens=lens,
        block_table_tensor=common.block_table_tensor[at],
        slot_mapping=common.slot_mapping[tokens.to(device)],
        max_query_len=int(widths.max()),
        max_seq_len=int(lens_cpu.max()),
        seq_lens_cpu_upper_bound=lens_cpu,
        is_prefilling=prefilling[index] if prefilling is not None else None,
        req_idx=common.req_idx[index.numpy()] if common.req_idx is not None else None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
    return part, tokens.to(device)


def memo_impl(memo: Memo, state: WorkerState) -> type[Any]:
    """The mixin of an attention implementation, for one engine."""
    own = {
        "kvplug_memo": memo,
        "kvplug_memo_state": state,
        "kvplug_memo_rows": MemoRows(memo, state),
    }
    return type("Memo", (MemoImpl,), own)


def memo_builder(memo: Memo) -> type[Any]:
    """The mixin of a metadata builder, for one engine."""
    return type("MemoSteps", (MemoBuilder,), {"kvplug_memo": memo})
