"""The deployments that a plan compares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvplug.contract import Kind, ScoringPolicy
from kvplug.registry import plugins

STOCK, STOCK_FP8 = "stock", "stock_fp8"
SINK = 64
"""Sink tokens of `sink_window`."""

PAIRS = (("sink_window", "int4"), ("snapkv", "int4"))
"""Sequence policy and format that are planned together."""

FORMATS: dict[str, tuple[dict[str, Any], int]] = {
    "kivi": ({"bits": 4}, 64),
    "kivi:bits=2": ({"bits": 2}, 64),
}
"""Formats planned with options, or with a block size of their own, by name."""


@dataclass(frozen=True)
class Candidate:
    """A deployment to plan.

    Attributes:
        name: Its name in the plan.
        section: Its ``kvplug`` section.
        flags: vLLM's flags that it sets, by name with dashes.
        measured_as: Names under which it was measured.
        transfer: What its connector's flag sets beside the section.
    """

    name: str
    section: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    measured_as: tuple[str, ...] = ()
    transfer: Mapping[str, Any] = field(default_factory=dict)


def candidates(budget: int) -> list[Candidate]:
    """Stock, every format and sequence policy that needs no more options, and the pairs.

    Args:
        budget: Tokens that a sequence policy keeps of a request.
    """
    return [
        Candidate(STOCK, measured_as=(STOCK,)),
        Candidate(STOCK_FP8, flags={"kv-cache-dtype": "fp8"}, measured_as=(STOCK_FP8, "vllm_fp8")),
        *_formats(),
        *_sequences(budget),
        *_pairs(budget),
    ]


def _formats() -> Iterator[Candidate]:
    names = plugins().registry.ready(Kind.FORMAT)
    variants = [v for v in FORMATS if v.partition(":")[0] in names]
    for name in sorted({*names, *variants}):
        options, block_size = FORMATS.get(name, ({}, 0))
        section = {"format": {"use": name.partition(":")[0], **options}}
        flags = {"block-size": block_size} if block_size else {}
        written = ":".join([name.partition(":")[0], *(f"{k}={v}" for k, v in options.items())])
        yield Candidate(name, section, flags, (name, written))


def sequence_section(name: str, budget: int) -> dict[str, Any]:
    """The options of a sequence policy that keeps so many tokens of a request."""
    policy = plugins().registry.get(Kind.SEQUENCE, name)
    if policy is not None and issubclass(policy, ScoringPolicy):
        return {"use": name, "budget": budget}
    if name == "sink_window":
        return {"use": name, "sink": SINK, "window": max(budget - SINK, 1)}
    return {"use": name}


def _sequences(budget: int) -> Iterator[Candidate]:
    for name in plugins().registry.ready(Kind.SEQUENCE, "budget", "sink", "window"):
        yield Candidate(name, {"sequence": sequence_section(name, budget)}, {}, (name,))


def _pairs(budget: int) -> Iterator[Candidate]:
    registry = plugins().registry
    for sequence, stored in PAIRS:
        if registry.get(Kind.SEQUENCE, sequence) and registry.get(Kind.FORMAT, stored):
            name = f"{sequence}+{stored}"
            section = {
                "sequence": sequence_section(sequence, budget),
                "format": {"use": stored},
            }
            yield Candidate(name, section, {}, (name,))
