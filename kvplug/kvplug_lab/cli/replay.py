"""``kvplug replay``: a workload in the real engine and in the simulator, side by side."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvplug.cli.refusals import refusing
from kvplug.cli.tables import print_table
from kvplug_lab.cli.inputs import check_outputs, model_directory
from kvplug_lab.cli.options import MODEL, Json, Model
from kvplug_lab.cli.outputs import bar, print_written

if TYPE_CHECKING:
    from kvplug_lab.engine.against_simulator import Compared

BLOCK = 32
"""Tokens per block; a size that vLLM supports on CPUs, too."""


def replay(
    trace: Annotated[
        Path | None,
        typer.Argument(
            metavar="TRACE",
            help="A trace, whose first requests are sent; by default conversations about real "
            "text.",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        str, typer.Option(metavar="NAME,...", help="Prefix-cache policies; lru always runs.")
    ] = "lru",
    blocks: Annotated[
        int, typer.Option(min=2, help=f"Blocks of the engine's pool, {BLOCK} tokens each.")
    ] = 150,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests sent together.")] = 1,
    sessions: Annotated[int, typer.Option(min=1, help="Conversations.")] = 12,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each.")] = 4,
    visitors: Annotated[int, typer.Option(min=0, help="Requests without a conversation.")] = 12,
    requests: Annotated[int, typer.Option(min=1, help="Requests taken from TRACE.")] = 200,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the conversations.")] = 0,
    model: Model = MODEL,
    json: Json = None,
) -> None:
    """Serve a workload under each policy at one cache size, and compare with the simulator.

    The engine's run is recorded and the simulator replays the recording, at the same capacity
    and with the same policy. Prints both hit rates and the prefill tokens the cache saved.
    """
    from kvplug.hosts.trace import traces
    from kvplug_lab.engine import against_simulator as host

    console = Console(soft_wrap=True)
    names = dict.fromkeys([host.BASELINE, *(n.strip() for n in policy.split(",") if n.strip())])
    with refusing(1):
        check_outputs(json=json)
        for name in names:
            host.choice_of(name)
        loaded = traces.read(trace) if trace is not None else None
        directory = model_directory(model)
        if loaded is not None:
            workload = host.from_trace(
                loaded,
                directory,
                block_size=BLOCK,
                requests=requests,
                longest=min(4096, (blocks // concurrency) * BLOCK - output_tokens),
                output_tokens=output_tokens,
                concurrency=concurrency,
            )
        else:
            workload = host.conversations(
                directory,
                sessions=sessions,
                turns=turns,
                visitors=visitors,
                output_tokens=output_tokens,
                concurrency=concurrency,
                seed=seed,
            )
        console.print(f"{workload.says}; a pool of {blocks} blocks of {BLOCK} tokens", markup=False)
        rows = []
        for name in names:
            with _shown(name, len(workload.requests)) as update:
                rows.append(
                    host.compare(
                        directory, workload, name, blocks, block_size=BLOCK, progress=update
                    )
                )
    print_table(console, table(rows))
    if json is not None:
        figures = {"workload": workload.says, "rows": [figures_of(r, rows[0]) for r in rows]}
        json.write_text(json_module.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print_written(console, "figures", json)


@contextmanager
def _shown(name: str, total: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Show a run's progress: a bar on a terminal, one line elsewhere."""
    with bar("{task.description}") as progress:
        task = progress.add_task(f"{name}: engine is starting", total=total)
        if progress.disable:
            typer.echo(f"{name}: {total} requests", err=True)

        def update(state: dict[str, Any]) -> None:
            if state["phase"] == "running":
                progress.update(task, description=name, completed=state["finished"])

        yield update


def figures_of(row: Compared, lru: Compared) -> dict[str, Any]:
    """One row's figures; those against stock are against the row of LRU."""
    return asdict(row) | {
        "engine_hit_rate": row.engine_rate,
        "simulated_hit_rate": row.simulated_rate,
        "kvplug_simulate_hit_rate": row.once_rate,
        "difference": row.engine_rate - row.simulated_rate,
        "prefill_tokens": row.computed_tokens,
        "saved_against_no_cache": row.cached_tokens,
        "saved_against_lru": lru.computed_tokens - row.computed_tokens,
    }


def table(rows: list[Compared]) -> Table:
    """The comparison; the first row is LRU's."""
    lru = rows[0]
    shown = Table(
        title=f"{lru.requests:,} requests, {lru.prompt_tokens:,} prompt tokens, "
        f"{lru.blocks} blocks",
        title_justify="left",
    )
    shown.add_column("policy")
    for column in (
        "hit rate,\nengine",
        "simu-\nlator",
        "points\napart",
        "stored\nonce",
        "prefill\ntokens",
        "saved",
        "against\nLRU",
        "evicted",
    ):
        shown.add_column(column, justify="right")
    for row in rows:
        fewer = lru.computed_tokens - row.computed_tokens
        shown.add_row(
            row.policy,
            f"{row.engine_rate:.4f}",
            f"{row.simulated_rate:.4f}",
            f"{100 * (row.engine_rate - row.simulated_rate):+.2f}",
            f"{row.once_rate:.4f}",
            f"{row.computed_tokens:,}",
            f"{row.cached_tokens / row.prompt_tokens:.1%}",
            f"{fewer / lru.computed_tokens:+.1%}" if row is not lru else "",
            f"{row.evicted:,}",
        )
    return shown
