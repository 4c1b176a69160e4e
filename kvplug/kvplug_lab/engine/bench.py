"""Overhead of kvplug: engine steps side by side, and microseconds per scheduler step.

Every figure is a comparison inside one run. Engines that differ only in kvplug run at the same
time and take turns; scheduler steps with and without kvplug alternate on the same input.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvplug.errors import KVPlugError
from kvplug_lab.engine.trial import connector_flags
from kvplug_lab.spread import Spread

WINDOW = {"sequence": {"use": "sink_window", "sink": 64, "window": 448}}
ENGINES: dict[str, Any] = {
    "stock": "absent",
    "stock again": "absent",
    "no section": None,
    "{}": {},
    "lru": {"prefix_cache": "lru"},
    "sink_window": WINDOW,
}
"""Engine to its section; ``absent``: vLLM loads no plugin; None: kvplug is installed, not used."""


# -- engine steps --------------------------------------------------------------------------------


def engine_steps(
    model: Path, rounds: int, say: Callable[[str], None], names: Sequence[str] = tuple(ENGINES)
) -> dict[str, dict[str, Any]]:
    """Step times of engines that take turns, as ratios to stock within each round.

    Args:
        model: Model directory.
        rounds: Turns each engine takes.
        say: Called with a line about each step.
        names: Engines of `ENGINES`; the first is what the others are divided by.

    Returns:
        Per engine: ``ms`` of a decode step and its ``ratio`` to the first engine, as `Spread`.
    """
    children: dict[str, subprocess.Popen[str]] = {}
    try:
        for name in names:
            say(f"starting engine: {name}")
            children[name] = _start(model, ENGINES[name])
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(rounds):
            order = list(names) if turn % 2 == 0 else list(reversed(names))
            for name in order:
                times[name].append(_ask(children[name], name))
            say(f"round {turn + 1} of {rounds}")
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    first = times[names[0]]
    return {
        name: {
            "ms": Spread.of([t * 1e3 for t in times[name]]),
            "ratio": Spread.of([t / base for t, base in zip(times[name], first, strict=True)]),
        }
        for name in names
    }


def _start(model: Path, section: Any) -> subprocess.Popen[str]:
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "KVPLUG_BENCH_SECTION": json.dumps(None if section == "absent" else section),
    }
    if section == "absent":
        environment["VLLM_PLUGINS"] = ""
    child = subprocess.Popen(
        [sys.executable, "-m", "kvplug_lab.engine.bench", str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == "ready":
            return child
    raise KVPlugError(f"a benchmark engine exited with code {child.wait()}")


def _ask(child: subprocess.Popen[str], name: str) -> float:
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write("go\n")
    child.stdin.flush()
    for line in child.stdout:
        if line.startswith("took "):
            return float(line.split()[1])
    raise KVPlugError(f"benchmark engine {name!r} exited with code {child.wait()}")


def _serve_turns(model: str) -> None:
    """A child: one engine, one turn of decode steps per line of standard input."""
    from vllm import LLM, SamplingParams

    section = json.loads(os.environ["KVPLUG_BENCH_SECTION"])
    extra = {} if section is None else {"kv_transfer_config": connector_flags(section)}
    llm = LLM(
        model,
        max_model_len=2048,
        max_num_batched_tokens=2048,
        enforce_eager=True,
        dtype="bfloat16",
        block_size=32,
        num_gpu_blocks_override=400,
        **extra,
    )
    choose = random.Random(0)
    prompts = [[choose.randrange(10, 300) for _ in range(96)] for _ in range(16)]
    turn = 0

    def steps() -> float:
        nonlocal turn
        turn += 1
        sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            llm.llm_engine.add_request(f"{turn}-{i}", {"prompt_token_ids": prompt}, sampling)
        taken = []
        while llm.llm_engine.has_unfinished_requests():
            before = time.perf_counter()
            llm.llm_engine.step()
            taken.append(time.perf_counter() - before)
        return statistics.median(taken)

    steps()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(f"took {steps()}", flush=True)


# -- scheduler steps -----------------------------------------------------------------------------


class _Pool:
    """vLLM's real KV-cache manager, with or without kvplug, under a synthetic decode load.

    Every step each running request gets one more token, and one of them ends and is replaced by
    one whose first blocks are in the prefix cache.
    """

    def __init__(self, model: Path, section: Any, running: int):
        import torch
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.hashing import sha256_cbor
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import (
            FullAttentionSpec,
            KVCacheConfig,
            KVCacheGroupSpec,
            KVCacheTensor,
        )

        init_none_hash(sha256_cbor)
        self.block = 32
        extra = {} if section is None else {"kv_transfer_config": connector_flags(section)}
        config = EngineArgs(
            str(model),
            max_model_len=2048,
            max_num_batched_tokens=2048,
            enforce_eager=True,
            block_size=self.block,
            **extra,
        ).create_engine_config()
        blocks = running * 40 + 64
        page = dict(block_size=self.block, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
        spec = FullAttentionSpec(**page)
        if section and "sequence" in section:
            from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

            from kvplug.hosts.vllm import admission
            from kvplug.hosts.vllm.worker.kinds import worker_kinds

            (kind,) = worker_kinds(admission.deployment_of(config), config)
            spec = kind.customize_spec(spec, kind.rule(0), CPUAttentionBackend)
        size = spec.page_size_bytes * blocks
        cache = KVCacheConfig(
            num_blocks=blocks,
            kv_cache_tensors=[KVCacheTensor(size, ["0"], size, spec.page_size_bytes)],
            kv_cache_groups=[KVCacheGroupSpec(["0"], spec)],
        )
        self.manager = KVCacheManager(
            cache,
            max_model_len=2048,
            scheduler_block_size=self.block,
            hash_block_size=self.block,
            max_in_flight_tokens=2048,
        )
        self.connector: Any = None
        if section is not None:
            from kvplug.hosts.vllm.connector import KVPlugConnector

            self.connector = KVPlugConnector(config, KVConnectorRole.SCHEDULER, cache)
            self.connector.bind_kv_cache_manager(self.manager)
        self._hasher = get_request_block_hasher(self.block, sha256_cbor)
        self._choose = random.Random(0)
        self._prefix = [self._choose.randrange(10, 300) for _ in range(4 * self.block)]
        self._count = 0
        self.requests: list[Any] = []
        for _ in range(running):
            self._admit(self._choose.randrange(64, 900))

    def _admit(self, length: int) -> None:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self._count += 1
        own = [self._choose.randrange(10, 300) for _ in range(length)]
        request = Request(
            f"{self._count}",
            self._prefix + own,
            SamplingParams(max_tokens=1000),
            None,
            block_hasher=self._hasher,
        )
        if self.connector is not None:
            self.connector.on_new_request(request)
        hit, computed, _ = self.manager.get_computed_blocks(request)
        new = request.num_tokens - computed
        assert self.manager.allocate_slots(request, new, computed, hit) is not None
        request.num_computed_tokens = request.num_tokens
        self.requests.append(request)

    def step(self) -> tuple[float, float]:
        """One scheduler step; seconds in all, and those of them inside the connector's calls."""
        from types import SimpleNamespace

        for request in self.requests:
            request.append_output_token_ids(7)
        output = SimpleNamespace(
            scheduled_new_reqs=[],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[], new_block_ids=[], resumed_req_ids=set(), num_computed_tokens=[]
            ),
            num_scheduled_tokens={},
            finished_req_ids=set(),
            preempted_req_ids=None,
        )
        came = SimpleNamespace(kv_connector_worker_meta=None)
        leaving = self.requests.pop(0)
        clock = time.perf_counter
        start = clock()
        manager = self.manager
        for request in self.requests:
            manager.allocate_slots(request, 1)
            request.num_computed_tokens += 1
        inside = 0.0
        if self.connector is not None:
            before = clock()
            self.connector.build_connector_meta(output)
            self.connector.update_connector_output(came)
            self.connector.request_finished_all_groups(leaving, ())
            self.connector.get_kv_connector_stats()
            inside = clock() - before
        manager.free(leaving)
        spent = clock() - start
        leaving.num_computed_tokens = 0
        self._admit(self._choose.randrange(64, 900))
        return spent, inside


