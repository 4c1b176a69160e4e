"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvplug.cli import complete

MODEL_HELP = "A directory, ORG/NAME of the Hugging Face hub, or a name such as smollm2."
Model = Annotated[str, typer.Option(help=MODEL_HELP, autocompletion=complete.models)]
ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="The same as --model.", show_default=False),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help=MODEL_HELP, show_default="smollm2")
]
"""For a command that takes it as an argument, too."""
MODEL = "smollm2"
"""The model by default."""
Text = Annotated[
    Path | None,
    typer.Option(envvar="KVPLUG_TEXTS", help="Plain text to read; Shakespeare by default."),
]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 for torch's choice.")]
JSON_HELP = "Print the figures as JSON, or write them to FILE."
Json = Annotated[Path | None, typer.Option(metavar="[FILE]", help=JSON_HELP, show_default=False)]
