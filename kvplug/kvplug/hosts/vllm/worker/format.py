"""A format policy in stock attention layers: what a step looks like to it, and its guard.

A layer under a format has uint8 pages of the policy's own bytes. New tokens go through
`FormatPolicy.write` where the backend would have stored them, and queries through
`FormatPolicy.attend` where it would have attended. The rest of the backend, its metadata builder
included, stays vLLM's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport

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
from kvplug.hosts.vllm.messages import FormatReport, StepDirectives, StepReport
from kvplug.hosts.vllm.worker.kind import KindWorker, Origin
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

logger = init_logger("vllm.kvplug")

COUNTERS_EVERY = 64
"""Reports between two reads of counters that the host would have to wait for."""


class FormatWorker(KindWorker):
    """A format policy on a worker.

    Args:
        policy: The policy.
        origin: Source and key of the policy in its deployment, for messages.
        rows: Slots of the step's rows.

    Attributes:
        apart: Whether the format treats requests apart: it keeps recent tokens of each, or assigns
            them different ways to be stored.
        recent_size: Most recent tokens that a layer keeps of a request.
        layers: State of each layer, by layer name.
        log: What the policy did, and how it failed.
    """

    kind = Kind.FORMAT
    supports_update_block_table = False

    def __init__(self, policy: FormatPolicy, origin: Origin, rows: StepRows):
        super().__init__(origin)
        self.policy = policy
        layers = policy.engine.layers
        self.recent_size = max((policy.recent(layer) for layer in layers), default=0)
        self.apart = self.recent_size > 0 or len(policy.assignments()) > 1
        self.layers: dict[str, FormatLayer] = {}
        self.log = FormatLog(policy)
        self.rows = rows
        self._layouts = [policy.layout(layer) for layer in layers]
        self._assignments: dict[int, int] = {}
        self._num_groups = 1

    # -- layers --------------------------------------------------------------------------------

    def rule(self, index: int) -> PageLayout:
        return self._layouts[index]

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

    def metadata_steps(
        self, spec: Any, vllm_config: Any, device: torch.device
    ) -> Sequence[MetadataStep]:
        if not self.apart:
            return (FormatRows(None),)
        tokens = FormatTokens(self)
        return (tokens, FormatRows(tokens))

    def cudagraph_support(self, spec: Any, inner: AttentionCGSupport) -> AttentionCGSupport:
        # Attention runs between the graphs.
        return AttentionCGSupport.NEVER

    def attention_step(self) -> AttentionStep:
        return FormatAttention(self)

    def layer(self, impl: Any, layer: Any) -> FormatLayer:
        """Return the state of a layer, made on first use."""
        found = self.layers.get(layer.layer_name)
        if found is None:
            from vllm.model_executor.models.utils import extract_layer_index

            view = self.policy.engine.layers[extract_layer_index(layer.layer_name)]
            softcap = float(getattr(impl, "logits_soft_cap", 0) or 0)
            found = FormatLayer(self, view, float(impl.scale), softcap)
            self.layers[layer.layer_name] = found
        return found

    def assignments_of(self, slots: Sequence[int]) -> list[int]:
        """Return the assignment of each slot; 0 where none was given."""
        return [self._assignments.get(slot, 0) for slot in slots]

    # -- steps ---------------------------------------------------------------------------------

    def start(self, num_groups: int) -> None:
        self._num_groups = num_groups

    def begin(self, directives: StepDirectives) -> None:
        own = directives.format
        self._assignments = {} if own is None else dict(own.assignments.tolist())

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
        failed: Cause of the first failure, or None.
        unwritten: Blocks whose tokens could not be stored.
        waits: Whether pages lie on a device whose numbers the host has to wait for.
    """

    def __init__(self, policy: FormatPolicy):
        self._policy = policy
        self.counts = FormatReport()
        self.failed: str | None = None
        self.unwritten: set[int] = set()
        self.waits = False
        self._reports = 0
        self._has_counters = True

    def fail(self, method: str, error: Exception) -> None:
        """Count a failure; the first is logged."""
        self.counts.errors += 1
        if self.failed is None:
            self.failed = f"{method}: {type(error).__name__}: {error}"
            logger.error(
                "format policy %r failed in %s; layers it cannot attend are attended by reading "
                "pages back, and requests whose tokens it cannot store fail: %s: %s",
                self._policy.name,
                method,
                type(error).__name__,
                error,
                exc_info=error,
            )

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
            found = self._policy.signals()
            return None if found is None else [float(x) for x in found]
        except Exception as error:
            self.fail("signals", error)
            return None

    def _counters(self) -> dict[str, float]:
        """The policy's own counters; none once it failed to give them, and on a device only every
        `COUNTERS_EVERY` reports."""
        if not self._has_counters:
            return {}
        self._reports += 1
        if self.waits and self._reports % COUNTERS_EVERY != 1:
            return {}
        try:
            return {str(k): float(v) for k, v in self._policy.counters().items()}
        except Exception:
            logger.exception("policy %r failed in counters(); they are left out", self._policy.name)
            self._has_counters = False
            return {}


