"""A format policy in stock attention layers: what a step looks like to it, and its guard.

A layer under a format has uint8 pages of the policy's own bytes. New tokens go through
`FormatPolicy.write` where the backend would have stored them, and queries through
`FormatPolicy.attend` where it would have attended. The rest of the backend, its metadata builder
included, stays vLLM's.

Where a CUDA graph holds a step, none of this file's Python runs but that of the builders: layers
then read what `FormatTokens` wrote to buffers of its own, and what the runner keeps at fixed
addresses. So nothing that a step needs is computed, counted or looked up in `FormatAttention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport

from kvplug.containment import ON_WORKER, PolicyFailure
from kvplug.contract import (
    AttendBatch,
    FormatPolicy,
    Kind,
    LayerView,
    PageLayout,
    Recent,
    WriteBatch,
)
from kvplug.hosts.dense import attend, attend_dense
from kvplug.hosts.sizes import recent_places
from kvplug.hosts.torch_state import TorchPolicy
from kvplug.hosts.vllm.engine import plain_defaults
from kvplug.hosts.vllm.messages import FormatReport, StepDirectives, StepReport
from kvplug.hosts.vllm.worker.kind import KindWorker, Origin
from kvplug.hosts.vllm.worker.layers import layer_view, softcap_of
from kvplug.hosts.vllm.worker.metadata import to_device
from kvplug.hosts.vllm.worker.pages import CodedPages
from kvplug.hosts.vllm.worker.rows import StepRows
from kvplug.hosts.vllm.worker.steps import (
    Attend,
    AttendCall,
    AttentionStep,
    Build,
    BuildCall,
    MetadataStep,
    Write,
    WriteCall,
)
from kvplug.hosts.vllm.worker.stored_format import StoredFormat
from kvplug_kernels.cpu import prepare

logger = init_logger("vllm.kvplug")

MAX_SIGNALS = 4096
"""Numbers that a worker may measure at once."""

COUNTERS_EVERY = 64
"""Reports between two reads of counters that the host would have to wait for."""


class FormatWorker(KindWorker):
    """A format policy on a worker.

    Args:
        policy: The policy.
        origin: Source and key of the policy in its deployment, for messages.
        rows: Slots of the step's rows.
        max_requests: Slots of vLLM's second model runner; None on the first, where slots are the
            scheduler's, and there may be more of them later.

    Attributes:
        apart: Whether the format treats requests apart: it keeps recent tokens of each, or assigns
            them different ways to be stored.
        recent_sizes: Numbers of recent tokens that layers keep of a request, ascending.
        max_requests: As given.
        assignments: Assignment of each slot's request; None where there is one for all.
        layers: State of each layer, by layer name.
        log: What the policy did, and how it failed.
        first_slots: Slots that rings have at first.
    """

    kind = Kind.FORMAT
    supports_update_block_table = False

    def __init__(
        self,
        policy: FormatPolicy,
        origin: Origin,
        rows: StepRows,
        max_requests: int | None = None,
    ):
        super().__init__(origin)
        self.policy = policy
        layers = policy.engine.layers
        self.recent_sizes = sorted({policy.recent(layer) for layer in layers} - {0})
        several = len(policy.assignments()) > 1
        self.apart = bool(self.recent_sizes) or several
        self.max_requests = max_requests
        self.assignments = Assignments(max_requests or 0) if several else None
        self.layers: dict[str, FormatLayer] = {}
        self.log = FormatLog(policy)
        self.rows = rows
        self.page_layouts = [policy.layout(layer) for layer in layers]
        self.recent_of = [policy.recent(layer) for layer in layers]
        self._num_groups = 1
        self._softcap = False
        self.first_slots = 16

    # -- layers --------------------------------------------------------------------------------

    def rule(self, index: int) -> PageLayout:
        return self.page_layouts[index]

    def customize_spec(self, spec: Any, rule: Any, stock: type[Any]) -> Any:
        self.check_block_size(spec, stock, self.policy.name)
        return replace(
            spec,
            dtype=torch.uint8,
            state_content_bytes=rule.bytes_per_token_head,
            num_head_slots=rule.heads,
        )

    def layouts(self, inner: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        from vllm.v1.kv_cache_layout import KVCacheLayout

        # A format's pages are one run of bytes per KV head.
        own = (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)
        return own if inner is None else tuple(x for x in inner if x in own)

    def check_impl(self, impl: Any) -> None:
        name, fix = self.policy.name, "remove the format section for this model."
        if getattr(impl, "alibi_slopes", None) is not None:
            self.refuse(
                f"{name} does not support models with ALiBi: formats attend without position "
                "biases.",
                fix,
            )
        if getattr(impl, "sinks", None) is not None:
            self.refuse(f"{name} does not support models with learned attention sinks.", fix)
        # Some formats leave capped logits to the host, which reads pages back.
        self._softcap |= softcap_of(impl) > 0

    def loaded(self, name: str, layer: Any, dtype: torch.dtype, vllm_config: Any) -> None:
        """Take memory for a layer's recent tokens and for a builder, and place the policy's."""
        device = torch.device(vllm_config.device_config.device)
        if device.type == "cpu":
            # Here, and neither within a policy's deadline nor within a request.
            prepare()
        slots = self.max_requests or int(vllm_config.scheduler_config.max_num_seqs)
        self.first_slots = slots
        own = self.layer(layer.impl, layer)
        if own.recent_size:
            places = recent_places(own.recent_size, slots)
            count = places * layer.num_kv_heads * layer.head_size
            for what in ("key", "value"):
                self.held.reserve((own.layer.index, what), count, dtype, device)
        if self.apart:
            most = int(vllm_config.scheduler_config.max_num_batched_tokens)
            for size in (0, *self.recent_sizes):
                self.held.reserve(("tokens", size), most, torch.int64, device)
        with plain_defaults():
            self._place(own, layer, dtype, device)

    def _place(
        self, own: FormatLayer, layer: Any, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Let the policy copy to the device what it reads there, by a token that is padding."""
        size = self.policy.engine.block_size
        token = torch.zeros((1, layer.num_kv_heads, layer.head_size), dtype=dtype, device=device)
        nowhere = torch.full((1,), -1, dtype=torch.int64, device=device)
        batch = WriteBatch(token, token, nowhere)
        pages = own.layout.pages(own.layer, 1, size, device=device)
        # It may need more than this; what fails on real tokens is counted there.
        with suppress(PolicyFailure):
            self.log.contained.call("write", own.layer, batch, pages)

    def metadata_steps(
        self, spec: Any, vllm_config: Any, device: torch.device
    ) -> Sequence[MetadataStep]:
        most = int(vllm_config.scheduler_config.max_num_batched_tokens)
        tokens = FormatTokens(self, int(spec.block_size), most, device)
        return (tokens, FormatRows(tokens))

    def cudagraph_support(self, spec: Any, inner: AttentionCGSupport) -> AttentionCGSupport:
        # The first runner's slots may outgrow the buffers that a graph was captured with.
        grows = self.apart and self.max_requests is None
        if not self.policy.graph_safe or self._softcap or grows:
            return AttentionCGSupport.NEVER
        # Grids follow from the most queries of a row, so a graph fits batches of equal rows.
        return min(inner, AttentionCGSupport.UNIFORM_BATCH, key=lambda support: support.value)

    def attention_step(self) -> AttentionStep:
        return FormatAttention(self)

    def layer(self, impl: Any, layer: Any) -> FormatLayer:
        """Return the state of a layer, made on first use."""
        found = self.layers.get(layer.layer_name)
        if found is None:
            view = layer_view(self.policy, layer.layer_name)
            found = FormatLayer(self, view, float(impl.scale), softcap_of(impl))
            self.layers[layer.layer_name] = found
        return found

    # -- steps ---------------------------------------------------------------------------------

    def start(self, num_groups: int) -> None:
        self._num_groups = num_groups

    def begin(self, directives: StepDirectives) -> None:
        own = directives.format
        if own is not None and self.assignments is not None and self.max_requests is None:
            self.assignments.put(own.assignments)

    def load(self, directives: StepDirectives) -> None:
        own, named = directives.format, self.rows.named
        if own is None or self.assignments is None or self.max_requests is None:
            return
        pairs = [
            (named[slot].runner_slot, assigned)
            for slot, assigned in own.assignments.tolist()
            if slot in named
        ]
        self.assignments.put(np.array(pairs, dtype=np.int32).reshape(-1, 2))

    def end(self, directives: StepDirectives) -> None:
        self.log.stored(len(self.layers))

    def report(self, into: StepReport) -> None:
        into.format = self.log.take()

    def unfilled(self) -> set[int]:
        """Return blocks that could not be stored, until they are written again.

        With several KV-cache groups vLLM cannot tell which request a block belongs to; there they
        read as zeros.
        """
        return set(self.log.unwritten) if self._num_groups == 1 else set()


