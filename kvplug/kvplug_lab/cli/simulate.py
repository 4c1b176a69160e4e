"""``kvplug simulate``: hit rates of prefix-cache policies on traces, without an engine."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvplug.cli.refusals import refusing
from kvplug.cli.tables import print_table
from kvplug_lab.cli.inputs import PLOTS, InvalidInput, check_outputs, check_plot
from kvplug_lab.cli.options import Json
from kvplug_lab.cli.outputs import bar, print_written, wide_console

if TYPE_CHECKING:
    from kvplug.contract import EngineView, PrefixCachePolicy
    from kvplug.hosts.trace.simulator import ReplayResult
    from kvplug.hosts.trace.traces import Trace

LINES = ("lru", "min")
"""Every run is compared with these: the order of stock vLLM, and the offline optimum."""


def simulate(
    traces: Annotated[
        list[Path],
        typer.Argument(
            metavar="TRACE...",
            help="Traces: .npz files, or .jsonl files in Mooncake's format.",
            show_default=False,
        ),
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:OPTION=VALUE...],...",
            help="Policies, e.g. lru,lfu:half_life=1000, or a deployment file; may be repeated. "
            "`min` is the offline optimum. Every installed policy by default.",
            show_default=False,
        ),
    ] = None,
    capacity: Annotated[
        str,
        typer.Option(
            metavar="BLOCKS|PERCENT%,...",
            help="Cache sizes, in blocks or as a share of the trace's distinct blocks.",
        ),
    ] = "1%,2%,5%,10%",
    json: Json = None,
    plot: Annotated[
        Path | None,
        typer.Option(help=f"Draw hit rate against capacity ({', '.join(PLOTS)})."),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens per block of a .jsonl; an .npz states its own.",
            show_default="512 of Mooncake's, 16 of Bailian's",
        ),
    ] = None,
    tiers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:size=SIZE[:gbit=N][:latency=SECONDS][:coded=RATIO],...",
            help="Tiers below the pool, fastest first, e.g. host:size=5%:gbit=100; may be "
            "repeated. Policies are then the pool's order, LRU by default.",
            show_default=False,
        ),
    ] = None,
    lifecycle: Annotated[
        str,
        typer.Option(
            metavar="NAME[:OPTION=VALUE...],...",
            help="With --tiers: lifecycle policies; `eager` stores all as soon as it is computed.",
        ),
    ] = "eager,everything,watermarks,ladder",
    order: Annotated[
        str,
        typer.Option(
            metavar="NAME[:OPTION=VALUE...],...",
            help="With --tiers: orders that chunks leave the tiers in.",
        ),
    ] = "lru",
    gbit: Annotated[
        str,
        typer.Option(
            metavar="N,...", help="With --tiers: Gbit/s of every line, in place of their own."
        ),
    ] = "",
    bytes_per_token: Annotated[
        int, typer.Option(min=1, help="With --tiers: bytes of a token's KV in all layers.")
    ] = 131_072,
    prefill: Annotated[
        float, typer.Option(min=1, help="With --tiers: tokens a second of a short prefill.")
    ] = 10_000,
    quadratic: Annotated[
        float,
        typer.Option(
            min=1, help="With --tiers: tokens of context at which attending doubles that time."
        ),
    ] = 24_576,
) -> None:
    """Replay traces through the policy objects an engine would run, and print their hit rates.

    LRU (the order of stock vLLM) and MIN (the offline optimum) are in every table. An invalid
    trace, policy, capacity or file is reported in one message, with exit code 2.

    With --tiers, the pool stands above tiers with lines of the given speed, and the table shows
    what is loaded, computed, stored and stored in vain, and the time to the first token that this
    makes by a model of costs.
    """
    from kvplug.hosts.trace import traces as reader
    from kvplug.hosts.trace.simulator import Replay

    with refusing():
        check_outputs(json=json, plot=plot)
        check_plot(plot)
        loaded = [reader.read(path, block_size) for path in traces]
        if tiers is not None:
            from kvplug.hosts.trace.tiers import SimulatedModel
            from kvplug_lab.cli.simulate_tiers import TierOptions, run_tiers

            if plot is not None:
                raise InvalidInput("--plot: draws prefix-cache orders; leave it out with --tiers")
            run_tiers(
                loaded,
                [(one.label, one.build) for one in _pools(policy)],
                lambda trace: _capacities(trace, capacity),
                TierOptions(
                    tiers,
                    _names(lifecycle, "--lifecycle"),
                    _names(order, "--order"),
                    _numbers(gbit, "--gbit"),
                    SimulatedModel(bytes_per_token, prefill, quadratic),
                ),
                json,
                _shown,
                wide_console(150),
            )
            return
        asked = _asked(policy)
        runs = [(t, _capacities(t, capacity)) for t in loaded]
        results = {}
        total = sum(t.num_requests * len(sizes) * len(asked) for t, sizes in runs)
        with _shown(total) as step:
            for trace, sizes in runs:
                replay = Replay(trace)
                for size in sizes:
                    engine = replay.engine(size)
                    for one in asked:
                        built = one.build(trace, engine)
                        found = replay.run(built, size, one.label, step)
                        results[id(trace), size, one.label] = found
    console = Console(soft_wrap=True)
    for trace, sizes in runs:
        rows = {a.label: [results[id(trace), size, a.label] for size in sizes] for a in asked}
        print_table(console, _table(trace, sizes, rows))
    if json is not None:
        json.write_text(_json(list(results.values())), encoding="utf-8")
        print_written(console, "rows", json)
    if plot is not None:
        from kvplug_lab.cli.simulate_plot import draw

        panels = [[r for (of, *_), r in results.items() if of == id(t)] for t in loaded]
        draw(plot, panels, LINES)
        print_written(console, "plot", plot)


# -- what is asked for -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """A policy by the label its rows carry, and how to make one for a replay."""

    label: str
    build: Callable[[Trace, EngineView], PrefixCachePolicy]


def _asked(texts: Sequence[str] | None) -> list[_Asked]:
    """The policies to run: those named or all installed ones, and always LRU and MIN."""
    from kvplug_lab.prefix_orders import ready_orders

    if texts is None:
        named = ready_orders()
    else:
        named = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    labels = dict.fromkeys(named)
    first = [LINES[0]] if LINES[0] not in labels else []
    last = [LINES[1]] if LINES[1] not in labels else []
    return [_one(label) for label in [*first, *labels, *last]]


def _pools(texts: Sequence[str] | None) -> list[_Asked]:
    """The pool's orders beside tiers: those named, or LRU."""
    return [_one(name) for name in dict.fromkeys(_names(",".join(texts or LINES[:1]), "--policy"))]


