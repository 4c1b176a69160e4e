"""Errors that kvplug raises, and the form of a refusal."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


class KVPlugError(Exception):
    """Base of every error kvplug raises on purpose."""


@dataclass(frozen=True)
class Refusal:
    """One problem of a deployment, and its fix.

    Attributes:
        key: Path of the offending key, dotted, e.g. ``kvplug.sequence.window``.
        problem: What is wrong, one sentence.
        fix: What to change, one sentence.
        line: 1-based line of the key in the file, when known.
    """

    key: str
    problem: str
    fix: str
    line: int | None = None

    def text(self, source: str) -> str:
        """The refusal as one line: file, line, key, problem and fix."""
        where = f"{source}:{self.line}" if self.line is not None else source
        return f"{where}: {self.key}: {self.problem} Fix: {self.fix}"


def change_options(problem: str, names: Iterable[str]) -> str:
    """The fix for a problem with several options: change those that it mentions.

    Args:
        problem: What is wrong, one sentence.
        names: Every option there is.
    """
    mentioned = [name for name in names if re.search(rf"\b{re.escape(name)}s?\b", problem)]
    if not mentioned:
        return "change its options."
    *first, last = mentioned
    return f"change {', '.join(first)} or {last}." if first else f"change {last}."


class DeploymentError(KVPlugError, ValueError):
    """A deployment that cannot run: bad YAML, unknown policy, incompatible engine flag.

    The message holds one line per refusal: file, line, key, problem and fix. The command line
    prints it and exits with code 2; inside vLLM it stops the engine before any request is served.
    """

    exit_code = 2

    def __init__(self, source: str, refusals: list[Refusal]):
        self.source = source
        self.refusals = refusals
        super().__init__("\n".join(r.text(source) for r in refusals))

    def __reduce__(self) -> tuple[type[DeploymentError], tuple[str, list[Refusal]]]:
        return type(self), (self.source, self.refusals)


class PluginError(KVPlugError):
    """A plugin that cannot be loaded, or that registers something other than a policy."""