@dataclass
class TokenSlots:
    """Slots of the step's tokens, and the tokens whose exact K and V are kept afterwards.

    Attributes:
        slots: Slot of each token's request, ``[num_tokens]`` int64, or -1.
        assigned: Assignment of each token's request, ``[num_tokens]`` int64.
        kept: Tokens that are among the latest of their request, ``[n]`` int64.
        kept_at: Their cache slots, ``[n]`` int64.
    """

    slots: Tensor
    assigned: Tensor
    kept: Tensor
    kept_at: Tensor


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

    @property
    def row_slots(self) -> Tensor | None:
        """Slot of each row's first token, ``[num_rows]`` int64."""
        if self.tokens is None:
            return None
        first = self.query_start[:-1].long().clamp_max(max(self.tokens.slots.shape[0] - 1, 0))
        return self.tokens.slots[first]


class FormatTokens(MetadataStep):
    """Finds the slot of each token, for a format that treats requests apart."""

    def __init__(self, kind: FormatWorker):
        self._kind = kind
        self.current: TokenSlots | None = None

    def build(self, inner: Build, call: BuildCall) -> Any:
        self.current = self._token_slots(call)
        return inner(call)

    def _token_slots(self, call: BuildCall) -> TokenSlots:
        common = call.common
        rows, device = common.num_reqs, common.seq_lens.device
        starts = common.query_start_loc_cpu[: rows + 1].long()
        by_row = call.slots[:rows].cpu()
        assigned_by_row = torch.tensor(self._kind.assignments_of(by_row.tolist()))
        widths = starts[1:] - starts[:-1]
        slots = torch.repeat_interleave(by_row, widths)
        assigned = torch.repeat_interleave(assigned_by_row.long(), widths)
        before_end = torch.repeat_interleave(starts[1:], widths) - torch.arange(len(slots))
        latest = (before_end <= self._kind.recent_size) & (slots >= 0)
        kept = latest.nonzero()[:, 0].to(device)
        kept_at = common.slot_mapping[kept].long()
        return TokenSlots(slots.to(device), assigned.to(device), kept, kept_at)


class FormatRows(MetadataStep):
    """Lets a step's rows ride on the backend's metadata.

    Args:
        tokens: The step that finds the slots of tokens, or None.
    """

    def __init__(self, tokens: FormatTokens | None):
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
            self._tokens.current if self._tokens is not None else None,
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
        if step is None or not _coded(call.layer):
            return inner(call)
        layer = self._kind.layer(call.impl, call.layer)
        layer.attend(step, call.query, call.key, call.value, call.cache, call.output)
        if layer.recent_size and step.tokens is not None:
            layer.remember(step.tokens, call.key, call.value)
        return call.output

    def pages(self, impl: Any, layer: Any, cache: Tensor) -> CodedPages | None:
        if not _coded(layer):
            return None
        own = self._kind.layer(impl, layer)
        return CodedPages(own.policy, own.layer, own.layout, cache)


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
        self.layout = kind.policy.layout(layer)
        self.recent_size = kind.policy.recent(layer)
        self.exact_chunk = bool(getattr(kind.policy.options, "exact_chunk", True))
        self._kind = kind
        self._log = kind.log
        self._recent: Recent | None = None

    def recent(self, tokens: TokenSlots | None, like: Tensor) -> Recent | None:
        """Return the exact K and V of earlier tokens, with room for every slot of the step."""
        if not self.recent_size or tokens is None:
            return None
        slots = max(self._kind.rows.num_slots, 1)
        if self._recent is None or self._recent.key.shape[0] < slots:
            room = max(slots, 16 if self._recent is None else 2 * self._recent.key.shape[0])
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
            tokens.slots[:n] if tokens is not None else None,
            self.recent(tokens, key),
            tokens.assigned[:n] if tokens is not None else None,
        )
        unwritten = self._log.unwritten
        if unwritten and self is next(iter(self._kind.layers.values())):
            size = cache.shape[2]
            begun = slots[(slots >= 0) & (slots % size == 0)] // size
            unwritten.difference_update(begun.tolist())
        try:
            self.policy.write(self.layer, batch, cache)
        except Exception as error:
            self._log.fail("write", error)
            written = slots[slots >= 0]
            blocks = torch.unique(written // cache.shape[2])
            cache[blocks] = 0
            unwritten.update(blocks.tolist())
        self._log.counts.tokens += n
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
            request_slots=step.row_slots,
            recent=recent,
        )
        try:
            attend(self.policy, self.layer, batch, cache, out[:n])
        except Exception as error:
            self._log.fail("attend", error)
            try:
                attend_dense(self.policy, self.layer, batch, cache, out[:n])
            except Exception as second:
                self._log.fail("read", second)
                out[:n].zero_()
                self._log.unwritten.update(step.block_table[:, :1].flatten().tolist())

    def remember(self, tokens: TokenSlots, key: Tensor, value: Tensor) -> None:
        """Keep the step's latest tokens of each request, once they have been attended."""
        kept = self.recent(tokens, key)
        assert kept is not None
        at = (tokens.slots[tokens.kept], tokens.kept_at % self.recent_size)
        kept.key[at] = key[tokens.kept]
        kept.value[at] = value[tokens.kept]


def _coded(layer: Any) -> bool:
    """Whether a layer's pages are in a format's bytes."""
    rules = getattr(layer.attn_backend, "kvplug_rules", {})
    return rules.get(Kind.FORMAT) is not None


def _current_step(layer_name: str) -> FormatStep | None:
    from vllm.forward_context import get_forward_context

    metadata = get_forward_context().attn_metadata
    own = metadata.get(layer_name) if isinstance(metadata, dict) else None
    return getattr(own, "kvplug_format", None)
