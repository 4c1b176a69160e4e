"""Attention policies on a worker: the policy attends some decode rows, the backend all others.

Which rows those are is the same in every layer, so a metadata step finds them once and builds the
backend's metadata of the other rows beside that of all. In each layer the policy is given its rows;
what it leaves, and every row once it has failed, goes to the backend.

The second model runner learns whose the rows are after it has built a step's metadata, and before
the forward; metadata of a step with rows for the policy is built once more then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport

from kvplug.containment import ON_WORKER, PolicyFailure
from kvplug.contract import AttentionPolicy, DecodeRows, Kind, LayerView
from kvplug.hosts.policy_tensors import plain_tensor
from kvplug.hosts.torch_state import TorchPolicy
from kvplug.hosts.vllm.messages import AttentionReport, StepDirectives, StepReport
from kvplug.hosts.vllm.worker import metadata
from kvplug.hosts.vllm.worker.kind import KindWorker, Origin
from kvplug.hosts.vllm.worker.layers import layer_view, softcap_of
from kvplug.hosts.vllm.worker.pages import TokenPages, open_pages
from kvplug.hosts.vllm.worker.rows import StepRows
from kvplug.hosts.vllm.worker.steps import (
    Attend,
    AttendCall,
    AttentionStep,
    Build,
    BuildCall,
    Built,
    MetadataStep,
)

logger = init_logger("vllm.kvplug")


@dataclass
class ServedRows:
    """Rows of one step that the policy attends.

    Attributes:
        slots: Slot of each row.
        owners: Owner of each slot.
        lens: Tokens of each row.
        tokens: Its token among the step's, ``[rows]`` int64.
        table: Its blocks, ``[rows, max_blocks]`` int64.
        rest: The backend's metadata of all other rows; None if there are none.
        rest_tokens: Their tokens among the step's, ``[n]`` int64.
    """

    slots: list[int]
    owners: list[int]
    lens: list[int]
    tokens: Tensor
    table: Tensor
    rest: Any = None
    rest_tokens: Tensor | None = None


class AttentionWorker(KindWorker):
    """An attention policy on a worker.

    Args:
        policy: The policy.
        origin: Source and key of the policy in its deployment, for messages.
        rows: Slots of the engine's rows.

    Attributes:
        contained: The policy, as it is called.
        owners: Owner of each slot that the policy serves in the step.
        failed: Cause the policy was retired for, or None.
    """

    kind = Kind.ATTENTION
    # Taking another group's metadata would take its rows.
    supports_update_block_table = False

    def __init__(self, policy: AttentionPolicy, origin: Origin, rows: StepRows):
        super().__init__(origin)
        self.policy = policy
        self._step_rows = rows
        self._served: WeakSet[Served] = WeakSet()
        self.owners: dict[int, int] = {}
        self.failed: str | None = None
        self._rows = 0
        self._reported = False
        self.contained = TorchPolicy(policy, ON_WORKER, logger)
        self._pages: dict[str, tuple[int, TokenPages]] = {}

    # -- layers --------------------------------------------------------------------------------

    def customize_spec(self, spec: Any, rule: Any, stock: type[Any]) -> Any:
        from vllm.v1.kv_cache_interface import replace_as

        from kvplug.hosts.vllm.spec import ApproximateSpec

        return replace_as(spec, ApproximateSpec)

    def metadata_steps(
        self, spec: Any, vllm_config: Any, device: torch.device
    ) -> Sequence[MetadataStep]:
        served = Served(self, int(spec.block_size))
        self._served.add(served)
        return (served,)

    def cudagraph_support(self, spec: Any, inner: AttentionCGSupport) -> AttentionCGSupport:
        # The policy decides between the graphs, layer by layer.
        return AttentionCGSupport.NEVER

    def attention_step(self) -> AttentionStep:
        return ServedAttention(self)

    # -- steps ---------------------------------------------------------------------------------

    def begin(self, directives: StepDirectives) -> None:
        own = directives.attention
        self.owners = {} if own is None else dict(own.requests.tolist())

    def load(self, directives: StepDirectives) -> None:
        rows = self._step_rows
        if not self.owners or not rows.requests:
            return
        slots = {rows.named[slot].row: slot for slot in self.owners if slot in rows.named}
        for served in self._served:
            served.serve(slots)

    def end(self, directives: StepDirectives) -> None:
        # The second runner builds the next step before it begins.
        self.owners = {}
        for served in self._served:
            served.forget()

    def report(self, into: StepReport) -> None:
        if not self._rows and (self.failed is None or self._reported):
            return
        self._reported = self.failed is not None
        rows, self._rows = self._rows, 0
        into.attention = AttentionReport(rows, self.failed, self.contained.counters())

    def fail(self, method: str, failure: PolicyFailure) -> None:
        """Retire the policy: the backend attends from now on."""
        if self.failed is None:
            self.failed = f"{method}: {failure.cause}"
            self.contained.log(
                f"failed in {method} and is retired; the backend attends instead", failure
            )

    def serves(self, num_tokens: int) -> bool:
        """Return True if the policy attends rows of that many tokens."""
        if self.failed is not None:
            return False
        try:
            return bool(self.contained.run(self._serves, num_tokens))
        except PolicyFailure as failure:
            self.fail("serves", failure)
            return False

    def _serves(self, num_tokens: int) -> bool:
        return bool(self.policy.serves(num_tokens))

    def attend(self, call: AttendCall, rows: ServedRows) -> Tensor | None:
        """Let the policy attend rows of one layer; None where it leaves them.

        Returns:
            ``[rows, num_heads, head_size]``, in the dtype of the call's output.

        Raises:
            PolicyFailure: The policy failed.
        """
        view = layer_view(self.policy, call.layer.layer_name)
        pages, size = self._open(call), int(call.cache.shape[2])
        table = rows.table

        def gather(
            which: Sequence[int], starts: Sequence[int], ends: Sequence[int]
        ) -> tuple[Tensor, Tensor]:
            span = [
                (start // size, -(-end // size)) for start, end in zip(starts, ends, strict=True)
            ]
            widest = max(last - first for first, last in span)
            first, last, index = metadata.to_device(
                [*zip(*span, strict=True), tuple(which)], table.device
            )
            column = first[:, None] + torch.arange(widest, device=table.device)
            own = table[index]
            blocks = own.gather(1, column.clamp_max(own.shape[1] - 1))
            # Entries behind a row's last block name no block of its own.
            blocks = blocks.masked_fill(column >= last[:, None], 0)
            return pages.gather(0, blocks), pages.gather(1, blocks)

        query = call.query[rows.tokens].view(len(rows.lens), view.num_heads, view.head_size)
        scale, softcap = float(call.impl.scale), softcap_of(call.impl)
        batch = DecodeRows(
            query,
            tuple(rows.slots),
            tuple(rows.owners),
            tuple(rows.lens),
            scale,
            softcap,
            gather,
        )
        like = call.output
        out: Tensor | None = self.contained.run(self._attended, view, batch, query.shape, like)
        if out is not None:
            self._rows += len(rows.lens)
        return out

    def _attended(
        self, view: LayerView, batch: DecodeRows, shape: torch.Size, like: Tensor
    ) -> Tensor | None:
        """What the policy attends, checked, in the dtype of ``like``."""
        out = self.policy.attend(view, batch)
        return None if out is None else plain_tensor("attend", out, shape, like)

    def _open(self, call: AttendCall) -> TokenPages:
        name, at = call.layer.layer_name, call.cache.data_ptr()
        opened = self._pages.get(name)
        if opened is None or opened[0] != at:
            opened = self._pages[name] = (at, open_pages(call.impl, call.layer, call.cache))
        return opened[1]


class Served(MetadataStep):
    """Finds the rows that the policy attends; they ride on the step's metadata."""

    def __init__(self, kind: AttentionWorker, block_size: int):
        self._kind = kind
        self._block_size = block_size
        self._built: Built | None = None

    def build(self, inner: Build, call: BuildCall) -> Any:
        made = self._build(inner, call, None)
        if made is None:
            made = inner(call)
        self._built = Built.of(inner, call, made)
        return made

    def serve(self, slots: Mapping[int, int]) -> None:
        """Build the step's metadata again, in place, with rows for the policy.

        Args:
            slots: Slot of each row whose request the policy serves.
        """
        if self._built is None:
            return
        again = self._build(self._built.inner, self._built.call, slots)
        if again is not None:
            self._built.become(again)

    def forget(self) -> None:
        """Forget the step."""
        self._built = None

    def _build(self, inner: Build, call: BuildCall, slots: Mapping[int, int] | None) -> Any:
        """Build metadata with rows for the policy; None where it has none."""
        rows, rest = self._find(call, slots)
        if rows is None:
            return None
        if rest:
            part, rows.rest_tokens = metadata.select_rows(call.common, rest)
            rows.rest = inner(replace(call.part(part), fast=True))
        # Of all rows too: an error, or a layer the policy does not serve, falls back to it.
        built = inner(call.on(call.common))
        built.kvplug_served = rows
        return built

    def _find(
        self, call: BuildCall, known: Mapping[int, int] | None
    ) -> tuple[ServedRows | None, list[int]]:
        """The policy's rows, or None for none, and the numbers of the others."""
        common, owners, serves = call.common, self._kind.owners, self._kind.serves
        if not owners or self._kind.failed is not None or common.causal is not True:
            return None, []
        count = common.num_reqs
        starts = common.query_start_loc_cpu[: count + 1].tolist()
        lens = metadata.host_lengths(common)[:count].tolist()
        if known is None:
            slots = call.slots[:count].tolist()
        else:
            slots = [known.get(row, -1) for row in range(count)]
        mine: list[int] = []
        rest: list[int] = []
        for row in range(count):
            single = starts[row + 1] - starts[row] == 1 and lens[row] > 0
            served = single and slots[row] in owners and serves(lens[row])
            (mine if served else rest).append(row)
        if not mine:
            return None, rest
        tokens, index = metadata.to_device(
            [[starts[row] for row in mine], mine], common.seq_lens.device
        )
        found = ServedRows(
            [slots[row] for row in mine],
            [owners[slots[row]] for row in mine],
            [lens[row] for row in mine],
            tokens,
            common.block_table_tensor[index].long(),
        )
        return found, rest


