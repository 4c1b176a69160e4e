"""An engine in a process of its own that is built ahead and then serves workloads on demand.

Engines that are compared are built side by side, which takes a minute, and run one at a time, so
that each is timed alone. `serve` is the process's side; `kvplug_lab.gpu_check.engines` starts it.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvplug_lab.engine.detached import detach, take_environment
from kvplug_lab.engine.stepped import index_of, stated, stepped, waves
from kvplug_lab.engine.trial import connector_flags

LEAST_STEPS = 15
"""Steps at one batch size from which a median is reported."""


def serve(pipe: Any, spec: Mapping[str, Any]) -> None:
    """Build an engine, report it on ``pipe`` and answer workloads until one is None.

    Args:
        pipe: A `multiprocessing.connection.Connection`. The first message sent has ``ready``, the
            facts about the engine, or ``error``; each later one is what `run` returns, or has
            ``error``.
        spec: ``model``; ``engine``, arguments of ``vllm.LLM``; ``section`` or None for stock
            vLLM; ``env``, its environment variables; ``log``, a file for the engine's output; and
            ``warm``, a workload served before it is ready, or None.
    """
    code = 0
    try:
        detach(Path(spec["log"]))
        take_environment(spec["env"])
        start = time.perf_counter()
        llm = _build(spec)
        if spec.get("warm"):
            run(llm, spec["warm"])
        pipe.send({"ready": facts(llm) | {"start_s": round(time.perf_counter() - start, 1)}})
        while (work := pipe.recv()) is not None:
            pipe.send(run(llm, work))
    except EOFError:
        pass
    except BaseException as error:
        traceback.print_exc()
        pipe.send({"error": f"{type(error).__name__}: {error}"[:2000]})
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Shutting an engine down takes seconds, and nothing of it is kept.
    os._exit(code)


def probe(pipe: Any, device: str) -> None:
    """Report the device and the versions of what an engine runs on, or ``error``.

    Args:
        pipe: A `multiprocessing.connection.Connection`.
        device: ``cuda`` or ``cpu``.
    """
    try:
        import torch
        import vllm

        found: dict[str, Any] = {"torch": torch.__version__, "vllm": vllm.__version__}
        found["python"] = sys.version.split()[0]
        try:
            import triton

            found["triton"] = triton.__version__
        except ImportError:
            found["triton"] = None
        found["gpu"] = None
        if device == "cuda":
            torch.zeros(1, device="cuda").item()
            card = torch.cuda.get_device_properties(0)
            found |= {
                "gpu": card.name,
                "memory_gib": round(card.total_memory / 2**30, 1),
                "capability": f"{card.major}.{card.minor}",
                "cuda": torch.version.cuda,
            }
        pipe.send(found)
    except BaseException as error:
        pipe.send({"error": f"{type(error).__name__}: {error}"[:2000]})
    os._exit(0)


def _build(spec: Mapping[str, Any]) -> Any:
    from vllm import LLM

    arguments: dict[str, Any] = {"disable_log_stats": True, **spec["engine"]}
    if spec["section"] is not None:
        arguments["kv_transfer_config"] = connector_flags(spec["section"])
    return LLM(spec["model"], **arguments)


def facts(llm: Any) -> dict[str, Any]:
    """Model runner, graphs, scheduling, backend and pool of an engine in this process.

    Args:
        llm: The ``vllm.LLM``.

    Returns:
        ``runner`` (1 or 2), ``graphs``, ``async``, ``backend``, ``plugged`` (true where kvplug's
        steps run around the backend), ``blocks`` and ``block_size``.
    """
    config = llm.llm_engine.vllm_config
    layers = config.compilation_config.static_forward_context.values()
    backends = {layer.attn_backend for layer in layers if hasattr(layer, "attn_backend")}
    return {
        "runner": 2 if config.use_v2_model_runner else 1,
        "graphs": getattr(config.compilation_config.cudagraph_mode, "name", None),
        "async": bool(config.scheduler_config.async_scheduling),
        "backend": ", ".join(sorted({backend.get_name() for backend in backends})),
        "plugged": any(backend.__module__.startswith("kvplug.") for backend in backends),
        "blocks": config.cache_config.num_gpu_blocks,
        "block_size": config.cache_config.block_size,
    }


def run(llm: Any, work: Mapping[str, Any]) -> dict[str, Any]:
    """Serve a workload and time every step of the engine.

    Args:
        llm: The ``vllm.LLM``, its core in this process.
        work: ``requests``, each with ``prompt`` (token ids), ``max_tokens`` and optionally
            ``wave`` (requests of a wave are added once all of the wave before have finished) and
            ``kvplug`` (its request options); ``seconds``, after which what runs is aborted.

    Returns:
        ``tokens``, ``cached`` and ``kvplug`` of each request in order; ``seconds``; ``stopped``,
        true where it ran out of time; ``peak_running``; ``peak_blocks``; ``step_ms``, median
        milliseconds of decode steps by requests running; ``preemptions``; ``evictions`` and
        ``blocks_freed`` of sequence policies in this workload; and ``reports`` of kvplug's
        policies since the engine's start.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    requests = work["requests"]
    tokens: list[list[int]] = [[] for _ in requests]
    cached = [0] * len(requests)
    notes: list[Any] = [None] * len(requests)
    decode: dict[int, list[float]] = {}
    preempted: dict[str, int] = {}
    peak_running = peak_blocks = 0
    stopped = False
    half = getattr(scheduler.connector, "scheduler", None)
    evicted, freed = _evicted(half)
    start = time.perf_counter()
    limit = start + float(work.get("seconds") or 1e9)

    def add(wave: Sequence[int]) -> None:
        for i in wave:
            asked = requests[i].get("kvplug")
            sampling = SamplingParams(
                temperature=0.0,
                max_tokens=requests[i]["max_tokens"],
                ignore_eos=True,
                detokenize=False,
                extra_args={"kv_transfer_params": {"kvplug": asked}} if asked else None,
            )
            engine.add_request(str(i), {"prompt_token_ids": requests[i]["prompt"]}, sampling)

    computed: dict[str, int] = {}
    for step in stepped(engine, waves(r.get("wave", 0) for r in requests), add):
        running = scheduler.running
        peak_running = max(peak_running, len(running))
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        peak_blocks = max(peak_blocks, used)
        decodes = len(computed) == len(running)
        for one in running:
            if one.num_preemptions:
                preempted[one.request_id] = one.num_preemptions
            decodes &= one.num_computed_tokens == computed.get(one.request_id, -1) + 1
        if decodes and running:
            decode.setdefault(len(running), []).append(step.seconds)
        # Nothing runs, or computes, between two steps.
        computed = {r.request_id: r.num_computed_tokens for r in running}
        for output in step.outputs:
            index = index_of(output)
            tokens[index] = list(output.outputs[0].token_ids)
            if output.finished:
                cached[index] = output.num_cached_tokens or 0
                notes[index] = stated(output)
        if time.perf_counter() > limit:
            stopped = True
            left = [r.request_id for r in (*scheduler.running, *scheduler.waiting)]
            engine.abort_request(left, internal=True)
            break
    took = time.perf_counter() - start
    now_evicted, now_freed = _evicted(half)
    return {
        "tokens": tokens,
        "cached": cached,
        "kvplug": notes,
        "seconds": took,
        "stopped": stopped,
        "peak_running": peak_running,
        "peak_blocks": peak_blocks,
        "preemptions": sum(preempted.values()),
        "step_ms": {
            n: round(1e3 * statistics.median(times), 3)
            for n, times in sorted(decode.items())
            if len(times) >= LEAST_STEPS
        },
        "evictions": now_evicted - evicted,
        "blocks_freed": now_freed - freed,
        "reports": [asdict(r) for r in half.reports()] if half is not None else [],
    }


def _evicted(half: Any) -> tuple[float, int]:
    """Evictions and blocks freed of sequence policies so far, by the connector's scheduler half."""
    reports = [r for r in half.reports() if r.kind == "sequence"] if half is not None else []
    return sum(r.counters.get("evictions", 0) for r in reports), sum(r.acted for r in reports)
