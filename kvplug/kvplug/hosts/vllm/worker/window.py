"""Positional sequence policies on a worker: attention sees only what a window keeps.

A step's block tables stay positional in the runner; before they reach attention they are compacted
into a copy: hidden entries out, lengths shortened to match. RoPE is in the keys already and causal
masks are aligned to the end, so any paged attention kernel works on the result unchanged.

A prefill chunk spans positions with different windows, so its row is split at block boundaries:
every query then sees exactly what its position entitles it to, wherever the chunk was cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport

from kvplug.contract import Kind, LayerView, SequencePolicy, Window
from kvplug.hosts.vllm.messages import SequenceReport, StepDirectives, StepReport
from kvplug.hosts.vllm.spec import WindowedSpec
from kvplug.hosts.vllm.worker import metadata
from kvplug.hosts.vllm.worker.kind import KindWorker, Origin
from kvplug.hosts.vllm.worker.steps import Build, BuildCall, MetadataStep
from kvplug_kernels.compact_block_table import compact_block_table


class WindowWorker(KindWorker):
    """A positional sequence policy on a worker.

    Args:
        policy: The policy; its `window` answers for every layer.
        origin: Source and key of the policy in its deployment, for messages.
    """

    kind = Kind.SEQUENCE
    # Taking another group's metadata would skip the compaction.
    supports_update_block_table = False

    def __init__(self, policy: SequencePolicy, origin: Origin):
        super().__init__(origin)
        self.policy = policy
        self.counts = WindowCounts()
        self._windows = [_window(policy, layer) for layer in policy.engine.layers]
        self._exempt: Tensor | None = None

    def rule(self, index: int) -> Window:
        return self._windows[index]

    def customize_spec(self, spec: Any, rule: Any, stock: type[Any]) -> Any:
        from vllm.v1.kv_cache_interface import replace_as

        engine = self.policy.engine
        self.check_block_size(spec, stock, self.policy.name)
        return replace_as(
            spec,
            WindowedSpec,
            sink_tokens=rule.sink_blocks * engine.block_size,
            window_tokens=rule.window_blocks * engine.block_size,
            exact_tokens=min(w.exact_blocks for w in self._windows) * engine.block_size,
            in_flight_tokens=engine.max_in_flight_tokens,
            max_tokens=engine.max_model_len,
        )

    def check_impl(self, impl: Any) -> None:
        self.check_distances(impl, self.policy.name)

    def metadata_steps(
        self, spec: Any, vllm_config: Any, device: torch.device
    ) -> Sequence[MetadataStep]:
        if not isinstance(spec, WindowedSpec):
            return ()
        return (Compaction(self, spec, vllm_config, device),)

    def cudagraph_support(self, spec: Any, inner: AttentionCGSupport) -> AttentionCGSupport:
        # Splitting prefill rows changes how many there are.
        if isinstance(spec, WindowedSpec) and inner is AttentionCGSupport.ALWAYS:
            return AttentionCGSupport.UNIFORM_BATCH
        return inner

    def begin(self, directives: StepDirectives) -> None:
        exempt = directives.sequence.exempt if directives.sequence is not None else None
        self._exempt = None if exempt is None else torch.from_numpy(exempt)

    def exempt_rows(self, call: BuildCall) -> Tensor | None:
        """Return the mask of rows that keep everything, ``[rows]``, or None for none."""
        if self._exempt is None:
            return None
        return torch.isin(call.slots, self._exempt.to(call.slots.device))

    def report(self, into: StepReport) -> None:
        counts, self.counts = self.counts, WindowCounts()
        if counts.rows:
            into.sequence = SequenceReport(rows=counts.rows, split_rows=counts.split_rows)


def _window(policy: SequencePolicy, layer: LayerView) -> Window:
    window = policy.window(layer)
    assert window is not None, "checked when the deployment was"
    return window


@dataclass
class WindowCounts:
    """Rows compacted, and rows added by splitting, since the last report."""

    rows: int = 0
    split_rows: int = 0


class Compaction(MetadataStep):
    """Compacts the rows of one KV-cache group."""

    def __init__(
        self, kind: WindowWorker, spec: WindowedSpec, vllm_config: Any, device: torch.device
    ):
        self._kind = kind
        self._compact = Compactor(spec, vllm_config, device)

    def build(self, inner: Build, call: BuildCall) -> Any:
        exempt = None
        if self._compact.shortens(call.common):
            exempt = self._kind.exempt_rows(call)
        common = self._compact(call.common, exempt, self._kind.counts)
        # FlashAttention keeps the schedule of at most one row a request.
        split = common.num_reqs != call.common.num_reqs
        return inner(replace(call.on(common), fast=call.fast or split))


class Compactor:
    """Applies one `WindowedSpec` to a step's common attention metadata.

    Args:
        spec: The spec.
        vllm_config: The engine's config.
        device: Device of the tensors.
    """

    def __init__(self, spec: WindowedSpec, vllm_config: Any, device: torch.device):
        self.block_size = int(spec.block_size)
        self.window = spec.window
        self.exact_tokens = self.window.exact_blocks * self.block_size
        self.device = device
        # A decode row is as wide as its draft tokens; on an accelerator its true length is known
        # only on the device, so such rows are never split there.
        self.decode_width = 1 + int(vllm_config.num_speculative_tokens)
        self.max_rows = int(vllm_config.scheduler_config.max_num_seqs)
        self._table = torch.zeros((0, 0), dtype=torch.int32, device=device)
        self._lens = torch.zeros(0, dtype=torch.int32, device=device)

    def shortens(self, common: Any) -> bool:
        """Return False where every row is so short that it sees everything."""
        # A captured CUDA graph reads the compacted buffers, so there they are always written.
        return self.device.type != "cpu" or common.max_seq_len > self.exact_tokens

    def __call__(self, common: Any, exempt: Tensor | None, counts: WindowCounts) -> Any:
        """Return the metadata with rows shortened to what their queries may see.

        Args:
            common: vLLM's common metadata.
            exempt: Mask of rows that keep everything, ``[rows]``, or None for none.
            counts: Where rows are counted.
        """
        if not self.shortens(common):
            return common
        table, seq_lens = common.block_table_tensor, common.seq_lens
        query_cpu = common.query_start_loc_cpu
        query_lens = (query_cpu[1:] - query_cpu[:-1])[: common.num_reqs]
        upper = common.seq_lens_cpu_upper_bound
        lens_cpu = upper if upper is not None and self.device.type != "cpu" else seq_lens
        splits = self._splits(lens_cpu[: common.num_reqs], query_lens, exempt)
        if splits is None:
            counts.rows += table.shape[0]
            return self._whole_rows(common, table, seq_lens, exempt)
        counts.rows += int(splits.sum())
        counts.split_rows += int(splits.sum()) - common.num_reqs
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
        longest = int(lens.max()) if self.device.type == "cpu" else common.max_seq_len
        upper = lens if self.device.type == "cpu" else common.seq_lens_cpu_upper_bound
        return metadata.with_lengths(
            common,
            seq_lens=lens,
            block_table=compacted,
            max_seq_len=longest,
            seq_lens_cpu=upper,
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
        query_start = metadata.query_starts(widths)
        rows_dev = rows.to(device, non_blocking=True)
        one = (splits[rows] == 1).to(device, non_blocking=True)
        end_dev = torch.where(
            one, seq_lens[rows_dev], end.to(device, torch.int32, non_blocking=True)
        )
        widths_dev = widths.to(device, torch.int32, non_blocking=True)
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
        hidden = (block - self.window.window_blocks - self.window.sink_blocks).clamp_min(0)
        # A whole row may be shorter on the device than here, and then hides fewer blocks.
        hidden = torch.where(splits[rows] == 1, 0, hidden)
        upper = (end - hidden * size).to(torch.int32)
        return metadata.with_rows(
            common,
            rows,
            query_start=query_start,
            seq_lens=new_lens,
            block_table=compacted,
            max_seq_len=int(upper.max()),
            seq_lens_cpu=upper,
            num_tokens=common.num_actual_tokens,
        )