class ServedAttention(AttentionStep):
    """Attends the policy's rows by the policy, and the others through the rest of the chain."""

    def __init__(self, kind: AttentionWorker):
        self._kind = kind

    def attend(self, inner: Attend, call: AttendCall) -> Tensor:
        rows: ServedRows | None = getattr(call.metadata, "kvplug_served", None)
        if rows is None or self._kind.failed is not None or not _plain(call):
            return inner(call)
        try:
            made = self._kind.attend(call, rows)
        except PolicyFailure as failure:
            self._kind.fail("attend", failure)
            made = None
        if made is None:
            return inner(call)
        if rows.rest is not None and rows.rest_tokens is not None:
            part = call.on_tokens(rows.rest_tokens, rows.rest)
            inner(part)
            call.output[rows.rest_tokens] = part.output
        shape = call.output.shape[1:]
        call.output[rows.tokens] = made.reshape(-1, *shape)
        return call.output


def _plain(call: AttendCall) -> bool:
    """True if the layer attends causally and in no other way than the contract's."""
    impl = call.impl
    return (
        not call.args
        and all(extra is None for extra in call.kwargs.values())
        and getattr(impl, "sliding_window", None) in (None, -1, (-1, -1))
        and getattr(impl, "alibi_slopes", None) is None
        and getattr(impl, "sinks", None) is None
        and getattr(impl, "attn_type", "decoder") == "decoder"
    )
