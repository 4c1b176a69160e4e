"""A worker without a model: what every slot of every block holds, and what a step does to it.

A slot holds a digest of the text up to its token where the KV is exactly that text's, `Approximate`
where it is not, and None where nothing was written. A token is no better than what it was computed
on. So a worker knows what is wrong the moment it is read, hashed, stored or answered from.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from simulated_tiers import SimulatedTiers
from vllm.v1.core.kv_cache_utils import get_block_hash
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

from kvplug.hosts.pruning import layout
from kvplug.hosts.vllm.messages import (
    LoadOrder,
    ReuseDirectives,
    ReuseReport,
    SaveOrder,
    StepDirectives,
    StepReport,
)

BLOCK = 16
POISON = 9999
"""Token that is sampled from slots that nothing was written to."""

RIGHT, APPROXIMATE, EMPTY = range(3)
"""What a token is computed on, from good to bad."""


class Violation(AssertionError):
    """Something that must never happen, did."""


def require(holds: bool, problem: str) -> None:
    if not holds:
        raise Violation(problem)


@dataclass(frozen=True)
class Approximate:
    """KV that is not exactly what the text of its request gives."""

    request: str


@dataclass
class Text:
    """Token ids as the worker has them, and the digest of the text up to each.

    Attributes:
        salt: Keeps the texts of tenants apart.
        tokens: Token ids.
        digests: Digests of as many as were asked for.
    """

    salt: str | None
    tokens: list[int]
    digests: list[int] = field(default_factory=list)

    def upto(self, end: int) -> list[int]:
        """Digests of the first tokens."""
        known = self.digests
        for i in range(len(known), end):
            known.append(hash((known[-1] if known else self.salt, self.tokens[i])))
        return known

    def cut(self, length: int) -> None:
        """Forget the tokens after some."""
        del self.tokens[length:]
        del self.digests[length:]


class SimulatedWorker:
    """Runs the steps of a scheduler on contents alone.

    Args:
        scheduler: vLLM's scheduler, with kvplug's connector.
        choose: Source of randomness.
        exact_tokens: Tokens of a request that see all before them; None for all.
        failures: Part of the loads that fail.
        tiers: Whether each tier gives back exactly what was stored.

    Attributes:
        counts: What happened.
        content: Slots of each block written.
        approximated: Requests that an answer's tokens were sampled for from approximate KV.
    """

    def __init__(
        self,
        scheduler: Any,
        choose: random.Random,
        *,
        exact_tokens: int | None = None,
        failures: float = 0.0,
        tiers: Mapping[str, bool] | None = None,
    ):
        self.counts: Counter[str] = Counter()
        self.content: dict[int, list[Any]] = {}
        self.approximated: set[str] = set()
        self._scheduler = scheduler
        self._choose = choose
        self._exact_tokens = exact_tokens
        self._failures = failures
        self._manager = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        self._pool = scheduler.kv_cache_manager.block_pool
        self._tiers = SimulatedTiers(self, choose, failures, tiers or {}, require, self.counts)
        self._texts: dict[str, Text] = {}
        self._tables: dict[str, list[int]] = {}
        self._stored: dict[str, list[Any]] = {}
        self._hashed: dict[bytes, list[int]] = {}
        self._requests: dict[str, tuple[Any, int]] = {}
        self._salts: dict[str, str | None] = {}
        self._tenants: dict[str, str | None] = {}
        self._checked: dict[int, tuple[Any, int]] = {}
        self._written: Counter[int] = Counter()

    def add(self, request: Any) -> None:
        """Get to know a request: its hashes say what blocks should hold."""
        self._requests[request.request_id] = (request, 0)
        self._salts[request.request_id] = request.cache_salt

    # -- a step --------------------------------------------------------------------------------

    def execute(self, output: Any) -> ModelRunnerOutput:
        """Run a scheduled step."""
        for request_id in output.finished_req_ids:
            self._forget(request_id)
        starts = self._take_in(output)
        directives = output.kv_connector_metadata
        require(isinstance(directives, StepDirectives), "a step without directives")
        orders = directives.reuse or ReuseDirectives()
        report = ReuseReport()
        sent = KVConnectorOutput()
        # Chunks are read before anything is written.
        tiers = self._tiers.step(directives.tiers, sent)
        wanted = dict(self._stored)
        for segment in (*orders.drop, *orders.delete):
            self._stored.pop(segment, None)
        for segment in orders.fetch:
            report.failed[segment] = "missing"
        for save in orders.left:
            self._save(save, report)
        for load in orders.loads:
            self._load(load, wanted, report, sent)
        samples = {}
        for request_id, count in output.num_scheduled_tokens.items():
            samples[request_id] = self._compute(request_id, starts[request_id], count)
        self._evict(directives, starts, output.num_scheduled_tokens)
        for save in orders.saves:
            if save.fingerprint.request_id in report.unloaded:
                report.failed[save.segment] = "could not be stored"
            else:
                self._save(save, report)
        if report.unloaded:
            report.errors, report.error = len(report.unloaded), "load: OSError: as chosen"
        report.guard = [
            (request_id, 3 * self._choose.random(), -self._choose.random())
            for request_id in samples
            if self._choose.random() < 0.3
        ]
        if report or tiers:
            sent.kv_connector_worker_meta = StepReport(
                reuse=report if report else None, tiers=tiers if tiers else None
            )
        self._check_prefix_cache()
        ids = list(samples)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={name: i for i, name in enumerate(ids)},
            sampled_token_ids=list(samples.values()),
            kv_connector_output=sent,
        )

    def check_answers(self, outputs: dict[int, Any]) -> list[str]:
        """Check what clients are told; returns the requests that ended."""
        ended = []
        for answer in (o for client in outputs.values() for o in client.outputs):
            require(
                POISON not in answer.new_token_ids,
                f"{answer.request_id} is answered from slots that nothing was written to",
            )
            if answer.finish_reason is None:
                continue
            ended.append(answer.request_id)
            said = (answer.kv_transfer_params or {}).get("kvplug", {"exact": True})
            if answer.request_id in self.approximated:
                require(
                    said["exact"] is False,
                    f"the answer of {answer.request_id} is called exact and is not",
                )
        return ended

    def _take_in(self, output: Any) -> dict[str, int]:
        """Take in the requests of a step; returns where each starts."""
        cached = output.scheduled_cached_reqs
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for new in output.scheduled_new_reqs:
            starts[new.req_id] = new.num_computed_tokens
            self._begin(new.req_id, new.block_ids[0])
        for request_id, blocks, generated in zip(
            cached.req_ids, cached.new_block_ids, cached.num_output_tokens, strict=True
        ):
            if request_id in cached.resumed_req_ids:
                self._begin(request_id, blocks[0])
                continue
            prompt = self._scheduler.requests[request_id].num_prompt_tokens
            self._texts[request_id].cut(prompt + generated)
            if blocks is not None:
                self._tables[request_id] += blocks[0]
        for request_id in starts:
            table = self._manager.req_to_blocks[request_id]
            require(
                len(table) == len(self._tables[request_id])
                and all(
                    b.is_null or b.block_id == told
                    for b, told in zip(table, self._tables[request_id], strict=True)
                ),
                f"the worker was told other blocks of {request_id} than it has",
            )
        return starts

    def _begin(self, request_id: str, blocks: Sequence[int]) -> None:
        request = self._scheduler.requests[request_id]
        self._texts[request_id] = Text(request.cache_salt, list(request.all_token_ids))
        self._tables[request_id] = list(blocks)

    def _forget(self, request_id: str) -> None:
        self._texts.pop(request_id, None)
        self._tables.pop(request_id, None)
        # It may have been given its last hash, and ended, since the step before.
        self._learn_hashes()
        self._requests.pop(request_id, None)

    # -- tokens --------------------------------------------------------------------------------

    def _write(self, block: int, at: int, value: Any) -> None:
        self.content.setdefault(block, [None] * BLOCK)[at] = value
        self._written[block] += 1

    def _read(self, request_id: str, table: Sequence[int], text: Text, end: int) -> int:
        """What a request reads in its first ``end`` slots is at worst; raises for another's."""
        digests, worst = text.upto(end), RIGHT
        for nth in range(-(-end // BLOCK)):
            if not table[nth]:
                worst = max(worst, APPROXIMATE)
                continue
            first, stop = nth * BLOCK, min(end, nth * BLOCK + BLOCK)
            held = self.content.get(table[nth], [None] * BLOCK)
            if held[: stop - first] == digests[first:stop]:
                continue
            for i in range(first, stop):
                value = held[i - first]
                if value is None:
                    worst = EMPTY
                elif isinstance(value, Approximate):
                    require(
                        value.request == request_id,
                        f"{request_id} reads at {i} what is approximate and of {value.request}",
                    )
                    worst = max(worst, APPROXIMATE)
                else:
                    require(value == digests[i], f"{request_id} reads at {i} another text's KV")
        return worst

    def _compute(self, request_id: str, start: int, count: int) -> list[int]:
        """Compute some tokens of a request; returns what is sampled after the last."""
        text, end = self._texts[request_id], start + count
        require(end <= len(text.tokens), f"{request_id} is scheduled beyond its text")
        table = [b.block_id if not b.is_null else 0 for b in self._blocks(request_id)]
        worst = self._read(request_id, table, text, start)
        digests = text.upto(end)
        for i in range(start, end):
            require(table[i // BLOCK] != 0, f"{request_id} writes at {i} into no block")
            shortened = self._exact_tokens is not None and i >= self._exact_tokens
            if shortened and not self._exempt(request_id):
                worst = max(worst, APPROXIMATE)
            value: Any = digests[i] if worst == RIGHT else Approximate(request_id)
            self._write(table[i // BLOCK], i % BLOCK, None if worst == EMPTY else value)
        if end < len(text.tokens):
            return []
        token = POISON if worst == EMPTY else self._choose.randrange(10, 40)
        if worst == APPROXIMATE:
            self.approximated.add(request_id)
        text.tokens.append(token)
        return [token]

    def _blocks(self, request_id: str) -> list[Any]:
        found: list[Any] = self._manager.req_to_blocks[request_id]
        return found

    def _exempt(self, request_id: str) -> bool:
        return request_id in getattr(self._manager, "exempt", ())

    def _evict(
        self, directives: StepDirectives, starts: Mapping[str, int], counts: Mapping[str, int]
    ) -> None:
        """Move what survives a scoring policy's evictions into the first blocks it may write."""
        if directives.sequence is None or directives.sequence.rows is None:
            return
        plans, rows = directives.sequence.plans(), directives.rows
        assert rows is not None
        slots, limits = dict(rows.tolist()), self._manager.limits
        for request_id, start in starts.items():
            written = self._tables[request_id][(start + counts[request_id] - 1) // BLOCK]
            plan = plans.get((0, slots[written]))
            if plan is None:
                continue
            last, blocks = plan.state, self._blocks(request_id)
            for eviction in plan.evictions:
                laid = layout(last, eviction, limits.protected, BLOCK)
                last = eviction
                self.counts["evictions"] += 1
                for nth in laid.blocks[: laid.survivors]:
                    block = blocks[nth]
                    require(not block.is_null, f"{request_id} keeps tokens in no block")
                    require(block.ref_cnt == 1, f"{request_id} writes into a shared block")
                    for at in range(BLOCK):
                        self._write(block.block_id, at, Approximate(request_id))

    # -- stored runs ---------------------------------------------------------------------------

    def _save(self, order: SaveOrder, report: ReuseReport) -> None:
        if self._choose.random() < 0.03:
            report.failed[order.segment] = "could not be stored"
            return
        of, start = order.fingerprint, order.fingerprint.start
        values = [
            self.content.get(int(order.blocks[i // BLOCK]), [None] * BLOCK)[i % BLOCK]
            for i in range(start, start + of.length)
        ]
        require(None not in values, f"a segment of {of.request_id} is stored before it is filled")
        salt = self._salts[of.request_id]
        require(
            self._tenants.setdefault(of.tenant, salt) == salt, "two tenants share their segments"
        )
        if of.ancestry == 0:
            text = Text(salt, [*order.context.tolist(), *order.tokens.tolist()])
            require(
                values == text.upto(start + of.length)[start:],
                f"a segment of {of.request_id} is called exact and is not",
            )
        self.counts["saved exact" if of.ancestry == 0 else "saved approximate"] += 1
        self._stored[order.segment] = values
        report.saved[order.segment] = {"k_drift": 0.1}
        report.counts[order.segment] = 1

    def _load(
        self,
        order: LoadOrder,
        stored: dict[str, list[Any]],
        report: ReuseReport,
        sent: KVConnectorOutput,
    ) -> None:
        request = self._scheduler.requests.get(order.request)
        require(request is not None, f"a load for {order.request}, which has ended")
        text = Text(request.cache_salt, order.tokens.tolist())
        require(
            text.tokens == list(request.all_token_ids)[: len(text.tokens)],
            f"a load of {order.request} is not of its text",
        )
        blocks, end = order.blocks.tolist(), len(text.tokens)
        first = min([p.start for p in order.pieces] + [a for a, _ in order.spans])
        self.counts["loads"] += 1
        if order.awaited:
            sent.finished_recving = (sent.finished_recving or set()) | {order.request}
        if self._choose.random() < self._failures:
            self.counts["failed loads"] += 1
            for i in range(first, end):
                self._write(blocks[i // BLOCK], i % BLOCK, None)
            report.unloaded.append(order.request)
            if order.awaited:
                sent.failed_recving = sent.failed_recving | {order.request}
            else:
                sent.invalid_block_ids |= set(blocks[first // BLOCK :])
            return
        covered: set[int] = set()
        for piece in order.pieces:
            require(piece.segment in stored, f"{order.request} loads a segment that is not stored")
            values = stored[piece.segment][piece.offset : piece.offset + piece.length]
            at = range(piece.start, piece.start + piece.length)
            digests = text.upto(piece.start + piece.length)
            for i, value in zip(at, values, strict=True):
                if piece.exact:
                    require(value == digests[i], f"{order.request}: exact, and another text's KV")
                else:
                    value = Approximate(order.request)
                self._write(blocks[i // BLOCK], i % BLOCK, value)
            covered |= set(at)
        for a, b in order.spans:
            worst = self._read(order.request, blocks, text, a)
            digests = text.upto(b)
            for i in range(a, b):
                value = digests[i] if worst == RIGHT else Approximate(order.request)
                self._write(blocks[i // BLOCK], i % BLOCK, value)
            covered |= set(range(a, b))
        require(covered == set(range(first, end)), f"the run of {order.request} has holes")
        report.filled[order.number] = 1

    # -- tiers ---------------------------------------------------------------------------------

    def read_block(self, block: int) -> list[Any]:
        """Slots of a block."""
        return self.content.get(block, [None] * BLOCK)

    def write_block(self, block: int, values: Sequence[Any], request: str, exact: bool) -> None:
        """Fill a block with what a tier held."""
        for at, value in enumerate(values):
            self._write(block, at, value if exact or value is None else Approximate(request))

    def text_of(self, request: str, end: int) -> list[int] | None:
        """Digests of a request's first tokens; None for one that ended."""
        own = self._scheduler.requests.get(request)
        if own is None:
            return None
        return Text(own.cache_salt, list(own.all_token_ids)).upto(end)

    # -- the prefix cache ----------------------------------------------------------------------

    def _check_prefix_cache(self) -> None:
        """Every block in the prefix cache holds what its hash says."""
        self._learn_hashes()
        for block in self._pool.blocks:
            if block.block_hash is None or block.is_null:
                continue
            # A block that was neither hashed nor written since is as it was.
            seen = (block.block_hash, self._written[block.block_id])
            if self._checked.get(block.block_id) == seen:
                continue
            self._checked[block.block_id] = seen
            require(
                self.content.get(block.block_id) == self._hashed[get_block_hash(block.block_hash)],
                f"block {block.block_id} is in the prefix cache and does not hold its text's KV",
            )

    def _learn_hashes(self) -> None:
        """Note which text each hash of a request stands for."""
        for request_id, (request, known) in self._requests.items():
            hashes = request.block_hashes
            if len(hashes) > known:
                text = Text(request.cache_salt, list(request.all_token_ids))
                digests = text.upto(len(hashes) * BLOCK)
                for nth in range(known, len(hashes)):
                    self._hashed[hashes[nth]] = digests[nth * BLOCK : nth * BLOCK + BLOCK]
                self._requests[request_id] = (request, len(hashes))