def scheduler_steps(
    model: Path, running: int, steps: int, sections: dict[str, Any]
) -> dict[str, dict[str, Spread]]:
    """Microseconds kvplug adds to a scheduler step, alternating with stock on the same load.

    Args:
        model: Model directory (its config is all that is read).
        running: Requests running.
        steps: Steps measured per section.
        sections: Name to section.

    Returns:
        Per section: ``stock_us`` and ``added_us`` (paired difference), ``connector_us`` (the
        part spent in the connector's own calls).
    """
    found = {}
    for name, section in sections.items():
        stock, ours = _Pool(model, None, running), _Pool(model, section, running)
        pairs = []
        for i in range(steps + 20):
            if i % 2:
                first, second = stock.step(), ours.step()
            else:
                second, first = ours.step(), stock.step()
            if i >= 20:
                pairs.append((first[0], *second))
        found[name] = {
            "stock_us": Spread.of([a * 1e6 for a, _, _ in pairs]),
            "added_us": Spread.of([(b - a) * 1e6 for a, b, _ in pairs]),
            "connector_us": Spread.of([c * 1e6 for _, _, c in pairs]),
        }
    return found


def worker_steps(rows: int, steps: int, max_model_len: int = 4096) -> Spread:
    """Microseconds to compact one decode step's metadata of ``rows`` requests on this CPU."""
    from types import SimpleNamespace

    import torch
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from kvplug.hosts.vllm.spec import WindowedSpec
    from kvplug.hosts.vllm.worker.held import HeldMemory
    from kvplug.hosts.vllm.worker.window import Compactor, WindowCounts

    spec = WindowedSpec(
        block_size=32,
        num_kv_heads=2,
        head_size=64,
        dtype=torch.bfloat16,
        sink_tokens=64,
        window_tokens=448,
        exact_tokens=544,
        in_flight_tokens=2048,
        max_tokens=max_model_len,
    )
    config: Any = SimpleNamespace(
        num_speculative_tokens=0,
        scheduler_config=SimpleNamespace(max_num_seqs=rows),
    )
    compact = Compactor(spec, config, torch.device("cpu"), HeldMemory())
    lens = torch.randint(600, max_model_len, (rows,), dtype=torch.int32)
    starts = torch.arange(rows + 1, dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lens,
        num_reqs=rows,
        num_actual_tokens=rows,
        max_query_len=1,
        max_seq_len=int(lens.max()),
        block_table_tensor=torch.randint(1, 9999, (rows, max_model_len // 32), dtype=torch.int32),
        slot_mapping=torch.arange(rows),
    )
    taken = []
    for i in range(steps + 5):
        before = time.perf_counter()
        compact(common, None, WindowCounts())
        if i >= 5:
            taken.append((time.perf_counter() - before) * 1e6)
    return Spread.of(taken)


if __name__ == "__main__":
    _serve_turns(sys.argv[1])
