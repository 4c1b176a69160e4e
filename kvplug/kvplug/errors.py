"""What kvplug raises, and how a refusal reads."""

from __future__ import annotations

from dataclasses import dataclass


class KVPlugError(Exception):
    """Base of every error kvplug raises on purpose."""


@dataclass(frozen=True)
class Refusal:
    """One thing that is wrong with a deployment and what to do about it.

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
        where = f"{source}:{self.line}" if self.line is not None else source
        return f"{where}: {self.key}: {self.problem} Fix: {self.fix}"


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
    """A plugin that cannot be loaded or registers something that is not a policy."""
