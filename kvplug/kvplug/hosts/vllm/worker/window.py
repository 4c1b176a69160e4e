"""Positional sequence policies on a worker: attention sees only what a window keeps.

A step's block tables stay positional in the runner; before they reach attention they are compacted
into a copy: hidden entries out, lengths shortened to match. RoPE is in the keys already and causal
masks are aligned to the end, so any paged attention kernel works on the result unchanged.

A prefill chunk spans positions with different windows, so its row is split at block boundaries:
every query then sees exactly what its position entitles it to, wherever the chunk was cut.

The second model runner learns which requests keep everything after it has built a step's metadata,
and before the forward. Where a step has such requests, its metadata is built once more then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport

from kvplug.contract import Kind, LayerView, SequencePolicy, Window
from kvplug.hosts.vllm.messages import SequenceReport, StepDirectives, StepReport
from kvplug.hosts.vllm.spec import WindowedSpec
from kvplug.hosts.vllm.worker import metadata
from kvplug.hosts.vllm.worker.held import HeldMemory
from kvplug.hosts.vllm.worker.kind import KindWorker, Origin
from kvplug.hosts.vllm.worker.rows import StepRows
from kvplug.hosts.vllm.worker.steps import Build, BuildCall, Built, MetadataStep
from kvplug_kernels.compact_windows import compact_windows


class WindowWorker(KindWorker):
    """A positional sequence policy on a worker.

    Args:
        policy: The policy; its `window` answers for every layer.
        origin: Source and key of the policy in its deployment, for messages.
        rows: Slots of the engine's rows.
    """

    kind = Kind.SEQUENCE
    # Taking another group's metadata would skip the compaction.
    supports_update_block_table = False

    def __init__(self, policy: SequencePolicy, origin: Origin, rows: StepRows):
        super().__init__(origin)
        self.policy = policy
        self.counts = WindowCounts()
        self._rows = rows
        self._windows = [_window(policy, layer) for layer in policy.engine.layers]
        self._exempt: Tensor | None = None
        self._compactions: WeakSet[Compaction] = WeakSet()

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

    def loaded(self, name: str, layer: Any, dtype: torch.dtype, vllm_config: Any) -> None:
        """Take memory for the tables of a full-attention layer's group."""
        if layer.sliding_window is not None:
            return
        spec = layer.attn_backend.customize_spec(layer.get_kv_cache_spec(vllm_config))
        device = torch.device(vllm_config.device_config.device)
        rows, width = compacted_shape(spec.max_tokens, spec.block_size, vllm_config)
        self.held.reserve(("table", spec.rule()), rows * width, torch.int32, device)
        self.held.reserve(("lens", spec.rule()), rows, torch.int32, device)

    def metadata_steps(
        self, spec: Any, vllm_config: Any, device: torch.device
    ) -> Sequence[MetadataStep]:
        if not isinstance(spec, WindowedSpec):
            return ()
        compaction = Compaction(self, spec, vllm_config, device)
        self._compactions.add(compaction)
        return (compaction,)

    def cudagraph_support(self, spec: Any, inner: AttentionCGSupport) -> AttentionCGSupport:
        # Splitting prefill rows changes how many there are.
        if isinstance(spec, WindowedSpec) and inner is AttentionCGSupport.ALWAYS:
            return AttentionCGSupport.UNIFORM_BATCH
        return inner

    def begin(self, directives: StepDirectives) -> None:
        exempt = directives.sequence.exempt if directives.sequence is not None else None
        self._exempt = torch.from_numpy(exempt) if exempt is not None and len(exempt) else None

    def exempt_rows(self, call: BuildCall) -> Tensor | None:
        """Return the mask of rows that keep everything, ``[rows]``, or None for none is known."""
        if self._exempt is None:
            return None
        exempt = metadata.to_device(self._exempt, call.slots.device)
        return (call.slots[:, None] == exempt).any(1)

    def load(self, directives: StepDirectives) -> None:
        if self._exempt is None or not self._rows.requests:
            return
        named = self._rows.named
        exempt = [named[slot].row for slot in self._exempt.tolist() if slot in named]
        for compaction in self._compactions:
            compaction.exempt(exempt)

    def end(self, directives: StepDirectives) -> None:
        # The second runner builds the next step before it begins.
        self._exempt = None
        for compaction in self._compactions:
            compaction.forget()

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
        self._compact = Compactor(spec, vllm_config, device, kind.held)
        self._built: Built | None = None

    def build(self, inner: Build, call: BuildCall) -> Any:
        if not self._compact.shortens(call.common):
            self._built = None
            return inner(call)
        made = self._build(inner, call, self._kind.exempt_rows(call), self._kind.counts)
        self._built = Built.of(inner, call, made)
        return made

    def _build(
        self, inner: Build, call: BuildCall, exempt: Tensor | None, counts: WindowCounts
    ) -> Any:
        common = self._compact(call.common, exempt, counts, keep=not call.fast)
        # FlashAttention keeps the schedule of at most one row a request.
        split = common.num_reqs != call.common.num_reqs
        return inner(replace(call.on(common), fast=call.fast or split))

    def exempt(self, rows: Sequence[int]) -> None:
        """Build the step's metadata again, in place, with rows that keep everything.

        Args:
            rows: Numbers of the rows.
        """
        if self._built is None or not rows:
            return
        call = self._built.call
        mask = torch.zeros(call.common.num_reqs, dtype=torch.bool)
        mask[list(rows)] = True
        # A graph reads the buffers that are written here.
        self._built.become(self._build(self._built.inner, call, mask, WindowCounts()))

    def forget(self) -> None:
        """Forget the step."""
        self._built = None


