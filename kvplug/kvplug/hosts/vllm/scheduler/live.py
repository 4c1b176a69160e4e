"""Takes snapshots of the engine while somebody watches: the pool, the requests, the policies.

Nothing is kept up for it. Once a second at most, `LiveView` goes through the pool's blocks and the
tables of requests, a few thousand entries in each scheduler step, so that no step is held up for
longer than that takes. If no step comes, because the engine is idle or a step takes long, the
thread that sends the snapshots goes through the rest itself; what it reads while a step changes it
is a picture that is off by a step, and never more than a picture.

What policies say of themselves is asked in the scheduler's thread only: they are written for one
thread. An engine that falls idle is asked once more in its last, empty step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from vllm.logger import init_logger
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import RequestStatus

import kvplug
from kvplug.contract import PolicyReport
from kvplug.hosts.vllm import compat
from kvplug.hosts.vllm.flags import LIVE_PAGE
from kvplug.hosts.vllm.scheduler.kind import SchedulerContext
from kvplug.hosts.vllm.spec import ApproximateManager, ShorteningManager
from kvplug.observe.live import (
    MAX_BLOCKS,
    MAX_REQUESTS,
    BlockState,
    Facts,
    LayerShare,
    PolicyState,
    RequestSpan,
    Snapshot,
    Totals,
    counted,
    encode_map,
    outcomes,
    plain,
    runs,
)
from kvplug.observe.live_socket import Publisher

logger = init_logger("vllm.kvplug")

SLICE = 4096
"""Blocks, or entries of block tables, that one step goes through."""

PATIENCE = 0.25
"""Seconds that the sending thread waits for a step before it goes on itself."""

STATUS = {
    RequestStatus.RUNNING: "running",
    RequestStatus.WAITING_FOR_REMOTE_KVS: "loading",
    RequestStatus.PREEMPTED: "preempted",
}


class Shows(Protocol):
    """A part of the scheduler that the page shows."""

    def show(self, facts: Facts) -> None:
        """Add what the page shows of it; called in the scheduler's thread."""


@dataclass(slots=True)
class _Known:
    """A request under way: what the first lookup of its prompt found, in tokens; -1 before it."""

    request: Any
    hit: int = -1
    loaded: int = 0


@dataclass(slots=True)
class _Row:
    """A request as it was gone through."""

    known: _Known
    status: str
    table: int
    held: int
    resident: tuple[tuple[int, int], ...]
    approximate_from: int | None


@dataclass(slots=True)
class _Taken:
    """Everything that was gone through."""

    states: npt.NDArray[np.uint8]
    rows: list[_Row]
    more: int
    groups: list[tuple[int, int]]


