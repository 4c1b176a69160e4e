"""Reads server arguments and ``--config`` files with vLLM's own parser, so that nothing differs.

Importing this module imports vLLM, which takes seconds; `kvplug.hosts.vllm.flags` does so only
where vLLM is installed and a file describes an engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from kvplug.hosts.vllm.distribution import Command


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep vLLM's log lines and warnings, which are about an engine, out of a command's output."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


with _quiet():
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
    except ImportError:
        # Where vLLM before 0.33 has it.
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args

__all__ = ["Arguments", "ArgumentsRefused", "defaults", "parse", "parse_file"]

_MODEL = "model-of-the-command-line"
"""Stands for the model in ``vllm serve MODEL``, without which it reads no file."""

_UNSET = object()


class ArgumentsRefused(ValueError):
    """Arguments that vLLM's parser does not take; the message is its own, on one line."""

    def __init__(self, message: object):
        super().__init__(" ".join(str(message).split()))


@dataclass(frozen=True)
class Arguments:
    """Arguments as vLLM's server has them.

    Attributes:
        given: Values of the flags that were given, in a file or directly, by name with dashes.
        transfer: ``--kv-transfer-config`` as data, its unchanged defaults left out; None if it
            was not given.
    """

    given: Mapping[str, Any]
    transfer: Mapping[str, Any] | None


class _Parser(FlexibleArgumentParser):
    """vLLM's parser, which raises where it would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentsRefused(message)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise ArgumentsRefused(message or "asks for help or a version, and starts no server")


@functools.cache
def _parsers(command: Command) -> tuple[FlexibleArgumentParser, FlexibleArgumentParser]:
    """The command's parser, and one that leaves `_UNSET` where a flag was not given."""
    return _make(command), _make(command, defaults(command))


def _make(command: Command, unset: Mapping[str, Any] | None = None) -> FlexibleArgumentParser:
    parser = _Parser(prog="vllm")
    server = parser
    if command == "serve":
        server = parser.add_subparsers(dest="subparser").add_parser("serve")
    with _quiet():
        make_arg_parser(server)
    # Flags that collect values append to their default, which has to stay a list.
    server.set_defaults(
        **{name: _UNSET for name, value in (unset or {}).items() if not isinstance(value, list)}
    )
    return parser


@functools.cache
def defaults(command: Command) -> Mapping[str, Any]:
    """Defaults of the command's flags, by name with underscores."""
    found = vars(_make(command).parse_args(_line([], command)))
    return {name: value for name, value in found.items() if name != "subparser"}


def parse(arguments: Sequence[str], command: Command) -> Arguments:
    """Parse a server's arguments, a ``--config`` file among them, as vLLM does.

    Args:
        arguments: What follows the command; for ``vllm serve`` without a model.
        command: The command that they are for.

    Raises:
        ArgumentsRefused: vLLM does not start with them.
    """
    parser, marking = _parsers(command)
    try:
        with _quiet(), contextlib.redirect_stdout(io.StringIO()):
            parsed = parser.parse_args(_line(arguments, command))
            validate_parsed_serve_args(parsed)
            found = vars(marking.parse_args(_line(arguments, command)))
    except ArgumentsRefused:
        raise
    except Exception as error:  # whatever vLLM raises here ends its server as well
        raise ArgumentsRefused(error if str(error) else type(error).__name__) from error
    default = defaults(command)
    given = {
        name.replace("_", "-"): value
        for name, value in found.items()
        if name in default
        and value is not _UNSET
        and not (isinstance(value, list) and value == default[name])
    }
    tag = given.pop("model-tag", _MODEL)
    if tag != _MODEL:
        raise ArgumentsRefused(f"{tag!r} belongs to no flag")
    config = given.pop("kv-transfer-config", None)
    return Arguments(given, _transfer(config, parsed.kv_transfer_config))


def parse_file(data: Mapping[Any, Any], command: Command) -> Arguments:
    """Parse what a ``--config`` file would hold, as vLLM does.

    Raises:
        ArgumentsRefused: vLLM does not start with it.
    """
    with tempfile.TemporaryDirectory(prefix="kvplug-check-") as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(dict(data)), encoding="utf-8")
        return parse(["--config", str(path)], command)


def _line(arguments: Sequence[str], command: Command) -> list[str]:
    return ["serve", _MODEL, *arguments] if command == "serve" else [*arguments]


def _transfer(config: Any, again: Any) -> dict[str, Any] | None:
    """A connector config as data, of two that the same arguments gave."""
    if config is None:
        return None
    default = type(config)()
    names = [field.name for field in dataclasses.fields(config)]
    return {
        name: getattr(config, name)
        for name in names
        # An id that was not given is drawn anew for each.
        if getattr(config, name) not in (None, getattr(default, name))
        and getattr(config, name) == getattr(again, name)
    }
