"""vLLM's scheduler with kvplug's half of it, driven by requests that a hostile client might send.

`SchedulerFuzz` mixes arrivals, steps, aborts, preemptions and resets as a seed says. What the steps
do to the KV cache is left to a `SimulatedWorker`, which raises `Violation` for what must not be.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from simulated_worker import BLOCK, SimulatedWorker, require
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvplug.contract import Kind, ScoringPolicy
from kvplug.hosts.vllm import engine
from kvplug.hosts.vllm.admission import deployment_of
from kvplug.hosts.vllm.flags import EXTENSION, GUARD
from kvplug.hosts.vllm.spec import ApproximateSpec, PrunedSpec, WindowedSpec

MAX_TOKENS = 640
MODES: dict[str, dict[str, Any]] = {
    "reuse": {
        "reuse": {
            "use": ["structure", "position", "mask"],
            "approximate": True,
            "segments": {"by": "fixed", "size": 48, "min_tokens": 16},
            "store": {"memory": 3, "variants": 2},
            "recompute": {"boundary": 8, "gaps": 40},
        },
        "guard": {
            "history": 1,
            "max_entropy_drift": 0.01,
            "max_logprob_drift": 0.01,
            "breaker": {"threshold": 2, "window": 10, "cooldown": 0.01},
        },
    },
    "reuse+prefix": {
        "prefix_cache": "foresight",
        "reuse": {
            "use": [{"structure": {"max_ancestry": 8}}, "position"],
            "approximate": True,
            "segments": {"by": "fixed", "size": 64, "min_tokens": 16},
            "store": {"memory": 6},
        },
    },
    "windowed": {
        "prefix_cache": "tree",
        "sequence": {"use": "sink_window", "sink": 16, "window": 64},
    },
    "scoring": {
        "prefix_cache": "arc",
        "sequence": {"use": "knorm", "budget": 96, "sink": 4, "recent": 8},
    },
    "format": {"prefix_cache": "sieve", "format": "int8"},
    "adaptive": {"prefix_cache": "lirs", "format": "adaptive"},
    "prefix": {"prefix_cache": "foresight"},
    "tiers": {
        "tiers": [{"host": {"size": "1MiB"}}, {"host": {"size": "2MiB", "order": "sieve"}}],
        "lifecycle": {"use": "ladder", "high": 0.8, "low": 0.6},
    },
    "tiers that round": {
        "tiers": [{"host": {"size": "1MiB"}}, {"host": {"size": "2MiB", "transfer": "int8"}}]
    },
    "tiers+prefix": {"prefix_cache": "s3fifo", "tiers": [{"host": {"size": "2MiB"}}]},
    "tiers+windowed": {
        "prefix_cache": "lru",
        "sequence": {"use": "sink_window", "sink": 16, "window": 64},
        "tiers": [{"host": {"size": "2MiB"}}],
    },
    "tiers+scoring": {
        "sequence": {"use": "knorm", "budget": 96, "sink": 4, "recent": 8},
        "tiers": [{"host": {"size": "2MiB"}}],
    },
}
"""Sections by name."""

NESTED: dict[str, Any] = {}
for _ in range(50):
    NESTED = {"a": NESTED}
NONSENSE: list[dict[str, Any]] = [
    {},
    {"kvplug": None},
    {"kvplug": []},
    {"kvplug": "x"},
    {"kvplug": NESTED},
    {"kvplug": {"reuse": ["x"]}},
    {"kvplug": {"segments": "x"}},
    {"kvplug": {"segments": [2**63]}},
    {"kvplug": {"segments": [True, 1]}},
    {"kvplug": {"segments": [0]}},
    {"kvplug": {"segments": [-1]}},
    {"kvplug": {"segments": [1.0]}},
    {"kvplug": {"session_id": {}}},
    {"kvplug": {"session_id": "\ud800"}},
    {"kvplug": {"session": 5}},
    {"kvplug": {"sequence": []}},
    {"kvplug": {"reuse": "\ud800"}},
    {"do_remote_prefill": True},
    {"do_remote_decode": True},
]
"""Request parameters that mean nothing to kvplug."""


class SchedulerFuzz:
    """A scheduler, a worker and clients.

    Args:
        mode: Name of a section in `MODES`.
        seed: Seed of everything that is chosen.
        ahead: True to schedule a step while the one before it runs.
        model: Directory of a small Llama with two layers.
        failures: Part of the loads that fail.

    Attributes:
        worker: The worker.
        scheduler: vLLM's scheduler.
    """

    def __init__(
        self, mode: str, seed: int, ahead: bool, model: Path, *, failures: float = 0.08
    ) -> None:
        init_none_hash(sha256)
        self._choose = random.Random(f"{mode} {seed} {ahead}")
        self._ahead = ahead
        self.scheduler, exact_tokens = self._build(MODES[mode], model)
        tiers = self.scheduler.connector.deployment.tiers
        self.worker = SimulatedWorker(
            self.scheduler,
            self._choose,
            exact_tokens=exact_tokens,
            failures=failures,
            tiers={one.name: one.codec.policy.exact for one in tiers},
        )
        self._half = self.scheduler.connector.scheduler
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self._queue: deque[tuple[Any, Any]] = deque()
        self._live: set[str] = set()
        self._arrived = 0
        self._texts = [[self._choose.randrange(10, 300) for _ in range(400)] for _ in range(5)]

    def run(self, steps: int) -> None:
        """Do some random things, and then let everything end.

        Raises:
            Violation: Something happened that must not.
        """
        for _ in range(steps):
            self._act()
        self._drain()

    # -- the engine ----------------------------------------------------------------------------

    def _build(self, section: dict[str, Any], model: Path) -> tuple[Any, int | None]:
        choose = self._choose
        config = EngineArgs(
            model=str(model),
            max_model_len=MAX_TOKENS,
            max_num_seqs=8,
            max_num_batched_tokens=choose.choice([64, 128, 256]),
            block_size=BLOCK,
            enforce_eager=True,
            dtype="float32",
            async_scheduling=False,
            num_gpu_blocks_override=60,
            logits_processors=[GUARD] if "guard" in section else None,
            worker_extension_cls=EXTENSION,
            enable_prefix_caching=True,
            scheduling_policy=choose.choice(["fcfs", "priority"]),
            kv_transfer_config=KVTransferConfig(
                kv_connector="KVPlugConnector",
                kv_connector_module_path="kvplug.hosts.vllm.connector",
                kv_role="kv_both",
                kv_load_failure_policy=("recompute" if {"reuse", "tiers"} & {*section} else "fail"),
                kv_connector_extra_config={"kvplug": section},
            ),
        ).create_engine_config()
        # vLLM's CPU platform turns it off, whatever is asked.
        config.scheduler_config.async_scheduling = self._ahead
        blocks = choose.choice([48, 60, 90])
        config.cache_config.num_gpu_blocks = blocks
        spec, exact_tokens = self._spec(config)
        pages = KVCacheConfig(
            num_blocks=blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layers.0.attn", "layers.1.attn"], spec)],
            hash_block_size=BLOCK,
        )
        scheduler = (AsyncScheduler if self._ahead else Scheduler)(
            config,
            pages,
            StructuredOutputManager(config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
            log_stats=True,
        )
        return scheduler, exact_tokens

    def _spec(self, config: Any) -> tuple[Any, int | None]:
        deployment = deployment_of(config)
        common: dict[str, Any] = {
            "block_size": BLOCK,
            "num_kv_heads": 2,
            "head_size": 64,
            "dtype": torch.float32,
        }
        inexact = any(not one.codec.policy.exact for one in deployment.tiers)
        if inexact or deployment.choice(Kind.REUSE) is not None:
            return ApproximateSpec(**common), None
        policy = engine.sequence_policy(deployment, config)
        if policy is None:
            stored = engine.format_policy(deployment, config)
            if stored is not None:
                layout = stored.layout(stored.engine.layers[0])
                common |= {
                    "dtype": torch.uint8,
                    "state_content_bytes": layout.bytes_per_token_head,
                    "num_head_slots": layout.heads,
                }
            return FullAttentionSpec(**common), None
        common |= {"in_flight_tokens": config.max_in_flight_tokens, "max_tokens": MAX_TOKENS}
        layer = policy.engine.layers[0]
        if isinstance(policy, ScoringPolicy):
            limits = engine.layer_limits(policy, layer)
            exact = limits.protected * BLOCK
            # What is kept is exact until an eviction; then its blocks say that they are not.
            return PrunedSpec(**common, limits=limits, exact_tokens=exact), None
        window = policy.window(layer)
        exact = window.exact_blocks * BLOCK
        return (
            WindowedSpec(
                **common,
                sink_tokens=window.sink_blocks * BLOCK,
                window_tokens=window.window_blocks * BLOCK,
                exact_tokens=exact,
            ),
            exact,
        )

    def _act(self) -> None:
        choice = self._choose.random()
        if choice < 0.25 and len(self._live) < 14:
            self._arrive()
        elif choice < 0.96:
            self._step()
        elif choice < 0.98:
            self._abort()
        elif choice < 0.993:
            self._reset()
        elif (reuse := self._reuse()) is not None:
            if self._choose.random() < 0.3:
                reuse.catalog.invalidate(tenant=self._choose.choice(["", "a"]))
            else:
                reuse.catalog.end_session("a")

    def _step(self) -> None:
        """Schedule a step, or hear of the oldest one; both where the scheduler waits."""
        full = len(self._queue) == (2 if self._ahead else 1)
        if full or (self._ahead and self._queue and self._choose.random() < 0.4):
            self._hear()
        else:
            output = self.scheduler.schedule()
            self._queue.append((output, self.worker.execute(output)))
            # Engines take in aborts between a step and its outputs.
            if not self._ahead:
                if self._choose.random() < 0.02:
                    self._abort()
                self._hear()

    def _hear(self) -> None:
        output, ran = self._queue.popleft()
        outputs = self.scheduler.update_from_output(output, ran)
        for request_id in self.worker.check_answers(outputs):
            self._live.discard(request_id)
            self.worker.counts["ended"] += 1

    def _abort(self) -> None:
        if self._live:
            request_id = self._choose.choice(sorted(self._live))
            self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
            self._live.discard(request_id)
            self.worker.counts["aborted"] += 1

    def _reset(self) -> None:
        running = self._choose.random() < 0.5
        try:
            done = self.scheduler.reset_prefix_cache(reset_running_requests=running)
        except RuntimeError as error:
            # Blocks of steps or loads under way: vLLM says that it does not support that.
            waits = self._ahead or bool(self._half.deployment.tiers)
            require(waits and "not supported yet" in str(error), str(error))
            done = False
        self.worker.counts["resets"] += bool(done)

    # -- clients -------------------------------------------------------------------------------

    def _arrive(self) -> None:
        choose = self._choose
        tokens: list[int] = []
        lengths: list[int] = []
        for _ in range(choose.randrange(1, 5)):
            text = choose.choice(self._texts)
            start = 48 * choose.randrange(6)
            parts = [text[start : start + 48 * choose.randrange(1, 3)]]
            if choose.random() < 0.4:
                parts.append([choose.randrange(300, 600) for _ in range(choose.randrange(1, 30))])
            for part in parts:
                tokens += part
                lengths.append(len(part))
        tokens = tokens[: choose.choice([100, 300, 560])]
        sampling = SamplingParams(
            max_tokens=choose.randrange(1, 40),
            ignore_eos=True,
            prompt_logprobs=1 if choose.random() < 0.05 else None,
            extra_args={"kv_transfer_params": self._asks(lengths, len(tokens))}
            | ({"kvplug_guard": choose.choice(["r1", 7, []])} if choose.random() < 0.1 else {}),
        )
        self._arrived += 1
        request = Request(
            f"r{self._arrived}",
            tokens,
            sampling,
            None,
            cache_salt=choose.choice([None, None, None, "a", "b|x", "\ud7ff\0"]),
            priority=choose.randrange(3),
            block_hasher=self._hasher,
            arrival_time=float(self._arrived),
        )
        self._live.add(request.request_id)
        self.scheduler.add_request(request)
        self.worker.add(request)
        self.worker.counts["arrived"] += 1

    def _asks(self, lengths: list[int], total: int) -> dict[str, Any] | None:
        choose = self._choose
        chance = choose.random()
        if chance < 0.25:
            return None
        if chance < 0.45:
            return choose.choice(NONSENSE)
        asks: dict[str, Any] = {
            "reuse": choose.choice(["approximate", "approximate", "exact", "off"])
        }
        if choose.random() < 0.7:
            asks["segments"] = _within(lengths, total)
        elif choose.random() < 0.4:
            asks["segments"] = [choose.randrange(1, 90) for _ in range(6)]
        if choose.random() < 0.4:
            asks["session_id"] = choose.choice(["a", "b", "c\n"])
        if choose.random() < 0.15:
            asks["sequence"] = "off"
        if choose.random() < 0.1:
            asks["store"] = False
        return {"kvplug": asks}

    # -- the end -------------------------------------------------------------------------------

    def _drain(self) -> None:
        for _ in range(4000):
            if not self._live and not self._queue:
                break
            self._step()
        stuck = {r: str(self.scheduler.requests[r].status) for r in sorted(self._live)[:3]}
        require(not self._live, f"requests never end: {stuck}")
        for _ in range(3):
            self._step()
        while self._queue:
            self._hear()
        pool = self.scheduler.kv_cache_manager.block_pool
        require(
            pool.get_num_free_blocks() == pool.num_gpu_blocks - 1,
            f"{pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()} blocks are never given back",
        )
        for path, kept in _kept_requests(self._half):
            require(False, f"{path} remembers requests that ended: {kept}")
        for report in self._half.reports():
            failed = self.worker.counts["failed loads"] if report.kind == "reuse" else 0
            require(report.errors == failed, f"{report.kind} {report.name}: {report.errors} errors")
        reuse = self._reuse()
        if reuse is not None:
            counters = reuse.catalog.counters()
            self.worker.counts["stored"] = int(counters.get("segments", 0))

    def _reuse(self) -> Any:
        return next((k for k in self._half.kinds if k.kind is Kind.REUSE), None)


def _within(lengths: list[int], total: int) -> list[int]:
    found = []
    for length in lengths:
        if length > total:
            break
        found.append(length)
        total -= length
    return found


def _kept_requests(root: Any) -> Iterator[tuple[str, list[str]]]:
    """Containers below an object of kvplug's that have ids of requests for keys or elements."""
    todo, seen = [("scheduler half", root)], set()
    while todo:
        path, thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        for name, value in getattr(thing, "__dict__", {}).items():
            where = f"{path}.{name}"
            if isinstance(value, dict | set | list | tuple):
                kept = [k for k in value if isinstance(k, str) and _is_request(k)]
                if kept:
                    yield where, kept[:3]
                members = value.values() if isinstance(value, dict) else value
            else:
                members = (value,)
            todo += [(where, m) for m in members if type(m).__module__.startswith("kvplug")]


def _is_request(key: str) -> bool:
    return key[:1] == "r" and key[1:].isdigit()
