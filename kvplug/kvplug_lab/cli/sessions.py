"""``kvplug sessions``: sessions that return after their KV left the pool, under several tiers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from kvplug.cli.refusals import refusing
from kvplug.cli.tables import print_table
from kvplug_lab.cli.inputs import InvalidInput, check_outputs, model_directory
from kvplug_lab.cli.options import MODEL, Json, Model
from kvplug_lab.cli.outputs import bar, print_written, wide_console

if TYPE_CHECKING:
    from kvplug_lab.engine.sessions import Restarted, Run, Variant

DEFAULT = ("{tiers: [{host: {size: '{host}'}}]}",)


def sessions(
    section: Annotated[
        list[str] | None,
        typer.Option(
            "--section",
            metavar="YAML",
            help="A kvplug section to measure, NAME=YAML or YAML alone; once for each. {host} is "
            "the bytes of host memory, {folder} a folder.",
            show_default="one host tier",
        ),
    ] = None,
    sessions: Annotated[int, typer.Option(min=1, help="Sessions that return.")] = 10,
    turns: Annotated[int, typer.Option(min=2, help="Turns of each.")] = 4,
    turn_tokens: Annotated[int, typer.Option(min=1, help="Tokens that a turn adds.")] = 256,
    visitors: Annotated[
        int, typer.Option(min=0, help="Requests of each round that never return.")
    ] = 3,
    times: Annotated[
        float, typer.Option(min=0.1, help="Working set over the pool's memory.")
    ] = 5.0,
    host_share: Annotated[
        float, typer.Option(min=0.01, help="Host memory over the working set.")
    ] = 1.25,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 8,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests sent together.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each variant, interleaved.")] = 3,
    stock: Annotated[
        bool, typer.Option(help="Also run stock vLLM, without and with its own offload.")
    ] = True,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart", help="Kill the engine and measure the first tokens after its restart."
        ),
    ] = False,
    lengths: Annotated[
        str, typer.Option(metavar="N,...", help="Tokens of the prompts of --restart.")
    ] = "1024,2048,4096,8064",
    model: Model = MODEL,
    json: Json = None,
) -> None:
    """Serve sessions whose KV does not fit the pool, under each section, and compare.

    Prints time to first token of the turns that return, hit rates, tokens a second, and what was
    stored in vain. With --restart: the same after the engine was killed, by length of prompt.
    """
    from kvplug_lab.engine import sessions as host

    console = Console(soft_wrap=True)
    with refusing(1):
        check_outputs(json=json)
        variants = [_variant(text) for text in section or DEFAULT]
        directory = model_directory(model)
        if restart:
            sizes = [int(n) for n in lengths.split(",")]
            say = lambda text: typer.echo(text, err=True)  # noqa: E731
            made: dict[str, Any] = {"restart": []}
            for variant in variants:
                found = host.restart(directory, variant.section or {}, sizes, repeat, say)
                print_table(wide_console(100), restart_table(variant.name, found))
                made["restart"].append(
                    {
                        "variant": variant.name,
                        "section": variant.section,
                        "rows": [vars(one) for one in found],
                    }
                )
        else:
            if stock:
                variants = [
                    host.Variant(host.STOCK),
                    host.Variant(host.OFFLOAD, offload=True),
                    *variants,
                ]
            work = host.workload(
                directory,
                sessions=sessions,
                turns=turns,
                turn_tokens=turn_tokens,
                visitors=visitors,
                output_tokens=output_tokens,
                concurrency=concurrency,
            )
            blocks = host.pool_blocks(work, times, concurrency)
            about = {
                "sessions": sessions,
                "turns": turns,
                "turn_tokens": turn_tokens,
                "visitors": visitors,
                "output_tokens": output_tokens,
                "concurrency": concurrency,
                "tokens": work.tokens,
                "pool_tokens": blocks * host.BLOCK,
            }

            def write(made: dict[str, Any]) -> None:
                if json is not None:
                    json.write_text(host.as_json(made | {"workload": about}), encoding="utf-8")

            made = _measured(directory, work, variants, blocks, host_share, repeat, write)
            print_table(wide_console(130), table(made))
            made["workload"] = about
    if json is not None:
        json.write_text(host.as_json(made), encoding="utf-8")
        print_written(console, "figures", json)


def _variant(text: str) -> Variant:
    from kvplug_lab.engine.sessions import Variant

    name, equals, rest = text.partition("=")
    if not equals or set(name) & set("{}:"):
        name, rest = "", text
    try:
        section = yaml.safe_load(rest)
    except yaml.YAMLError as error:
        raise InvalidInput(f"--section: {rest!r} is no YAML ({error})") from error
    if not isinstance(section, dict):
        raise InvalidInput(f"--section: {rest!r} is no kvplug section, a mapping of kinds")
    return Variant(name or "kvplug: " + ", ".join(_tiers(section)), section)


def _tiers(section: dict[str, Any]) -> list[str]:
    tiers = section.get("tiers", [])
    return [next(iter(one), "") for one in tiers if isinstance(one, dict)] or list(section)


def _measured(
    model: Path,
    work: Any,
    variants: list[Variant],
    blocks: int,
    host_share: float,
    repeat: int,
    write: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Figures of all rounds; those of the rounds so far are written after each."""
    from kvplug_lab.engine import sessions as host

    runs: dict[str, list[host.Run]] = {variant.name: [] for variant in variants}
    host_bytes = int(host_share * work.tokens * bytes_per_token(model))
    with bar("{task.description}") as progress:
        task = progress.add_task("", total=repeat * len(variants))
        for turn, variant in host.interleaved(variants, repeat):
            progress.update(task, description=variant.name)
            if progress.disable:
                typer.echo(f"round {turn + 1}: {variant.name}", err=True)
            runs[variant.name].append(host.run(model, work, variant, blocks, host_bytes))
            progress.advance(task)
            if all(len(own) == turn + 1 for own in runs.values()):
                write(_figures(variants, runs, host_bytes))
    return _figures(variants, runs, host_bytes)


