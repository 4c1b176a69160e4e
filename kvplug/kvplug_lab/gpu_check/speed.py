"""Deployments against stock vLLM in the same KV memory, and decode steps at the same batch."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvplug.errors import KVPlugError
from kvplug_lab.gpu_check.engines import Engine, EngineFailed, Machine
from kvplug_lab.gpu_check.parts import Report

WINDOW = {"use": "sink_window", "sink": 64, "window": 448}
SNAPKV = {"use": "snapkv", "budget": 512, "window": 32}

ROWS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "stock": (None, {}),
    "{}": ({}, {}),
    "lru": ({"prefix_cache": {"use": "lru"}}, {}),
    "sink_window": ({"sequence": WINDOW}, {}),
    "keydiff": ({"sequence": {"use": "keydiff", "budget": 512}}, {}),
    "snapkv": ({"sequence": SNAPKV}, {}),
    "h2o": ({"sequence": {"use": "h2o", "budget": 512}}, {}),
    "stock_fp8": (None, {"kv_cache_dtype": "fp8"}),
    "int8": ({"format": {"use": "int8"}}, {}),
    "int4": ({"format": {"use": "int4"}}, {}),
    "sink_window+int4": ({"sequence": WINDOW, "format": {"use": "int4"}}, {}),
    "snapkv+int4": ({"sequence": SNAPKV, "format": {"use": "int4"}}, {}),
    "kivi": ({"format": {"use": "kivi", "bits": 2, "group": 16}}, {}),
    "stock_int4": (None, {"kv_cache_dtype": "int4_per_token_head"}),
}
"""Deployment to its ``kvplug`` section, None for stock, and its arguments of ``vllm.LLM``."""

STOCK = "stock"
LLAMA_3B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_bias": False,
    "mlp_bias": False,
}
"""Llama-3.2-3B's geometry with a smaller vocabulary; its weights are made up by vLLM."""

TARGETS: dict[str, tuple[str, float]] = {
    "{}": (STOCK, 0.99),
    "lru": (STOCK, 0.99),
    "sink_window": (STOCK, 2.5),
    "keydiff": (STOCK, 2.5),
    "snapkv": (STOCK, 2.2),
    "h2o": (STOCK, 2.2),
    "int8": ("stock_fp8", 1.0),
    "int4": ("stock_int4", 1.0),
    "sink_window+int4": (STOCK, 3.0),
}
"""Deployment to what its tokens per second are compared with, and the ratio that is aimed at."""
STEP_TARGET = 1.03
"""Most that a decode step without an eviction may cost, as a ratio to stock's."""

BUILD_SECONDS = 150
LEAST_SECONDS = 45
"""A wave is not begun with less time left: its engines would not be built."""
LATE = "not run: out of time"
DECODE_REQUESTS, DECODE_PROMPT, DECODE_OUTPUT = 8, 128, 160
DECODE_TURNS = 3


@dataclass(frozen=True)
class Load:
    """The measured workload.

    Attributes:
        requests: Requests, all added at once.
        prompt: Tokens of a prompt.
        output: Tokens of an answer.
        fit: Full requests that fit stock's KV memory.
        chunk: ``max_num_batched_tokens``.
        row_seconds: Time after which a row's requests are aborted; its rate is of what was
            generated until then.
    """

    requests: int = 48
    prompt: int = 2048
    output: int = 512
    fit: int = 8
    chunk: int = 4096
    row_seconds: float = 45.0

    @property
    def kv_tokens(self) -> int:
        """Tokens of stock's KV memory: those of ``fit`` requests and a block each to spare."""
        return self.fit * (self.prompt + self.output + 16)


def make_model(folder: Path) -> Path:
    """Write the config of the measured model; vLLM makes its weights up."""
    model = folder / "llama-3b"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(LLAMA_3B), encoding="utf-8")
    return model


def kv_bytes_per_token(model: Path) -> int:
    """Bytes of K and V of a token in bfloat16, from a model's config."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    heads = config.get("num_key_value_heads", config["num_attention_heads"])
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(config["num_hidden_layers"] * heads * size * 2 * 2)


def engine_arguments(
    machine: Machine, model: Path, load: Load, dummy: bool, own: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for a row: the same KV bytes for each, graphs as vLLM has them."""
    limit = load.prompt + load.output + 16
    found: dict[str, Any] = {
        "max_model_len": limit,
        "max_num_batched_tokens": load.chunk,
        "max_num_seqs": 64,
        "dtype": "bfloat16",
        "block_size": machine.block_size,
        "skip_tokenizer_init": True,
    }
    if machine.device == "cuda":
        found |= {
            "gpu_memory_utilization": 0.1,
            "kv_cache_memory_bytes": load.kv_tokens * kv_bytes_per_token(model),
            # As fine as vLLM's own sizes, without those that no batch here reaches.
            "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, *range(8, 65, 8)]},
        }
    else:
        found |= {"enforce_eager": True}
        found["num_gpu_blocks_override"] = load.kv_tokens // machine.block_size
    if dummy:
        found["load_format"] = "dummy"
    return found | dict(own)


