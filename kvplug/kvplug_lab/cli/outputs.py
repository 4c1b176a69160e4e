"""Output of commands: progress, wide tables, and the names of written files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from kvplug.cli.json_output import is_printed
from kvplug.cli.tables import console


def wide_console(width: int) -> Console:
    """A console on stdout: ``width`` columns in a pipe where COLUMNS says nothing."""
    return console(width)


def print_written(console: Console, what: str, file: Path) -> None:
    """Print where something was written; nothing of what ``--json`` prints."""
    if not is_printed(file):
        console.print(f"{what}: {file}", markup=False, highlight=False, soft_wrap=True)


def bar(
    description: str, *more: ProgressColumn, console: Console | None = None, transient: bool = True
) -> Progress:
    """A progress bar on stderr, or on ``console``; nothing where that is not a terminal.

    Args:
        description: Format of the text before the bar, e.g. ``{task.description}``.
        more: Columns after the time.
        console: Where to draw.
        transient: Remove the bar at the end.
    """
    console = console if console is not None else Console(stderr=True)
    return Progress(
        TextColumn(description),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        *more,
        console=console,
        transient=transient,
        disable=not console.is_terminal,
    )


@contextmanager
def counted(total: int) -> Iterator[Callable[[str], None]]:
    """Show the progress of ``total`` steps: a bar on a terminal, a line per 5 % elsewhere.

    Yields:
        A function to call at the end of each step, with one line about it.
    """
    with bar("{task.description:<36}") as progress:
        task = progress.add_task("reading", total=total)
        done = printed = 0

        def step(line: str) -> None:
            nonlocal done, printed
            progress.update(task, advance=1, description=line)
            done += 1
            part = done * 20 // total
            if progress.disable and part > printed:
                printed = part
                typer.echo(f"{done / total:4.0%} {line}", err=True)

        yield step
