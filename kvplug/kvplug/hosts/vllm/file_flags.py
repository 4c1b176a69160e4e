"""Reads the flags of a ``--config`` file: with vLLM's own parser, or plainly where it is missing.

Without vLLM only what has one reading is read; the rest is refused by name. With it, what vLLM
would drop or overwrite without a word is refused or told, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvplug.errors import DeploymentError, KVPlugError, Refusal
from kvplug.hosts.vllm.connector_flag import FLAG, connector_refusals, is_connector_flag
from kvplug.hosts.vllm.distribution import Command
from kvplug.near_names import did_you_mean

__all__ = ["FileFlags", "plain_flags", "vllm_flags"]

MAX_KEYS = 512
"""Most keys of a file; vLLM has fewer flags."""

_WHOLE_NUMBERS = frozenset(
    {
        "block-size",
        "num-gpu-blocks-override",
        "max-num-batched-tokens",
        "tensor-parallel-size",
        "pipeline-parallel-size",
        "data-parallel-size",
        "decode-context-parallel-size",
        "prefill-context-parallel-size",
    }
)
_MAX_SHOWN = 300
_SHORT_NUMBER = re.compile(r'("(?:[^"\\]|\\.)*")|\b(\d+(?:\.\d+)?)[kKmMgGtT]\b')

Refuse = Callable[[Any, str, str], None]


class FileFlags(NamedTuple):
    """The flags that a file, and a command line after it, set.

    Attributes:
        flags: Their values by name, with dashes; the connector's left out.
        transfer: The connector's flag as data; None if it is not set.
        written: The connector's flag as the file spells it.
        remarks: What a user should know of how they are read, one sentence each.
    """

    flags: dict[str, Any]
    transfer: Any
    written: str = FLAG
    remarks: tuple[str, ...] = ()


# -- with vLLM -------------------------------------------------------------------------------------


def vllm_flags(
    path: Path,
    data: Mapping[Any, Any] | None,
    lines: Mapping[str, int],
    arguments: Sequence[str],
    command: Command,
) -> FileFlags:
    """Read flags with vLLM's own parser.

    Args:
        path: The ``--config`` file, or what the arguments go with, for messages.
        data: What the file holds; None for arguments alone.
        lines: Line of each key path in the file.
        arguments: Arguments of the server that follow the file's.
        command: The server's command.

    Raises:
        DeploymentError: vLLM would not start with them, or would pass over a part of them.
        KVPlugError: vLLM's parser cannot be imported, or does not work.
    """
    refusals: list[Refusal] = []

    def refuse(key: Any, problem: str, fix: str) -> None:
        refusals.append(Refusal(str(key), problem, fix, lines.get(str(key))))

    def require_none() -> None:
        if refusals:
            raise DeploymentError(str(path), refusals)

    data = data if data is not None else {}
    _refuse_at_sight(data, refuse)
    require_none()  # before vLLM is imported, which takes seconds
    try:
        from kvplug.hosts.vllm import arguments as vllm

        vllm.parse([], command)
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise KVPlugError(
            f"vLLM's argument parser does not work here: {cause}. Fix: run `kvplug doctor`."
        ) from error
    sets = _sets(data, lines, command, refuse)
    doubled = _doubled(data, sets)
    for key, name in doubled.items():
        refuse(key, f"sets {name}, which the file sets already.", "keep one of them.")
    file = ["--config", str(path)] if data else []
    try:
        found = vllm.parse([*file, *arguments], command)
    except vllm.ArgumentsRefused as error:
        if not refusals:
            key = "after `--`" if arguments else "file"
            refusals.append(Refusal(key, f"vLLM refuses: {error}.", "change what it names."))
    require_none()
    written = next((str(k).split(".")[0] for k, names in sets.items() if FLAG in names), FLAG)
    remarks = tuple(
        remark for key in data if data[key] is False and (remark := _unheard(key, sets, command))
    )
    return FileFlags(dict(found.given), found.transfer, written, remarks)


def _refuse_at_sight(data: Mapping[Any, Any], refuse: Refuse) -> None:
    """Refuse what vLLM would not take, drop or overwrite, as far as the text alone tells."""
    if len(data) > MAX_KEYS:
        refuse("file", f"has {len(data):,} keys.", f"write at most {MAX_KEYS}.")
        return
    names: set[str] = set()
    for key, value in data.items():
        head, dot, below = str(key).partition(".")
        name = head.replace("_", "-") + dot + below
        if not isinstance(key, str):
            refuse(key, "is not the name of a flag.", "write a name.")
        elif dot and isinstance(value, bool):
            fix = f"write {head} as a nested mapping."
            refuse(key, "is true or false, which vLLM reads in no dotted flag.", fix)
        elif name == "config":
            refuse(key, "names another file, which vLLM does not read.", "remove it.")
        elif name in names:
            refuse(key, f"sets {name}, which the file sets already.", "keep one of them.")
        elif isinstance(value, str) and (doubled := _doubled_in_json(value)):
            refuse(key, f"names {doubled!r} twice in its JSON.", "keep one of them.")
        names.add(name)


def _sets(
    data: Mapping[str, Any], lines: Mapping[str, int], command: Command, refuse: Refuse
) -> dict[str, frozenset[str]]:
    """Names of the flags that vLLM sets for each key by itself; refuses what it does not take."""
    together: dict[str, dict[str, Any]] = {}  # dotted keys of one flag make one value
    for key, value in data.items():
        alone = key.replace("_", "-").split(".")[0] if "." in key else key
        together.setdefault(alone, {})[key] = value
    found: dict[str, frozenset[str]] = {}
    for part in together.values():
        found |= dict.fromkeys(part, _names(part, lines, command, refuse))
    return found


def _names(
    part: Mapping[str, Any], lines: Mapping[str, int], command: Command, refuse: Refuse
) -> frozenset[str]:
    """Names of the flags that vLLM sets for one key, or for the dotted keys of one flag."""
    from kvplug.hosts.vllm import arguments as vllm

    key, value = next(iter(part.items()))
    try:
        if value is False:
            # vLLM drops a `false` that it does not hear, whether or not there is such a flag.
            vllm.parse_file({key: True}, command)
        found = vllm.parse_file(part, command)
    except vllm.ArgumentsRefused as error:
        problem = str(error)
    else:
        return frozenset(found.given) | ({FLAG} if found.transfer is not None else set())
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            refuse(key, f"is not valid JSON: {error}.", "write it as nested YAML.")
            return frozenset()
    if is_connector_flag(key) and "." not in key:
        told = connector_refusals(value, key, lines)
        for refusal in told:
            refuse(refusal.key, refusal.problem, refusal.fix)
        if told:
            return frozenset()
    if problem.startswith("unrecognized arguments: --"):
        known = [name.replace("_", "-") for name in vllm.defaults(command)]
        meant = did_you_mean(key.replace("_", "-"), known)
        refuse(key, "is not a vLLM flag.", f"{meant}see `vllm serve --help=all`.")
    else:
        shown = problem if len(problem) <= _MAX_SHOWN else f"{problem[:_MAX_SHOWN]} ..."
        refuse(key, f"vLLM refuses it: {shown.removesuffix('.')}.", "write it as vLLM takes it.")
    return frozenset()


def _doubled(data: Mapping[str, Any], sets: Mapping[str, frozenset[str]]) -> dict[str, str]:
    """Keys that set what an earlier key sets: of two, vLLM keeps the last and says so nowhere."""
    found: dict[str, str] = {}
    seen: dict[str, set[tuple[str, ...]]] = {}
    for key, names in sets.items():
        dotted = tuple(key.split(".")[1:])
        if dotted and dotted[-1].endswith("+"):
            continue  # adds to a list
        leaves = set(_leaves(data[key], dotted)) if dotted else {()}
        for name in names:
            before = seen.setdefault(name, set())
            if any(_overlap(leaf, other) for leaf in leaves for other in before):
                found[key] = ".".join([name, *dotted])
            before |= leaves
    return found


def _leaves(value: Any, path: tuple[str, ...]) -> list[tuple[str, ...]]:
    if isinstance(value, Mapping) and value:
        return [leaf for k, v in value.items() for leaf in _leaves(v, (*path, str(k)))]
    return [path]


def _overlap(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    shorter = min(len(a), len(b))
    return a[:shorter] == b[:shorter]


def _unheard(key: str, sets: Mapping[str, frozenset[str]], command: Command) -> str | None:
    """What to say of a ``false`` that vLLM drops, where its default is not false already."""
    from kvplug.hosts.vllm import arguments as vllm

    if sets[key]:
        return None
    for name in vllm.parse_file({key: True}, command).given:
        if vllm.defaults(command).get(name.replace("-", "_")) is False:
            return None
        how = "python -m vllm.entrypoints.openai.api_server" if command == "api_server" else ""
        return (
            f"{key}: false is not heard by {how or 'vllm serve'}, which keeps its default; "
            f"write no-{name}: true."
        )
    return None


# -- without vLLM ----------------------------------------------------------------------------------


def plain_flags(path: Path, data: Mapping[Any, Any], lines: Mapping[str, int]) -> FileFlags:
    """Read the flags of a ``--config`` file where vLLM is not installed.

    Raises:
        DeploymentError: A key or a value that only vLLM's parser could tell.
    """
    flags: dict[str, Any] = {}
    written = FLAG
    refusals: list[Refusal] = []

    def refuse(key: Any, problem: str, fix: str) -> None:
        refusals.append(Refusal(str(key), problem, fix, lines.get(str(key))))

    for key, value in data.items():
        name = str(key).replace("_", "-")
        if not isinstance(key, str):
            refuse(key, "is not the name of a flag.", "write a name.")
        elif is_connector_flag(name) and name != FLAG:
            fix = f"write {FLAG} as a nested mapping, or install vLLM."
            refuse(key, "is read by vLLM's own parser only, which is not installed.", fix)
        elif name in flags:
            refuse(key, f"sets {name}, which the file sets already.", "keep one of them.")
        elif value is False and "_" in key:
            refuse(key, "is false, which vLLM may not hear in this spelling.", f"write {name}.")
        elif name in _WHOLE_NUMBERS and isinstance(value, str):
            refuse(key, f"must be a number, got {value!r}.", "write it without quotes.")
        else:
            flags[name] = _plain_json(key, value, refuse) if name.endswith("config") else value
            written = key if name == FLAG else written
    if refusals:
        raise DeploymentError(str(path), refusals)
    transfer = flags.pop(FLAG, None)
    remark = "vLLM is not installed here: its flags were read without its parser."
    return FileFlags(flags, transfer, written, (remark,))


def _plain_json(key: Any, value: Any, refuse: Refuse) -> Any:
    """A structured flag's value, parsed where it is JSON text."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        if doubled := _doubled_in_json(value):
            refuse(key, f"names {doubled!r} twice in its JSON.", "keep one of them.")
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        refuse(key, f"is not valid JSON: {error}.", "write it as nested YAML.")
        return None


# -- JSON ------------------------------------------------------------------------------------------


def _doubled_in_json(text: str) -> str | None:
    """A key that an object of JSON text names twice, of which every reader keeps the last."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    twice: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice.extend(name for name in names if names.count(name) > 1)
        return dict(pairs)

    try:
        # vLLM takes 80m for a number in JSON, too.
        json.loads(_SHORT_NUMBER.sub(r"\1\2", text), object_pairs_hook=note)
    except (ValueError, RecursionError):
        return None
    return twice[0] if twice else None