class FormatLog:
    """Counts, failures and measurements of a format policy on a worker.

    Args:
        policy: The policy.

    Attributes:
        counts: Counts since the last report.
        tokens: Tokens of the step that metadata was built for last.
        failed: Cause of the first failure, or None.
        unwritten: Blocks whose tokens could not be stored.
        waits: Whether pages lie on a device whose numbers the host has to wait for.
    """

    def __init__(self, policy: FormatPolicy):
        self._policy = policy
        self.contained = TorchPolicy(policy, ON_WORKER, logger)
        self.counts = FormatReport()
        self.tokens = 0
        self.failed: str | None = None
        self.unwritten: set[int] = set()
        self.waits = False
        self._reports = 0

    def fail(self, method: str, failure: PolicyFailure) -> None:
        """Count a failure; the first is logged."""
        self.counts.errors += 1
        if self.failed is None:
            self.failed = f"{method}: {failure.cause}"
            self.contained.log(
                f"failed in {method}; layers it cannot attend are attended by reading pages back, "
                "and requests whose tokens it cannot store fail",
                failure,
            )

    def lose(self, blocks: list[int]) -> None:
        """Take note that the tokens of some blocks are not there."""
        self.unwritten.update(blocks)
        self.counts.unwritten.update(blocks)

    def stored(self, layers: int) -> None:
        """Count the tokens of a step that ended, once per layer."""
        self.counts.tokens += self.tokens * layers
        self.tokens = 0

    def begun(self, blocks: Tensor) -> None:
        """Take note that blocks are written again, ``[n]``; waits for the device."""
        self.unwritten.difference_update(blocks.tolist())

    def take(self) -> FormatReport | None:
        """Return what happened since the last report, or None for nothing."""
        if not self.counts.tokens and not self.counts.errors:
            return None
        report, self.counts = self.counts, FormatReport()
        report.failed = self.failed
        report.counters = self._counters()
        report.signals = self._signals()
        return report

    def _signals(self) -> list[float] | None:
        try:
            found: list[float] | None = self.contained.run(self._measured)
        except PolicyFailure as failure:
            self.fail("signals", failure)
            return None
        return found

    def _measured(self) -> list[float] | None:
        given = self._policy.signals()
        if given is None:
            return None
        found = [float(x) for x in islice(given, MAX_SIGNALS + 1)]
        if len(found) > MAX_SIGNALS or not all(map(math.isfinite, found)):
            raise ValueError(f"signals must be at most {MAX_SIGNALS} finite numbers")
        return found

    def _counters(self) -> dict[str, float]:
        """The policy's own counters; none once it failed to give them, and on a device only every
        `COUNTERS_EVERY` reports."""
        self._reports += 1
        if self.waits and self._reports % COUNTERS_EVERY != 1:
            return {}
        return self.contained.counters()


