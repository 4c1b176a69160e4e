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
from kvplug.cli.explain import explain
from kvplug.cli.installed import CommandGroup, add_installed, panel
from kvplug.cli.json_output import Command
from kvplug.cli.new import new
from kvplug.cli.plan import plan
from kvplug.cli.policies import policies
from kvplug.cli.presets import presets
from kvplug.cli.record import record
from kvplug.cli.serve import serve
from kvplug.cli.top import top

logger = logging.getLogger("kvplug")

app = typer.Typer(
    name="kvplug",
    cls=CommandGroup,
    help="KV-cache policies as plugins for stock vLLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Commands of groups inherit it.
    context_settings={"help_option_names": ["-h", "--help"]},
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


for _command in (serve, record, top, explain, doctor, policies, presets, check, plan, new):
    app.command(cls=Command, rich_help_panel=panel(_command.__name__))(_command)


add_installed(app)
