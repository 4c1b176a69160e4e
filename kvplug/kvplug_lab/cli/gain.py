"""``kvplug gain``: sequence policies and formats against stock vLLM in the same KV memory."""

from __future__ import annotations

import json as json_module
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvplug.cli.refusals import refusing
from kvplug_lab.cli.inputs import check_outputs, smollm2
from kvplug_lab.cli.options import Json, Model
from kvplug_lab.cli.outputs import print_written

if TYPE_CHECKING:
    from kvplug_lab.engine.trial import TrialRequest

BLOCK = 32
"""Tokens per block; a size that vLLM supports on CPUs, too."""

COLUMNS: dict[str, tuple[str, str]] = {
    "pool_tokens": ("pool, tokens", ",.0f"),
    "pool_ratio": ("of stock", ".2f"),
    "requests": ("running at once", ".2f"),
    "peak_requests_running": ("at most", ".0f"),
    "kv_tokens_per_running_request": ("KV tokens per request", ",.0f"),
    "preemptions": ("preemptions", ".0f"),
    "output_tokens_per_second": ("output tokens/s", ".1f"),
    "ratio": ("of stock", ".2f"),
    "greedy_agreement": ("as the full cache", ".0%"),
    "decisions": ("evictions", ",.0f"),
}
"""Figure to its heading and format, in the order shown."""


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
        int, typer.Option(min=2, help=f"Blocks of the engine's pool, {BLOCK} tokens each.")
    ] = 128,
    long_prompts: Annotated[int, typer.Option(min=0, help="Requests with long prompts.")] = 6,
    long_outputs: Annotated[int, typer.Option(min=0, help="Requests with long outputs.")] = 6,
    words: Annotated[int, typer.Option(min=1, help="Words of a long prompt.")] = 800,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a long output.")] = 448,
    rounds: Annotated[
        int, typer.Option(min=1, help="Times every engine runs, stock between the policies.")
    ] = 1,
    model: Model = None,
    json: Json = None,
) -> None:
    """Serve long prompts and long outputs together, on stock vLLM and under each policy or format.

    Every engine has the same KV memory and gets the same requests at once. Stock runs first and
    between the others; throughputs are ratios to the median of its runs. The pool's size is the
    one that vLLM reports when it starts.
    """
    from kvplug.registry import plugins
    from kvplug_lab.fidelity import variants as wanted

    console = Console(soft_wrap=True)
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
        directory = model or smollm2(console)
        work = _work(long_prompts, long_outputs, words, output_tokens)
        figures = _measure(console, directory, work, sections, blocks, rounds)
    console.print(_table(figures))
    if json is not None:
        text = {"budget": budget, "blocks": blocks, "block_size": BLOCK, "runs": figures}
        json.write_text(json_module.dumps(text, indent=1), encoding="utf-8")
        print_written(console, "figures", json)


def _names(asked: str, registry: Any) -> list[str]:
    from kvplug.contract import Kind

    known = registry.names(Kind.SEQUENCE)
    names = known if asked == "all" else [name for name in asked.split(",") if name]
    for name in names:
        if name not in known:
            message = f"--policy: unknown sequence policy {name!r}; installed: {', '.join(known)}."
            typer.echo(message, err=True)
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
) -> list[dict[str, Any]]:
    from kvplug_lab.cli.demo import compare
    from kvplug_lab.engine.trial import TrialResult, TrialSpec, pool_tokens, run_fresh

    engine = {
        "block_size": BLOCK,
        "max_model_len": (blocks - 1) * BLOCK,
        "max_num_batched_tokens": 512,
        "enable_prefix_caching": True,
    }
    runs: list[tuple[str, int, TrialResult]] = []
    order = [n for i, name in enumerate(sections) for n in (["stock"] * (i % 5 == 0) + [name])]
    block_bytes, pools = 0, []
    for name in [*order, "stock"] * rounds:
        section = sections.get(name)
        groups = 1 if section is None else _groups(section, model)
        # Layers in several groups have blocks of their own: more of them in the same memory.
        room = blocks * groups
        if section is not None and "format" in section:
            room = blocks * block_bytes // _block_bytes(section, model)
        own_engine = engine | {"num_gpu_blocks_override": room + 1}
        with tempfile.TemporaryDirectory(prefix="kvplug-gain-") as scratch:
            log = Path(scratch) / "engine.log"
            result = run_fresh(TrialSpec(str(model), work, own_engine, section), log=log)
            pools.append(pool_tokens(log.read_text(encoding="utf-8", errors="replace")))
        if section is None:
            block_bytes = result.block_bytes
        runs.append((name, groups, result))
        console.print(
            f"{name}: {result.output_tokens_per_second:.1f} output tokens/s, at most "
            f"{result.peak_running} running",
            markup=False,
        )
    stock = next(result for name, _, result in runs if name == "stock")
    base = statistics.median(r.output_tokens_per_second for n, _, r in runs if n == "stock")
    rows = []
    for (name, groups, result), pool in zip(runs, pools, strict=True):
        own = compare(stock, result)["kvplug"]
        busy = [s.running for s in result.steps if s.running]
        own["requests"] = sum(busy) / len(busy)
        own["kv_tokens_per_running_request"] /= groups
        own["kv_mib"] = result.num_blocks * result.block_bytes / 2**20
        own["pool_tokens"] = pool
        own["pool_ratio"] = pool / pools[0]
        own["ratio"] = own["output_tokens_per_second"] / base
        counters = result.reports[0]["counters"] if result.reports else {}
        own["decisions"] = counters.get("evictions", 0) / groups
        rows.append({"policy": name, **own, "counters": counters})
    return rows


def _block_bytes(section: dict[str, Any], model: Path) -> int:
    """Bytes of a block of all layers under a section's format."""
    from transformers import AutoConfig

    from kvplug.contract import EngineView, FormatPolicy, Kind, LayerView
    from kvplug.fingerprint import model_fingerprint
    from kvplug.parser import load_deployment

    config = AutoConfig.from_pretrained(model)
    heads, layers = int(config.num_attention_heads), int(config.num_hidden_layers)
    head_size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    view = EngineView(
        block_size=BLOCK,
        layers=tuple(
            LayerView(i, layers, kv_heads, heads, head_size, "bfloat16") for i in range(layers)
        ),
        model=model_fingerprint(model),
    )
    choice = load_deployment(section, engine=view).choice(Kind.FORMAT)
    assert choice is not None
    policy = choice.build(view)
    assert isinstance(policy, FormatPolicy)
    return BLOCK * sum(policy.layout(layer).token_bytes(layer) for layer in view.layers)


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
    table = Table(title="the same requests in the same KV memory")
    table.add_column("policy")
    for heading, _ in COLUMNS.values():
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["policy"], *(format(row[key], form) for key, (_, form) in COLUMNS.items())
        )
    return table
