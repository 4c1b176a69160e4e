"""Sessions that return after others have taken their place in the pool, in the real engine.

Sessions take turns, so that each returns when the KV of all the others was computed meanwhile. With
a working set of several times the pool, stock vLLM finds nothing of a session that returns; what a
tier holds of it is loaded. Among them are visitors, who ask once and never return: what is stored
of them is stored in vain.

The engine of each run lives in a process of its own. Runs of the variants are interleaved, and
figures are medians over runs, because a machine is slower at one time than at another.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvplug.errors import KVPlugError
from kvplug_lab import texts
from kvplug_lab.engine.trial import TrialRequest, TrialResult, TrialSpec, run_fresh
from kvplug_lab.engine.turns import Engine
from kvplug_lab.spread import Spread

BLOCK = 32
"""Tokens per block; a size that vLLM supports on CPUs, too."""

STOCK, OFFLOAD = "stock", "stock with its own offload"

SETTLE = 30.0
"""Seconds that a durable tier is given to store what the pool holds before the engine is killed."""


class SessionsError(KVPlugError):
    """Sessions that cannot be run; the message says what to change."""

    exit_code = 2


@dataclass(frozen=True)
class Workload:
    """Requests of sessions that take turns, and of visitors.

    Attributes:
        requests: In order; a wave is sent together.
        returning: Indices of requests whose session was there before.
        tokens: Tokens of all sessions when they end, visitors' among them: the working set.
        longest: Tokens of the longest request, its answer included.
    """

    requests: list[TrialRequest]
    returning: frozenset[int]
    tokens: int
    longest: int


@dataclass(frozen=True)
class Variant:
    """A deployment to measure.

    Attributes:
        name: For the table.
        section: Its kvplug section; None for stock vLLM.
        offload: True for vLLM's own offloading connector.
    """

    name: str
    section: Mapping[str, Any] | None = None
    offload: bool = False


@dataclass
class Run:
    """One run of one variant.

    Attributes:
        ttft: Seconds to the first token of each request whose session returned.
        first: The same of all others.
        prompt: Tokens of all prompts.
        cached: Those that were not computed.
        loaded: Those of them that came out of a tier.
        seconds: Seconds of all steps.
        stored: Chunks stored; -1 if not known.
        useful: Those that were read later.
        stored_bytes: Bytes stored, as coded.
        counters: Everything that the tiers' policies counted.
        tokens: Tokens of the answers, to compare variants with.
    """

    ttft: list[float]
    first: list[float]
    prompt: int
    cached: int
    loaded: int
    seconds: float
    stored: int = -1
    useful: int = -1
    stored_bytes: int = -1
    counters: dict[str, float] = field(default_factory=dict)
    tokens: list[list[int]] = field(default_factory=list)


def workload(
    model: Path,
    *,
    sessions: int,
    turns: int,
    turn_tokens: int,
    visitors: int,
    output_tokens: int,
    concurrency: int,
) -> Workload:
    """Make sessions of consecutive text of Shakespeare.

    Args:
        model: Directory of the model whose tokenizer is used.
        sessions: Sessions.
        turns: Turns of each.
        turn_tokens: Tokens that a turn adds to the session's text so far.
        visitors: Requests between two turns of a session that never return.
        output_tokens: Tokens of each answer.
        concurrency: Requests sent together.

    Raises:
        SessionsError: There is not as much text.
    """
    ids = _text(model)
    need = turn_tokens * (sessions * turns + visitors * turns)
    if need > len(ids):
        raise SessionsError(f"{need} tokens of text are needed, and there are {len(ids)}")
    pieces = iter(ids[at : at + turn_tokens] for at in range(0, need, turn_tokens))
    made: list[TrialRequest] = []
    latest: dict[int, int] = {}
    returning = set()
    for _ in range(turns):
        every = [*range(sessions), *[-1] * visitors]
        # Visitors come in between, not all at the end.
        order = sorted(range(len(every)), key=lambda i: (i * 7) % len(every))
        for who in (every[i] for i in order):
            before = latest.get(who) if who >= 0 else None
            index = len(made)
            made.append(TrialRequest(next(pieces), output_tokens, 0, after=before))
            if before is not None:
                returning.add(index)
            if who >= 0:
                latest[who] = index
    # A session's turn waits for the answer before it.
    wave, members = 0, 0
    waves: dict[int, int] = {}
    for i, one in enumerate(made):
        if members >= concurrency or (one.after is not None and waves[one.after] == wave):
            wave, members = wave + 1, 0
        waves[i] = wave
        members += 1
    each = turn_tokens + output_tokens
    return Workload(
        [replace(one, wave=waves[i]) for i, one in enumerate(made)],
        frozenset(returning),
        each * turns * (sessions + visitors),
        each * turns,
    )


def _text(model: Path) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    return list(texts.encoder_of(tokenizer)(texts.shakespeare()))


def pool_blocks(work: Workload, times: float, concurrency: int) -> int:
    """Return the blocks of a pool that the working set is so many times as large as.

    Raises:
        SessionsError: The requests that run together do not fit it.
    """
    blocks = int(work.tokens / times) // BLOCK + 1
    least = concurrency * (-(-work.longest // BLOCK) + 1) + 1
    if blocks < least:
        raise SessionsError(
            f"a working set of {work.tokens} tokens over {times:g} is {blocks} blocks, and "
            f"{concurrency} requests of {work.longest} tokens need {least}: use more sessions"
        )
    return blocks


def filled_in(section: Any, **values: str) -> Any:
    """Replace ``{name}`` in every text of a section."""
    if isinstance(section, Mapping):
        return {key: filled_in(value, **values) for key, value in section.items()}
    if isinstance(section, list):
        return [filled_in(value, **values) for value in section]
    if isinstance(section, str):
        for name, value in values.items():
            section = section.replace(f"{{{name}}}", value)
    return section


def engine_of(work: Workload, blocks: int) -> dict[str, Any]:
    """Arguments of the engine."""
    return {
        "max_model_len": -(-(work.longest + 1) // BLOCK) * BLOCK,
        "max_num_batched_tokens": 512,
        "num_gpu_blocks_override": blocks,
        "block_size": BLOCK,
    }


def run(
    model: Path,
    work: Workload,
    variant: Variant,
    blocks: int,
    host_bytes: int,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Run:
    """Run the sessions once.

    Args:
        model: Model directory.
        work: The sessions.
        variant: The deployment; ``{host}`` in its section is ``host_bytes``, ``{folder}`` a folder
            that is removed afterwards.
        blocks: Blocks of the pool.
        host_bytes: Bytes of host memory below the pool.
        progress: Called as things happen.
    """
    with tempfile.TemporaryDirectory(prefix="kvplug-sessions-") as folder:
        engine, section = engine_of(work, blocks), None
        if variant.offload:
            engine["kv_transfer_config"] = own_offload(host_bytes)
        elif variant.section is not None:
            section = filled_in(variant.section, host=str(host_bytes), folder=folder)
        spec = TrialSpec(str(model), work.requests, engine, section)
        return of(run_fresh(spec, progress), work, variant)


def own_offload(host_bytes: int) -> dict[str, Any]:
    """vLLM's own connector, with its own order, counted."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "KVPlugOffloadingSpec",
            "spec_module_path": "kvplug.hosts.vllm.offload.spec",
            "cpu_bytes_to_use": host_bytes,
            "eviction_policy": "CountedLRU",
            "cache_policy_module_path": "kvplug_lab.engine.counted_offload",
            "offload_prompt_only": False,
        },
    }


