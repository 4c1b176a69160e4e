"""Replays a workload in the real engine and in the simulator, and compares what both hit.

The engine run is recorded by the policy ``record`` around the one under test, so the simulator
replays exactly what the engine served. Both rates count blocks: of all full blocks of all
requests, prompt and answer, those found in the prefix cache. The engine's hits are vLLM's own
``num_cached_tokens``.

Requests run in waves: ``concurrency`` of them are sent together, and the next ones when all have
ended. With one at a time, engine and simulator see the same events in the same order; with more,
the simulator still serves one after the other, in the order of arrival.

Two simulated rates are given. `PoolReplay` stores blocks as vLLM's pool does and is the one to be
compared with the engine. ``kvplug simulate`` stores each block once and has no block that is not
full, so it is given one block less per request that runs at once; it differs from the engine
where an order evicts the head of a prefix before its end.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvplug.contract import Kind, PrefixCachePolicy
from kvplug.deployment import Choice
from kvplug.errors import KVPlugError
from kvplug.hosts.trace import traces
from kvplug.hosts.trace.pool import PoolReplay
from kvplug.hosts.trace.simulator import Replay
from kvplug.parser import load_deployment
from kvplug_lab import texts
from kvplug_lab.engine.trial import TrialRequest, TrialSpec, run_fresh

BASELINE = "lru"
"""Stock vLLM's order, decision for decision."""

SYSTEM = (
    "You answer questions about plays. You are given a passage and then asked about it, several "
    "times. Answer in one sentence, from the passage alone, and name who speaks. If the passage "
    "does not say, answer that it does not say. Never make up a line, a name or a place."
)


class WorkloadError(KVPlugError):
    """A workload that does not fit the engine's memory; the message says what to change."""

    exit_code = 2


@dataclass(frozen=True)
class Workload:
    """Requests to send, and how long they get.

    Attributes:
        requests: The requests, in waves.
        longest: Tokens of the longest one, answer included.
        concurrency: Most requests of a wave.
        says: One line about it.
    """

    requests: list[TrialRequest]
    longest: int
    concurrency: int
    says: str


@dataclass(frozen=True)
class Compared:
    """One policy, in the engine and in the simulator.

    Attributes:
        policy: Its name.
        blocks: Blocks of the engine's pool.
        requests: Requests served.
        references: Full blocks of all requests, prompts and answers.
        prompt_tokens: Tokens of all prompts: what an engine without a cache computes.
        cached_tokens: Those the engine found in its cache (vLLM's ``num_cached_tokens``).
        engine_hits: The same in blocks.
        simulated_hits: Blocks the simulator hit with the storage rules of vLLM's pool.
        once_hits: Blocks ``kvplug simulate`` hits, which stores each block once.
        evicted: Cached blocks the engine gave up at the policy's word.
        preemptions: Requests the engine preempted.
        seconds: Wall time of the engine's steps.
    """

    policy: str
    blocks: int
    requests: int
    references: int
    prompt_tokens: int
    cached_tokens: int
    engine_hits: int
    simulated_hits: int
    once_hits: int
    evicted: int
    preemptions: int
    seconds: float

    @property
    def engine_rate(self) -> float:
        """Blocks the engine hit over blocks referred to."""
        return self.engine_hits / self.references

    @property
    def simulated_rate(self) -> float:
        """Blocks the simulator hit over the same."""
        return self.simulated_hits / self.references

    @property
    def once_rate(self) -> float:
        """Blocks ``kvplug simulate`` hits over the same."""
        return self.once_hits / self.references

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens the engine computed."""
        return self.prompt_tokens - self.cached_tokens


# -- workloads -------------------------------------------------------------------------------------


def conversations(
    model: Path,
    *,
    sessions: int = 12,
    turns: int = 4,
    visitors: int = 12,
    output_tokens: int = 8,
    concurrency: int = 1,
    seed: int = 0,
) -> Workload:
    """Several conversations about passages of Shakespeare, interleaved as they would arrive.

    All begin with the same system prompt. A conversation's first prompt brings a passage of its
    own; each further one is the whole conversation so far, the model's answers included, and new
    text. The pause between turns differs from one conversation to the next and varies within it.
    Between them come visitors, who ask one thing about a passage and never return.

    Args:
        model: Directory of the model whose tokenizer and chat marks are used.
        sessions: Conversations.
        turns: Turns of each.
        visitors: Requests that stay alone.
        output_tokens: Tokens of each answer.
        concurrency: Requests sent together.
        seed: Seed of the texts, their lengths and the order.

    Raises:
        TextUnavailable: The plays are not installed.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    choose = random.Random(seed)
    plays = texts.shakespeare()
    passages = iter(texts.passages(plays, sessions + visitors, 340, seed))
    asides = iter(texts.passages(plays, sessions * max(1, turns - 1), 110, seed + 1))

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text).input_ids)

    def whole_lines(text: str, least: int) -> str:
        words = text.split(" ")
        return " ".join(words[: choose.randint(least, max(least, len(words)))])

    def opening() -> list[int]:
        return tokens(
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
            f"{whole_lines(next(passages), 100)}\nWho speaks?<|im_end|>\n<|im_start|>assistant\n"
        )

    def further() -> list[int]:
        return tokens(
            f"<|im_end|>\n<|im_start|>user\n{whole_lines(next(asides), 50)}\nAnd who speaks here?"
            "<|im_end|>\n<|im_start|>assistant\n"
        )

    moments: list[tuple[float, int]] = []
    for session in range(sessions):
        pause, at = choose.uniform(1, 8), choose.uniform(0, 8)
        for _ in range(turns):
            moments.append((at, session))
            at += choose.expovariate(1 / pause)
    end = max((at for at, _ in moments), default=1.0)
    moments += [(choose.uniform(0, end), -1) for _ in range(visitors)]

    order: list[tuple[int, list[int]]] = []
    for _, session in sorted(moments):
        begun = any(s == session for s, _ in order) and session >= 0
        order.append((session, further() if begun else opening()))
    return _in_waves(
        order,
        output_tokens,
        concurrency,
        f"{sessions} conversations of {turns} turns and {visitors} single requests",
    )


