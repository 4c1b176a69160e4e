"""Starts engines in processes of their own, and hands them workloads."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from kvplug.errors import KVPlugError
from kvplug_lab.engine import prepared
from kvplug_lab.models import cache_home

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    # FlashInfer may be absent, and its sampler would be compiled on the first token.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Engines are killed at their end, which leaves semaphores to the tracker, as is its work.
    "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",
    # Engines start side by side, each with as many threads as there are cores otherwise.
    "OMP_NUM_THREADS": "2",
}
PROBE_SECONDS = 120
STACK_SECONDS = 1.0
"""For an engine that is late to write where it stands."""
TAIL = 3000
"""Characters of a log that an error shows."""


class EngineFailed(KVPlugError, RuntimeError):
    """An engine failed to start or to serve; the message ends with the end of its log."""


@dataclass
class Machine:
    """A device that engines run on.

    Attributes:
        device: ``cuda`` or ``cpu``.
        facts: Name and memory of the card and versions of what runs on it.
        folder: Where logs and models are written.
        root: Checkout, whose tests and oracles are used.
    """

    device: str
    facts: dict[str, Any]
    folder: Path
    root: Path
    context: BaseContext = field(repr=False)

    @property
    def block_size(self) -> int:
        """Tokens per block of checks: vLLM's default on a GPU, or the least its CPU has."""
        return 16 if self.device == "cuda" else 32

    @property
    def graphs(self) -> bool:
        """True where engines capture CUDA graphs."""
        return self.device == "cuda"


def open_machine(device: str, folder: Path, root: Path) -> Machine:
    """Find out what the device is and how processes are best started on it.

    vLLM is imported once, in a process that forks one for each engine. Where a process forked
    so cannot use the device, each engine imports vLLM itself.

    Args:
        device: ``cuda`` or ``cpu``.
        folder: Where logs and models go; made where absent.
        root: Checkout.

    Raises:
        EngineFailed: vLLM cannot be imported or the device cannot be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["kvplug_lab.engine.preload"])
    problems = []
    for context in (fork, multiprocessing.get_context("spawn")):
        found = _probe(context, device)
        if "error" not in found:
            facts = found | {"engines": context.get_start_method()}
            return Machine(device, facts, folder, root, context)
        problems.append(f"{context.get_start_method()}: {found['error']}")
    fix = "run it where torch sees a CUDA device, or pass --device cpu --only exact,policies"
    raise EngineFailed(f"no engine can run on {device}: {'; '.join(problems)}. Fix: {fix}.")


_starting = threading.Lock()


def start_process(context: BaseContext, target: Any, *arguments: Any) -> tuple[Any, Connection]:
    """Start ``target(pipe, *arguments)`` in a process; return it and the other end of the pipe."""
    ours, theirs = context.Pipe()
    process = context.Process(  # type: ignore[attr-defined]
        target=target, args=(theirs, *arguments), daemon=False
    )
    with _starting:  # the fork server takes one order at a time
        process.start()
    theirs.close()
    return process, ours


def _probe(context: BaseContext, device: str) -> dict[str, Any]:
    process, pipe = start_process(context, prepared.probe, device)
    try:
        if not pipe.poll(PROBE_SECONDS):
            return {"error": f"no answer within {PROBE_SECONDS} s"}
        found: dict[str, Any] = pipe.recv()
        return found
    except EOFError:
        return {"error": "the process died"}
    finally:
        process.kill()


def log_stem(name: str) -> str:
    """Name of an engine as the name of its log has it."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", name)


class Engine:
    """One engine that was started and may still be building.

    Args:
        machine: Where it runs.
        name: Its name in messages and of its log.
        model: Model directory.
        section: The ``kvplug`` section, or None for stock vLLM.
        engine: Keyword arguments of ``vllm.LLM``.
        env: Environment variables added to this process's own.
        slot: Place that it takes among the engines that live at once. One of the same place reuses
            what it compiled; two that live at once would read what the other half wrote.
        warm: A workload it serves before it is ready, as `kvplug_lab.engine.prepared.run` takes.
    """

    def __init__(
        self,
        machine: Machine,
        name: str,
        model: Path,
        section: Mapping[str, Any] | None,
        engine: Mapping[str, Any],
        env: Mapping[str, str] | None = None,
        slot: str = "0",
        warm: Mapping[str, Any] | None = None,
    ):
        self.name = name
        self.facts: dict[str, Any] = {}
        self.log = machine.folder / f"engine-{log_stem(name)}.log"
        self.log.write_bytes(b"")
        own = {"VLLM_CACHE_ROOT": str(cache_home() / "gpu-check" / slot)}
        if section is None:
            own["VLLM_PLUGINS"] = ""
        spec = {
            "model": str(model),
            "section": None if section is None else dict(section),
            "engine": dict(engine),
            "env": os.environ | own | dict(env or {}),
            "log": str(self.log),
            "warm": warm,
        }
        self._process, self._pipe = start_process(machine.context, prepared.serve, spec)

    def ready(self, deadline: float) -> dict[str, Any]:
        """Wait until it is built; return the facts about it.

        Args:
            deadline: On the clock of `time.monotonic`.

        Raises:
            EngineFailed: It failed, or is not ready in time.
        """
        if not self.facts:
            self.facts = self._receive(deadline, "start")["ready"]
        return self.facts

    def ask(self, work: Mapping[str, Any], deadline: float) -> dict[str, Any]:
        """Have it serve a workload; return what `kvplug_lab.engine.prepared.run` returns.

        Raises:
            EngineFailed: It failed, or is not done in time.
        """
        try:
            self._pipe.send(dict(work))
        except OSError as error:
            raise EngineFailed(f"the engine is gone ({error}){self._tail()}") from error
        return self._receive(deadline, "serve")

    def stop(self) -> None:
        """End its process."""
        self._process.kill()
        self._process.join(10)
        self._pipe.close()

    def _receive(self, deadline: float, what: str) -> dict[str, Any]:
        try:
            if not self._pipe.poll(max(0.0, deadline - time.monotonic())):
                self._say_where_it_stands()
                raise EngineFailed(f"the engine did not {what} in the time left{self._tail()}")
            message: dict[str, Any] = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise EngineFailed(f"the engine's process ended{self._tail()}") from error
        if "error" in message:
            raise EngineFailed(message["error"] + self._tail())
        return message

    def _say_where_it_stands(self) -> None:
        """Have it write its threads' stacks to its log; it is killed next, so no harm is done."""
        with contextlib.suppress(OSError):
            os.kill(self._process.pid, signal.SIGUSR1)
            self._pipe.poll(STACK_SECONDS)

    def _tail(self) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return f"\n{text[-TAIL:]}" if text else ""