def _figures(
    variants: list[Variant], runs: dict[str, list[Run]], host_bytes: int
) -> dict[str, Any]:
    from kvplug_lab.engine import sessions as host

    rows = [host.summary(variant, runs[variant.name]) for variant in variants]
    base = runs[variants[0].name][0].tokens
    for row, variant in zip(rows, variants, strict=True):
        row["same_answers"] = sum(
            mine == theirs
            for one in runs[variant.name]
            for mine, theirs in zip(one.tokens, base, strict=True)
        ) / (len(base) * len(runs[variant.name]))
    return {"rows": rows, "host_bytes": host_bytes, "rounds": len(runs[variants[0].name])}


def bytes_per_token(model: Path) -> int:
    """Bytes of KV of a token in all layers, in two bytes an element."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(model)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * 2 * config.num_hidden_layers * config.num_key_value_heads * size)


def table(made: dict[str, Any]) -> Table:
    """What the variants showed, a row each."""
    found = Table()
    heads = ("", "TTFT of returns", "p95", "hit rate", "from tiers", "prompt tok/s", "stored")
    for name in (*heads, "read again", "same answers"):
        found.add_column(name, justify="left" if not name else "right")
    for row in made["rows"]:
        stored, useful = row["stored"], row["useful"]
        found.add_row(
            row["variant"],
            _ms(row["ttft_median"]),
            _ms(row["ttft_p95"]),
            f"{row['hit_rate']['median']:.1%}",
            f"{row['from_tiers']['median']:.1%}",
            f"{row['prompt_tokens_per_second']['median']:,.0f}",
            f"{row['stored_bytes'] / 2**20:,.1f} MiB" if stored >= 0 else "",
            f"{useful / stored:.0%}" if stored > 0 else "",
            f"{row['same_answers']:.0%}",
        )
    return found


def _ms(spread: dict[str, float]) -> str:
    median, low, high = (1e3 * spread[name] for name in ("median", "low", "high"))
    return f"{median:,.0f} [{low:,.0f}, {high:,.0f}] ms"


def restart_table(name: str, rows: list[Restarted]) -> Table:
    """Times to first token after a restart, a row for each length."""
    from kvplug_lab.spread import Spread

    found = Table(title=name)
    for head in ("tokens", "computed", "restored", "ratio", "not computed"):
        found.add_column(head, justify="right")
    for row in rows:
        computed, restored = Spread.of(row.computed), Spread.of(row.restored)
        found.add_row(
            f"{row.length:,}",
            f"{computed.text('.2f')} s",
            f"{restored.text('.2f')} s",
            f"{computed.median / restored.median:.1f}",
            f"{row.cached:,}",
        )
    return found