def from_trace(
    trace: traces.Trace,
    model: Path,
    *,
    block_size: int = 32,
    requests: int = 200,
    longest: int = 4096,
    output_tokens: int = 8,
    concurrency: int = 1,
) -> Workload:
    """The first requests of a trace, with made-up text: equal blocks, equal tokens.

    A block of the trace becomes one block of the engine, whatever number of tokens it represents.
    Only prompts are replayed; answers are the engine's own.

    Args:
        trace: The trace.
        model: Directory of the model whose vocabulary the tokens are drawn from.
        block_size: Tokens per block of the engine.
        requests: Requests to take from its start.
        longest: Most tokens of a prompt; longer ones are truncated.
        output_tokens: Tokens of each answer.
        concurrency: Requests sent together.
    """
    vocabulary = json.loads((model / "config.json").read_text("utf-8"))["vocab_size"]
    most = max(1, (longest - 1) // block_size)
    known: dict[int, list[int]] = {}

    def block(number: int) -> list[int]:
        if number not in known:
            source = np.random.default_rng(number)
            known[number] = source.integers(vocabulary // 4, vocabulary, block_size).tolist()
        return known[number]

    order = []
    taken = min(requests, trace.num_requests)
    for r in range(taken):
        prompt = -(-int(trace.prompt_tokens[r]) // trace.block_size)
        ids = trace.ids[trace.off[r] : trace.off[r + 1]][: min(prompt, most)].tolist()
        # One token more, or the last block could not be hit.
        order.append((-1, [t for i in ids for t in block(i)] + [r % vocabulary]))
    return _in_waves(
        order,
        output_tokens,
        concurrency,
        f"{taken:,} of {trace.num_requests:,} requests of {trace.name}",
    )


def _in_waves(
    order: Sequence[tuple[int, list[int]]], output_tokens: int, concurrency: int, says: str
) -> Workload:
    """Requests of (session or -1, new tokens), a session's text going on from its last one."""
    found: list[TrialRequest] = []
    last: dict[int, int] = {}
    lengths: list[int] = []
    wave: list[int] = []
    number = 0
    for session, new in order:
        if len(wave) == concurrency or (session >= 0 and session in wave):
            number, wave = number + 1, []
        wave.append(session)
        after = last.get(session)
        lengths.append((lengths[after] if after is not None else 0) + len(new) + output_tokens)
        options = {"session_id": f"s{session}"} if session >= 0 else None
        if session >= 0:
            last[session] = len(found)
        found.append(TrialRequest(new, output_tokens, number, options, after))
    how = "one at a time" if concurrency == 1 else f"up to {concurrency} at once"
    says = f"{says}, prompts of {min(lengths) - output_tokens:,} to "
    says += f"{max(lengths) - output_tokens:,} tokens, {output_tokens} out each, {how}"
    return Workload(found, max(lengths), concurrency, says)


# -- the comparison --------------------------------------------------------------------------------


def choice_of(policy: str) -> Choice:
    """A prefix-cache policy with its default options.

    Raises:
        DeploymentError: There is no such policy.
    """
    deployment = load_deployment({"prefix_cache": policy}, source="--policy", key="")
    choice = deployment.choice(Kind.PREFIX_CACHE)
    assert choice is not None
    return choice


def simulate(replay: Replay, choice: Choice, capacity: int) -> int:
    """Blocks hit by a fresh object of the policy."""
    policy = choice.build(replay.engine(capacity))
    assert isinstance(policy, PrefixCachePolicy)
    return replay.run(policy, capacity).hits


def compare(
    model: Path,
    workload: Workload,
    policy: str,
    blocks: int,
    *,
    block_size: int = 32,
    progress: Callable[[dict[str, Any]], None] | None = None,
    engine: dict[str, Any] | None = None,
    trace: Path | None = None,
) -> Compared:
    """Serve a workload under a policy, in a process of its own, and simulate what was recorded.

    Args:
        model: Model directory.
        workload: What to send.
        policy: Name of the prefix-cache policy, with its default options.
        blocks: Blocks of the engine's pool.
        block_size: Tokens per block.
        progress: Called with the engine's progress, see `run_fresh`.
        engine: More arguments of ``vllm.LLM``.
        trace: Where the recorded trace is kept; nowhere by default.

    Raises:
        WorkloadError: The pool cannot hold the requests that run at once.
        DeploymentError: There is no such policy.
        TrialFailed: The engine failed.
        PolicyFailed: The policy failed in the simulator.
    """
    need = workload.concurrency * -(-workload.longest // block_size)
    if blocks < need:
        raise WorkloadError(
            f"{blocks} blocks of {block_size} tokens are too few for {workload.concurrency} of the "
            f"longest requests at once, {workload.longest} tokens each: give it at least {need}"
        )
    choice = choice_of(policy)
    with tempfile.TemporaryDirectory(prefix="kvplug-replay-") as scratch:
        path = Path(scratch) / "trace.npz"
        spec = TrialSpec(
            str(model),
            workload.requests,
            {
                "block_size": block_size,
                "num_gpu_blocks_override": blocks + 1,  # one is vLLM's null block
                "max_model_len": workload.longest + 1,
                "max_num_seqs": workload.concurrency,
                **(engine or {}),
            },
            {"prefix_cache": {"use": "record", "of": policy, "path": str(path)}},
        )
        served = run_fresh(spec, progress)
        recorded = traces.read(path)
        if trace is not None:
            trace.write_bytes(path.read_bytes())
    asked = sum(a.prompt_tokens for a in served.answers)
    if recorded.num_requests != len(served.answers) or int(recorded.prompt_tokens.sum()) != asked:
        raise WorkloadError(
            f"the engine served {len(served.answers)} requests of {asked} tokens and recorded "
            f"{recorded.num_requests} of {recorded.prompt_tokens.sum()}"
        )
    (report,) = served.reports
    cached = sum(a.cached_tokens for a in served.answers)
    return Compared(
        policy=policy,
        blocks=blocks,
        requests=len(served.answers),
        references=recorded.num_references,
        prompt_tokens=asked,
        cached_tokens=cached,
        engine_hits=cached // block_size,
        simulated_hits=simulate(PoolReplay(recorded), choice, blocks - workload.concurrency + 1),
        once_hits=simulate(Replay(recorded), choice, blocks - workload.concurrency),
        evicted=int(report["counters"]["evicted"]),
        preemptions=served.preemptions,
        seconds=served.seconds,
    )