def of(result: TrialResult, work: Workload, variant: Variant) -> Run:
    """What a run showed."""
    answers = result.answers
    found = Run(
        [answers[i].ttft or 0.0 for i in sorted(work.returning)],
        [one.ttft or 0.0 for i, one in enumerate(answers) if i not in work.returning],
        sum(one.prompt_tokens for one in answers),
        sum(one.cached_tokens for one in answers),
        int(result.metrics.get("vllm:external_prefix_cache_hits", 0)),
        result.seconds,
        tokens=[one.token_ids for one in answers],
    )
    if variant.offload:
        found.stored = int(result.metrics["offload_stored"])
        found.useful = int(result.metrics["offload_useful"])
        found.stored_bytes = found.stored * result.block_bytes
    tiers = {r["name"]: r["counters"] for r in result.reports if r["kind"] == "tiers"}
    if tiers:
        found.counters = {f"{t} {n}": v for t, own in tiers.items() for n, v in own.items()}
        # A chunk that moves down is stored in each tier that it comes to.
        found.stored, found.useful, found.stored_bytes = (
            int(sum(own.get(name, 0) for own in tiers.values()))
            for name in ("stored", "useful", "stored_bytes")
        )
    return found


def interleaved(variants: Sequence[Variant], repeat: int) -> Iterator[tuple[int, Variant]]:
    """Each variant so many times, in rounds that begin with another one each."""
    for turn in range(repeat):
        for i in range(len(variants)):
            yield turn, variants[(i + turn) % len(variants)]


