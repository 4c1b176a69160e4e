"""The metadata builder that shows attention only what a windowed request still holds.

A step's block tables stay positional in the runner; before they reach attention they are compacted
into a copy: hidden entries out, lengths shortened to match. RoPE is in the keys already and causal
masks are aligned to the end, so any paged attention kernel works on the result unchanged.

A prefill chunk spans positions with different windows, so its row is split at block boundaries:
every query then sees exactly what its position entitles it to, wherever the chunk was cut.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport

from kvplug.hosts.vllm.spec import WindowedSpec
from kvplug.hosts.vllm.worker.state import worker_state
from kvplug_kernels.compact_block_table import compact_block_table


class Compactor:
    """Applies one `WindowedSpec` to a step's common attention metadata."""

    def __init__(self, spec: WindowedSpec, vllm_config: Any, device: torch.device):
        self.block_size = int(spec.block_size)
        self.window = spec.window
        self.exact_tokens = self.window.exact_blocks * self.block_size
        self.device = device
        self.state = worker_state(vllm_config)
        # A decode row is as wide as its draft tokens; on an accelerator its true length is known
        # only on the device, so such rows are never split there.
        self.decode_width = 1 + int(vllm_config.num_speculative_tokens)
        self.max_rows = int(vllm_config.scheduler_config.max_num_seqs)
        self._table = torch.zeros((0, 0), dtype=torch.int32, device=device)
        self._lens = torch.zeros(0, dtype=torch.int32, device=device)

    def __call__(self, common: Any) -> Any:
        # A captured CUDA graph reads the compacted buffers, so there they are always written.
        if self.device.type == "cpu" and common.max_seq_len <= self.exact_tokens:
            return common
        table, seq_lens = common.block_table_tensor, common.seq_lens
        query_cpu = common.query_start_loc_cpu
        query_lens = (query_cpu[1:] - query_cpu[:-1])[: common.num_reqs]
        upper = common.seq_lens_cpu_upper_bound
        lens_cpu = upper if upper is not None and self.device.type != "cpu" else seq_lens
        exempt = self.state.exempt_rows(table, seq_lens, self.block_size)
        splits = self._splits(lens_cpu[: common.num_reqs], query_lens, exempt)
        if splits is None:
            return self._whole_rows(common, table, seq_lens, exempt)
        return self._split_rows(common, table, seq_lens, lens_cpu, query_lens, splits, exempt)

    def _gap(self, block: Tensor, exempt: Tensor | None) -> tuple[Tensor, Tensor]:
        start = torch.full_like(block, self.window.sink_blocks)
        end = (block - self.window.window_blocks).clamp_min(self.window.sink_blocks)
        if exempt is not None:
            end = torch.where(exempt, start, end)
        return start.to(torch.int32), end.to(torch.int32)

    def _splits(self, lens: Tensor, query_lens: Tensor, exempt: Tensor | None) -> Tensor | None:
        """Sub-rows of each row, ``[num_reqs]`` int64, or None when each is one."""
        if int(query_lens.max()) <= (1 if self.device.type == "cpu" else self.decode_width):
            return None
        first = ((lens - query_lens) // self.block_size).clamp_min(self.window.exact_blocks - 1)
        last = (lens - 1) // self.block_size
        count = (last - first + 1).clamp_min(1)
        if self.device.type != "cpu":
            count = torch.where(query_lens > self.decode_width, count, 1)
        if exempt is not None:
            count = torch.where(exempt.cpu(), 1, count)
        return count.to(torch.int64) if int(count.max()) > 1 else None

    def _whole_rows(
        self, common: Any, table: Tensor, seq_lens: Tensor, exempt: Tensor | None
    ) -> Any:
        """One row a request: stays on the device, into buffers a CUDA graph can replay."""
        starts = common.query_start_loc
        computed = seq_lens - (starts[1:] - starts[:-1])[: seq_lens.shape[0]]
        gap_start, gap_end = self._gap(computed // self.block_size, exempt)
        rows, width = table.shape
        if self._table.shape[0] < rows or self._table.shape[1] < width:
            self._table = self._table.new_zeros((max(rows, self.max_rows), width))
            self._lens = self._lens.new_zeros(max(rows, self.max_rows))
        compacted, lens = compact_block_table(
            table,
            seq_lens,
            self.block_size,
            gap_start=gap_start,
            gap_end=gap_end,
            out_table=self._table,
            out_lens=self._lens,
        )
        self.state.counters.rows += rows
        longest = int(lens.max()) if self.device.type == "cpu" else common.max_seq_len
        upper = lens if self.device.type == "cpu" else common.seq_lens_cpu_upper_bound
        return common.replace(
            seq_lens=lens,
            block_table_tensor=compacted,
            max_seq_len=longest,
            seq_lens_cpu_upper_bound=upper,
            _num_computed_tokens_cache=None,
        )

    def _split_rows(
        self,
        common: Any,
        table: Tensor,
        seq_lens: Tensor,
        lens_cpu: Tensor,
        query_lens: Tensor,
        splits: Tensor,
        exempt: Tensor | None,
    ) -> Any:
        """Several rows a request: prefill, where lengths are exact on the host."""
        size, device = self.block_size, self.device
        rows = torch.repeat_interleave(torch.arange(common.num_reqs), splits)
        first = torch.cumsum(splits, 0) - splits
        nth = torch.arange(rows.shape[0]) - first[rows]
        lens, queries = lens_cpu[: common.num_reqs].long(), query_lens.long()
        computed = lens - queries
        base = (computed // size).clamp_min(self.window.exact_blocks - 1)
        is_last = nth == splits[rows] - 1
        block = base[rows] + nth
        start = torch.where(nth == 0, computed[rows], block * size)
        end = torch.where(is_last, lens[rows], (block + 1) * size)
        widths = end - start
        query_start = torch.zeros(rows.shape[0] + 1, dtype=torch.int32)
        torch.cumsum(widths, 0, out=query_start[1:])

        rows_dev = rows.to(device, non_blocking=True)
        one = (splits[rows] == 1).to(device, non_blocking=True)
        end_dev = torch.where(
            one, seq_lens[rows_dev], end.to(device, torch.int32, non_blocking=True)
        )
        query_dev = query_start.to(device, non_blocking=True)
        widths_dev = query_dev[1:] - query_dev[:-1]
        block_dev = torch.where(
            one,
            (end_dev - widths_dev) // size,
            block.to(device, torch.int32, non_blocking=True),
        )
        gap_start, gap_end = self._gap(block_dev, exempt[rows_dev] if exempt is not None else None)
        compacted, new_lens = compact_block_table(
            table,
            end_dev,
            size,
            rows=rows_dev,
            gap_start=gap_start,
            gap_end=gap_end,
        )
        self.state.counters.rows += int(rows.shape[0])
        self.state.counters.split_rows += int(rows.shape[0]) - common.num_reqs
        hidden = (block - self.window.window_blocks - self.window.sink_blocks).clamp_min(0)
        # A whole row may be shorter on the device than here, and then hides fewer blocks.
        hidden = torch.where(splits[rows] == 1, 0, hidden)
        upper = (end - hidden * size).to(torch.int32)
        prefilling = common.is_prefilling
        return common.replace(
            num_reqs=int(rows.shape[0]),
            query_start_loc=query_dev,
            query_start_loc_cpu=query_start,
            seq_lens=new_lens,
            block_table_tensor=compacted,
            max_query_len=int(widths.max()),
            max_seq_len=int(upper.max()),
            seq_lens_cpu_upper_bound=upper,
            is_prefilling=prefilling[rows] if prefilling is not None else None,
            req_idx=common.req_idx[rows.numpy()] if common.req_idx is not None else None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )


class CompactingBuilder:
    """Mixin placed before a stock metadata builder."""

    # Metadata of another group with the same spec could be reused by swapping its block table in,
    # which would skip the compaction.
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
        self._compact = (
            Compactor(kv_cache_spec, vllm_config, device)
            if isinstance(kv_cache_spec, WindowedSpec)
            else None
        )

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """At most uniform decode batches: splitting prefill rows changes how many there are."""
        support = super().get_cudagraph_support(  # type: ignore[misc]
            vllm_config, kv_cache_spec
        )
        if isinstance(kv_cache_spec, WindowedSpec) and support is AttentionCGSupport.ALWAYS:
            return AttentionCGSupport.UNIFORM_BATCH
        return support

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        if self._compact is not None:
            common_attn_metadata = self._compact(common_attn_metadata)
            # Rows hide different blocks, so what was a common prefix may be none any more.
            common_prefix_len = 0
        return super().build(  # type: ignore[misc]
            common_prefix_len, common_attn_metadata, fast_build
        )
