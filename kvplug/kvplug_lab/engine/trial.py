"""Run one workload on one engine in this process and watch its block pool from outside.

What is reported comes from vLLM's own scheduler and block pool, step by step, not from kvplug's
counters, so a run without kvplug is measured by the same code. The demo, the benchmarks and the
integration tests each start it in a fresh process::

    python -m kvplug_lab.engine.trial SPEC.json RESULT.json

Progress goes to standard output, one JSON object a line.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvplug.errors import KVPlugError
from kvplug.hosts.vllm.connector_flag import CONNECTOR, MODULE
from kvplug_lab.engine.leftovers import leftovers
from kvplug_lab.engine.stepped import index_of, stated, stepped, waves

FORCED = "kvplug_force"
FORCING = "kvplug_lab.engine.force:ForceTokens"
STOP_SECONDS = 120
"""An engine that takes longer to stop is killed: its summary and its recordings are lost. vLLM's
own 5 s are too few on a busy machine."""


@dataclass
class TrialRequest:
    """One request.

    Attributes:
        prompt: Its text, or token ids.
        max_tokens: Tokens to generate; the end-of-sequence token is ignored.
        wave: Requests of a wave are added once all of the wave before have finished.
        kvplug: What it asks of kvplug, e.g. ``{"sequence": "off"}``.
        after: Index of a request of an earlier wave whose prompt and answer it goes on from;
            ``prompt`` is then token ids that follow them.
        salt: Its cache salt: requests with different ones share nothing.
        force: Tokens the answer is made to have, ``max_tokens`` of them; their log-probabilities
            are reported.
        weights: Model directory whose weights the engine loads before the request's wave.
        reset: Reset vLLM's caches and the connector's before its wave, after that.
        image: File of an image that the prompt, a text, has a place for; empty for none.
    """

    prompt: str | list[int]
    max_tokens: int
    wave: int = 0
    kvplug: dict[str, Any] | None = None
    after: int | None = None
    salt: str | None = None
    force: list[int] | None = None
    weights: str = ""
    reset: bool = False
    image: str = ""


@dataclass
class TrialSpec:
    """A workload and the engine to run it on.

    Attributes:
        model: Model directory.
        requests: The workload.
        engine: Keyword arguments of ``vllm.LLM``.
        section: The ``kvplug`` section (data or path), or None for stock vLLM.
        reset_running_at: Step at which all running requests are preempted once, or None.
        watched: Step the engine in this process and watch its pool. Otherwise the engine runs as
            vLLM runs it, in processes of its own, and only the answers are reported.
    """

    model: str
    requests: list[TrialRequest]
    engine: dict[str, Any] = field(default_factory=dict)
    section: Any = None
    reset_running_at: int | None = None
    watched: bool = True

    @classmethod
    def from_json(cls, text: str) -> TrialSpec:
        """Parse what `to_json` wrote."""
        data = json.loads(text)
        data["requests"] = [TrialRequest(**r) for r in data["requests"]]
        return cls(**data)

    def to_json(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))


@dataclass
class Step:
    """The pool after one engine step.

    Attributes:
        seconds: Since the first step began.
        running: Requests running.
        waiting: Requests waiting.
        held: Blocks in use by requests, shared ones counted once.
        largest: Most blocks of any one request.
    """

    seconds: float
    running: int
    waiting: int
    held: int
    largest: int


@dataclass
class Answer:
    """Answer to one request.

    Attributes:
        prompt_tokens: Tokens of its prompt.
        cached_tokens: Those of them found in the prefix cache.
        token_ids: Generated tokens.
        text: The same as text.
        kvplug: kvplug's part of the output, or None.
        ttft: Seconds from adding the request to its first token; None in an engine not watched.
        logprobs: Log-probability of each forced token, or None.
    """

    prompt_tokens: int
    cached_tokens: int
    token_ids: list[int]
    text: str
    kvplug: dict[str, Any] | None
    ttft: float | None = None
    logprobs: list[float] | None = None


@dataclass
class TrialResult:
    """Result of a trial.

    Attributes:
        answers: In the order of the requests.
        steps: The pool after each step.
        num_blocks: Blocks in the pool, the null block not counted.
        block_size: Tokens per block.
        block_bytes: Bytes of KV per block, all layers.
        seconds: Wall time of all steps.
        preemptions: Times a request was preempted.
        handed_over: Blocks that a request freed while running and another one then used while
            the first was still running.
        reports: What kvplug's policies reported; empty for stock.
        cap_blocks: Per KV-cache group, the cap kvplug states; empty without a sequence policy.
        classes: Names of the backend, manager and queue classes in use.
        leftovers: Where kvplug still knows of requests of waves before the last one.
        held_bytes: Bytes that kvplug holds on the worker beside pages: recent tokens, tables.
        cpu_seconds: CPU time of all steps, all threads of the engine's process.
        metrics: vLLM's own counters by name, all labels together, and those of its offloaded
            chunks, ``offload_stored`` and others, where they are counted.
    """

    answers: list[Answer]
    steps: list[Step]
    num_blocks: int
    block_size: int
    block_bytes: int
    seconds: float
    preemptions: int
    handed_over: int
    reports: list[dict[str, Any]]
    cap_blocks: list[int]
    classes: dict[str, list[str]]
    leftovers: list[str] = field(default_factory=list)
    held_bytes: int = 0
    cpu_seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str) -> TrialResult:
        """Parse what `to_json` wrote."""
        data = json.loads(text)
        data["answers"] = [Answer(**a) for a in data["answers"]]
        data["steps"] = [Step(**s) for s in data["steps"]]
        return cls(**data)

    def to_json(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @property
    def peak_held(self) -> int:
        """Most blocks in use at once."""
        return max((s.held for s in self.steps), default=0)

    @property
    def peak_running(self) -> int:
        """Most requests running at once."""
        return max((s.running for s in self.steps), default=0)

    @property
    def largest(self) -> int:
        """Most blocks of any one request at any time."""
        return max((s.largest for s in self.steps), default=0)

    @property
    def tokens_per_request(self) -> float:
        """Mean tokens of KV memory per running request, over steps with any."""
        busy = [(s.held, s.running) for s in self.steps if s.running]
        if not busy:
            return 0.0
        return self.block_size * sum(h for h, _ in busy) / sum(r for _, r in busy)

    @property
    def output_tokens_per_second(self) -> float:
        """Generated tokens per second of wall time."""
        return sum(len(a.token_ids) for a in self.answers) / self.seconds if self.seconds else 0.0


def pool_tokens(log: str) -> int:
    """Capacity of the KV cache in tokens, as vLLM logs it when it starts.

    Raises:
        KVPlugError: The log does not state it.
    """
    found = re.search(r"KV cache size: ([\d,]+) tokens", log)
    if found is None:
        raise KVPlugError("vLLM's log does not state the size of its KV cache")
    return int(found[1].replace(",", ""))


def connector_flags(section: Any) -> dict[str, Any]:
    """The ``kv_transfer_config`` that turns kvplug on with a section; KV that cannot be loaded is
    computed."""
    loads = isinstance(section, Mapping) and ("reuse" in section or "tiers" in section)
    return {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": MODULE,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"kvplug": section},
    } | ({"kv_load_failure_policy": "recompute"} if loads else {})


class _Watch:
    """Reads an in-process engine's scheduler and pool."""

    def __init__(self, llm: Any):
        self.scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self.manager = self.scheduler.kv_cache_manager
        self.pool = self.manager.block_pool
        self.managers = self.manager.coordinator.single_type_managers
        self.preemptions: dict[str, int] = {}
        self.tokens: dict[str, int] = {}
        self.handed_over = 0
        self._held_before: dict[str, set[int]] = {}
        self._given_back: dict[int, str] = {}

    def kvplug(self) -> dict[str, Any]:
        """kvplug's own objects in this process, by what they are."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

        if self.scheduler.connector is None:
            return {}
        found: dict[str, Any] = {"scheduler": self.scheduler.connector}
        found |= {f"manager {i}": m for i, m in enumerate(self.managers)}
        found["queue"] = self.pool.free_block_queue
        if has_kv_transfer_group():
            found["worker"] = get_kv_transfer_group()
        return found

    def look(self, seconds: float) -> Step:
        held: dict[str, set[int]] = {}
        for request in self.scheduler.running:
            self.preemptions[request.request_id] = request.num_preemptions
            self.tokens[request.request_id] = request.num_computed_tokens
            held[request.request_id] = {
                b.block_id
                for m in self.managers
                for b in m.req_to_blocks.get(request.request_id, ())
                if not b.is_null
            }
        for request_id, ids in held.items():
            for block in ids:
                giver = self._given_back.get(block)
                if giver is not None and giver != request_id and giver in held:
                    self.handed_over += 1
                self._given_back.pop(block, None)
            for block in self._held_before.get(request_id, set()) - ids:
                self._given_back[block] = request_id
        self._held_before = held
        everything = set().union(*held.values()) if held else set()
        return Step(
            seconds=seconds,
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            held=len(everything),
            largest=max(map(len, held.values()), default=0),
        )


def run_trial(
    spec: TrialSpec,
    progress: Callable[[dict[str, Any]], None],
    *,
    prepare: Callable[[Any], None] | None = None,
) -> TrialResult:
    """Run a workload in this process. One engine config per process: vLLM caches backends.

    Args:
        spec: What to run.
        progress: Called with ``{"phase": ..., ...}`` as things happen.
        prepare: Called with the ``vllm.LLM`` before the first request.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if spec.watched else "1"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", str(STOP_SECONDS))
    progress({"phase": "starting"})
    from vllm import LLM

    arguments = {"enforce_eager": True, "dtype": "bfloat16", "block_size": 32} | spec.engine
    if spec.section is not None:
        arguments["kv_transfer_config"] = connector_flags(spec.section)
    processors: list[Any] = [*arguments.pop("logits_processors", ())]  # type: ignore[misc]
    if any(r.force is not None for r in spec.requests):
        processors.append(FORCING)
    if processors:
        arguments["logits_processors"] = processors
    llm = LLM(spec.model, disable_log_stats=False, **arguments)
    if prepare is not None:
        prepare(llm)
    result = _watched(llm, spec, progress) if spec.watched else _unwatched(llm, spec)
    progress({"phase": "stopping"})
    llm.llm_engine.engine_core.shutdown(timeout=STOP_SECONDS)
    return result


