"""Errors of a command as messages on stderr and exit codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from kvplug.errors import DeploymentError


def print_refusals(error: DeploymentError) -> None:
    """Print a deployment's refusals to stderr, one line each."""
    for refusal in error.refusals:
        typer.echo(" ".join(refusal.text(error.source).splitlines()), err=True)


@contextmanager
def refusing(code: int = 2) -> Iterator[None]:
    """Print the errors that kvplug raises on purpose to stderr and exit.

    What the user can fix, code 2, takes one line each.

    Args:
        code: Exit code of an error that has no ``exit_code`` of its own.

    Raises:
        typer.Exit: One of those errors was raised inside.
    """
    from kvplug.errors import DeploymentError, KVPlugError

    try:
        yield
    except DeploymentError as error:
        print_refusals(error)
        raise typer.Exit(error.exit_code) from None
    except KVPlugError as error:
        code = getattr(error, "exit_code", code)
        typer.echo(" ".join(str(error).splitlines()) if code == 2 else str(error), err=True)
        raise typer.Exit(code) from None