class LiveView:
    """What the page shows of one engine.

    Args:
        context: The scheduler's context.
        parts: Kinds of the deployment, and what observes beside them.
        reports: Reports of the kinds' policies.
        kv_cache_config: vLLM's KV-cache groups.

    Attributes:
        scheduled: Tokens scheduled so far.
        steps: Steps so far.
    """

    def __init__(
        self,
        context: SchedulerContext,
        parts: Sequence[Shows],
        reports: Callable[[], Sequence[PolicyReport]],
        kv_cache_config: Any,
    ):
        self.steps = self.scheduled = 0
        self._context = context
        self._parts = parts
        self._reports = reports
        self._groups = [tuple(group.layer_names) for group in kv_cache_config.kv_cache_groups]
        self._requests: dict[str, _Known] = {}
        self._generated = self._finished = self._preemptions = 0
        self._hit = self._loaded = self._computed = 0
        self._pool: Any = None
        self._managers: list[Any] = []
        self._publisher: Publisher | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._due = self._failed = False
        self._sweep: Iterator[None] = iter(())
        self._taken: _Taken | None = None
        self._facts = Facts()
        self._policies: tuple[PolicyReport, ...] = ()
        self._busy = False
        self._cost = 0.0

    def bind(self, manager: Any) -> None:
        """Bind to vLLM's KV-cache manager, and listen for those who want to watch."""
        self._pool = manager.block_pool
        self._managers = list(manager.coordinator.single_type_managers)
        self._ask()
        config = self._context.vllm_config
        rank = int(config.parallel_config.data_parallel_index)
        try:
            self._publisher = Publisher(str(config.kv_transfer_config.engine_id), rank, self.take)
            self._publisher.start()
        except OSError as error:
            logger.error(
                "kvplug: the live page does not show this engine: %s. Another engine on this "
                "machine has its engine_id; leave it out of kv-transfer-config.",
                error.strerror or error,
            )
            return
        logger.info(
            "kvplug: the engine's state is shown at /kvplug where the server has --middleware %s, "
            "which kvplug serve adds",
            LIVE_PAGE,
        )

    # -- requests ------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """Take in a request."""
        self._requests[request.request_id] = _Known(request)

    def matched(self, request: Any, num_local: int, num_external: int | None) -> None:
        """Take note of what a lookup found; that after a preemption is not the prompt's."""
        known = self._requests.get(request.request_id)
        if known is not None and not request.num_preemptions:
            known.hit, known.loaded = num_local, num_external or 0

    def finished(self, request: Any) -> None:
        """Forget a request that ended."""
        known = self._requests.pop(request.request_id, None)
        if known is None:
            return
        # Policies count ends too, and one may come after the last step that had tokens.
        self._busy = True
        self._finished += 1
        self._generated += request.num_output_tokens
        self._preemptions += request.num_preemptions
        if known.hit >= 0:
            self._hit += known.hit
            self._loaded += known.loaded
            self._computed += max(0, request.num_prompt_tokens - known.hit - known.loaded)

    # -- steps ---------------------------------------------------------------------------------

    def step(self, tokens: int) -> None:
        """Take note of a step of so many tokens, and go on with a snapshot that is due."""
        self.steps += 1
        self.scheduled += tokens
        self._busy |= tokens > 0
        if self._due:
            # Taken only while the sending thread does not go through the rest itself.
            if self._lock.acquire(blocking=False):
                try:
                    began = time.perf_counter()
                    if self._advance():
                        self._ask()
                        self._done.set()
                    self._cost += time.perf_counter() - began
                except Exception as error:
                    self._fail(error)
                finally:
                    self._lock.release()
        elif self._busy and not tokens:
            # The engine falls idle, or waits: this may be its last step for long.
            self._busy = False
            try:
                self._ask()
            except Exception as error:
                self._fail(error)

    def _advance(self) -> bool:
        """Go through the next few thousand entries; True once that was all."""
        for _ in self._sweep:
            return False
        self._due = False
        return True

    def _ask(self) -> None:
        """Ask policies, kinds and observers what they have to show."""
        facts = Facts()
        for part in self._parts:
            part.show(facts)
        self._facts, self._policies = facts, tuple(self._reports())

    def _fail(self, error: Exception) -> None:
        self._due = False
        if not self._failed:
            self._failed = True
            logger.error("kvplug: a snapshot for the live page failed: %r", error, exc_info=error)

    # -- the sending thread --------------------------------------------------------------------

    def take(self) -> bytes | None:
        """Take a snapshot; None if it failed. Waits for steps, and goes on itself without any."""
        try:
            return self._take().json_bytes()
        except Exception as error:
            self._fail(error)
            return None
        finally:
            # It names requests that may have ended by now.
            self._taken = None

    def _take(self) -> Snapshot:
        self._cost = 0.0
        self._done.clear()
        self._sweep = self._go_through()
        self._due = True
        before = -1
        while self._due and before != self.steps:
            before = self.steps
            self._done.wait(PATIENCE)
        with self._lock:
            while not self._done.is_set():
                if self._advance():
                    self._done.set()
        if self._taken is None:
            raise RuntimeError("the sweep ended early")
        return self._built(self._taken)

    def _go_through(self) -> Iterator[None]:
        """Go through blocks and tables, with a yield about every `SLICE` of them."""
        blocks, null = self._pool.blocks, self._pool.null_block
        states = np.zeros(min(len(blocks), MAX_BLOCKS), np.uint8)
        held, cached, empty = map(int, (BlockState.HELD, BlockState.CACHED, BlockState.EMPTY))
        for first in range(0, len(states), SLICE):
            some = blocks[first : min(first + SLICE, len(states))]
            # A comprehension: twice as fast as numpy over an iterator of attributes.
            found = [
                held if block.ref_cnt else empty if block.block_hash is None else cached
                for block in some
            ]
            states[first : first + len(some)] = found
            yield
        rows: list[_Row] = []
        groups = [(0, 0)] * len(self._managers)
        work = 0
        known = list(self._requests.values())
        for one in known:
            row = None
            for number, pages in enumerate(self._managers):
                table = pages.req_to_blocks.get(one.request.request_id) or ()
                share = self._row(one, pages, list(table), null, states)
                row = row or share
                groups[number] = (
                    groups[number][0] + share.table,
                    groups[number][1] + share.held,
                )
                work += share.table
            if row is not None and len(rows) < MAX_REQUESTS:
                rows.append(row)
            if work >= SLICE:
                work = 0
                yield
        if null.block_id < len(states):
            states[null.block_id] = BlockState.RESERVED
        self._taken = _Taken(states, rows, len(known) - len(rows), groups)

    def _row(self, known: _Known, pages: Any, table: list[Any], null: Any, states: Any) -> _Row:
        """Describe a request in one group, and mark its blocks if they are not just held."""
        request = known.request
        status = STATUS.get(request.status, "waiting")
        first = None
        if isinstance(pages, ApproximateManager):
            first = pages.approximate_from(request.request_id)
        # In a table of full attention nothing is given back while the request runs.
        whole = type(pages) is FullAttentionManager or isinstance(pages, ApproximateManager)
        held = np.ones(len(table), np.bool_)
        if not whole:
            held[:] = [block is not null for block in table]
        count = int(held.sum())
        state, start = None, 0
        if status == "loading":
            state = BlockState.LOADING
        elif first is not None:
            state, start = BlockState.APPROXIMATE, first // pages.block_size
        elif count < len(table):
            state = BlockState.PARTLY_EVICTED
            if isinstance(pages, ShorteningManager):
                first = int(pages.kv_cache_spec.exact_tokens)
        if state is not None and start < len(table):
            ids = [block.block_id for block in table[start:] if block is not null]
            if len(self._pool.blocks) > len(states):
                ids = [i for i in ids if i < len(states)]
            states[ids] = state
        resident = ((0, len(table)),) if table and whole else runs(held)
        return _Row(known, status, len(table), count, resident, first)

    def _built(self, taken: _Taken) -> Snapshot:
        context, now = self._context, time.time()
        requests = [known.request for known in list(self._requests.values())]
        looked_up = [row for row in taken.rows if row.known.hit >= 0]
        hit = self._hit + sum(row.known.hit for row in looked_up)
        computed = self._computed + sum(
            max(0, row.known.request.num_prompt_tokens - row.known.hit - row.known.loaded)
            for row in looked_up
        )
        prompts = outcomes("prefix cache", "tokens", {"hit": hit, "computed": computed})
        return Snapshot(
            engine=int(context.vllm_config.parallel_config.data_parallel_index),
            at=now,
            clock=time.monotonic(),
            model=plain(context.vllm_config.model_config.served_model_name),
            kvplug=kvplug.__version__,
            vllm=plain(compat.version()),
            block_size=context.engine.block_size,
            block_bytes=context.block_bytes,
            blocks=len(taken.states),
            map=encode_map(taken.states),
            states=tuple(counted(taken.states)),
            requests=tuple(_shown(row, now) for row in taken.rows),
            more=taken.more,
            policies=tuple(_policy(report) for report in self._policies[:256]),
            tiers=tuple(self._facts.tiers[:64]),
            outcomes=tuple((prompts + self._facts.outcomes)[:512]),
            layers=tuple(self._layers(taken.groups)),
            breakers=self._facts.breakers,
            totals=Totals(
                steps=self.steps,
                scheduled=self.scheduled,
                generated=self._generated + sum(r.num_output_tokens for r in requests),
                finished=self._finished,
                preemptions=self._preemptions + sum(r.num_preemptions for r in requests),
            ),
            cost=self._cost,
        )

    def _layers(self, groups: Sequence[tuple[int, int]]) -> list[LayerShare]:
        """Shares by layer: those of its group."""
        of_layer: dict[int, tuple[int, int]] = {}
        for names, share in zip(self._groups, groups, strict=False):
            for name in names:
                numbers = [int(part) for part in name.split(".") if part.isdecimal()]
                if len(numbers) == 1:
                    of_layer[numbers[0]] = share
        sizes = self._facts.token_bytes
        found = []
        for layer in self._context.engine.layers[:1024]:
            element = 4 if layer.dtype == "float32" else 2
            stock = 2 * layer.num_kv_heads * layer.head_size * element
            table, held = of_layer.get(layer.index, (0, 0))
            size = sizes[layer.index] if layer.index < len(sizes) else stock
            found.append(LayerShare(layer=layer.index, token_bytes=size, table=table, held=held))
        return found

    def close(self) -> None:
        """Stop to listen. Idempotent."""
        if self._publisher is not None:
            self._publisher.close()


def _shown(row: _Row, now: float) -> RequestSpan:
    request = row.known.request
    return RequestSpan(
        id=plain(request.request_id),
        status=row.status,
        prompt=request.num_prompt_tokens,
        computed=max(0, request.num_computed_tokens),
        output=request.num_output_tokens,
        hit=max(0, row.known.hit),
        loaded=row.known.loaded,
        table=row.table,
        held=row.held,
        resident=row.resident,
        approximate_from=row.approximate_from,
        preempted=request.num_preemptions,
        age=max(0.0, now - request.arrival_time),
    )


def _policy(report: PolicyReport) -> PolicyState:
    return PolicyState(
        kind=plain(report.kind),
        name=plain(report.name),
        exact=bool(report.exact),
        acted=int(report.acted),
        errors=int(report.errors),
        counters={
            plain(name): max(0.0, float(value))
            for name, value in list(report.counters.items())[:256]
        },
    )
