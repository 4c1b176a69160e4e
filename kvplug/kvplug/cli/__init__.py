"""The command line, one file a command.

Nothing here imports torch, vllm or transformers: commands that need them import them when they
run, so that ``kvplug --help`` answers at once.
"""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from kvplug import __version__
from kvplug.cli.bench import bench
from kvplug.cli.calibrate import app as calibrate
from kvplug.cli.check import check
from kvplug.cli.demo import demo
from kvplug.cli.doctor import doctor
from kvplug.cli.eval import evaluate
from kvplug.cli.explain import explain
from kvplug.cli.gain import gain
from kvplug.cli.policies import policies
from kvplug.cli.record import record
from kvplug.cli.replay import replay
from kvplug.cli.reuse import app as reuse
from kvplug.cli.serve import serve
from kvplug.cli.simulate import simulate

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
    logging.getLogger("kvplug").addHandler(logging.NullHandler())


for _command in (
    policies,
    check,
    simulate,
    serve,
    record,
    replay,
    demo,
    gain,
    bench,
    doctor,
    explain,
):
    app.command()(_command)
app.command("eval")(evaluate)
app.add_typer(
    calibrate, name="calibrate", help="Learn a model from text: for formats, or for reuse."
)
app.add_typer(reuse, name="reuse")
