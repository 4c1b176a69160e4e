from __future__ import annotations

import itertools
from typing import Any

import grid
import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

IMPLEMENTATION = pytest.mark.parametrize(
    "implementation", [pytest.param(max, id="max"), pytest.param(min, id="min")]
)


def cases(mark: pytest.MarkDecorator, *, slow: bool) -> list[tuple[Any, ...]]:
    return [
        param.values
        for param in mark.args[1]
        if any(mark.name == "slow" for mark in param.marks) == slow
    ]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "INTERPRETED", True)


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    choose=st.data(),
)
def test_every_value_and_every_declared_pair_is_covered(
    sizes: list[int], choose: st.DataObject
) -> None:
    whole = list(itertools.product(*map(range, sizes)))
    axes = list(itertools.combinations(range(len(sizes)), 2))
    pairs = choose.draw(st.lists(st.sampled_from(axes), unique=True)) if axes else []
    chosen = [whole[i] for i in grid.cover(whole, pairs)]
    for axis, size in enumerate(sizes):
        assert {case[axis] for case in chosen} == set(range(size))
    for a, b in pairs:
        both = set(itertools.product(range(sizes[a]), range(sizes[b])))
        assert {(case[a], case[b]) for case in chosen} == both
    if not pairs:
        assert len(chosen) == max(sizes)
    assert [whole[i] for i in grid.cover(whole, pairs)] == chosen


def test_every_implementation_sees_every_value_and_the_others_are_slow() -> None:
    mark = grid.grid(
        IMPLEMENTATION,
        pytest.mark.parametrize("width", [1, 2, 3]),
        pytest.mark.parametrize(("lens", "rows"), [([1], 2), ([3], 4)]),
    )
    assert mark.args[0] == ["implementation", "width", "lens", "rows"]
    fast = cases(mark, slow=False)
    assert len(fast) == 6 and len(fast) + len(cases(mark, slow=True)) == 12
    for which in (max, min):
        assert {case[1] for case in fast if case[0] is which} == {1, 2, 3}
        assert {case[3] for case in fast if case[0] is which} == {2, 4}
    assert [param.id for param in mark.args[1]][:2] == ["max-1-lens0-2", "max-1-lens1-4"]


def test_values_that_need_not_meet_are_mixed() -> None:
    flag = pytest.mark.parametrize("flag", [False, True])
    mark = grid.grid(IMPLEMENTATION, flag, pytest.mark.parametrize("width", range(6)))
    fast = cases(mark, slow=False)
    assert len(fast) == 12
    for which in (max, min):
        assert sum(case[1] for case in fast if case[0] is which) == 3


def test_declared_pairs_are_covered() -> None:
    axes = [pytest.mark.parametrize(name, range(3)) for name in "abc"]
    both = set(itertools.product(range(3), range(3)))
    fast = cases(grid.grid(*axes, pairs=[("c", "a")]), slow=False)
    assert {(case[0], case[2]) for case in fast} == both
    assert len(cases(grid.grid(*axes), slow=False)) == 3


def test_a_gpu_runs_the_whole_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "INTERPRETED", False)
    axes = [pytest.mark.parametrize(name, grid.mostly_slow(range(3), [1])) for name in "ab"]
    assert len(cases(grid.grid(*axes), slow=False)) == 9


def test_values_outside_the_core_are_slow() -> None:
    values = grid.mostly_slow(["x", "y", "z"], ["x", "z"])
    mark = grid.grid(IMPLEMENTATION, pytest.mark.parametrize("name", values))
    assert cases(mark, slow=True) == [(max, "y"), (min, "y")]
    with pytest.raises(AssertionError, match="core must be some of the values"):
        grid.mostly_slow(["x"], ["y"])
