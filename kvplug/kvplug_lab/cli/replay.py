"""``kvplug replay``: a workload in the real engine and in the simulator, side by side."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from kvplug_lab.engine.replay import Compared

BLOCK = 32
"""Tokens per block: one that vLLM takes on a CPU, too."""


def replay(
    trace: Annotated[
        Path | None,
        typer.Argument(
            metavar="TRACE",
            help="A trace whose first requests are sent; conversations about real text if left "
            "out.",
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
    visitors: Annotated[int, typer.Option(min=0, help="Requests that stay alone.")] = 12,
    requests: Annotated[int, typer.Option(min=1, help="Requests taken from TRACE.")] = 200,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the conversations.")] = 0,
    model: Annotated[
        Path | None, typer.Option(help="Model directory; SmolLM2-135M-Instruct by default.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Serve a workload under each policy at one cache size, and compare with the simulator.

    The engine's run is recorded and the simulator replays the recording, at the same capacity
    and with the same policy. Prints both hit rates and the prefill tokens the cache saved.
    """
    from kvplug.errors import DeploymentError, KVPlugError
    from kvplug.hosts.trace import traces
    from kvplug_lab import models
    from kvplug_lab.engine import replay as host

    console = Console(soft_wrap=True)
    names = dict.fromkeys([host.BASELINE, *(n.strip() for n in policy.split(",") if n.strip())])
    try:
        if json is not None and (json.is_dir() or not json.parent.is_dir()):
            raise host.ReplayError(f"--json: {json} cannot be written: its folder must exist")
        for name in names:
            host.choice_of(name)
        loaded = traces.read(trace) if trace is not None else None
        directory = model or models.smollm2(progress=lambda line: console.print(line, markup=False))
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
            with _Shown(name, len(workload.requests)) as told:
                rows.append(
                    host.compare(directory, workload, name, blocks, block_size=BLOCK, progress=told)
                )
    except DeploymentError as error:
        for refusal in error.refusals:
            typer.echo(refusal.text(error.source), err=True)
        raise typer.Exit(2) from None
    except (host.ReplayError, traces.TraceError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    except KVPlugError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    console.print(table(rows))
    if json is not None:
        figures = {"workload": workload.says, "rows": [figures_of(r, rows[0]) for r in rows]}
        json.write_text(json_module.dumps(figures, indent=1) + "\n", encoding="utf-8")
        console.print(f"figures: {json}", markup=False)


class _Shown:
    """A bar on a terminal, a line per run elsewhere."""

    def __init__(self, name: str, total: int):
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(f"{name}: engine is starting", total=total)
        self._name = name
        if not console.is_terminal:
            typer.echo(f"{name}: {total} requests", err=True)

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        self._bar.start()
        return self._told

    def _told(self, what: dict[str, Any]) -> None:
        if what["phase"] == "running":
            self._bar.update(self._task, description=self._name, completed=what["finished"])

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


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
