"""The command line, one file a command.

Nothing here imports torch, vllm or transformers: commands that need them import them when they
run, so that ``kvplug --help`` answers at once. Other distributions add commands
(`kvplug.cli.installed`).
"""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from kvplug import __version__
from kvplug.cli.check import check
from kvplug.cli.doctor import doctor
from kvplug.cli.installed import CommandGroup, add_installed
from kvplug.cli.policies import policies
from kvplug.cli.record import record
from kvplug.cli.serve import serve

logger = logging.getLogger("kvplug")

app = typer.Typer(
    name="kvplug",
    cls=CommandGroup,
    help="KV-cache policies as plugins for stock vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"kvplug {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    # Commands print what is broken themselves; a log line would print it twice.
    logger.addHandler(logging.NullHandler())


for _command in (check, serve, record, policies, doctor):
    app.command()(_command)


add_installed(app)