class Assignments:
    """Assignment of each slot's request.

    Args:
        slots: Slots there will ever be, or 0 if that is not known.
    """

    def __init__(self, slots: int):
        self._of_slot = np.zeros(slots, dtype=np.int64)
        self._on: dict[torch.device, Tensor] = {}

    def put(self, pairs: npt.NDArray[np.int32]) -> None:
        """Set the assignments of some slots, ``[n, 2]``: slot and assignment."""
        if not len(pairs):
            return
        missing = 1 + int(pairs[:, 0].max()) - len(self._of_slot)
        if missing > 0:
            self._of_slot = np.pad(self._of_slot, (0, missing))
            self._on.clear()
        self._of_slot[pairs[:, 0]] = pairs[:, 1]
        # In place: a graph reads them where they were.
        for device, placed in self._on.items():
            placed.copy_(to_device(self._of_slot, device))

    def of(self, slots: Tensor) -> Tensor:
        """Assignment of each slot, ``[n]`` int64; that of slot 0 for -1.

        Args:
            slots: ``[n]`` int64.
        """
        placed = self._on.get(slots.device)
        if placed is None:
            placed = to_device(self._of_slot.copy(), slots.device)
            self._on[slots.device] = placed
        return placed[slots.clamp_min(0)]


@dataclass(frozen=True)
class TokenSlots:
    """Slots of a step's tokens, in buffers that every step of a builder overwrites.

    Attributes:
        slots: Slot of each token's request, ``[max_num_batched_tokens]`` int64; -1 where unknown,
            and for padding.
        places: By number of recent tokens kept: place of each token's exact K and V in the rings,
            the same shape; 0 for tokens that are not among the latest of their request.
    """

    slots: Tensor
    places: dict[int, Tensor]