def _names(text: str, option: str) -> list[str]:
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise InvalidInput(f"{option}: must not be empty")
    return found


def _numbers(text: str, option: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [0.0]
    if not all(0 < number < 1e6 for number in found):
        raise InvalidInput(f"{option}: {text!r} must be numbers of Gbit/s, e.g. 1,10,100")
    return found


def _one(label: str) -> _Asked:
    from kvplug.contract import Kind
    from kvplug.errors import DeploymentError, Refusal
    from kvplug.hosts.trace.minimum import Minimum
    from kvplug.parser import load_deployment
    from kvplug_lab.policy_text import policy_section

    if label == Minimum.name:
        return _Asked(label, Minimum)
    if label.endswith((".yaml", ".yml")):
        from kvplug.hosts.vllm.flags import read_config

        deployment = read_config(Path(label)).deployment
        if deployment.choice(Kind.PREFIX_CACHE) is None:
            refusal = Refusal(
                "prefix_cache", "is not set.", "use a file whose kvplug section sets it."
            )
            raise DeploymentError(label, [refusal])
    else:
        section = {"prefix_cache": policy_section(label, "--policy", "lfu:half_life=9")}
        deployment = load_deployment(section, source="--policy", key="")
    choice = deployment.choice(Kind.PREFIX_CACHE)
    assert choice is not None

    def build(trace: Trace, engine: EngineView) -> PrefixCachePolicy:
        from kvplug.contract import PrefixCachePolicy

        deployment.require_compatible(engine, runs=frozenset({*deployment.choices}), host="trace")
        policy = choice.build(engine)
        assert isinstance(policy, PrefixCachePolicy)
        return policy

    return _Asked(label, build)


def _capacities(trace: Trace, text: str) -> list[int]:
    from kvplug.errors import KVPlugError

    try:
        found = {trace.capacity(one): None for one in text.split(",") if one.strip()}
    except ValueError as error:
        raise KVPlugError(f"--capacity: {error}") from None
    if not found:
        raise KVPlugError("--capacity: must not be empty; write e.g. 100,200 or 1%,5%")
    return sorted(found)


# -- what is shown ---------------------------------------------------------------------------------


@contextmanager
def _shown(total: int) -> Iterator[Callable[[int], None] | None]:
    """A progress bar on a terminal, nothing elsewhere."""
    with bar("replaying") as progress:
        task = progress.add_task("", total=total)
        yield None if progress.disable else lambda n: progress.advance(task, n)


def _table(trace: Trace, sizes: list[int], rows: dict[str, list[ReplayResult]]) -> Table:
    table = Table(
        title=f"{trace.name}: hit rate of {trace.num_requests:,} requests, "
        f"{trace.num_references:,} blocks of {trace.block_size} tokens, "
        f"{trace.num_distinct:,} distinct",
        title_justify="left",
    )
    table.add_column("policy")
    for size in sizes:
        table.add_column(f"{size:,}\n{size / trace.num_distinct:.2%}", justify="right")
    table.add_column("of LRU to MIN", justify="right")

    def mean(results: list[ReplayResult]) -> float:
        return sum(r.hit_rate for r in results) / len(results)

    lru, best = (mean(rows[name]) for name in LINES)
    ordered = sorted(rows, key=lambda n: (n != LINES[0], n == LINES[1]))
    for label in ordered:
        closed = f"{(mean(rows[label]) - lru) / (best - lru):.0%}" if best > lru else "-"
        table.add_row(
            label,
            *(f"{r.hit_rate:.4f}" for r in rows[label]),
            closed,
            style="dim" if label in LINES else None,
        )
    return table


def _json(results: Sequence[ReplayResult]) -> str:
    rows = [
        {"trace": r.trace, "policy": r.policy, "capacity": r.capacity, "hit_rate": r.hit_rate}
        for r in results
    ]
    return json_module.dumps(rows, indent=1) + "\n"
