"""Commands of other distributions, and where to find those that are not installed."""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from kvplug.cli.json_output import Command

COMMANDS = "kvplug.commands"
"""Entry-point group of commands: a function, or a `typer.Typer` of several. A name with a dot,
``group.command``, adds the command to the group of another entry point."""

EXTRAS = {
    "lab": (
        "simulate",
        "replay",
        "tune",
        "demo",
        "gain",
        "bench",
        "gpu-check",
        "eval",
        "codecs",
        "sessions",
        "calibrate",
        "reuse",
    ),
    "reuse-learned": ("calibrate.reuse",),
}
"""kvplug's own commands that come with an extra, by extra; not installed with kvplug alone."""

PANELS = {
    "Run": ("serve", "record"),
    "Look": ("top", "explain", "doctor"),
    "Choose": ("policies", "presets", "check", "plan", "tune", "calibrate"),
    "Write": ("new",),
    "Measure": (
        "eval",
        "gain",
        "demo",
        "reuse",
        "simulate",
        "replay",
        "sessions",
        "codecs",
        "bench",
        "gpu-check",
    ),
}
"""Commands by what one wants of them, in the order of `kvplug --help`."""

OTHER = "From other packages"

logger = logging.getLogger("kvplug")

_broken: dict[str, str] = {}


class CommandGroup(TyperGroup):
    """A group that names the extra of a command that is not installed.

    Attributes:
        prefix: Name of the group followed by a dot; empty for the program itself.
    """

    prefix = ""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that the arguments name.

        Raises:
            typer.Exit: It comes with an extra or its distribution is broken; with code 2.
        """
        if args and args[0] not in self.commands and (problem := self.absent(args[0])):
            typer.echo(problem, err=True)
            raise typer.Exit(2)
        return super().resolve_command(ctx, args)

    def absent(self, name: str) -> str | None:
        """Say how to get a known command that is not there, or None for an unknown name."""
        full = f"{self.prefix}{name}"
        command = f"`kvplug {full.replace('.', ' ')}`"
        if full in _broken:
            return f"{command} failed to load: {_broken[full]}. Fix: reinstall what brings it."
        for extra, names in EXTRAS.items():
            if full in names:
                return f"{command} is not installed; it comes with pip install 'kvplug[{extra}]'."
        return None


def add_installed(app: typer.Typer) -> None:
    """Add the commands of other distributions to the program.

    One that fails to load is left out with a warning. One whose group is not installed is left
    out silently: a distribution may serve without the commands that it adds to another's. No
    command replaces another one.
    """
    groups: dict[str, typer.Typer] = {"": app}
    taken = {_name(command) for command in app.registered_commands}
    entries = importlib.metadata.entry_points(group=COMMANDS)
    for entry in sorted(entries, key=lambda e: (e.name.count("."), e.name)):
        above, _, name = entry.name.rpartition(".")
        if above not in groups:
            continue
        try:
            if entry.name in taken:
                raise ValueError("another distribution brings a command of that name")
            found = entry.load()
            if not callable(found):
                raise TypeError("it is neither a function nor a typer.Typer")
        except Exception as error:
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            if entry.name not in taken:
                _broken[entry.name] = cause
            logger.warning("command %s failed to load: %s", entry.name, cause)
            continue
        taken.add(entry.name)
        if isinstance(found, typer.Typer):
            _prepare(found)
            groups[above].add_typer(found, name=name, rich_help_panel=panel(entry.name))
            groups[entry.name] = found
        else:
            groups[above].command(name, cls=Command, rich_help_panel=panel(entry.name))(found)


def panel(name: str) -> str | None:
    """Heading that a command stands under in `kvplug --help`; none for one of a group."""
    for heading, names in PANELS.items():
        if name in names:
            return heading
    return None if "." in name else OTHER


def _prepare(group: typer.Typer) -> None:
    """Give the commands of a group what every command has."""
    for command in group.registered_commands:
        if command.cls in (None, TyperCommand):
            command.cls = Command


def _name(command: Any) -> str:
    """Name of a registered command."""
    return str(command.name or command.callback.__name__.replace("_", "-"))
