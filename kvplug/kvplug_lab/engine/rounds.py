"""An engine in a process of its own that serves a whole load again and again, each time from cold.

Engines that are compared live at the same time and take turns at the load. Before each round all
that an engine has cached or stored is dropped. A request waits for the one before it in its
session, and for a place among those in flight.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from kvplug_lab.engine.detached import detach, take_environment
from kvplug_lab.engine.stepped import index_of
from kvplug_lab.engine.trial import (
    FORCING,
    TrialFailed,
    TrialRequest,
    TrialSpec,
    environment_of,
    run_trial,
)


@dataclass
class Served:
    """One answer of a round.

    Attributes:
        prompt: Tokens of the prompt.
        cached: Those of them that were not computed.
        loaded: Those of them that came from a connector.
        tokens: The answer.
        ttft: Seconds from when it was sent to its first token.
        waited: Those of them before it was scheduled.
        tpot: Seconds for each further token; 0 for one token.
        logprobs: Of forced tokens, in nats; empty for a free answer.
        exact: What the answer says of itself; True if it says nothing.
    """

    prompt: int
    cached: int
    loaded: int
    tokens: list[int]
    ttft: float
    waited: float
    tpot: float
    logprobs: list[float] = field(default_factory=list)
    exact: bool = True


@dataclass
class RoundStep:
    """The engine after a step.

    Attributes:
        seconds: The step took.
        running: Requests that run after it.
        waiting: Requests that wait for a place in the pool.
        held: Blocks in use.
        slots: Slots of the blocks of running requests; a shared block counts for each.
        empty: Those of them that hold no token.
        context: Tokens of all running requests.
        decode: True if every running request generated one token in it and none was prefilled.
    """

    seconds: float
    running: int
    waiting: int
    held: int
    slots: int
    empty: int
    context: int
    decode: bool


SAID_EVERY = 0.5
"""Seconds between two words about a round that runs."""


@dataclass
class Progress:
    """How far a round is.

    Attributes:
        answered: Requests answered.
        running: Requests that run.
        waiting: Requests that wait for a place in the pool.
        held: Blocks in use.
    """

    answered: int
    running: int
    waiting: int
    held: int


@dataclass
class Round:
    """One round of one engine.

    Attributes:
        answers: In the order of the load.
        steps: Every step.
        seconds: From the first request sent to the last answer.
        cpu_seconds: Processor time of them, all threads.
        num_blocks: Blocks in the pool.
        block_size: Tokens of a block.
        block_bytes: Bytes of a block, all layers.
        preemptions: Times a request was preempted.
        held_bytes: Bytes that kvplug holds on the worker beside pages.
        reports: What kvplug's policies reported since the engine's start.
    """

    answers: list[Served]
    steps: list[RoundStep]
    seconds: float
    cpu_seconds: float
    num_blocks: int
    block_size: int
    block_bytes: int
    preemptions: int
    held_bytes: int
    reports: list[dict[str, Any]]

    @property
    def output_tokens_per_second(self) -> float:
        """Generated tokens per second."""
        return sum(len(a.tokens) for a in self.answers) / self.seconds if self.seconds else 0.0

    @property
    def peak_running(self) -> int:
        """Most requests running at once."""
        return max((s.running for s in self.steps), default=0)


class RoundEngine:
    """An engine that serves rounds, in a process of its own; a context manager.

    vLLM is imported once, in a process that forks one for each engine; on a GPU, where a forked
    process may not be able to use the device, each engine imports it itself.

    Args:
        spec: The model, the engine and the section; its requests are not run.
        log: Where the engine's log goes.
    """

    def __init__(self, spec: TrialSpec, log: Path):
        self.log = log
        log.write_bytes(b"")
        engine = spec.engine | {"logits_processors": [FORCING]}
        plain = replace(spec, requests=[], engine=engine).to_json()
        context = _context()
        self._pipe, theirs = context.Pipe()
        self._process: Any = context.Process(  # type: ignore[attr-defined]
            target=serve, args=(theirs, plain, str(log), environment_of(spec, {})), daemon=True
        )
        self._process.start()
        theirs.close()

    def wait(self) -> None:
        """Until it has started.

        Raises:
            TrialFailed: It ended instead.
        """
        self._receive()

    def serve(
        self,
        requests: Sequence[TrialRequest],
        before: Sequence[int | None],
        most: int,
        progress: Callable[[Progress], None] | None = None,
    ) -> Round:
        """Serve a load from cold.

        Args:
            requests: The load.
            before: Index of the request that each one waits for, or None.
            most: Requests in flight at most.
            progress: Called about twice a second while the round runs.

        Raises:
            TrialFailed: The engine ended.
        """
        try:
            self._pipe.send((list(requests), list(before), most, progress is not None))
        except OSError:
            raise self._ended() from None
        found = self._receive()
        while isinstance(found, Progress):
            if progress is not None:
                progress(found)
            found = self._receive()
        assert isinstance(found, Round)
        return found

    def __enter__(self) -> RoundEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            raise self._ended() from None

    def _ended(self) -> TrialFailed:
        self._process.join()
        tail = self.log.read_text(encoding="utf-8", errors="replace")[-4000:]
        return TrialFailed(f"an engine exited with code {self._process.exitcode}:\n{tail}")


def import_ahead() -> None:
    """Have the process that forks engines import vLLM now, while this one does something else."""
    if _context().get_start_method() == "forkserver":
        forkserver.ensure_running()


def _context() -> BaseContext:
    import torch

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    # Engines end at once; what vLLM left to the tracker is released by it, which warns of each.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kvplug_lab.engine.preload"])
    return context


def serve(pipe: Connection, spec: str, log: str, environment: dict[str, str]) -> None:
    """Build an engine and answer loads until the pipe is closed; the process's side.

    Args:
        pipe: Gets None once the engine is there, and a `Round` for each load, with `Progress`
            before it where that is asked for.
        spec: A `TrialSpec` as JSON.
        log: Where the output of this process goes.
        environment: Its environment variables.
    """
    detach(Path(log))
    take_environment(environment)
    code = 0
    try:
        run_trial(TrialSpec.from_json(spec), lambda _: None, prepare=lambda llm: _serve(llm, pipe))
    except EOFError:
        pass
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Shutting an engine down takes seconds, and nothing of it is kept.
    os._exit(code)


def _serve(llm: Any, pipe: Connection) -> None:
    pipe.send(None)
    served = 0
    while True:
        requests, before, most, wanted = pipe.recv()
        say = pipe.send if wanted else lambda _: None
        found = _round(llm, requests, before, most, served, say)
        served += len(requests)
        pipe.send(found)


def _round(
    llm: Any,
    requests: Sequence[TrialRequest],
    before: Sequence[int | None],
    most: int,
    served: int,
    say: Callable[[Progress], None],
) -> Round:
    from kvplug.hosts.vllm.connector_flag import CONNECTOR
    from kvplug_lab.engine.trial import _answer, _prompt, _sampling, _Watch

    if not llm.reset_prefix_cache(reset_connector=True):
        raise RuntimeError("the engine's caches could not be reset")
    engine = llm.llm_engine
    watch = _Watch(llm)
    unsent, flying = list(range(len(requests))), set[int]()
    answers: dict[int, Served] = {}
    steps: list[RoundStep] = []
    sent: dict[int, float] = {}
    first: dict[int, float] = {}
    preempted: dict[str, int] = {}
    said = time.perf_counter()
    started, cpu = time.perf_counter(), time.process_time()

    def send() -> None:
        for i in [*unsent]:
            if len(flying) >= most:
                return
            earlier = before[i]
            if earlier is None or earlier in answers:
                unsent.remove(i)
                flying.add(i)
                sent[i] = time.perf_counter()
                prompt, sampling = _prompt(requests[i], {}), _sampling(requests[i])
                engine.add_request(f"{served + i}", prompt, sampling)

    while len(answers) < len(requests):
        send()
        computed = {r.request_id: r.num_computed_tokens for r in watch.scheduler.running}
        begun = time.perf_counter()
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            i = index_of(output) - served
            if output.outputs[0].token_ids:
                first.setdefault(i, now)
            if not output.finished:
                continue
            flying.discard(i)
            own = _answer(output, first[i] - sent[i])
            stats = output.metrics
            more = len(own.token_ids) - 1
            marked = own.kvplug or {}
            answers[i] = Served(
                prompt=own.prompt_tokens,
                cached=own.cached_tokens,
                loaded=int(marked.get("loaded", 0) or 0) + int(marked.get("reused", 0) or 0),
                tokens=own.token_ids,
                ttft=first[i] - sent[i],
                waited=max(stats.scheduled_ts - stats.queued_ts, 0.0) if stats else 0.0,
                tpot=(now - first[i]) / more if more else 0.0,
                logprobs=own.logprobs or [],
                exact=bool(marked.get("exact", True)),
            )
        step = _look(watch, now - begun, computed, preempted)
        steps.append(step)
        if now - said > SAID_EVERY:
            said = now
            say(Progress(len(answers), step.running, step.waiting, step.held))
    connector = watch.scheduler.connector
    half = connector.scheduler if type(connector).__name__ == CONNECTOR else None
    worker = getattr(watch.kvplug().get("worker"), "worker", None)
    config = watch.manager.kv_cache_config
    return Round(
        answers=[answers[i] for i in range(len(requests))],
        steps=steps,
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu,
        num_blocks=config.num_blocks - 1,
        block_size=watch.managers[0].block_size,
        block_bytes=max(t.size for t in config.kv_cache_tensors) // config.num_blocks,
        preemptions=sum(preempted.values()),
        held_bytes=worker.held_bytes if worker is not None else 0,
        reports=[asdict(r) for r in half.reports()] if half is not None else [],
    )


def _look(
    watch: Any, seconds: float, computed: dict[str, int], preempted: dict[str, int]
) -> RoundStep:
    running = watch.scheduler.running
    slots = empty = context = 0
    held: set[int] = set()
    decode = len(running) > 0
    for request in running:
        if request.num_preemptions:
            preempted[request.request_id] = request.num_preemptions
        tokens = request.num_computed_tokens
        decode &= tokens == computed.get(request.request_id, -1) + 1
        context += tokens
        for manager in watch.managers:
            blocks = manager.req_to_blocks.get(request.request_id, ())
            real = [b.block_id for b in blocks if not b.is_null]
            held.update(real)
            slots += len(real) * manager.block_size
            # Blocks that were given back in the middle held tokens, so the rest is no gap.
            if len(real) == len(blocks):
                empty += max(len(real) * manager.block_size - tokens, 0)
    return RoundStep(
        seconds=seconds,
        running=len(running),
        waiting=len(watch.scheduler.waiting),
        held=len(held),
        slots=slots,
        empty=empty,
        context=context,
        decode=decode and len(computed) == len(running),
    )
