"""Runs many small engines side by side, each on the same few prompts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from kvplug_lab.gpu_check.engines import Engine, EngineFailed, Machine
from kvplug_lab.gpu_check.parts import Report

LENGTHS = (3, 150, 320, 701)
"""Tokens of the prompts: inside every budget, around it, and several chunks long."""
GENERATED = 40
BUDGET = 128
"""Tokens that sequence policies keep of a request in checks."""
POOL_TOKENS = 16384
SMALL_POOL_TOKENS = 1120
"""Barely more than one request of `MAX_MODEL_LEN` needs: cached blocks are evicted all the time."""
MAX_MODEL_LEN = 1024
MAX_NUM_SEQS = 8
START_SECONDS = 150


def prompts(seed: int = 0) -> list[list[int]]:
    """The prompts: random token ids of the tiny model, the same for the same seed."""
    choose = random.Random(seed)
    return [[choose.randrange(10, 300) for _ in range(n)] for n in LENGTHS]


def workload(*, one_by_one: bool = False, times: int = 1) -> list[dict[str, Any]]:
    """Requests for the prompts.

    Args:
        one_by_one: Serve one at a time.
        times: Serve them all so many times, each time after the time before.
    """
    found: list[dict[str, Any]] = []
    for again in range(times):
        for i, prompt in enumerate(prompts()):
            wave = again * len(LENGTHS) + i if one_by_one else again
            found.append({"prompt": prompt, "max_tokens": GENERATED, "wave": wave})
    return found


def small_pool(machine: Machine, groups: int = 1) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for a pool in which blocks are short.

    Args:
        machine: Its block size is used.
        groups: KV-cache groups of the deployment at most; each has blocks of its own.
    """
    return {"num_gpu_blocks_override": groups * SMALL_POOL_TOKENS // machine.block_size}


def engine_arguments(machine: Machine, **own: Any) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for an engine of a check; vLLM's defaults wherever it has room."""
    found: dict[str, Any] = {
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": MAX_NUM_SEQS,
        "num_gpu_blocks_override": POOL_TOKENS // machine.block_size,
        "block_size": machine.block_size,
        "skip_tokenizer_init": True,
    }
    if machine.device == "cuda":
        found |= {"gpu_memory_utilization": 0.03, "kv_cache_memory_bytes": 1 << 30}
        found["compilation_config"] = {"cudagraph_capture_sizes": [1, 2, 4, MAX_NUM_SEQS]}
    else:
        found["enforce_eager"] = True
    if own.get("enforce_eager"):
        found.pop("compilation_config", None)
    return found | own


@dataclass(frozen=True)
class Case:
    """An engine and what its answers must be.

    Attributes:
        name: Its name.
        section: The ``kvplug`` section, or None for stock.
        requests: What it serves.
        engine: Arguments of ``vllm.LLM`` in addition to `engine_arguments`.
        env: Environment variables of its own.
        check: ``check(result)`` returns what is wrong with the answers, or an empty text. Called
            with the result of `kvplug_lab.engine.prepared.run`.
    """

    name: str
    section: Mapping[str, Any] | None
    requests: Sequence[Mapping[str, Any]]
    check: Callable[[Mapping[str, Any]], str]
    engine: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


def serve_cases(
    name: str,
    machine: Machine,
    model: Path,
    cases: Sequence[Case],
    side_by_side: int,
    report: Report,
    deadline: float,
) -> None:
    """Serve every case and report a row each.

    Args:
        name: Of the part; no other part that runs beside it has it.
        machine: Where the engines run.
        model: Model directory.
        cases: The cases.
        side_by_side: Engines that live at the same time.
        report: Gets rows with ``name``, ``ok``, ``problem``, the facts about the engine, and what
            the policies reported.
        deadline: Cases that have not begun by then fail, with that as their problem.
    """

    free: SimpleQueue[str] = SimpleQueue()
    for i in range(side_by_side):
        free.put(f"{name}-{i}")

    def one(case: Case) -> None:
        slot = free.get()
        try:
            row, line = _serve(name, machine, model, case, slot, deadline)
        finally:
            free.put(slot)
        report(row, line)

    with ThreadPoolExecutor(side_by_side) as pool:
        for done in [pool.submit(one, case) for case in cases]:
            done.result()


def _serve(
    part: str, machine: Machine, model: Path, case: Case, slot: str, deadline: float
) -> tuple[dict[str, Any], str]:
    row: dict[str, Any] = {"name": case.name, "ok": False, "problem": ""}
    start = time.monotonic()
    if start >= deadline:
        return row | {"problem": "not run: out of time"}, f"{case.name}: not run, out of time"
    arguments = engine_arguments(machine, **case.engine)
    engine = None
    try:
        engine = Engine(
            machine, f"{part} {case.name}", model, case.section, arguments, case.env, slot
        )
        row |= engine.ready(min(deadline, start + START_SECONDS))
        result = engine.ask({"requests": list(case.requests)}, deadline)
        row["problem"] = unfinished(result, case.requests) or case.check(result)
        row["reports"] = result["reports"]
    except EngineFailed as error:
        row["problem"] = str(error)
    finally:
        if engine is not None:
            engine.stop()
    row["ok"] = not row["problem"]
    row["seconds"] = round(time.monotonic() - start, 1)
    how = f"runner {row.get('runner')}, {row.get('graphs')}, {row.get('backend')}"
    first = row["problem"].splitlines()[0] if row["problem"] else "ok"
    return row, f"{case.name}: {first} ({how}, {row['seconds']:.0f} s)"


def unfinished(result: Mapping[str, Any], requests: Sequence[Mapping[str, Any]]) -> str:
    """What is missing of the answers' length, or an empty text."""
    short = [
        i
        for i, (tokens, request) in enumerate(zip(result["tokens"], requests, strict=True))
        if len(tokens) != request["max_tokens"]
    ]
    return f"requests {short} did not finish" if short else ""


def differences(found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> str:
    """Where answers part from expected ones, or an empty text."""
    if len(found) != len(expected):
        return f"{len(found)} answers, expected {len(expected)}"
    parted = []
    for i, (own, other) in enumerate(zip(found, expected, strict=True)):
        if list(own) != list(other):
            first = next((n for n, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), 0)
            parted.append(f"request {i} from token {first}")
    return f"other tokens than expected: {', '.join(parted)}" if parted else ""
