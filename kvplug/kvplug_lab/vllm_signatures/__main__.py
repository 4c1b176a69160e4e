"""``python -m kvplug_lab.vllm_signatures WHEEL``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvplug.errors import KVPlugError
from kvplug.hosts.vllm import compat
from kvplug_lab.vllm_signatures import FOLDER, Library, compare


def main(
    wheel: Annotated[Path, typer.Argument(help="A wheel of vLLM, from `pip download --no-deps`.")],
) -> None:
    """Compare kvplug with a release of vLLM, and record the signatures that kvplug uses.

    vLLM must be installed, in another release: what kvplug overrides there must be here too.

    Exits with code 0 if everything fits, 1 otherwise.
    """
    try:
        library = Library.of_wheel(wheel)
        fit = compare(library, compare(Library.installed(compat.version())))
    except KVPlugError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    target = FOLDER / f"vllm-{library.version}.json"
    library.write(target)
    typer.echo(f"{len(fit.uses)} uses of vLLM compared; wrote {target.name}")
    for problem in fit.problems:
        typer.echo(problem)
    sys.exit(1 if fit.problems else 0)


if __name__ == "__main__":
    typer.run(main)
