"""Reads YAML that somebody else may have written, in bounded time and memory.

PyYAML builds a document of aliases once, but whatever walks it afterwards, vLLM's JSON included,
visits each alias anew. So the events are counted first, each alias as all that it stands for.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from kvplug.errors import DeploymentError, Refusal
from kvplug.regular_file import UnreadableFile, read_regular

__all__ = ["MAX_BYTES", "MAX_DEPTH", "MAX_VALUES", "read_yaml"]

MAX_BYTES = 256 << 10
"""Largest file that is read."""

MAX_VALUES = 50_000
"""Most values of a document, with each alias counted as what it stands for."""

MAX_DEPTH = 64
"""Deepest nesting of a document."""

_MAX_NUMBER = 256
"""Longest number, in characters: PyYAML takes quadratic time for some."""

_MERGE = "tag:yaml.org,2002:merge"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Refused(yaml.MarkedYAMLError):
    """A document that is YAML, but more than a deployment needs."""

    def __init__(self, problem: str, fix: str, mark: Any):
        super().__init__(None, None, problem, mark)
        self.fix = fix


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice instead of keeping the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                break  # SafeLoader raises its own error
            as_text = _json_key(key)
            if key in seen or as_text in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key!r}", key_node.start_mark
                )
            seen |= {key, as_text}
        return super().construct_mapping(node, deep)


def _json_key(key: Hashable) -> Hashable:
    """The key in JSON, in which vLLM hands a section on: there, 1 and "1" are one key."""
    if isinstance(key, str) or not isinstance(key, bool | int | float | None):
        return key
    return json.dumps(key)


def read_yaml(path: Path) -> tuple[Any, dict[str, int]]:
    """Parse a YAML file and note the line of every key path.

    Returns:
        The data, and ``{"a.b.c": line}`` with 1-based lines.

    Raises:
        DeploymentError: The file cannot be read, is not YAML, or is larger or deeper than
            deployments are.
    """
    try:
        text = read_regular(path, MAX_BYTES).decode("utf-8-sig")
    except UnreadableFile as error:
        raise DeploymentError(
            str(path), [Refusal("file", f"{error.problem}.", "check the path.")]
        ) from error
    except UnicodeDecodeError as error:
        raise DeploymentError(
            str(path), [Refusal("file", f"cannot be read: {error}.", "write it in UTF-8.")]
        ) from error
    try:
        _require_bounded(text)
        node = yaml.compose(text, _Loader)
        data = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise DeploymentError(
            str(path),
            [
                Refusal(
                    "YAML",
                    f"{problem}.",
                    getattr(error, "fix", "correct the syntax at that line."),
                    mark.line + 1 if mark is not None else None,
                )
            ],
        ) from error
    return data, _lines(node)


def _lines(root: yaml.Node | None) -> dict[str, int]:
    lines: dict[str, int] = {}

    def walk(node: yaml.Node | None, path: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                below = f"{path}.{key.value}" if path else str(key.value)
                lines[below] = key.start_mark.line + 1
                walk(value, below)
        elif isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                lines[f"{path}[{i}]"] = item.start_mark.line + 1
                walk(item, f"{path}[{i}]")

    walk(root, "")
    return lines


def _require_bounded(text: str) -> None:
    """Refuse a document that is too large, too deep or contains itself; recurses nowhere."""
    sizes: dict[str, tuple[int, int]] = {}  # values and depth, by anchor
    open_: list[tuple[list[int], str | None]] = [([0, 0], None)]

    def add(values: int, depth: int, mark: Any) -> None:
        within = open_[-1][0]
        within[0] += values
        within[1] = max(within[1], depth)
        if len(open_) - 1 + depth > MAX_DEPTH:
            raise _Refused(f"nested more than {MAX_DEPTH} deep", "nest less.", mark)
        if sum(counted[0] for counted, _ in open_) > MAX_VALUES:
            raise _Refused(
                f"has more than {MAX_VALUES:,} values", "write less, or less often.", mark
            )

    for event in yaml.parse(text, yaml.SafeLoader):
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for _, anchor in open_):
                raise _Refused(
                    f"anchor {event.anchor!r} contains itself", "remove the alias.", mark
                )
            add(*sizes.get(event.anchor or "", (1, 0)), mark)
        elif isinstance(event, yaml.ScalarEvent):
            _require_short_number(event)
            if event.anchor is not None:
                sizes[event.anchor] = (1, 0)
            add(1, 0, mark)
        elif isinstance(event, yaml.CollectionStartEvent):
            add(1, 0, mark)
            open_.append(([0, 0], event.anchor))
            add(0, 0, mark)
        elif isinstance(event, yaml.CollectionEndEvent):
            (values, depth), anchor = open_.pop()
            open_[-1][0][0] += values
            open_[-1][0][1] = max(open_[-1][0][1], depth + 1)
            if anchor is not None:
                sizes[anchor] = (values + 1, depth + 1)


def _require_short_number(event: yaml.ScalarEvent) -> None:
    if len(event.value) <= _MAX_NUMBER:
        return
    tag = event.tag
    if tag is None and event.implicit[0]:
        tag = _PLAIN.resolve(yaml.ScalarNode, event.value, (True, False))
    if tag in _NUMBERS:
        problem = f"has a number of {len(event.value):,} characters"
        raise _Refused(problem, "write it shorter.", event.start_mark)


_PLAIN: Any = yaml.SafeLoader("")
"""Says what a plain scalar is."""
