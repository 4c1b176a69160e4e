"""``kvplug gain``: sequence policies and formats against stock vLLM in the same KV memory."""

from __future__ import annotations

import json as json_module
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvplug.cli.refusals import refusing
from kvplug.cli.tables import print_table
from kvplug.errors import KVPlugError
from kvplug_lab.cli.inputs import check_outputs, model_directory
from kvplug_lab.cli.options import MODEL, Json, Model
from kvplug_lab.cli.outputs import print_written, wide_console
from kvplug_lab.cpu_dtype import fast_dtype
from kvplug_lab.spread import Spread

if TYPE_CHECKING:
    from kvplug_lab.engine.trial import TrialRequest, TrialResult

WIDTH = 240
"""Columns of the table where there is no terminal."""

BLOCK = 32
"""Tokens per block; a size that vLLM supports on CPUs, too."""

COLUMNS: dict[str, tuple[str, str]] = {
    "kv_mib": ("KV, MiB", ".1f"),
    "held_mib": ("of it beside pages", ".1f"),
    "pool_tokens": ("pool, tokens", ",.0f"),
    "pool_ratio": ("of stock", ".2f"),
    "requests": ("running at once", ".2f"),
    "peak_requests_running": ("at most", ".0f"),
    "kv_tokens_per_running_request": ("KV tokens per request", ",.0f"),
    "preemptions": ("preemptions", ".0f"),
    "output_tokens_per_second": ("output tokens/s", ".1f"),
    "ratio": ("of stock", ".2f"),
    "cpu_ratio": ("per CPU second, of stock", ".2f"),
    "greedy_agreement": ("as the full cache", ".0%"),
    "decisions": ("evictions", ",.0f"),
}
"""Figure to its heading and format, in the order shown."""

SPREAD = ("output_tokens_per_second", "ratio", "cpu_ratio")
"""Figures shown with the lowest and the highest of several runs."""


def gain(
    policy: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="Sequence policies, or `all`; all of them if no --format is given.",
        ),
    ] = "",
    format: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:OPTION=VALUE...],...",
            help="Formats as `kvplug eval` takes them, or `all`; may be repeated.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[int, typer.Option(min=1, help="Tokens each request keeps.")] = 512,
    blocks: Annotated[
        int,
        typer.Option(
            min=16, help=f"KV memory of every engine, as blocks of {BLOCK} tokens on stock vLLM."
        ),
    ] = 128,
    long_prompts: Annotated[int, typer.Option(min=0, help="Requests with long prompts.")] = 6,
    long_outputs: Annotated[int, typer.Option(min=0, help="Requests with long outputs.")] = 6,
    words: Annotated[int, typer.Option(min=1, help="Words of a long prompt.")] = 800,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a long output.")] = 448,
    rounds: Annotated[
        int, typer.Option(min=1, help="Times every engine runs, stock between the policies.")
    ] = 1,
    dtype: Annotated[
        str,
        typer.Option(
            help="Type of weights, activations and stock's KV, as vLLM takes it; auto: bfloat16, "
            "or float32 on a CPU without AVX-512."
        ),
    ] = "auto",
    model: Model = MODEL,
    json: Json = None,
) -> None:
    """Serve long prompts and long outputs together, on stock vLLM and under each policy or format.

    Every engine gets the same requests at once and the same bytes: vLLM makes of them as many
    blocks as fit, and what a policy holds beside its pages (recent tokens, tables) is taken off
    before; an engine that serves nothing tells how much. Stock runs first and between the others;
    throughputs are ratios to the mean of the runs of stock before and after. The pool's size is
    the one that vLLM reports when it starts.
    """
    from kvplug.registry import plugins
    from kvplug_lab.fidelity import variants as wanted

    console = wide_console(WIDTH)
    asked = policy or ("" if format else "all")
    sections = {
        name: section_of(name, budget) for name in _names(asked, plugins().registry) if asked
    }
    with refusing():
        check_outputs(json=json)
        sections |= {
            own.label: {"format": {"use": own.policy.name, **own.options}}
            for own in wanted.formats(format or [])
        }
    with refusing(1):
        directory = model_directory(model)
        work = _work(long_prompts, long_outputs, words, output_tokens)
        dtype = fast_dtype() if dtype == "auto" else dtype
        figures = _measure(console, directory, work, sections, blocks, rounds, dtype)
    print_table(console, _table(figures))
    if json is not None:
        text = {"budget": budget, "blocks": blocks, "block_size": BLOCK, "runs": figures}
        json.write_text(json_module.dumps(text, indent=1), encoding="utf-8")
        print_written(console, "figures", json)


