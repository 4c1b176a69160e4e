"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    Path | None, typer.Option(help="Model directory; SmolLM2-135M-Instruct by default.")
]
ModelArgument = Annotated[
    Path | None,
    typer.Argument(help="Model directory; SmolLM2-135M-Instruct by default.", show_default=False),
]
Text = Annotated[
    Path | None,
    typer.Option(envvar="KVPLUG_TEXTS", help="Plain text to read; Shakespeare by default."),
]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 for torch's choice.")]
Json = Annotated[Path | None, typer.Option(help="Write the figures as JSON.")]