def summary(variant: Variant, runs: Sequence[Run]) -> dict[str, Any]:
    """Median and quartiles of a variant's runs, as JSON."""

    def spread(values: Sequence[float]) -> dict[str, float]:
        return asdict(Spread.of(values))

    def quantile(values: Sequence[float], share: float) -> float:
        return float(np.quantile(values, share, method="inverted_cdf"))

    return {
        "variant": variant.name,
        "section": variant.section,
        "ttft_median": spread([Spread.of(one.ttft).median for one in runs]),
        "ttft_p95": spread([quantile(one.ttft, 0.95) for one in runs]),
        "first_ttft_median": spread([Spread.of(one.first).median for one in runs]),
        "hit_rate": spread([one.cached / one.prompt for one in runs]),
        "from_tiers": spread([one.loaded / one.prompt for one in runs]),
        "prompt_tokens_per_second": spread([one.prompt / one.seconds for one in runs]),
        "stored": runs[0].stored,
        "useful": runs[0].useful,
        "stored_bytes": runs[0].stored_bytes,
        "counters": runs[-1].counters,
    }


# -- restart -----------------------------------------------------------------------------------


@dataclass
class Restarted:
    """Requests after a restart, by length of their prompt.

    Attributes:
        length: Tokens of the prompts.
        computed: Seconds to the first token of prompts that nobody had stored.
        restored: The same of prompts that were stored when the engine was killed.
        cached: Tokens of the latter that were not computed, of the last.
    """

    length: int
    computed: list[float] = field(default_factory=list)
    restored: list[float] = field(default_factory=list)
    cached: int = 0


def restart(
    model: Path,
    section: Mapping[str, Any],
    lengths: Sequence[int],
    repeat: int,
    say: Callable[[str], None],
) -> list[Restarted]:
    """Serve prompts, kill the engine in the middle of a request, start it again, and ask again.

    Prompts that were stored and prompts that never were are asked alternately in the restarted
    engine.

    Args:
        model: Model directory.
        section: A kvplug section with a durable tier; ``{folder}`` in it is a folder that outlives
            the engine.
        lengths: Tokens of prompts.
        repeat: Prompts of each length.
        say: Told what goes on.
    """
    ids = iter(_text(model))

    def prompt(length: int) -> TrialRequest:
        return TrialRequest([next(ids) for _ in range(length)], 1)

    stored = [[prompt(n) for _ in range(repeat)] for n in lengths]
    fresh = [[prompt(n) for _ in range(repeat)] for n in lengths]
    longest = max(lengths)
    # The pool holds the longest prompt and a little: what is stored is not there as well.
    engine = {
        "max_model_len": longest + BLOCK,
        "max_num_batched_tokens": 1024,
        "num_gpu_blocks_override": longest // BLOCK + 8,
        "block_size": BLOCK,
    }
    found = [Restarted(n) for n in lengths]
    with tempfile.TemporaryDirectory(prefix="kvplug-restart-") as scratch:
        folder = Path(scratch)
        spec = TrialSpec(
            str(model), [], engine, filled_in(dict(section), folder=str(folder / "tier"))
        )
        with Engine(spec, folder / "first.log") as first:
            first.wait()
            for many in stored:
                for request in many:
                    first.ask([request])
            say("stored; the engine is killed in the middle of a request")
            until = time.monotonic() + SETTLE
            size = -1
            while time.monotonic() < until and size != (size := _bytes(folder / "tier")):
                # Steps let the engine's transfers go on.
                for _ in range(4):
                    first.ask([TrialRequest([5, 6, 7, 8], 4)])
                    time.sleep(0.5)
            first.send([TrialRequest(fresh[-1][0].prompt, 64)])
            time.sleep(1.0)
            first.kill()
        with Engine(spec, folder / "second.log") as second:
            second.wait()
            second.ask([TrialRequest(list(range(10, 200)), 4)])
            for one, old, new in zip(found, stored, fresh, strict=True):
                for before, never in zip(old, new, strict=True):
                    (answer,) = second.ask([never])
                    one.computed.append(answer.ttft or 0.0)
                    (answer,) = second.ask([before])
                    one.restored.append(answer.ttft or 0.0)
                    one.cached = answer.cached_tokens
                say(f"{one.length} tokens: {one.computed} computed, {one.restored} restored")
    return found


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def as_json(value: Any) -> str:
    """Figures as JSON."""
    return json.dumps(value, indent=1, sort_keys=True) + "\n"