@dataclass
class FormatStep:
    """The rows of one step, as the backend's metadata has them.

    Attributes:
        query_start: ``[num_rows + 1]`` int32.
        block_table: ``[num_rows, max_blocks]`` int32.
        seq_lens: ``[num_rows]`` int32.
        num_tokens: Tokens of the step.
        max_query_len: Most queries of a row.
        max_seq_len: Most tokens of a row.
        tokens: Slots of the step's tokens, or None where requests are treated alike.
    """

    query_start: Tensor
    block_table: Tensor
    seq_lens: Tensor
    num_tokens: int
    max_query_len: int
    max_seq_len: int
    tokens: TokenSlots | None
    _made: dict[tuple[Any, bool], Tensor] = field(default_factory=dict)

    def past_lens(self) -> Tensor:
        """Tokens of earlier steps that each row sees, ``[num_rows]`` int32."""
        return self._once("past", lambda: self.seq_lens - self.query_start.diff())

    def row_slots(self) -> Tensor | None:
        """Slot of each row's first token, ``[num_rows]`` int64."""
        tokens = self.tokens
        if tokens is None:
            return None
        last = tokens.slots.shape[0] - 1
        return self._once(
            "slots", lambda: tokens.slots[self.query_start[:-1].long().clamp_max(last)]
        )

    def recent_lens(self, size: int) -> Tensor:
        """Of `past_lens`, those in a ring of ``size`` tokens, ``[num_rows]`` int32."""
        slots, past = self.row_slots(), self.past_lens()
        assert slots is not None
        return self._once(size, lambda: torch.where(slots >= 0, past % size, 0).to(torch.int32))

    def _once(self, name: Any, make: Callable[[], Tensor]) -> Tensor:
        """Compute for the first layer what all share; a graph holds the computation too."""
        key = (name, _captures())
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = make()
        return found


class FormatTokens(MetadataStep):
    """Counts the tokens of a step, and finds their slots where a format treats requests apart.

    Args:
        kind: The format on this worker.
        block_size: Tokens per block.
        max_tokens: Most tokens of a step.
        device: Device of the tensors.
    """

    def __init__(self, kind: FormatWorker, block_size: int, max_tokens: int, device: torch.device):
        self._kind = kind
        self._block_size = block_size
        self.current: TokenSlots | None = None
        self._buffers: TokenSlots | None = None
        if kind.apart:
            slots, *places = (
                kind.held.take(("tokens", name), (max_tokens,), torch.int64, device)
                for name in (0, *kind.recent_sizes)
            )
            self._buffers = TokenSlots(
                slots.fill_(-1), dict(zip(kind.recent_sizes, places, strict=True))
            )

    def build(self, inner: Build, call: BuildCall) -> Any:
        self.current = None
        # Others' forwards must not write to the buffers: the step's own is under way.
        if not self._kind.rows.hides:
            common, log = call.common, self._kind.log
            log.tokens = int(common.query_start_loc_cpu[common.num_reqs])
            if log.unwritten:
                mapping = common.slot_mapping
                begun = mapping[(mapping >= 0) & (mapping % self._block_size == 0)]
                log.begun(begun // self._block_size)
            if self._buffers is not None:
                self._fill(self._buffers, call)
                self.current = self._buffers
        return inner(call)

    def _fill(self, into: TokenSlots, call: BuildCall) -> None:
        common = call.common
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].long()
        count, to_end = int(starts[-1]), None
        slots = call.slots
        if common.max_query_len > 1:
            widths = starts.diff()
            rows = torch.repeat_interleave(torch.arange(len(widths)), widths)
            before_end = torch.repeat_interleave(starts[1:], widths) - torch.arange(count)
            rows, to_end = to_device(torch.stack([rows, before_end]), slots.device)
            slots = slots[rows]
        slots = slots[:count]
        into.slots[:count] = slots
        into.slots[count:] = -1
        mapping = common.slot_mapping[:count]
        for size, places in into.places.items():
            kept = (slots >= 0) & (mapping >= 0)
            if to_end is not None:
                kept &= to_end <= size
            places[:count] = torch.where(kept, 1 + slots * size + mapping % size, 0)
            places[count:] = 0


