"""Lines and tables on standard output, as wide as there is room for."""

from __future__ import annotations

import os
import sys
import textwrap
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

NARROWEST = 20


def room() -> int | None:
    """Columns that there are: those of COLUMNS, or of the terminal; None in a pipe."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and len(columns) < 6 and int(columns):
        return max(int(columns), NARROWEST)
    if sys.stdout.isatty():
        return max(os.get_terminal_size(sys.stdout.fileno()).columns, NARROWEST)
    return None


def say(line: str, hanging: str = "", *, colour: str = "") -> None:
    """Print a line, wrapped at words where there is a width.

    Args:
        line: The line; what it begins with blank is kept.
        hanging: What further lines begin with.
        colour: Colour of what stands before its first colon, where there are colours.
    """
    width = room()
    lines = [line]
    if width is not None and len(line) >= width:
        lines = textwrap.wrap(
            line,
            width - 1,
            subsequent_indent=hanging if len(hanging) <= width // 2 else "  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    label, colon, rest = lines[0].partition(":")
    if colour and "NO_COLOR" not in os.environ:
        lines[0] = f"{typer.style(label, fg=colour)}{colon}{rest}"
    for one in lines:
        typer.echo(one)


def console(width: int) -> Console:
    """A console on stdout.

    Args:
        width: Columns in a pipe, where COLUMNS says nothing.
    """
    from rich.console import Console

    return Console(width=room() or width, highlight=False)


def print_table(on: Console, table: Table) -> None:
    """Print a table; row after row, a line a heading, where its columns have no room."""
    if on.measure(table).minimum <= on.width and _readable(on, table):
        on.print(table)
        return
    if table.title:
        on.print(table.title)
    headings = [_plain(column.header) for column in table.columns]
    for row in zip(*(column.cells for column in table.columns), strict=True):
        cells = [_plain(cell) for cell in row]
        first, *rest = zip(headings, cells, strict=True)
        on.print(first[1] or first[0] or "-", markup=False, highlight=False)
        said = "; ".join(f"{h} {c}".strip() for h, c in rest if c)
        width = on.width - 1
        for line in textwrap.wrap(
            said, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
        ):
            on.print(line, markup=False, highlight=False)


def _readable(on: Console, table: Table) -> bool:
    """True if no cell of the table is wrapped, or only that of its last column."""
    from rich.measure import Measurement

    last = table.columns[-1]
    cells = [len(line) for cell in last.cells for line in _plain(cell).splitlines()]
    whole = Measurement.get(on, on.options.update(width=100_000), table).maximum
    return whole - max(cells, default=0) + min(max(cells, default=0), 24) <= on.width


def _plain(cell: object) -> str:
    from rich.text import Text

    text = cell if isinstance(cell, Text) else Text.from_markup(str(cell))
    return " ".join(text.plain.split())