def _prompt(request: TrialRequest, texts: dict[int, list[int]]) -> Any:
    prompt: dict[str, Any] = {"prompt": request.prompt}
    if isinstance(request.prompt, list):
        before = texts[request.after] if request.after is not None else []
        prompt = {"prompt_token_ids": before + request.prompt}
    if request.image:
        from PIL import Image

        prompt["multi_modal_data"] = {"image": Image.open(request.image).convert("RGB")}
    return prompt | ({"cache_salt": request.salt} if request.salt is not None else {})


def _text(output: Any) -> list[int]:
    return [*output.prompt_token_ids, *output.outputs[0].token_ids]


def _sampling(request: TrialRequest) -> Any:
    from vllm import SamplingParams

    extra: dict[str, Any] = {}
    if request.kvplug:
        extra["kv_transfer_params"] = {"kvplug": request.kvplug}
    if request.force is not None:
        extra[FORCED] = request.force
    return SamplingParams(
        temperature=0.0,
        max_tokens=request.max_tokens,
        ignore_eos=True,
        extra_args=extra or None,
        logprobs=0 if request.force is not None else None,
    )


def _answer(output: Any, ttft: float | None = None) -> Answer:
    likely = output.outputs[0].logprobs
    return Answer(
        prompt_tokens=len(output.prompt_token_ids),
        cached_tokens=output.num_cached_tokens or 0,
        token_ids=list(output.outputs[0].token_ids),
        text=output.outputs[0].text,
        kvplug=stated(output),
        ttft=ttft,
        logprobs=[next(iter(step.values())).logprob for step in likely] if likely else None,
    )