def requests(model: Path, count: int, prompt: int, output: int, seed: int) -> list[dict[str, Any]]:
    """Requests of random tokens of a model, so that none is in the prefix cache."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    choose = random.Random(seed)
    some = range(10, min(30000, config["vocab_size"]))
    return [{"prompt": choose.choices(some, k=prompt), "max_tokens": output} for _ in range(count)]


def measured(result: Mapping[str, Any], load: Load, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a row, from what its engine returned for the workload."""
    generated = sum(map(len, result["tokens"]))
    reports = result["reports"]
    return {
        "tokens_per_s": round(generated / result["seconds"], 1),
        "seconds": round(result["seconds"], 2),
        "finished": sum(len(t) == load.output for t in result["tokens"]),
        "stopped": result["stopped"],
        "running": result["peak_running"],
        "kv_tokens": facts["blocks"] * facts["block_size"],
        "peak_blocks": result["peak_blocks"],
        "preemptions": result["preemptions"],
        "step_ms": result["step_ms"],
        "evictions": result["evictions"],
        "blocks_freed": result["blocks_freed"],
        "errors": sum(r["errors"] for r in reports),
    }


def run_speed(
    machine: Machine,
    names: Sequence[str],
    load: Load,
    real: Path | None,
    wave: int,
    report: Report,
    deadline: float,
) -> None:
    """Measure rows in waves: engines of a wave start side by side, then each runs alone.

    Args:
        machine: Where the engines run; a CUDA device.
        names: Rows of `ROWS`; every one if empty. `STOCK` is measured first where it is one.
        load: The workload.
        real: Model directory with weights; None for Llama-3.2-3B's geometry with made-up ones.
        wave: Engines that live at the same time.
        report: Gets a row per deployment: its section, the figures of `measured`, ``ratio`` and
            ``decode_ratio`` to stock, ``same_tokens`` (with real weights) and the engine's facts.
        deadline: Rows that were not measured by then fail.

    Raises:
        KVPlugError: A name is unknown.
    """
    chosen = list(names) or list(ROWS)
    if unknown := [name for name in chosen if name not in ROWS]:
        raise KVPlugError(f"unknown rows {', '.join(unknown)}. Fix: choose from {', '.join(ROWS)}.")
    chosen.sort(key=lambda name: name != STOCK)
    model = real or make_model(machine.folder)
    measures = _Measures(machine, model, load, real is None, report, deadline)
    for i in range(0, len(chosen), wave):
        measures.wave(chosen[i : i + wave])


