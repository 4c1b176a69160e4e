"""The command line, one file a command.

Nothing here imports torch, vllm or transformers: commands that need them import them when they
run, so that ``kvplug --help`` answers at once. Other distributions add commands through the
entry-point group ``kvplug.commands``.
"""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Annotated

import typer

from kvplug import __version__
from kvplug.cli.check import check
from kvplug.cli.doctor import doctor
from kvplug.cli.policies import policies
from kvplug.cli.record import record
from kvplug.cli.serve import serve

COMMANDS = "kvplug.commands"
"""Entry points of other distributions' commands: a function, or a `typer.Typer` of several. A name
with a dot, ``group.command``, adds the command to the group that another entry point made."""

logger = logging.getLogger("kvplug")

app = typer.Typer(
    name="kvplug",
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
    # Commands say themselves what is broken; a log line beside that would say it twice.
    logger.addHandler(logging.NullHandler())


for _command in (check, serve, record, policies, doctor):
    app.command()(_command)


def _add_installed(into: typer.Typer) -> None:
    """Add the commands of other distributions; one that cannot be loaded is left out."""
    groups: dict[str, typer.Typer] = {"": into}
    entries = importlib.metadata.entry_points(group=COMMANDS)
    for entry in sorted(entries, key=lambda e: (e.name.count("."), e.name)):
        above, _, name = entry.name.rpartition(".")
        try:
            found = entry.load()
            if isinstance(found, typer.Typer):
                groups[above].add_typer(found, name=name)
                groups[entry.name] = found
            else:
                groups[above].command(name)(found)
        except Exception as error:
            logger.warning("the command %r cannot be loaded: %s", entry.name, error)


_add_installed(app)
