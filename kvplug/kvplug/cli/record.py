"""``kvplug record``: serves a deployment and writes down which blocks its requests refer to."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvplug.cli.check import notes, print_refusals, read_checked
from kvplug.cli.serve import SHUTDOWN_SECONDS, _become, _is_flag, vllm_command

if TYPE_CHECKING:
    from kvplug.hosts.vllm.flags import ConfigFile

RECORD = "record"
STOCK = "lru"
"""What a deployment without a prefix-cache policy runs: vLLM's own order."""
TIMEOUT = "shutdown-timeout"
"""The flag without which vLLM ends the engine before the trace is written a last time."""


def record(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A vLLM --config file with a kvplug section, or a section in a file of its own.",
            show_default=False,
        ),
    ],
    extra: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- VLLM_ARGS...]", help="Passed on to vLLM.", show_default=False),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="File of the trace, .npz; one that exists is kept.")
    ] = Path("kvplug-trace.npz"),
    every: Annotated[
        int | None,
        typer.Option(min=1, help="Seconds between two writes.", show_default="30"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Directory or name of the model; smollm2 is the demo's, made on first use.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print vLLM's command and stop.")
    ] = False,
) -> None:
    """Serve a deployment as `kvplug serve` does, and record a trace for `kvplug simulate`.

    The deployment's own prefix-cache policy decides (vLLM's order if it names none); the trace
    holds block numbers, lengths and times, nothing of what was said. It is written as requests
    end and when the server stops.
    """
    from kvplug.errors import DeploymentError, KVPlugError

    try:
        config = read_checked(file)
        section = recorded(config, out.absolute(), every)
        command = vllm_command(config, model, _time_to_write(config, extra or []), section)
    except DeploymentError as error:
        print_refusals(error)
        raise typer.Exit(error.exit_code) from None
    except KVPlugError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    for note in notes(config):
        if TIMEOUT not in note:
            typer.echo(f"{file}: note: {note}", err=True)
    typer.echo(shlex.join(command))
    if not dry_run:
        _become(command)


def _time_to_write(config: ConfigFile, extra: Sequence[str]) -> list[str]:
    """vLLM's arguments, with time to write the trace at the end where nobody set any."""
    said = config.standalone or TIMEOUT in config.flags
    if said or any(_is_flag(a, f"--{TIMEOUT}") for a in extra):
        return [*extra]
    return [f"--{TIMEOUT}", str(SHUTDOWN_SECONDS), *extra]


def recorded(config: ConfigFile, out: Path, every: int | None = None) -> dict[str, Any]:
    """A deployment's section with ``record`` around its prefix-cache policy.

    Args:
        config: A checked deployment.
        out: File of the trace, absolute: the server may be started elsewhere.
        every: Seconds between two writes; the policy's default if None.

    Raises:
        DeploymentError: The trace cannot be written there, or nothing can be recorded.
    """
    from kvplug.contract import EngineView, Feature, Kind
    from kvplug.hosts.vllm.flags import RUNS, engine_from_flags
    from kvplug.parser import load_deployment

    own = config.deployment
    wrapped: dict[str, Any] = {"use": RECORD, "of": STOCK}
    choice = own.choice(Kind.PREFIX_CACHE)
    if choice is not None:
        written = own.section[str(Kind.PREFIX_CACHE)]
        options = dict(written) if isinstance(written, Mapping) else {}
        if choice.policy.name == RECORD:
            wrapped |= options
        else:
            wrapped["of"] = options | {"use": choice.policy.name}  # `auto` is settled by now
    wrapped["path"] = str(out)
    if every is not None:
        wrapped["every"] = every
    section = {**own.section, str(Kind.PREFIX_CACHE): wrapped}
    if config.standalone:
        needed = frozenset({Feature.PREFIX_CACHING}).union(*(c.policy.requires for c in own.all()))
        engine = EngineView(block_size=16, features=needed)
    else:
        engine = engine_from_flags(config.flags)
    deployment = load_deployment(section, source=str(config.path), key="", engine=engine)
    deployment.require_compatible(engine, runs=RUNS, host="vllm")
    return section