def _unwatched(llm: Any, spec: TrialSpec) -> TrialResult:
    answers: dict[int, Answer] = {}
    texts: dict[int, list[int]] = {}
    before = time.perf_counter()
    for wave in waves(r.wave for r in spec.requests):
        _between(llm, [spec.requests[i] for i in wave])
        outputs = llm.generate(
            [_prompt(spec.requests[i], texts) for i in wave],
            [_sampling(spec.requests[i]) for i in wave],
            use_tqdm=False,
        )
        answers |= {i: _answer(output) for i, output in zip(wave, outputs, strict=True)}
        texts |= {i: _text(output) for i, output in zip(wave, outputs, strict=True)}
    return TrialResult(
        answers=[answers[i] for i in range(len(spec.requests))],
        steps=[],
        num_blocks=0,
        block_size=int(llm.llm_engine.vllm_config.cache_config.block_size),
        block_bytes=0,
        seconds=time.perf_counter() - before,
        preemptions=0,
        handed_over=0,
        reports=[],
        cap_blocks=[],
        classes={},
    )


def _between(llm: Any, wave: Sequence[TrialRequest]) -> None:
    """Do to an idle engine what the requests of a wave say."""
    for weights in filter(None, (request.weights for request in wave)):
        llm.collective_rpc("reload_weights", kwargs={"weights_path": weights})
    if any(request.reset for request in wave) and not llm.reset_prefix_cache(reset_connector=True):
        raise RuntimeError("the engine's caches could not be reset")


