"""``kvplug record``: serves a deployment and records the blocks its requests reference."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvplug.cli.check import notes
from kvplug.cli.refusals import refusing
from kvplug.cli.serve import (
    SHUTDOWN_SECONDS,
    DryRun,
    File,
    Model,
    VLLMArguments,
    memory_notes,
    served,
    start,
    vllm_command,
)

if TYPE_CHECKING:
    from kvplug.hosts.vllm.flags import ConfigFile

RECORD = "record"
STOCK = "lru"
"""Recorded where a deployment has no prefix-cache policy: vLLM's own order."""
REQUEST_LOG = "kvplug.hosts.vllm.request_log.RequestLog"
"""Value of ``--middleware`` that records requests."""
REQUEST_LOG_FILE = "KVPLUG_REQUEST_LOG"
"""Environment variable that names the file it writes."""
TIMEOUT = "shutdown-timeout"
"""Without this flag vLLM stops the engine before the trace is written a last time."""


def record(
    file: File,
    extra: VLLMArguments = None,
    out: Annotated[
        Path, typer.Option(help="Trace file, .npz; an existing file is not overwritten.")
    ] = Path("kvplug-trace.npz"),
    every: Annotated[
        int | None,
        typer.Option(min=1, help="Seconds between writes.", show_default="30"),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Also append the requests themselves, with their text, to this file for "
            "`kvplug tune`.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    dry_run: DryRun = False,
) -> None:
    """Serve a deployment as `kvplug serve` does and record a trace for `kvplug simulate`.

    The deployment's own prefix-cache policy decides (vLLM's order if it names none); the trace
    holds block numbers, lengths and times, never the text of prompts or answers. It is written
    as requests finish and when the server stops. With --prompts, a second file holds the text of
    requests, and of no answer.
    """
    environment = dict(os.environ)
    with refusing():
        config, given = served(file, extra or [])
        section = recorded(config, out.absolute(), every)
        arguments = _time_to_write(config, extra or [])
        remarks = [note for note in notes(config) if TIMEOUT not in note]
        remarks += memory_notes(config, environment)
        if prompts is not None:
            arguments = [*_requests_to(file, prompts.absolute(), environment), *arguments]
            remarks.append(f"the text of requests is written to {prompts.absolute()}.")
        command = vllm_command(config, model, arguments, given, section, dry_run=dry_run)
    start(command, file, remarks, dry_run, environment)


def _time_to_write(config: ConfigFile, extra: Sequence[str]) -> list[str]:
    """vLLM's arguments, with a shutdown timeout to write the trace in where none is set."""
    if config.standalone or TIMEOUT in config.flags:
        return [*extra]
    return [f"--{TIMEOUT}", str(SHUTDOWN_SECONDS), *extra]


def _requests_to(file: Path, out: Path, environment: dict[str, str]) -> list[str]:
    """vLLM's arguments that record requests; the environment gets the file's name.

    Raises:
        DeploymentError: The file cannot be written.
    """
    from kvplug.errors import DeploymentError, Refusal

    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        refusal = Refusal("--prompts", f"{out} cannot be written.", "choose another file.")
        raise DeploymentError(str(file), [refusal])
    environment[REQUEST_LOG_FILE] = str(out)
    return ["--middleware", REQUEST_LOG]


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
            wrapped["of"] = options | {"use": choice.policy.name}  # `auto` has been resolved
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