def compacted_shape(max_tokens: int, block_size: int, vllm_config: Any) -> tuple[int, int]:
    """Most rows of a step, and most blocks of one.

    Args:
        max_tokens: Longest sequence.
        block_size: Tokens per block.
        vllm_config: The engine's config.
    """
    longest = max_tokens + 1 + int(vllm_config.num_speculative_tokens)
    return int(vllm_config.scheduler_config.max_num_seqs), -(-longest // block_size)


class Compactor:
    """Applies one `WindowedSpec` to a step's common attention metadata.

    Args:
        spec: The spec.
        vllm_config: The engine's config.
        device: Device of the tensors.
        held: The memory of the kind.
    """

    def __init__(
        self, spec: WindowedSpec, vllm_config: Any, device: torch.device, held: HeldMemory
    ):
        self.block_size = int(spec.block_size)
        self.window = spec.window
        self.exact_tokens = self.window.exact_blocks * self.block_size
        self.device = device
        # A decode row is as wide as its draft tokens; on an accelerator its true length is known
        # only on the device, so such rows are never split there.
        self.decode_width = 1 + int(vllm_config.num_speculative_tokens)
        self._max_tokens = int(spec.max_tokens)
        # Made before any CUDA graph is captured, and as large as the engine will ever need.
        rows, width = compacted_shape(self._max_tokens, self.block_size, vllm_config)
        self._table = held.take(("table", spec.rule()), (rows, width), torch.int32, device)
        self._lens = held.take(("lens", spec.rule()), (rows,), torch.int32, device)

    def shortens(self, common: Any) -> bool:
        """Return False where every row is so short that it sees everything."""
        # A captured CUDA graph reads the compacted buffers, so there they are always written.
        return self.device.type != "cpu" or common.max_seq_len > self.exact_tokens

    def __call__(
        self, common: Any, exempt: Tensor | None, counts: WindowCounts, keep: bool = True
    ) -> Any:
        """Return the metadata with rows shortened to what their queries may see.

        Args:
            common: vLLM's common metadata.
            exempt: Mask of rows that keep everything, ``[rows]``, on the host or the device; None
                for none.
            counts: Where rows are counted.
            keep: Whether whole rows go into the buffers that CUDA graphs read.
        """
        if not self.shortens(common):
            return common
        query_cpu = common.query_start_loc_cpu
        query_lens = (query_cpu[1:] - query_cpu[:-1])[: common.num_reqs]
        upper = common.seq_lens_cpu_upper_bound
        lens_cpu = upper if upper is not None and self.device.type != "cpu" else common.seq_lens
        known = exempt if exempt is None or exempt.device.type == "cpu" else None
        splits = self._splits(lens_cpu[: common.num_reqs], query_lens, known)
        if splits is None:
            counts.rows += common.block_table_tensor.shape[0]
            return self._whole_rows(common, exempt, keep)
        counts.rows += int(splits.sum())
        counts.split_rows += int(splits.sum()) - common.num_reqs
        return self._split_rows(common, lens_cpu, query_lens, splits, exempt, known)

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
            count = torch.where(exempt, 1, count)
        return count.to(torch.int64) if int(count.max()) > 1 else None

    def _on_device(self, exempt: Tensor | None) -> Tensor | None:
        if exempt is None or exempt.device.type != "cpu":
            return exempt
        return metadata.to_device(exempt, self.device)

    def _longest(self, query_lens: Tensor | int) -> Any:
        """Most tokens that rows see of which the last so many are queries."""
        return self.window.exact_blocks * self.block_size - 1 + query_lens

    def _live(self, common: Any) -> Tensor:
        """The block table without columns that no row reaches."""
        width = min(-(-common.max_seq_len // self.block_size), self._table.shape[1])
        table: Tensor = common.block_table_tensor[:, :width]
        return table

    def _whole_rows(self, common: Any, exempt: Tensor | None, keep: bool) -> Any:
        """One row a request: stays on the device, into buffers a CUDA graph can replay."""
        table = self._live(common)
        rows, width = table.shape
        out_table, out_lens = self._table, self._lens
        if not keep or rows > len(out_lens):
            out_table, out_lens = table.new_zeros((rows, width)), common.seq_lens.new_empty(rows)
        compacted, lens = compact_windows(
            table,
            common.seq_lens,
            common.query_start_loc[: rows + 1],
            self.block_size,
            sink=self.window.sink_blocks,
            window=self.window.window_blocks,
            exempt=self._on_device(exempt),
            out_table=out_table,
            out_lens=out_lens,
        )
        longest, upper = common.max_seq_len, common.seq_lens_cpu_upper_bound
        if self.device.type == "cpu":
            longest, upper = int(lens.max()), lens
        # A graph is captured for the longest text there can be, and replayed for exempt rows too.
        elif exempt is None and longest < self._max_tokens:
            seen = self._longest(common.max_query_len)
            if seen < longest:
                longest = seen
                upper = upper.clamp_max(seen) if upper is not None else None
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
        lens_cpu: Tensor,
        query_lens: Tensor,
        splits: Tensor,
        exempt: Tensor | None,
        known: Tensor | None,
    ) -> Any:
        """Several rows a request: prefill, where lengths are exact on the host."""
        size = self.block_size
        rows = torch.repeat_interleave(torch.arange(common.num_reqs), splits)
        n = len(rows)
        nth = torch.arange(n) - (torch.cumsum(splits, 0) - splits)[rows]
        lens, queries = lens_cpu[: common.num_reqs].long(), query_lens.long()
        computed = lens - queries
        block = (computed // size).clamp_min(self.window.exact_blocks - 1)[rows] + nth
        start = torch.where(nth == 0, computed[rows], block * size)
        end = torch.where(nth == splits[rows] - 1, lens[rows], (block + 1) * size)
        whole = splits[rows] == 1
        query_start = metadata.query_starts(end - start)
        # A whole row may be shorter on the device than here.
        ends = torch.where(whole, 0, end)
        packed = metadata.to_device(torch.cat([rows, ends, query_start]).int(), self.device)
        rows_dev, ends_dev, starts_dev = packed[:n], packed[n : 2 * n], packed[2 * n :]
        table = self._live(common)
        # Buffers of its own: a graph captured for decode steps reads the others.
        compacted, new_lens = compact_windows(
            table,
            common.seq_lens,
            starts_dev,
            size,
            sink=self.window.sink_blocks,
            window=self.window.window_blocks,
            rows=rows_dev,
            ends=ends_dev,
            exempt=self._on_device(exempt),
            out_table=table.new_zeros((n, table.shape[1])),
            out_lens=common.seq_lens.new_empty(n),
        )
        hidden = (block - self.window.window_blocks - self.window.sink_blocks).clamp_min(0)
        upper = torch.where(
            whole, torch.minimum(end, self._longest(end - start)), end - hidden * size
        )
        if exempt is not None:
            upper = end if known is None else torch.where(known[rows], end, upper)
        upper = upper.to(torch.int32)
        return metadata.with_rows(
            common,
            rows,
            query_start=query_start,
            query_start_device=starts_dev,
            seq_lens=new_lens,
            block_table=compacted,
            max_seq_len=int(upper.max()),
            seq_lens_cpu=upper,
            num_tokens=common.num_actual_tokens,
        )
