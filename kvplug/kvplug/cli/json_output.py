"""``--json`` of commands that write figures: a file as its value, standard output without one."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

OPTION, PARAMETER = "--json", "json"
STDOUT = "-"
"""Value that stands for standard output."""

_printed: ContextVar[Path | None] = ContextVar("_printed", default=None)


def is_printed(file: Path) -> bool:
    """True for a file whose content will go to standard output, and which then is gone."""
    return file == _printed.get()


def print_json(data: Any) -> None:
    """Print a document to standard output, with None in place of what JSON does not have."""
    typer.echo(json.dumps(finite(data), indent=2))


def finite(value: Any) -> Any:
    """The same with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value


class Command(TyperCommand):
    """A command whose ``--json`` needs no value: the figures then are all of standard output.

    The command itself writes a file, as for ``--json FILE``; tables and notes go to stderr.
    """

    def __init__(self, *args: Any, help: str | None = None, **more: Any) -> None:
        """Take the arguments of `TyperCommand`."""
        # A docstring's lines are as wide as the file it is in; a terminal wraps whole paragraphs.
        paragraphs = inspect.cleandoc(help or "").split("\n\n")
        whole = "\n\n".join(one.replace("\n", " ") for one in paragraphs)
        super().__init__(*args, help=whole or None, **more)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give ``--json`` without a value the one for standard output."""
        if self._takes_file():
            args = _with_value(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; its document is printed unless it refused its input.

        Raises:
            typer.Exit: ``--json`` names an existing file that is not JSON; with code 2.
        """
        file = ctx.params.get(PARAMETER)
        if not self._takes_file() or file is None:
            return super().invoke(ctx)
        if file != Path(STDOUT):
            _refuse_other(file)
            return super().invoke(ctx)
        with tempfile.TemporaryDirectory(prefix="kvplug-json-") as scratch:
            ctx.params[PARAMETER] = written = Path(scratch) / "figures.json"
            token = _printed.set(written)
            try:
                with _stdout_to_stderr():
                    answer = super().invoke(ctx)
            except typer.Exit as ended:
                if ended.exit_code != 2:
                    _print(written)
                raise
            finally:
                _printed.reset(token)
            _print(written)
            return answer

    def _takes_file(self) -> bool:
        return any(OPTION in one.opts and not getattr(one, "is_flag", False) for one in self.params)


def _with_value(args: Sequence[str]) -> list[str]:
    found: list[str] = []
    end = args.index("--") if "--" in args else len(args)
    for i, argument in enumerate(args):
        found.append(argument)
        following = args[i + 1] if i + 1 < end else "--"
        if i < end and argument == OPTION and following.startswith("-") and following != STDOUT:
            found.append(STDOUT)
    return found


def _refuse_other(file: Path) -> None:
    """Refuse to overwrite a file that is not JSON: an argument after ``--json``, say.

    Raises:
        typer.Exit: It exists, and is not named .json.
    """
    if file.is_file() and file.suffix != ".json":
        typer.echo(
            f"{OPTION}: {file} is there and is no .json file. Fix: name another file, or put "
            f"{OPTION} last to print the figures.",
            err=True,
        )
        raise typer.Exit(2)


def _print(file: Path) -> None:
    if file.is_file():
        print_json(json.loads(file.read_text(encoding="utf-8")))


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """What this process, and those that it starts, print to stdout goes to stderr."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # one of them is closed
        kept = -1
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stderr.flush()
        if kept >= 0:
            os.dup2(kept, 1)
            os.close(kept)
