"""``kvplug new``: makes the package of a policy, with tests that pass and a deployment."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from kvplug.cli import complete
from kvplug.cli.json_output import print_json
from kvplug.cli.refusals import refusing


def new(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="prefix_cache, sequence, format, reuse, attention, tiers, transfer or lifecycle.",
            show_default=False,
            autocompletion=complete.kinds,
        ),
    ],
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="The policy's name, e.g. my_policy.", show_default=False
        ),
    ],
    kernel: Annotated[
        bool, typer.Option("--kernel", help="Add a kernel: plain loops, Triton, and a test.")
    ] = False,
    directory: Annotated[
        Path, typer.Option("--directory", "-d", help="Folder to make kvplug-NAME in.")
    ] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make a package of your own policy: installable, with tests that pass.

    It holds a small policy of the kind that works, the laws of the kind as tests, and a
    deployment. Change the policy into yours.
    """
    from kvplug.scaffold import new_policy

    with refusing():
        folder, *files = new_policy(kind, name, directory, kernel=kernel)
    if as_json:
        paths = [str(file.relative_to(folder)) for file in files]
        print_json({"folder": str(folder), "files": paths})
        return
    typer.echo(f"Made {folder}:")
    for file in files:
        typer.echo(f"  {file.relative_to(folder)}")
    typer.echo("Next:")
    typer.echo(f"  pip install -e {shlex.quote(f'{folder}[test]')}")
    typer.echo(f"  cd {shlex.quote(str(folder))} && python -m pytest")
    typer.echo(f"  kvplug check {name}.yaml")
