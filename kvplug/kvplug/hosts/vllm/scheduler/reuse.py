"""The scheduler half of reuse: what requests may take of what is stored, and what is stored."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.logger import init_logger

from kvplug.contract import EngineView, Fingerprint, Placement, ReuseCheck, ReuseRequest
from kvplug.deployment import Deployment
from kvplug.hosts.vllm import compat, engine
from kvplug.hosts.vllm.messages import LoadOrder, PieceOrder, ReuseNews, ReuseOrders, SaveOrder
from kvplug.hosts.vllm.spec import ReusedManager
from kvplug.hosts.vllm.view import identity, token_bytes, tokenizer
from kvplug.reuse.catalog import Catalog, CatalogEntry
from kvplug.reuse.chain import ChainResult, run_chain
from kvplug.reuse.drift_record import DriftRecord, FamilyRecord, PieceRecord
from kvplug.reuse.guard import Drift, Guard
from kvplug.reuse.index import Match
from kvplug.reuse.plan import Planner, ReusePlan
from kvplug.reuse.splitting import Splitter

logger = init_logger("vllm.kvplug")

FAMILIES = 16
"""Most families of segments a request is watched for."""

PATIENCE = 5.0
"""Seconds a request waits for a segment to come back from the folder."""


@dataclass
class ReuseCounters:
    """What reuse did.

    Attributes:
        segments: Segments stored.
        requests: Requests that took stored tokens.
        approximate_requests: Those of them that are not exact.
        tokens: Tokens taken, not counting what was computed anew among them.
        exact_tokens: Those of them that were exact.
        shifted_tokens: Those of them whose keys were rotated.
        loaded: Tokens that workers wrote into pages.
        corrected: Those of them that a check corrected on the way.
        computed: Tokens computed anew within runs.
        waited: Times a request waited for the folder.
        drifted: Answers the guard found unlike exact ones.
        plans: Plans made.
        plan_us: Microseconds they took in all, matching and checks included.
        check_us: Those of them in checks.
        memo_rows: Decode rows whose far attention might be reused.
        memo_skipped: Those whose was.
        errors: Exceptions on the way.
    """

    segments: int = 0
    requests: int = 0
    approximate_requests: int = 0
    tokens: int = 0
    exact_tokens: int = 0
    shifted_tokens: int = 0
    loaded: int = 0
    corrected: int = 0
    computed: int = 0
    waited: int = 0
    drifted: int = 0
    plans: int = 0
    plan_us: float = 0.0
    check_us: float = 0.0
    memo_rows: int = 0
    memo_skipped: int = 0
    errors: int = 0


@dataclass
class _Wishes:
    """What a request asks of reuse."""

    off: bool = False
    approximate: bool = False
    lengths: list[int] | None = None
    session: str = ""
    bad: str = ""

    @classmethod
    def of(cls, request: Any, allowed: bool) -> _Wishes:
        asked = (request.kv_transfer_params or {}).get("kvplug")
        asked = asked if isinstance(asked, dict) else {}
        how, lengths = asked.get("reuse", "exact"), asked.get("segments")
        session = asked.get("session_id", getattr(request, "session_id", None) or "")
        if how not in ("exact", "approximate", "off", False):
            return cls(bad=f"reuse is {how!r}, not exact, approximate or off")
        if lengths is not None and not (
            isinstance(lengths, list)
            and all(type(n) is int and n > 0 for n in lengths)
            and sum(lengths) <= request.num_prompt_tokens
        ):
            return cls(bad="segments are not lengths that fit the prompt")
        if not isinstance(session, str) or len(session) > 256:
            return cls(bad="session_id is no text of at most 256 characters")
        return cls(how in ("off", False), how == "approximate" and allowed, lengths, session)


@dataclass
class _Known:
    """A request under way."""

    request: Any
    wishes: _Wishes
    tenant: str
    lora: str
    spans: list[tuple[int, int]]
    plan: ReusePlan | None = None
    taken: ReusePlan | None = None
    lane: int | None = None
    approximate_from: int | None = None
    ancestry: int = 0
    next_span: int = 0
    asked_at: float | None = None
    contexts: _Contexts = field(default_factory=lambda: _Contexts())
    families: tuple[str, ...] = ()
    guarded: bool = False
    refused: Counter[str] = field(default_factory=Counter)


class _Contexts:
    """Digests of the text before a position, each made once."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._at = 0
        self._known: dict[int, bytes] = {0: self._hash.digest()}

    def at(self, tokens: npt.NDArray[np.int32], position: int) -> bytes:
        found = self._known.get(position)
        if found is None:
            if position < self._at:
                found = _digest(tokens[:position])
            else:
                self._hash.update(tokens[self._at : position].tobytes())
                self._at = position
                found = self._hash.digest()
            self._known[position] = found
        return found