def _watched(llm: Any, spec: TrialSpec, progress: Callable[[dict[str, Any]], None]) -> TrialResult:
    engine = llm.llm_engine
    watch = _Watch(llm)
    steps: list[Step] = []
    answers: dict[int, Answer] = {}
    texts: dict[int, list[int]] = {}
    added: dict[int, float] = {}
    first: dict[int, float] = {}
    elapsed = cpu = 0.0

    def add(wave: Sequence[int]) -> None:
        _between(llm, [spec.requests[i] for i in wave])
        for i in wave:
            prompt = _prompt(spec.requests[i], texts)
            added[i] = time.perf_counter()
            engine.add_request(str(i), prompt, _sampling(spec.requests[i]))

    for step in stepped(engine, waves(r.wave for r in spec.requests), add):
        elapsed += step.seconds
        cpu += step.cpu_seconds
        for output in step.outputs:
            index = index_of(output)
            if output.outputs[0].token_ids and index not in first:
                first[index] = time.perf_counter() - added[index]
            if output.finished:
                answers[index] = _answer(output, first.get(index))
                texts[index] = _text(output)
        steps.append(watch.look(elapsed))
        if spec.reset_running_at == len(steps):
            watch.scheduler.reset_prefix_cache(reset_running_requests=True)
        progress(
            {
                "phase": "running",
                "step": len(steps),
                "finished": len(answers),
                "requests": len(spec.requests),
                "tokens": sum(watch.tokens.values()),
                **asdict(steps[-1]),
            }
        )
    connector = watch.scheduler.connector
    # Another connector may have a scheduler of its own.
    half = connector.scheduler if type(connector).__name__ == CONNECTOR else None
    worker = getattr(watch.kvplug().get("worker"), "worker", None)
    config = watch.manager.kv_cache_config
    layers = engine.vllm_config.compilation_config.static_forward_context.values()
    last = max((r.wave for r in spec.requests), default=0)
    ended = {str(i) for i, r in enumerate(spec.requests) if r.wave < last}
    return TrialResult(
        answers=[answers[i] for i in range(len(spec.requests))],
        steps=steps,
        num_blocks=config.num_blocks - 1,
        block_size=watch.managers[0].block_size,
        block_bytes=max(t.size for t in config.kv_cache_tensors) // config.num_blocks,
        seconds=elapsed,
        preemptions=sum(watch.preemptions.values()),
        handed_over=watch.handed_over,
        reports=[asdict(r) for r in half.reports()] if half is not None else [],
        cap_blocks=[
            m.max_admission_blocks_per_request for m in watch.managers if hasattr(m, "on_freed")
        ],
        classes={
            "attention": sorted(
                {
                    f"{type(layer.impl).__module__}.{type(layer.impl).__qualname__}"
                    for layer in layers
                    if hasattr(layer, "impl")
                }
            ),
            "managers": [type(m).__name__ for m in watch.managers],
            "queue": [type(watch.pool.free_block_queue).__name__],
        },
        leftovers=leftovers(
            watch.kvplug(), (name for name in watch.tokens if name.split("-")[0] in ended)
        ),
        held_bytes=worker.held_bytes if worker is not None else 0,
        cpu_seconds=cpu,
        metrics=_counters(llm),
    )


