"""Engines against oracles in float32, and against stock in their own precision.

The oracles are those of the checkout's engine tests: plain transformers over the whole text for
every token, on the CPU. Float32 on vLLM's Triton backend leaves no rounding to hide behind.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

from kvplug_lab.engine.detached import detach
from kvplug_lab.gpu_check.cases import (
    BUDGET,
    GENERATED,
    Case,
    differences,
    prompts,
    serve_cases,
    small_pool,
    workload,
)
from kvplug_lab.gpu_check.engines import EngineFailed, Machine, start_process
from kvplug_lab.gpu_check.parts import Report

Tokens = list[list[int]]
Expected = Callable[[], Tokens]

SINK, WINDOW = 40, 100
INTERVAL = 32
CHUNK = 100
"""Tokens of a step: prompts come in chunks whose ends are no ends of blocks."""
SHARED_SECONDS = 120


# -- expected tokens, in processes of their own --------------------------------------------------


def answer(
    pipe: Any, log: str, root: str, model: str, kind: str, options: Mapping[str, Any]
) -> None:
    """A child: send what an oracle answers to the prompts, or ``{"error": ...}``."""
    try:
        detach(Path(log))
        # Nothing here may touch the device, whose memory belongs to engines.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        import torch

        torch.set_num_threads(2)
        sys.path.insert(0, str(Path(root) / "integration_tests"))
        pipe.send(ORACLES[kind](Path(model), **options))
    except BaseException as error:
        pipe.send({"error": f"{type(error).__name__}: {error}"[:1000]})
    os._exit(0)


def _window(model: Path, block: int, sink: int, window: int) -> Tokens:
    oracle = import_module("oracle").Oracle(model)
    return [
        oracle.greedy(p, GENERATED, block_size=block, sink=sink, window=window) for p in prompts()
    ]


def _pruned(model: Path, block: int, score: str, limit: int | None) -> Tokens:
    pruned_oracle = import_module("pruned_oracle")
    rule = pruned_oracle.Rule(BUDGET, INTERVAL, sink=4, recent=16, block=block, hold=limit)
    oracle = pruned_oracle.PrunedOracle(model)
    return [oracle.greedy(p, GENERATED, getattr(pruned_oracle, score), [rule]) for p in prompts()]


def _coded(
    model: Path, bits: int, group: int, chunk: int, window: tuple[int, int, int] | None
) -> Tokens:
    formats, windows = import_module("format_oracle"), import_module("oracle")
    oracle = formats.FormatOracle(model)
    stored = formats.per_channel(bits, group) if group else formats.per_token(bits)
    return [
        oracle.greedy(
            p,
            GENERATED,
            stored,
            formats.in_chunks(len(p), chunk, group) if group else formats.never,
            (lambda n: windows.visible(n, *window)) if window else None,
        )
        for p in prompts()
    ]


ORACLES: dict[str, Callable[..., Tokens]] = {
    "window": _window,
    "pruned": _pruned,
    "coded": _coded,
}


class Oracles:
    """Computes expected tokens ahead, each in a process, while engines start.

    Args:
        machine: Its checkout has the oracles.
        model: Model directory.
        side_by_side: Processes at the same time.
        deadline: When what is not computed fails, on the clock of `time.monotonic`.
    """

    def __init__(self, machine: Machine, model: Path, side_by_side: int, deadline: float):
        self._machine, self._model, self._deadline = machine, model, deadline
        self._pool = ThreadPoolExecutor(side_by_side)

    def ahead(self, kind: str, **options: Any) -> Expected:
        """Start computing; return a function that waits for the tokens."""
        future: Future[Tokens] = self._pool.submit(self._compute, kind, options)
        return future.result

    def close(self) -> None:
        """Drop what has not begun."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _compute(self, kind: str, options: Mapping[str, Any]) -> Tokens:
        machine = self._machine
        log = machine.folder / "engine-oracles.log"
        process, pipe = start_process(
            machine.context, answer, str(log), str(machine.root), str(self._model), kind, options
        )
        try:
            if not pipe.poll(max(0.0, self._deadline - time.monotonic())):
                raise EngineFailed(f"the oracle {kind!r} was not done in the time left")
            found = pipe.recv()
        except EOFError as error:
            raise EngineFailed(f"the oracle {kind!r} died") from error
        finally:
            process.kill()
        if isinstance(found, dict):
            raise EngineFailed(f"the oracle {kind!r} failed: {found['error']}")
        return found  # type: ignore[no-any-return]