class _Measures:
    """Rows as they are measured, and what later ones are compared with."""

    def __init__(
        self,
        machine: Machine,
        model: Path,
        load: Load,
        dummy: bool,
        report: Report,
        deadline: float,
    ):
        self.machine, self.model, self.load, self.dummy = machine, model, load, dummy
        self.report, self.deadline = report, deadline
        self.rate: dict[str, float] = {}
        self.decode: list[float] = []
        self.stock_tokens: list[list[int]] | None = None

    def wave(self, names: Sequence[str]) -> None:
        rows: dict[str, dict[str, Any]] = {}
        engines: dict[str, Engine] = {}
        if self.deadline - time.monotonic() < LEAST_SECONDS:
            for name in names:
                self.report({"name": name, "ok": False, "error": LATE}, f"{name}: {LATE}")
            return
        try:
            for i, name in enumerate(names):
                section, own = ROWS[name]
                rows[name] = {"name": name, "ok": False, "section": section, "engine": own}
                engines[name] = self._start(name, section, own, f"speed-{i}")
            begun = time.monotonic()
            for name in names:
                # Every engine is built before the first one is timed.
                self._try(rows[name], lambda n=name: self._built(rows[n], engines[n], begun))
            for name in names:
                if "error" not in rows[name]:
                    self._try(rows[name], lambda n=name: self._throughput(rows[n], engines[n]))
            self._turns(rows, engines)
        finally:
            for engine in engines.values():
                engine.stop()
        for name in names:
            row = rows[name]
            row["ok"] = "error" not in row
            self.report(row, _line(row))

    def _try(self, row: dict[str, Any], work: Any) -> None:
        try:
            work()
        except EngineFailed as error:
            row["error"] = str(error)
            self._say(f"{row['name']}: {str(error).splitlines()[0]}")

    def _say(self, line: str) -> None:
        """Print progress: a wave takes minutes."""
        print(f"speed: {line}", flush=True)

    def _start(
        self, name: str, section: Mapping[str, Any] | None, own: Mapping[str, Any], slot: str
    ) -> Engine:
        # Long enough to be evicted while it is prefilled and while it decodes.
        warm = {"requests": requests(self.model, 4, self.load.prompt, 160, seed=1), "seconds": 30.0}
        return Engine(
            self.machine,
            f"speed {name}",
            self.model,
            section,
            engine_arguments(self.machine, self.model, self.load, self.dummy, own),
            slot=slot,
            warm=warm,
        )

    def _built(self, row: dict[str, Any], engine: Engine, begun: float) -> None:
        row |= engine.ready(min(self.deadline, begun + BUILD_SECONDS))
        self._say(f"{row['name']}: built in {row['start_s']} s")

    def _throughput(self, row: dict[str, Any], engine: Engine) -> None:
        load = self.load
        left = self.deadline - time.monotonic()
        if left < 5:
            raise EngineFailed(LATE)
        longest = min(load.row_seconds, left)
        asked = requests(self.model, load.requests, load.prompt, load.output, seed=2)
        work = {"requests": asked, "seconds": longest}
        result = engine.ask(work, time.monotonic() + longest + 20)
        row |= measured(result, load, engine.facts)
        if row["name"] == STOCK:
            self.stock_tokens = None if self.dummy else result["tokens"]
        self.rate[row["name"]] = row["tokens_per_s"]
        row["ratio"] = self._ratio(row["tokens_per_s"], STOCK)
        if self.stock_tokens is not None:
            # Made-up weights repeat one token, which would show nothing.
            row["same_tokens"] = result["tokens"] == self.stock_tokens
        if row["name"] in TARGETS:
            base, aim = TARGETS[row["name"]]
            row["target"] = {"of": base, "ratio": aim}
        if row["errors"]:
            row["error"] = f"policies count {row['errors']} errors"
        elif row["finished"] < load.requests and not row["stopped"]:
            row["error"] = f"{row['finished']} of {load.requests} requests finished"
        self._say(_line(row))

    def _ratio(self, rate: float, of: str) -> float | None:
        return round(rate / self.rate[of], 3) if self.rate.get(of) else None

    def _turns(self, rows: dict[str, dict[str, Any]], engines: dict[str, Engine]) -> None:
        """Decode steps of a few short requests, which no policy evicts from, in turns."""
        alive = [name for name in engines if "step_ms" in rows[name]]
        times: dict[str, list[float]] = {name: [] for name in alive}
        for turn in range(DECODE_TURNS):
            for name in alive if turn % 2 == 0 else reversed(alive):
                if "error" not in rows[name] and self.deadline - time.monotonic() > 2:
                    self._try(
                        rows[name],
                        lambda n=name, t=turn: times[n].extend(self._turn(engines[n], t)),
                    )
        if STOCK in times:
            self.decode = times[STOCK]
        for name in alive:
            if times[name]:
                rows[name]["decode_ms"] = round(statistics.median(times[name]), 3)
                rows[name]["decode_turns_ms"] = times[name]
                if self.decode:
                    ratio = statistics.median(times[name]) / statistics.median(self.decode)
                    rows[name]["decode_ratio"] = round(ratio, 4)

    def _turn(self, engine: Engine, turn: int) -> list[float]:
        work = {
            "requests": requests(
                self.model, DECODE_REQUESTS, DECODE_PROMPT, DECODE_OUTPUT, seed=10 + turn
            )
        }
        result = engine.ask(work, min(self.deadline, time.monotonic() + 30))
        return [ms for n, ms in result["step_ms"].items() if int(n) == DECODE_REQUESTS]


def _line(row: Mapping[str, Any]) -> str:
    """A row as one line."""
    parts = [row["name"]]
    if "tokens_per_s" in row:
        parts.append(f"{row['tokens_per_s']:,.0f} tokens/s")
        if row.get("ratio") is not None:
            parts.append(f"{row['ratio']:.2f} of stock")
        parts.append(f"{row['running']} running")
        steps = ", ".join(f"{n}: {ms:.2f}" for n, ms in row["step_ms"].items())
        parts.append(f"step ms by batch {{{steps}}}")
        parts.append(f"{row['evictions']:.0f} evictions, {row['blocks_freed']:.0f} blocks freed")
    if "decode_ms" in row:
        ratio = f" ({row['decode_ratio']:.3f} of stock's)" if "decode_ratio" in row else ""
        parts.append(f"decode step at {DECODE_REQUESTS}: {row['decode_ms']:.2f} ms{ratio}")
    if row.get("stopped"):
        parts.append("stopped early")
    if "error" in row:
        parts.append(row["error"].splitlines()[0])
    if "runner" in row:
        parts.append(f"runner {row['runner']}, {row['graphs']}, {row['backend']}")
    return "; ".join(parts)


def load_facts(load: Load) -> dict[str, Any]:
    """The workload as the results state it."""
    return {**asdict(load), "kv_tokens": load.kv_tokens}