class FormatRows(MetadataStep):
    """Lets a step's rows ride on the backend's metadata.

    Args:
        tokens: The step that finds the slots of tokens.
    """

    def __init__(self, tokens: FormatTokens):
        self._tokens = tokens

    def build(self, inner: Build, call: BuildCall) -> Any:
        common = call.common
        # The backend does not attend: no schedule for its kernels, which FlashAttention's builder
        # would ask for in the dtype of the pages.
        metadata = inner(replace(call.on(common), fast=True))
        rows = common.num_reqs
        metadata.kvplug_format = FormatStep(
            common.query_start_loc[: rows + 1],
            common.block_table_tensor[:rows],
            common.seq_lens[:rows],
            int(common.num_actual_tokens),
            int(common.max_query_len),
            int(common.max_seq_len),
            self._tokens.current,
        )
        return metadata


class FormatAttention(AttentionStep):
    """Writes and attends layers by the format."""

    def __init__(self, kind: FormatWorker):
        self._kind = kind

    def write(self, inner: Write, call: WriteCall) -> None:
        if not _coded(call.layer):
            inner(call)
            return
        step = _current_step(call.layer.layer_name) if self._kind.apart else None
        layer = self._kind.layer(call.impl, call.layer)
        layer.write(step, call.key, call.value, call.cache, call.slot_mapping)

    def attend(self, inner: Attend, call: AttendCall) -> Tensor:
        step = getattr(call.metadata, "kvplug_format", None)
        if not _coded(call.layer):
            return inner(call)
        layer = self._kind.layer(call.impl, call.layer)
        if step is None:
            return inner(call)
        layer.attend(step, call.query, call.key, call.value, call.cache, call.output)
        if layer.recent_size and step.tokens is not None:
            layer.remember(step.tokens, step.num_tokens, call.key, call.value)
        return call.output

    def pages(self, impl: Any, layer: Any, cache: Tensor) -> CodedPages | None:
        if not _coded(layer):
            return None
        own = self._kind.layer(impl, layer)
        return CodedPages(own.stored, own.layer, own.layout, cache)


class Ring:
    """Exact K and V of the latest tokens of each slot's request in one layer.

    Args:
        slots: Slots.
        size: Tokens kept of each.
        key: Memory for the keys, ``[1 + slots * size, num_kv_heads, head_size]``.
        value: Memory for the values, the same shape.

    Attributes:
        slots: As given.
        recent: The tokens as policies see them.
    """

    def __init__(self, slots: int, size: int, key: Tensor, value: Tensor):
        self.slots = slots
        # Place 0 takes tokens that are not kept.
        self._key, self._value = key, value
        by_slot = (slots, size, *key.shape[1:])
        self.recent = Recent(self._key[1:].view(by_slot), self._value[1:].view(by_slot))

    def put(self, places: Tensor, key: Tensor, value: Tensor) -> None:
        """Keep tokens at their places, ``[n]`` int64; see `TokenSlots.places`."""
        self._key.index_copy_(0, places, key)
        self._value.index_copy_(0, places, value)

    def take(self, other: Ring) -> None:
        """Take over the tokens of a ring of fewer slots."""
        self.recent.key[: other.slots] = other.recent.key
        self.recent.value[: other.slots] = other.recent.value