def _names(asked: str, registry: Any) -> list[str]:
    from kvplug.contract import Kind

    known = registry.names(Kind.SEQUENCE)
    every = registry.ready(Kind.SEQUENCE, "budget", "sink", "window")
    names = every if asked == "all" else [name for name in asked.split(",") if name]
    for name in names:
        if name not in known:
            fix = registry.choose(Kind.SEQUENCE, name)
            typer.echo(f"--policy: unknown sequence policy {name!r}. Fix: {fix}.", err=True)
            raise typer.Exit(2)
    return list(names)


def _work(prompts: int, outputs: int, words: int, output_tokens: int) -> list[TrialRequest]:
    from kvplug_lab import texts
    from kvplug_lab.engine.trial import TrialRequest

    text = texts.shakespeare()
    long = [TrialRequest(p, 48) for p in texts.passages(text, prompts, words, 0)] if prompts else []
    short = texts.passages(text, outputs, 80, 1) if outputs else []
    many = [TrialRequest(p, output_tokens) for p in short]
    mixed = [r for pair in zip(long, many, strict=False) for r in pair]
    rest = min(len(long), len(many))
    return mixed + long[rest:] + many[rest:]


def section_of(name: str, budget: int) -> dict[str, Any]:
    """The ``kvplug`` section that gives a policy a budget in tokens."""
    from kvplug.contract import Kind, ScoringPolicy
    from kvplug.registry import plugins

    policy = plugins().registry.get(Kind.SEQUENCE, name)
    if policy is not None and issubclass(policy, ScoringPolicy):
        return {"sequence": {"use": name, "budget": budget}}
    return {"sequence": {"use": name, "sink": BLOCK, "window": budget - BLOCK}}