def _counters(llm: Any) -> dict[str, float]:
    """vLLM's counters, and those of offloaded chunks where this process counts them."""
    found: dict[str, float] = {}
    for metric in llm.get_metrics():
        if type(metric).__name__ == "Counter":
            found[metric.name] = found.get(metric.name, 0.0) + float(metric.value)
    counted = sys.modules.get("kvplug_lab.engine.counted_offload")
    if counted is not None:
        found |= {f"offload_{name}": float(n) for name, n in counted.COUNTS.items()}
    return found


class TrialFailed(KVPlugError):
    """An engine run ended without a result; the message holds the end of its log."""


def environment_of(spec: TrialSpec, more: dict[str, str]) -> dict[str, str]:
    """Environment of a trial's process."""
    found = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"} | more
    if "kv_cache_memory_bytes" in spec.engine:
        # vLLM takes the variable's GiB where both are given.
        found.pop("VLLM_CPU_KVCACHE_SPACE", None)
    # Kernel tests set this for their own process; an engine must not inherit it.
    found.pop("TRITON_INTERPRET", None)
    return found


def run_fresh(
    spec: TrialSpec,
    progress: Callable[[dict[str, Any]], None] | None = None,
    *,
    env: dict[str, str] | None = None,
    log: Path | None = None,
) -> TrialResult:
    """Run a trial in a process of its own.

    Args:
        spec: What to run.
        progress: Called with each progress object of the child.
        env: Environment variables added to this process's own.
        log: Where the engine's log goes; a temporary file by default.

    Raises:
        TrialFailed: The child failed.
    """
    with tempfile.TemporaryDirectory(prefix="kvplug-trial-") as scratch:
        folder = Path(scratch)
        (folder / "spec.json").write_text(spec.to_json(), encoding="utf-8")
        log = log or folder / "engine.log"
        environment = environment_of(spec, env or {})
        with (
            log.open("w", encoding="utf-8") as errors,
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "kvplug_lab.engine.trial",
                    str(folder / "spec.json"),
                    str(folder / "result.json"),
                ],
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
            ) as child,
        ):
            assert child.stdout is not None
            for line in child.stdout:
                if not line.startswith("{"):
                    errors.write(line)
                    errors.flush()  # the child writes there too: keep the order
                elif progress is not None:
                    progress(json.loads(line))
        result = folder / "result.json"
        if child.returncode or not result.exists():
            tail = log.read_text(encoding="utf-8", errors="replace")[-4000:]
            raise TrialFailed(f"the engine exited with code {child.returncode}:\n{tail}")
        return TrialResult.from_json(result.read_text(encoding="utf-8"))


def main() -> None:
    """Entry point of ``python -m kvplug_lab.engine.trial``."""
    spec_path, result_path = map(Path, sys.argv[1:3])
    spec = TrialSpec.from_json(spec_path.read_text(encoding="utf-8"))

    def progress(what: dict[str, Any]) -> None:
        print(json.dumps(what), flush=True)

    result_path.write_text(run_trial(spec, progress).to_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