def _digest(tokens: npt.NDArray[np.int32]) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


class ReuseScheduler:
    """Matches requests with what is stored, and orders what the workers do.

    Args:
        deployment: The deployment; it has a reuse section.
        vllm_config: The engine's config.
        view: The engine as policies see it.
        tell: Called with what happened, as `EventType` names it, a count and a detail.
    """

    def __init__(
        self,
        deployment: Deployment,
        vllm_config: Any,
        view: EngineView,
        tell: Callable[[str, int, str], None],
    ):
        self.settings = deployment.reuse
        self.counters = ReuseCounters()
        self.refused: Counter[str] = Counter()
        self.costs_us: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.checks: list[ReuseCheck] = engine.reuse_checks(deployment, view)
        self.view = view
        self._deployment = deployment
        self._tell = tell
        self._size = view.block_size
        stored = engine.format_policy(deployment, vllm_config)
        self._world = int(vllm_config.parallel_config.world_size)
        self._identity = identity(vllm_config, view, stored)
        self._model = str(vllm_config.model_config.model)
        self._least = self.settings.segments.min_tokens
        self.catalog = Catalog(
            self.settings.store,
            token_bytes(view, stored) * self._world,
            prefetch=self.settings.prefetch,
            min_tokens=self._least,
            world=self._world,
        )
        self._splitter = Splitter(self.settings.segments, tokenizer(vllm_config))
        self._planner = Planner(
            self.settings.recompute, bool(vllm_config.parallel_config.worker_extension_cls)
        )
        self.guard = Guard(deployment.guard) if deployment.guard is not None else None
        self._guarding = deployment.guard
        self._managers: list[ReusedManager] = []
        self._known: dict[str, _Known] = {}
        self._loads: list[LoadOrder] = []
        self._left: list[SaveOrder] = []
        self._ranks: Counter[str] = Counter()
        # Never the same twice: a worker's memory of a lane is one request's.
        self._lanes = itertools.count()
        if self.settings.store.directory:
            self.refused.update(self.catalog.scan(self.settings.store.directory))

    def bind(self, managers: Sequence[Any]) -> None:
        """Take in the KV-cache managers, before the first allocation."""
        self._managers = [m for m in managers if isinstance(m, ReusedManager)]

    # -- requests ------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """Take in a request; its cache salt is still the user's own."""
        if request.prompt_token_ids is None or request.mm_features or request.pooling_params:
            self.refused["not plain text"] += 1
            return
        wishes = _Wishes.of(request, self.settings.approximate)
        if wishes.bad:
            self.refused["bad request parameter"] += 1
        lora = request.lora_request.lora_name if request.lora_request is not None else ""
        tokens = _tokens(request)
        known = _Known(
            request,
            wishes,
            request.cache_salt or "",
            lora,
            self._splitter.split(tokens, wishes.lengths),
        )
        if wishes.approximate and self.settings.memo is not None:
            known.lane = next(self._lanes)
        self._known[request.request_id] = known
        if self.guard is not None:
            known.families = tuple(
                f"{known.tenant}\0{_digest(tokens[a:b]).hex()}" for a, b in known.spans[1:]
            )[:FAMILIES]
            known.guarded = bool(known.families)
            if known.guarded:
                compat.mark_request(request, request.request_id)
        if self.settings.prefetch and wishes.approximate:
            self.catalog.prefetch(tokens, known.tenant, known.spans)

    def matched(self, request: Any, num_local: int) -> int | None:
        """Tokens after the engine's own hit that need not be prefilled; None to be asked again."""
        known = self._known.get(request.request_id)
        # vLLM computes all of a prompt whose log-probabilities are wanted.
        if known is None or known.wishes.off or request.skip_reading_prefix_cache:
            return 0
        if len(self.catalog) == 0:
            return 0
        before = time.perf_counter()
        plan = self._plan(request, known, num_local)
        self.counters.plans += 1
        self.counters.plan_us += 1e6 * (time.perf_counter() - before)
        if self._waits(known, plan):
            self.counters.waited += 1
            return None
        known.plan = plan
        self._set_limit(request, known, plan)
        return plan.length

    def _waits(self, known: _Known, plan: ReusePlan) -> bool:
        """Whether a request is better asked again: something it can take is on its way."""
        coming = [
            segment.in_flight or self.catalog.want(name)
            for name in plan.waiting
            if (segment := self.catalog.get(name)) is not None
        ]
        if not any(coming):
            return False
        now = time.monotonic()
        known.asked_at = known.asked_at or now
        return now - known.asked_at < PATIENCE

    def _plan(self, request: Any, known: _Known, num_local: int) -> ReusePlan:
        tokens = _tokens(request)
        allowed = known.wishes.approximate
        approximate = allowed and (
            self.guard is None or all(self.guard.allows(f) for f in known.families)
        )

        def judge(segment: CatalogEntry, match: Match) -> ChainResult:
            end = match.start + match.length
            would = self._fingerprint(request, known, tokens, match.start, end)
            asked = ReuseRequest(
                would, request.request_id, num_local, request.num_tokens, approximate
            )
            result = run_chain(self.checks, segment.candidate, asked)
            self.asked.update(result.costs_us.keys())
            if result.refused_by:
                self.refusals[result.refused_by] += 1
            if not result.verdict.ok and allowed and not approximate:
                again = run_chain(
                    self.checks, segment.candidate, replace(asked, approximate_allowed=True)
                )
                if again.verdict.ok:
                    return replace(result, verdict=replace(result.verdict, reason="breaker open"))
            return result

        return self._planner.plan(
            request.num_tokens, num_local, self.catalog.match(tokens, known.tenant), judge
        )

    def _set_limit(self, request: Any, known: _Known, plan: ReusePlan | None) -> None:
        """From which token on the prefix cache must not hold a request's blocks."""
        first = plan.approximate_from if plan is not None else None
        if known.lane is not None:
            first = min(request.num_prompt_tokens, first or request.num_prompt_tokens)
        known.approximate_from = first
        for manager in self._managers:
            if first is None:
                manager.approximate_from.pop(request.request_id, None)
            else:
                manager.approximate_from[request.request_id] = first

    def _fingerprint(
        self, request: Any, known: _Known, tokens: npt.NDArray[np.int32], start: int, end: int
    ) -> Fingerprint:
        return Fingerprint(
            **self._identity,
            lora=known.lora,
            tenant=known.tenant,
            mask="causal",
            start=start,
            length=end - start,
            context=known.contexts.at(tokens, start),
            tokens=_digest(tokens[start:end]),
            created=time.time(),
            request_id=request.request_id,
            ancestry=known.ancestry,
        )

    def allocated(self, request: Any, blocks: Any, num_external: int) -> None:
        """A request was given its blocks, and counts on some tokens being loaded into them."""
        known = self._known.get(request.request_id)
        if known is None:
            return
        plan, known.plan = known.plan, None
        known.next_span, known.taken = 0, None
        known.ancestry = 1 if known.lane is not None else 0
        if plan is not None:
            self._count_checks(known, plan)
        if plan is None or not num_external:
            self._set_limit(request, known, None)
            self._watch(request, known)
            return
        assert num_external == plan.length, "vLLM takes a run whole or not at all"
        known.taken = plan
        pieces = plan.pieces
        self._loads.append(
            LoadOrder(
                request.request_id,
                np.array(blocks.get_block_ids()[0], dtype=np.int64),
                _tokens(request)[: plan.end].copy(),
                tuple(
                    PieceOrder(
                        p.segment.id,
                        p.offset,
                        p.length,
                        p.start,
                        p.verdict.exact,
                        p.verdict.shift,
                        p.verdict.confidence,
                    )
                    for p in pieces
                ),
                tuple(plan.spans),
            )
        )
        self.catalog.touch([p.segment.id for p in pieces])
        loose = [p for p in pieces if not p.verdict.exact]
        if loose:
            known.ancestry = 1 + max(p.segment.fingerprint.ancestry for p in loose)
        self._count(plan)
        self._watch(request, known)

    def _count(self, plan: ReusePlan) -> None:
        counters = self.counters
        counters.requests += 1
        counters.approximate_requests += plan.approximate_from is not None
        counters.tokens += plan.length - plan.recomputed
        counters.exact_tokens += sum(p.length for p in plan.pieces if p.verdict.exact)
        counters.shifted_tokens += sum(p.length for p in plan.pieces if p.verdict.shift)
        self._tell("reused", plan.length - plan.recomputed, "")

    def _count_checks(self, known: _Known, plan: ReusePlan) -> None:
        known.refused = plan.refused
        self.refused.update(plan.refused)
        self.costs_us.update(plan.costs_us)
        self.counters.check_us += sum(plan.costs_us.values())
        for cause, count in plan.refused.items():
            self._tell("refused", count, cause)

    def _watch(self, request: Any, known: _Known) -> None:
        if self.guard is not None and known.guarded:
            self.guard.started(request.request_id, known.families, known.ancestry > 0)

    # -- steps ---------------------------------------------------------------------------------

    def step(self, starts: dict[str, int], scheduled: dict[str, int]) -> ReuseOrders | None:
        """What the workers are to do in a step.

        Args:
            starts: Computed tokens of each scheduled request before the step.
            scheduled: Tokens of each that the step computes.
        """
        orders = ReuseOrders(loads=self._loads, left=self._left)
        self._loads, self._left = [], []
        try:
            for request_id, start in starts.items():
                known = self._known.get(request_id)
                if known is not None:
                    self._order(orders, known, request_id, start + scheduled[request_id])
            self.catalog.expire()
            told = self.catalog.take_commands()
            orders.drop, orders.fetch, orders.delete = told.drop, told.fetch, told.delete
        except Exception as error:
            # Loads were promised: they are ordered whatever happens to what is stored.
            self.counters.errors += 1
            logger.error("reuse cannot order a step's segments", exc_info=error)
        return orders if orders else None

    def _order(self, orders: ReuseOrders, known: _Known, request_id: str, end: int) -> None:
        orders.saves += self._completed(request_id, known, end)
        if known.lane is not None:
            orders.lanes[self._blocks(request_id)[(end - 1) // self._size]] = known.lane

    def _blocks(self, request_id: str) -> list[int]:
        return [b.block_id for b in self._managers[0].req_to_blocks.get(request_id, ())]

    def _completed(self, request_id: str, known: _Known, end: int) -> list[SaveOrder]:
        """Orders to store the segments that a step completes."""
        found = []
        last = len(known.spans) - (1 if self.settings.store.outputs else 0)
        while known.next_span < last and known.spans[known.next_span][1] <= end:
            span = known.spans[known.next_span]
            known.next_span += 1
            blocks = self._blocks(request_id)
            tail = blocks[(end - 1) // self._size]
            order = self._save(known, span, blocks, tail)
            if order is not None:
                found.append(order)
        return found

    def _save(
        self, known: _Known, span: tuple[int, int], blocks: Sequence[int], tail: int
    ) -> SaveOrder | None:
        start, end = span
        request = known.request
        taken = known.taken
        if known.wishes.off or end - start < self._least:
            return None
        if taken is not None and any(
            p.start <= start and end <= p.end and p.offset + start - p.start == 0
            for p in taken.pieces
        ):
            return None
        first = known.approximate_from
        approximate = first is not None and end > first
        if approximate and not self.settings.approximate:
            return None
        tokens = _tokens(request)
        print_ = self._fingerprint(request, known, tokens, start, end)
        if not approximate:
            print_ = replace(print_, ancestry=0)
        segment = self.catalog.plan_save(
            print_, tokens[start:end].copy(), tokens[:start].copy(), known.wishes.session
        )
        if segment is None:
            return None
        return SaveOrder(
            segment.id,
            print_,
            segment.token_ids,
            segment.context_ids,
            np.array(blocks[: -(-end // self._size)], dtype=np.int64),
            tail,
            known.wishes.session,
        )

    def finished(self, request: Any, blocks: Sequence[int]) -> dict[str, Any] | None:
        """A request ended; returns what its output says of reuse, or None for nothing."""
        known = self._known.pop(request.request_id, None)
        for manager in self._managers:
            manager.approximate_from.pop(request.request_id, None)
        if known is None:
            return None
        lane = known.lane
        self._leave(known, blocks)
        drift = self._judged(known)
        plan = known.taken
        if plan is None and lane is None and not known.wishes.bad and not known.refused:
            return None
        said: dict[str, Any] = {
            "exact": lane is None and (plan is None or plan.approximate_from is None)
        }
        if plan is not None:
            said["reused"] = plan.length - plan.recomputed
            said["recomputed"] = plan.recomputed
            said["segments"] = len(plan.pieces)
            said["shifted"] = sum(p.length for p in plan.pieces if p.verdict.shift)
        if known.refused:
            said["not_reused"] = dict(known.refused)
        if known.wishes.bad:
            said["refused"] = known.wishes.bad
        if drift is not None:
            said["drift"] = drift
        return said

    def _leave(self, known: _Known, blocks: Sequence[int]) -> None:
        """Order what an ended request leaves to be stored, before its blocks are written again."""
        request = known.request
        computed = min(request.num_computed_tokens, request.num_tokens - 1)
        if not blocks or known.next_span >= len(known.spans) or not self.settings.store.outputs:
            return
        start = known.spans[known.next_span][0]
        for span in known.spans[known.next_span :]:
            start = span[0]
            if span is known.spans[-1] or span[1] > computed:
                break
        most = self.settings.segments.max_tokens
        while start < computed:
            end = min(start + most, computed)
            if -(-end // self._size) > len(blocks):
                break
            order = self._save(known, (start, end), blocks, -1)
            if order is not None:
                self._left.append(order)
            start = end

    def _judged(self, known: _Known) -> dict[str, float] | None:
        """What the guard makes of an answer; a drift is counted, told and recorded."""
        if self.guard is None or not known.guarded:
            return None
        drift = self.guard.finished(known.request.request_id)
        if drift is None:
            return None
        self.counters.drifted += 1
        worst = drift.families[0]
        if self._guarding is not None and self._guarding.records:
            self._record(known, drift, self._guarding.records)
        self._tell("drifted", 1, f"entropy by {worst.entropy:.2f}, {worst.logprob:.2f} nats")
        return {"entropy": worst.entropy, "logprob": worst.logprob}

    def _record(self, known: _Known, drift: Drift, folder: str) -> None:
        """Write down what happened, for ``kvplug explain``."""
        request, plan = known.request, known.taken
        if plan is None:
            return
        text = request.all_token_ids
        record = DriftRecord(
            model=self._model,
            fingerprint=self.view.model,
            dtype=self.view.layers[0].dtype,
            block_size=self._size,
            kvplug=dict(self._deployment.section),
            request_id=request.request_id,
            prompt_ids=list(text[: request.num_prompt_tokens]),
            output_ids=list(text[request.num_prompt_tokens :]),
            pieces=[
                PieceRecord.of(
                    p.segment.id,
                    Placement(p.segment.fingerprint, p.offset, p.length, p.start, p.verdict),
                    p.segment.context_ids,
                    p.segment.token_ids,
                )
                for p in plan.pieces
            ],
            computed=list(plan.spans),
            entropies=list(drift.entropies),
            logprobs=list(drift.logprobs),
            families=FamilyRecord.of(drift),
        )
        try:
            path = record.write(folder)
            logger.warning("kvplug: an answer drifted after reuse: kvplug explain %s", path)
        except OSError as error:
            logger.error("kvplug: no record of a drift could be written: %s", error)

    # -- telling -------------------------------------------------------------------------------

    @property
    def mark(self) -> tuple[float, ...]:
        """Changes whenever there is something new to tell."""
        counters = self.counters
        return (counters.segments, counters.plans, counters.computed, sum(self.refused.values()))

    def told(self, name: str) -> tuple[int, dict[str, float]]:
        """How often a check was asked, and its counters; the first check's are those of all."""
        found: dict[str, float] = {
            "asked": self.asked[name],
            "refusals": self.refusals[name],
            "us": round(self.costs_us[name]),
        }
        for check in self.checks:
            if check.name == name:
                found |= check.counters()
        if self.checks[0].name == name:
            found |= {k: round(v) for k, v in asdict(self.counters).items() if k != "errors"}
            found |= {f"refused {cause}": count for cause, count in sorted(self.refused.items())}
            found |= self.catalog.counters()
            if self.guard is not None:
                found |= self.guard.counters()
        return self.asked[name], found

    def report(self, news: ReuseNews) -> None:
        """Take in what the workers did."""
        for name, measures in news.saved.items():
            if news.counts.get(name, 0) == self._world:
                self.catalog.saved(name, measures)
                self.counters.segments += 1
            else:
                self.catalog.failed(name, "could not be stored")
        for kind, names, call in (
            ("written", news.written, self.catalog.written),
            ("fetched", news.fetched, self.catalog.fetched),
        ):
            for name in names:
                self._ranks[f"{kind} {name}"] += 1
                if self._ranks[f"{kind} {name}"] == self._world:
                    del self._ranks[f"{kind} {name}"]
                    call(name)
        for name, cause in news.failed.items():
            for kind in ("written", "fetched"):
                self._ranks.pop(f"{kind} {name}", None)
            self.catalog.failed(name, cause)
            self.refused[cause] += 1
            self._tell("refused", 1, cause)
        for request_id in news.unloaded:
            known = self._known.get(request_id)
            if known is not None and known.taken is not None:
                known.taken = None
                known.ancestry = 1 if known.lane is not None else 0
                known.refused["load failed"] += 1
                self.refused["load failed"] += 1
                self._set_limit(known.request, known, None)
        counters = self.counters
        counters.loaded += news.loaded[0]
        counters.corrected += news.loaded[1]
        counters.computed += news.computed
        counters.errors += news.errors
        counters.memo_rows += news.memo[0]
        counters.memo_skipped += news.memo[1]
        if self.guard is not None and news.guard:
            heard: dict[str, list[tuple[float, float]]] = {}
            for request_id, entropy, logprob in news.guard:
                heard.setdefault(request_id, []).append((entropy, logprob))
            for request_id, values in heard.items():
                table = np.array(values, dtype=np.float32)
                self.guard.observe(request_id, table[:, 0], table[:, 1])


def _tokens(request: Any) -> npt.NDArray[np.int32]:
    return np.array(request.all_token_ids, dtype=np.int32)
