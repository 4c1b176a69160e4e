"""Options, calibrations and errors that the laws hold the shipped formats against."""

from __future__ import annotations

import atexit
import functools
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from calibrated import write_calibration

from kvplug.contract import EngineView, FormatPolicy
from kvplug.registry import plugins
from kvplug.testing.format import (
    MODEL,
    NUM_LAYERS,
    SHAPES,
    Case,
    Shape,
    queries,
    vectors,
    view,
)
from kvplug_policies.coded import CodedFormat

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "int8": [{}, {"group": 32}],
    "int4": [{}, {"group": 16, "rotate": False}, {"layers": {"1": 3}}],
    "kivi": [
        {},
        {"bits": 2, "rotate": False, "anchor": False},
        {"group": 16, "key_bits": 3, "value_bits": 2, "value_group": 32},
    ],
    "rotated": [{}, {"bits": 3}, {"bits": 2}, {"key_bits": 4, "value_bits": 2}],
    "hack": [{}, {"bits": 2}, {"bits": 8}, {"bits": 2, "group": 32}],
    "lowrank": [{"bits": 8}, {"bits": 4}],
    "merge_heads": [{"max_error": 1.0}, {"max_error": 1.0, "bits": 4}],
    "residual": [
        {},
        {"outliers": 8, "options": {"rotate": False}},
        {"format": "kivi", "options": {"group": 16}},
    ],
    "mixed": [{"default": "int8", "layers": {"1": {"use": "kivi", "group": 16}}}, {}],
}
"""Options that the laws are held against; the defaults where a format is not named."""

CALIBRATED = ("lowrank", "merge_heads", "residual")

ERRORS = {"adaptive": (0.14, 0.14), "merge_heads": (1.5, 1.5)}
"""Errors of formats whose bits do not say them: levels may change, and Gaussian heads that have
nothing in common are merged all the same."""

INTEGER_TOLERANCE = 0.04
"""Of queries and probabilities in 8 bits."""


def cases() -> Iterator[Case]:
    """Every registered format, third parties' included."""
    for policy in plugins().registry:
        if issubclass(policy, FormatPolicy):
            integer = getattr(policy, "integer", False) or policy.name == "adaptive"
            for options in OPTIONS.get(policy.name, [{}]):
                yield Case(
                    policy,
                    options,
                    tolerance=INTEGER_TOLERANCE if integer else 2e-4,
                    prepare=functools.partial(_prepared, policy.name),
                    bytewise=getattr(policy, "into", CodedFormat.into) is CodedFormat.into,
                    errors=ERRORS.get(policy.name),
                )


def _prepared(name: str, shape: Shape) -> Mapping[str, Any]:
    more: dict[str, Any] = {"calibration": calibration(shape)} if name in CALIBRATED else {}
    return more | ({"rank": shape.head_size} if name == "lowrank" else {})


def pairs() -> Iterator[tuple[Case, tuple[Shape, ...]]]:
    """Cases and shapes: a format's first options on every shape that its groups of tokens fill, the
    others on two each."""
    seen: set[str] = set()
    for i, case in enumerate(cases()):
        group = int(case.options.get("group", 32)) if case.policy.name == "kivi" else 1
        shapes = [s for s in SHAPES if s.block % group == 0]
        if case.policy.name == "merge_heads":
            shapes = [s for s in shapes if s.kv_heads > 1]
        if case.policy.name in seen or case.policy.name in CALIBRATED:
            shapes = [shapes[i % len(shapes)], shapes[(i + 2) % len(shapes)]]
        seen.add(case.policy.name)
        yield case, tuple(shapes)


@functools.cache
def calibration(shape: Shape) -> str:
    """A calibration file for layers of the shape, of vectors like those of the laws."""
    folder = tempfile.TemporaryDirectory(prefix="kvplug-laws-")
    atexit.register(folder.cleanup)
    seen = {}
    for index in range(NUM_LAYERS):
        key, value = (x.transpose(0, 1) for x in vectors(shape, 640, seed=100 + index))
        query = queries(shape, 640, seed=200 + index).transpose(0, 1)
        seen[index] = (query, key, value)
    layers = tuple(view(shape, index) for index in range(NUM_LAYERS))
    engine = EngineView(shape.block, layers=layers, model=MODEL)
    return write_calibration(Path(folder.name) / "laws.safetensors", engine, seen)
