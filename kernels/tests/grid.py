"""Grids of parameters: a GPU runs all of a grid, Triton's interpreter a part that covers it.

The interpreter takes milliseconds for each program, so there a test's grid is cut down to the
cases that show every value of every axis to every implementation, and every declared pair of
values; the others are marked ``slow``.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def unless_gpu(slow: bool) -> tuple[pytest.MarkDecorator, ...]:
    """The marks of a case: ``slow`` where asked and Triton is interpreted."""
    return (pytest.mark.slow,) if slow and INTERPRETED else ()


def implementations(
    naive: Any, triton: Any, vectorized: Any, cpu: Any = None, *, name: str = "implementation"
) -> tuple[pytest.MarkDecorator, pytest.MarkDecorator]:
    """The axis of an operation's implementations, without the specification and with it."""
    fast = [pytest.param(triton, id="triton"), pytest.param(vectorized, id="vectorized")]
    if cpu is not None and not torch.cuda.is_available():
        fast.append(pytest.param(cpu, id="cpu"))
    every = [pytest.param(naive, id="naive"), *fast]
    return pytest.mark.parametrize(name, fast), pytest.mark.parametrize(name, every)


def mostly_slow(values: Iterable[Any], core: Collection[Any]) -> list[Any]:
    """Parameters of an axis, those outside ``core`` marked slow where Triton is interpreted."""
    values = list(values)
    assert set(core) <= set(values), "core must be some of the values"
    return [pytest.param(v, marks=unless_gpu(v not in core), id=str(v)) for v in values]


def grid(
    *axes: pytest.MarkDecorator, pairs: Iterable[tuple[str, str]] = ()
) -> pytest.MarkDecorator:
    """Parametrize a test by the product of axes, all but a covering part of it marked slow.

    Args:
        axes: ``pytest.mark.parametrize`` marks, one an axis. Cases with a value that is already
            marked keep its marks and cover nothing.
        pairs: Names of axes that interact: all pairs of their values are covered. The axis
            ``implementation`` interacts with every other.
    """
    names, values = zip(*(_axis(axis) for axis in axes), strict=True)
    cases = list(itertools.product(*values))
    at = {name: i for i, axis in enumerate(names) for name in axis}
    together = {tuple(sorted((at[a], at[b]))) for a, b in pairs}
    if "implementation" in at:
        of = at["implementation"]
        together |= {tuple(sorted((of, i))) for i in range(len(names)) if i != of}
    own = [tuple(mark for value in case for mark in value.marks) for case in cases]
    plain = [i for i, marks in enumerate(own) if not marks]
    places = list(itertools.product(*(range(len(axis)) for axis in values)))
    chosen = {plain[i] for i in cover([places[i] for i in plain], together)}
    params = [
        pytest.param(
            *(part for value in case for part in value.values),
            marks=own[i] or unless_gpu(i not in chosen),
            id="-".join(str(value.id) for value in case),
        )
        for i, case in enumerate(cases)
    ]
    return pytest.mark.parametrize([name for axis in names for name in axis], params)


def cover(cases: Sequence[tuple[int, ...]], pairs: Iterable[tuple[int, ...]] = ()) -> list[int]:
    """Indices of cases that together have every value of every axis and, for each of ``pairs`` of
    axes, every pair of values that any case has. Greedy, and of cases that show as much the one
    whose values met least: values that need not meet are mixed. The same in every run."""
    groups = [(axis,) for axis in range(len(cases[0]))] if cases else []
    groups += list(pairs)
    shown = [{(group, tuple(case[axis] for axis in group)) for group in groups} for case in cases]
    missing = set().union(*shown)
    met = [list(itertools.combinations(enumerate(case), 2)) for case in cases]
    often: Counter[Any] = Counter()
    chosen = []

    def gain(i: int) -> tuple[int, int, int]:
        return len(shown[i] & missing), -sum(often[pair] for pair in met[i]), -i

    while missing:
        best = max(range(len(cases)), key=gain)
        chosen.append(best)
        missing -= shown[best]
        often.update(met[best])
    return sorted(chosen)


def _axis(mark: pytest.MarkDecorator) -> tuple[tuple[str, ...], list[Any]]:
    """Names of an axis, and its values with an id each."""
    names, values = mark.args
    names = tuple(names.split(",")) if isinstance(names, str) else tuple(names)
    ids = mark.kwargs.get("ids")
    found = []
    for i, value in enumerate(values):
        if not hasattr(value, "marks"):
            value = pytest.param(*(value if len(names) > 1 else (value,)))
        label = value.id
        if label is None and ids is not None:
            label = "-".join(map(ids, value.values)) if callable(ids) else ids[i]
        if label is None:
            label = "-".join(
                str(part) if isinstance(part, str | int | float | None) else f"{name}{i}"
                for name, part in zip(names, value.values, strict=True)
            )
        found.append(pytest.param(*value.values, marks=value.marks, id=label))
    return names, found