def _measure(
    console: Console,
    model: Path,
    work: list[TrialRequest],
    sections: dict[str, dict[str, Any]],
    blocks: int,
    rounds: int,
    dtype: str,
) -> list[dict[str, Any]]:
    from kvplug_lab.engine.trial import TrialSpec, pool_tokens, run_fresh

    memory = blocks * _block_bytes(model, dtype)
    engine = {
        "block_size": BLOCK,
        # With room to hold a longest request beside what a policy holds.
        "max_model_len": (blocks - blocks // 8 - 1) * BLOCK,
        "max_num_batched_tokens": 512,
        "max_num_seqs": max(len(work), 1),
        "enable_prefix_caching": True,
        "dtype": dtype,
    }

    def run(name: str, requests: list[TrialRequest], room: int) -> tuple[TrialResult, int]:
        own = engine | {"kv_cache_memory_bytes": room}
        with tempfile.TemporaryDirectory(prefix="kvplug-gain-") as scratch:
            log = Path(scratch) / "engine.log"
            result = run_fresh(TrialSpec(str(model), requests, own, sections.get(name)), log=log)
            return result, pool_tokens(log.read_text(encoding="utf-8", errors="replace"))

    held = {"stock": 0}
    for name in sections:
        held[name] = run(name, [], memory)[0].held_bytes
        if held[name] >= memory:
            raise KVPlugError(
                f"{name} holds {held[name] / 2**20:.1f} MiB beside pages, and all of the memory is "
                f"{memory / 2**20:.1f} MiB; give more --blocks"
            )
    runs: list[tuple[str, int, TrialResult]] = []
    pools = []
    order = [n for i, name in enumerate(sections) for n in (["stock"] * (i % 5 == 0) + [name])]
    for name in [*order * rounds, "stock"]:
        section = sections.get(name)
        groups = 1 if section is None else _groups(section, model)
        result, pool = run(name, work, memory - held[name])
        runs.append((name, groups, result))
        pools.append(pool)
        console.print(
            f"{name}: {result.output_tokens_per_second:.1f} output tokens/s, at most "
            f"{result.peak_running} running",
            markup=False,
            soft_wrap=True,
        )
    stock = runs[0][2]
    rows = []
    for i, ((name, groups, result), pool) in enumerate(zip(runs, pools, strict=True)):
        own = compare(stock, result)["kvplug"]
        busy = [s.running for s in result.steps if s.running]
        own["requests"] = sum(busy) / len(busy)
        own["kv_tokens_per_running_request"] /= groups
        own["held_mib"] = result.held_bytes / 2**20
        own["kv_mib"] = result.num_blocks * result.block_bytes / 2**20 + own["held_mib"]
        own["pool_tokens"] = pool
        own["pool_ratio"] = pool / pools[0]
        near = _beside(i, [n == "stock" for n, _, _ in runs])
        for figure, of in (("ratio", _per_second), ("cpu_ratio", _per_cpu_second)):
            own[figure] = of(result) / statistics.mean(of(runs[n][2]) for n in near)
        own["cpu_seconds"] = result.cpu_seconds
        counters = result.reports[0]["counters"] if result.reports else {}
        own["decisions"] = counters.get("evictions", 0) / groups
        rows.append({"policy": name, **own, "counters": counters})
    return rows


def agreement(stock: TrialResult, kvplug: TrialResult) -> float:
    """Share of stock's greedy tokens that the other run gives before its first difference."""
    same = 0
    for theirs, ours in zip(stock.answers, kvplug.answers, strict=True):
        for a, b in zip(theirs.token_ids, ours.token_ids, strict=True):
            if a != b:
                break
            same += 1
    return same / sum(len(a.token_ids) for a in stock.answers)


def compare(stock: TrialResult, kvplug: TrialResult) -> dict[str, dict[str, float]]:
    """The figures of both runs, by name."""

    def of(result: TrialResult) -> dict[str, float]:
        tokens = sum(a.prompt_tokens + len(a.token_ids) for a in result.answers)
        return {
            "pool_blocks": result.num_blocks,
            "block_kib": result.block_bytes / 1024,
            "peak_blocks_held": result.peak_held,
            "most_blocks_of_one_request": result.largest,
            "kv_tokens_per_running_request": result.tokens_per_request,
            "peak_requests_running": result.peak_running,
            "preemptions": result.preemptions,
            "seconds": result.seconds,
            "output_tokens_per_second": result.output_tokens_per_second,
            "total_tokens_per_second": tokens / result.seconds,
            "blocks_handed_to_others_while_running": result.handed_over,
        }

    figures = {"stock": of(stock), "kvplug": of(kvplug)}
    figures["stock"]["greedy_agreement"] = 1.0
    figures["kvplug"]["greedy_agreement"] = agreement(stock, kvplug)
    identical = [
        a.token_ids == b.token_ids for a, b in zip(stock.answers, kvplug.answers, strict=True)
    ]
    figures["stock"]["identical_answers"] = len(identical)
    figures["kvplug"]["identical_answers"] = sum(identical)
    return figures


def _per_second(result: TrialResult) -> float:
    return result.output_tokens_per_second


def _per_cpu_second(result: TrialResult) -> float:
    return sum(len(a.token_ids) for a in result.answers) / max(result.cpu_seconds, 1e-9)


def _beside(i: int, stock: Sequence[bool]) -> list[int]:
    """The last run of stock before run ``i`` and the first one after it; those beside it, for a run
    of stock itself if there are any."""
    before = [n for n in range(i) if stock[n]][-1:]
    after = [n for n in range(i + 1, len(stock)) if stock[n]][:1]
    return before + after or [i]


def _block_bytes(model: Path, dtype: str) -> int:
    """Bytes of a block of all layers on stock vLLM."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    config = getattr(config, "text_config", config)
    heads, layers = int(config.num_attention_heads), int(config.num_hidden_layers)
    head_size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return BLOCK * layers * kv_heads * head_size * 2 * (4 if dtype in ("float32", "float") else 2)


def _groups(section: dict[str, Any], model: Path) -> int:
    """KV-cache groups a section splits a model's layers into."""
    from transformers import AutoConfig

    from kvplug.contract import EngineView, Kind, LayerView, ScoringPolicy
    from kvplug.parser import load_deployment

    layers = int(AutoConfig.from_pretrained(model).num_hidden_layers)
    view = EngineView(
        block_size=BLOCK, layers=tuple(LayerView(i, num_layers=layers) for i in range(layers))
    )
    choice = load_deployment(section, engine=view).choice(Kind.SEQUENCE)
    policy = choice.build(view) if choice is not None else None
    if not isinstance(policy, ScoringPolicy):
        return 1
    return len({policy.share(layer) for layer in view.layers})


def _table(rows: list[dict[str, Any]]) -> Table:
    """One row a policy: medians of its runs, and the extremes of what differs from run to run."""
    table = Table(title="the same requests in the same KV memory")
    table.add_column("policy")
    for heading, _ in COLUMNS.values():
        table.add_column(heading, justify="right")
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault(row["policy"], []).append(row)
    for name, own in runs.items():
        cells = []
        for key, (_, form) in COLUMNS.items():
            spread = Spread.of([run[key] for run in own], tail=0.0)
            several = key in SPREAD and len(own) > 1
            cells.append(spread.text(form) if several else format(spread.median, form))
        table.add_row(name, *cells)
    return table
