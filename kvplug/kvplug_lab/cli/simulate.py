"""``kvplug simulate``: hit rates of prefix-cache policies on traces, without an engine."""

from __future__ import annotations

import importlib.util
import json as json_module
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from kvplug.contract import EngineView, PrefixCachePolicy
    from kvplug.hosts.trace.simulator import Result
    from kvplug.hosts.trace.traces import Trace

LINES = ("lru", "min")
"""What every run is compared with: the order of stock vLLM, and the offline optimum."""

PLOTS = (".png", ".svg", ".pdf")


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
            help="Cache sizes, in blocks or as a part of the trace's distinct blocks.",
        ),
    ] = "1%,2%,5%,10%",
    json: Annotated[
        Path | None, typer.Option(help="Write rows {trace, policy, capacity, hit_rate} as JSON.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help=f"Draw hit rate against capacity ({', '.join(PLOTS)})."),
    ] = None,
    block_size: Annotated[
        int, typer.Option(min=1, help="Tokens a block of a .jsonl; an .npz says its own.")
    ] = 512,
) -> None:
    """Replay traces through the policy objects an engine would run, and print their hit rates.

    LRU (the order of stock vLLM) and MIN (the offline optimum) are in every table. A trace,
    policy, capacity or file that is wrong ends it with one message and exit code 2.
    """
    from kvplug.errors import DeploymentError, KVPlugError
    from kvplug.hosts.trace import traces as reader
    from kvplug.hosts.trace.simulator import PolicyFailed, Replay

    try:
        _check_outputs(json, plot)
        asked = _asked(policy)
        loaded = [reader.read(path, block_size) for path in traces]
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
    except DeploymentError as error:
        for refusal in error.refusals:
            typer.echo(" ".join(refusal.text(error.source).splitlines()), err=True)
        raise typer.Exit(error.exit_code) from None
    except PolicyFailed as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(error.exit_code) from None
    except KVPlugError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    console = Console(soft_wrap=True)
    for trace, sizes in runs:
        rows = {a.label: [results[id(trace), size, a.label] for size in sizes] for a in asked}
        console.print(_table(trace, sizes, rows))
    if json is not None:
        json.write_text(_json(list(results.values())), encoding="utf-8")
        console.print(f"rows: {json}", markup=False, highlight=False)
    if plot is not None:
        from kvplug_lab.cli.simulate_plot import draw

        panels = [[r for (of, *_), r in results.items() if of == id(t)] for t in loaded]
        draw(plot, panels, LINES)
        console.print(f"plot: {plot}", markup=False, highlight=False)


# -- what is asked for -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """A policy by the label its rows carry, and how to make one for a replay."""

    label: str
    build: Callable[[Trace, EngineView], PrefixCachePolicy]


def _asked(texts: Sequence[str] | None) -> list[_Asked]:
    """The policies to run: those named, or every one there is; LRU and MIN among them."""
    from kvplug.contract import Kind
    from kvplug.registry import plugins

    if texts is None:
        named = [n for n in plugins().registry.names(Kind.PREFIX_CACHE) if _runs_unasked(n)]
    else:
        named = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    labels = dict.fromkeys(named)
    first = [LINES[0]] if LINES[0] not in labels else []
    last = [LINES[1]] if LINES[1] not in labels else []
    return [_one(label) for label in [*first, *labels, *last]]


def _runs_unasked(name: str) -> bool:
    """Whether a policy orders anything and runs without being told more."""
    from pydantic import ValidationError

    from kvplug.contract import Kind
    from kvplug.registry import plugins

    policy = plugins().registry.get(Kind.PREFIX_CACHE, name)
    assert policy is not None
    try:
        policy.Options()
    except ValidationError:
        return False
    # What wraps another policy orders nothing itself.
    return "of" not in policy.Options.model_fields


def _one(label: str) -> _Asked:
    import yaml

    from kvplug.contract import Kind
    from kvplug.errors import DeploymentError, Refusal
    from kvplug.hosts.trace.minimum import Minimum
    from kvplug.parser import load_deployment

    if label == Minimum.name:
        return _Asked(label, Minimum)
    if label.endswith((".yaml", ".yml")):
        from kvplug.hosts.vllm.flags import read_config

        deployment = read_config(Path(label)).deployment
        if deployment.choice(Kind.PREFIX_CACHE) is None:
            refusal = Refusal(
                "prefix_cache", "chooses no policy.", "name a file whose kvplug section does."
            )
            raise DeploymentError(label, [refusal])
    else:
        name, *pairs = label.split(":")
        options: dict[str, Any] = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            try:
                options[key.strip()] = yaml.safe_load(value)
            except yaml.YAMLError:
                equals = ""
            if not equals or not key.strip():
                refusal = Refusal(
                    label,
                    f"{pair!r} is no option.",
                    "write NAME:OPTION=VALUE, e.g. lfu:half_life=9",
                )
                raise DeploymentError("--policy", [refusal])
        section = {"prefix_cache": {"use": name, **options}}
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
        raise KVPlugError("--capacity: names no capacity: write e.g. 100,200 or 1%,5%")
    return sorted(found)


def _check_outputs(json: Path | None, plot: Path | None) -> None:
    """Refuse outputs that cannot be written before minutes are spent on them."""
    from kvplug.errors import KVPlugError

    for option, path in (("--json", json), ("--plot", plot)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise KVPlugError(f"{option}: {path} cannot be written: its folder must exist")
    if plot is None:
        return
    if plot.suffix not in PLOTS:
        raise KVPlugError(f"--plot: {plot} must end in {', '.join(PLOTS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise KVPlugError("--plot needs matplotlib: pip install 'kvplug[plots]'")


# -- what is shown ---------------------------------------------------------------------------------


class _Bar:
    def __init__(self, total: int):
        self._progress = Progress(
            TextColumn("replaying"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> Callable[[int], None]:
        self._progress.start()
        return lambda n: self._progress.advance(self._task, n)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _shown(total: int) -> _Bar | nullcontext[None]:
    """A progress bar on a terminal, nothing elsewhere."""
    return _Bar(total) if Console(stderr=True).is_terminal else nullcontext()


def _table(trace: Trace, sizes: list[int], rows: dict[str, list[Result]]) -> Table:
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

    def mean(results: list[Result]) -> float:
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


def _json(results: Sequence[Result]) -> str:
    rows = [
        {"trace": r.trace, "policy": r.policy, "capacity": r.capacity, "hit_rate": r.hit_rate}
        for r in results
    ]
    return json_module.dumps(rows, indent=1) + "\n"