# -- cases ---------------------------------------------------------------------------------------


def compares(expected: Expected, *acted: str, times: int = 1) -> Callable[[Mapping[str, Any]], str]:
    """A check that answers are the expected ones, and that policies of some kinds acted."""

    def check(result: Mapping[str, Any]) -> str:
        return problem_of(result, acted) or differences(result["tokens"], expected() * times)

    return check


def problem_of(result: Mapping[str, Any], acted: Sequence[str]) -> str:
    """What policies report that they should not, or an empty text.

    Args:
        result: Of a workload.
        acted: Kinds whose policies must have acted.
    """
    reports = result["reports"]
    found = [f"{r['name']} counts {r['errors']} errors" for r in reports if r["errors"]]
    found += [
        f"{r['name']} counts {r['counters'][bad]:.0f} {bad}"
        for r in reports
        for bad in ("nonfinite", "fallbacks")
        if r["counters"].get(bad)
    ]
    for kind in acted:
        if not any(r["kind"] == kind and r["acted"] > 0 for r in reports):
            found.append(f"no {kind} policy acted")
    return ", ".join(found)


class Shared:
    """Answers of one case that others are compared with.

    Attributes:
        asked: Cases that are compared with them.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._tokens: Tokens | None = None
        self._known = threading.Event()

    def check(self, result: Mapping[str, Any]) -> str:
        """Remember the answers; as a check it finds nothing wrong."""
        self._tokens = result["tokens"]
        self._known.set()
        return ""

    def expected(self) -> Tokens:
        """The answers, once they are known.

        Raises:
            EngineFailed: The other case did not answer in time.
        """
        if not self._known.wait(SHARED_SECONDS) or self._tokens is None:
            raise EngineFailed("stock did not answer, so there is nothing to compare with")
        return self._tokens


def exact_cases(machine: Machine, oracles: Oracles, names: Sequence[str] = ()) -> list[Case]:
    """Every case that has an oracle, and those that are compared with stock.

    Args:
        machine: Where they run.
        oracles: Starts computing what the cases expect.
        names: Beginnings of the names of wanted cases; every case if empty.
    """
    block = machine.block_size
    plain: dict[str, Any] = {"dtype": "float32", "max_num_batched_tokens": CHUNK}
    env = {}
    if machine.device == "cuda":
        plain["attention_backend"] = "TRITON_ATTN"
        # Triton multiplies float32 in TF32 otherwise, and is as inexact as bfloat16 then.
        env = {"TRITON_F32_DEFAULT": "ieee"}
    found: list[Case] = []

    def case(
        name: str,
        section: Mapping[str, Any] | None,
        oracle: tuple[str, Mapping[str, Any]],
        *kinds: str,
        one_by_one: bool = False,
        times: int = 1,
        **engine: Any,
    ) -> None:
        if wanted(name, names):
            expected = oracles.ahead(oracle[0], **oracle[1])
            requests = workload(one_by_one=one_by_one, times=times)
            check = compares(expected, *kinds, times=times)
            found.append(Case(name, section, requests, check, plain | engine, env))

    def pruned(score: str, limit: int | None = None) -> tuple[str, dict[str, Any]]:
        return "pruned", {"block": block, "score": score, "limit": limit}

    def coded(
        bits: int, group: int = 0, window: tuple[int, int, int] | None = None
    ) -> tuple[str, dict[str, Any]]:
        return "coded", {"bits": bits, "group": group, "chunk": CHUNK, "window": window}

    def seen(sink: int, window: int) -> tuple[str, dict[str, Any]]:
        return "window", {"block": block, "sink": sink, "window": window}

    full = seen(1 << 20, 1 << 20)
    budget = {"budget": BUDGET, "sink": 4, "interval": INTERVAL, "recent": 16}
    window = {"sequence": {"use": "sink_window", "sink": SINK, "window": WINDOW}}
    keydiff = {"sequence": {"use": "keydiff", **budget}}
    tova = {"sequence": {"use": "tova", **budget}}
    h2o = {"sequence": {"use": "h2o", **budget, "recent_part": 0.125}}
    int8 = {"format": {"use": "int8", "exact_chunk": False}}
    int4 = {"format": {"use": "int4", "fit": 0, "rotate": False, "exact_chunk": False}}
    plain = {"fit": 0, "rotate": False, "anchor": False}
    kivi = {"format": {"use": "kivi", "bits": 2, "group": block, **plain}}
    reuse = {"reuse": {"use": ["structure", "position", "mask"], "segments": {"by": "fixed"}}}
    limit = 11 * 32
    limited = {"sequence": keydiff["sequence"] | {"prefill": limit}}

    case("stock", None, full)
    case("sink_window", window, seen(SINK, WINDOW), "sequence")
    case("keydiff", keydiff, pruned("keydiff"), "sequence")
    case("keydiff, evicted inside prompts", limited, pruned("keydiff", limit), "sequence")
    case("tova", tova, pruned("tova"), "sequence")
    case("h2o", h2o, pruned("heavy"), "sequence")
    case("int8", int8, coded(8), "format")
    case("int4", int4, coded(4), "format")
    case("kivi", kivi, coded(2, block), "format", one_by_one=True)
    both = coded(4, 0, (block, SINK, WINDOW))
    case("sink_window with int4", window | int4, both, "sequence", "format")
    # The store is what is checked: nothing else may answer for it.
    case("reuse", reuse, full, "reuse", times=2, enable_prefix_caching=False)

    shared = Shared()
    own: dict[str, Any] = {"dtype": "bfloat16", "max_num_batched_tokens": 256}
    own |= small_pool(machine)
    # The second time the prompts are in the prefix cache.
    twice = workload(times=2)
    like_stock = {"{}": ({}, ()), "lru": ({"prefix_cache": {"use": "lru"}}, ("prefix_cache",))}
    for name, (section, kinds) in like_stock.items():
        if wanted(name, names):
            if shared.asked == 0:
                found.append(Case("stock, own precision", None, twice, shared.check, own))
            shared.asked += 1
            check = compares(shared.expected, *kinds)
            found.append(Case(f"{name}, tokens of stock", section, twice, check, own))
    return found


def wanted(name: str, names: Sequence[str]) -> bool:
    """True where ``name`` begins with one of ``names``, or those are empty."""
    return not names or any(name.startswith(one) for one in names)


def run_exact(
    machine: Machine,
    model: Path,
    names: Sequence[str],
    side_by_side: int,
    report: Report,
    deadline: float,
) -> None:
    """Serve the cases and compare their tokens.

    Args:
        machine: Where the engines run.
        model: The tiny model.
        names: Cases to serve; every one if empty.
        side_by_side: Engines that live at the same time.
        report: Gets a row per case.
        deadline: Of the part.
    """
    oracles = Oracles(machine, model, side_by_side, deadline)
    try:
        cases = exact_cases(machine, oracles, names)
        # Those that others are compared with come first, or others would wait for them.
        cases.sort(key=lambda c: c.section is not None)
        serve_cases("exact", machine, model, cases, side_by_side, report, deadline)
    finally:
        oracles.close()