class FormatLayer:
    """One layer under a format: its pages, its recent tokens, and the guard around the policy.

    Args:
        kind: The format on this worker.
        layer: The layer.
        scale: Softmax scale.
        softcap: Soft cap of logits; 0 for none.
    """

    def __init__(self, kind: FormatWorker, layer: LayerView, scale: float, softcap: float):
        self.policy = kind.policy
        self.layer = layer
        self.scale = scale
        self.softcap = softcap
        self.layout = kind.page_layouts[layer.index]
        self.recent_size = kind.recent_of[layer.index]
        self.exact_chunk = bool(getattr(kind.policy.options, "exact_chunk", True))
        self._kind = kind
        self._log = kind.log
        self.stored = StoredFormat(
            kind.policy, kind.log.contained, kind.log.fail, kind.log.unwritten
        )
        self._ring: Ring | None = None
        self._torn = False

    def ring(self, like: Tensor) -> Ring:
        """Return the layer's ring, made on first use.

        On the first runner it grows with the number of slots.

        Args:
            like: K or V of some tokens.
        """
        slots, ring = self._kind.max_requests, self._ring
        if slots is None:
            slots = max(self._kind.rows.num_slots, 1)
            if ring is None or ring.slots < slots:
                slots = max(slots, self._kind.first_slots if ring is None else 2 * ring.slots)
        if ring is None or ring.slots < slots:
            shape = (recent_places(self.recent_size, slots), *like.shape[1:])
            key, value = (
                self._kind.held.take((self.layer.index, what), shape, like.dtype, like.device)
                for what in ("key", "value")
            )
            self._ring = Ring(slots, self.recent_size, key, value)
            if ring is not None:
                self._ring.take(ring)
        assert self._ring is not None
        return self._ring

    def recent(self, tokens: TokenSlots | None, like: Tensor) -> Recent | None:
        """Return the exact K and V of earlier tokens, with room for every slot of the step."""
        if not self.recent_size or tokens is None:
            return None
        return self.ring(like).recent

    def write(
        self, step: FormatStep | None, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor
    ) -> None:
        """Store a step's tokens; blocks that could not be written are reported, not served."""
        tokens = step.tokens if step is not None else None
        n, of_tokens, assignments = slots.shape[0], None, self._kind.assignments
        if tokens is not None:
            of_tokens = tokens.slots[:n]
        batch = WriteBatch(
            key[:n],
            value[:n],
            slots,
            of_tokens,
            self.recent(tokens, key),
            assignments.of(of_tokens)
            if assignments is not None and of_tokens is not None
            else None,
        )
        try:
            self._log.contained.call("write", self.layer, batch, cache)
        except PolicyFailure as failure:
            if _captures():
                raise
            self._log.fail("write", failure)
            written = slots[slots >= 0]
            blocks = torch.unique(written // cache.shape[2])
            cache[blocks] = 0
            self._log.lose(blocks.tolist())
            self._torn = True
        self._log.waits = cache.device.type != "cpu"

    def attend(
        self,
        step: FormatStep,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: Tensor,
        out: Tensor,
    ) -> None:
        """Attend a step's queries; by reading pages back where the policy fails."""
        n = step.num_tokens
        # What could not be stored is not in the pages; its step has it all the same.
        exact = (self.exact_chunk or self._torn) and key is not None and value is not None
        self._torn = False
        recent = self.recent(step.tokens, key) if exact else None
        kept = step.recent_lens(self.recent_size) if recent is not None else None
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
            request_slots=step.row_slots() if self.recent_size else None,
            recent=recent,
            past_lens=step.past_lens(),
            recent_lens=kept,
        )
        run = self._log.contained.run
        try:
            run(attend, self.policy, self.layer, batch, cache, out[:n])
        except PolicyFailure as failure:
            if _captures():
                raise
            self._log.fail("attend", failure)
            try:
                run(attend_dense, self.policy, self.layer, batch, cache, out[:n])
            except PolicyFailure as second:
                self._log.fail("read", second)
                out[:n].zero_()
                self._log.lose(step.block_table[:, :1].flatten().tolist())

    def remember(self, tokens: TokenSlots, n: int, key: Tensor, value: Tensor) -> None:
        """Keep the latest of a step's ``n`` tokens of each request, once they were attended."""
        places = tokens.places[self.recent_size][:n]
        self.ring(key).put(places, key[:n], value[:n])


def _captures() -> bool:
    """Whether a CUDA graph is being captured."""
    ready: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return ready and torch.cuda.is_current_stream_capturing()


def _coded(layer: Any) -> bool:
    """Whether a layer's pages are in a format's bytes."""
    rules = getattr(layer.attn_backend, "kvplug_rules", {})
    return rules.get(Kind.FORMAT) is not None


def _current_step(layer_name: str) -> FormatStep | None:
    from vllm.forward_context import get_forward_context

    metadata = get_forward_context().attn_metadata
    own = metadata.get(layer_name) if isinstance(metadata, dict) else None
    return getattr(own, "kvplug_format", None)
