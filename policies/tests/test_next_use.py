from __future__ import annotations

import random

import numpy as np
import pytest

from kvplug_policies.next_use import NextUseModel


def live(model: NextUseModel, thing: int, reuse_at: float | None, until: float) -> None:
    """One thing's life: the bins it passes, and its reuse if there is one before ``until``."""
    end = until if reuse_at is None else reuse_at
    for b, (start, stop) in enumerate(zip(model.edges, model.edges[1:], strict=False)):
        if start >= end:
            break
        ends_here = reuse_at is not None and stop >= end
        model.waited(thing, b, min(stop, end) - start, ends_here, 1.0)


def at(model: NextUseModel, thing: int, age: float) -> float:
    return float(model.indices([thing], [model.bin(age)])[0])


def test_with_nothing_learned_older_is_worse() -> None:
    model = NextUseModel([2])
    thing = model.describe([0])
    worth = [at(model, thing, age) for age in (0.1, 1, 10, 100, 1000, 10_000)]
    assert worth == sorted(worth, reverse=True)
    assert len(set(worth)) == len(worth)


def test_what_is_never_used_again_is_worth_less_than_what_is() -> None:
    model, choose = NextUseModel([2]), random.Random(1)
    used, unused = model.describe([0]), model.describe([1])
    for _ in range(300):
        live(model, used, choose.uniform(5, 60), 300)
        live(model, unused, None, 300)
    model.learn()
    for age in (0.1, 3, 20):
        assert at(model, used, age) > 3 * at(model, unused, age)


def test_worth_rises_until_the_reuse_is_due_and_falls_after() -> None:
    model, choose = NextUseModel([1]), random.Random(2)
    thing = model.describe([0])
    for _ in range(600):
        live(model, thing, choose.uniform(50, 70) if choose.random() < 0.5 else None, 2000)
    model.learn()
    assert at(model, thing, 55) > 2 * at(model, thing, 1)
    assert at(model, thing, 1) > 2 * at(model, thing, 500)


def test_the_hazard_of_a_memoryless_reuse_is_its_rate() -> None:
    model, choose = NextUseModel([1], half_life=10**9), random.Random(3)
    thing = model.describe([0])
    for _ in range(3000):
        live(model, thing, choose.expovariate(1 / 40), 1e6)
    model.learn()
    found = model.hazards([thing])[0][model.bin(4) : model.bin(90)]
    np.testing.assert_allclose(found, 1 / 40, rtol=0.35)


@pytest.mark.parametrize("best", ["soon", "late"])
def test_the_index_is_the_best_rate_over_all_waits(best: str) -> None:
    model = NextUseModel([1])
    model._weights[:] = 0
    hazards = np.full(len(model.edges) - 1, 1e-6)
    due = model.bin(1 if best == "soon" else 3000)
    hazards[due] = 10.0
    model._base = np.log(hazards)
    thing = model.describe([0])
    index = float(model.indices([thing], [0])[0])
    # Waiting for the bin in which reuse is all but sure: one reuse in the time until then.
    assert index == pytest.approx(1 / (model.edges[due] - model.edges[1] / 2 + 0.1), rel=0.02)


def test_a_changed_habit_is_learned_again() -> None:
    model, choose = NextUseModel([1], half_life=2000), random.Random(4)
    thing = model.describe([0])
    for _ in range(500):
        live(model, thing, choose.uniform(1, 2), 500)
    model.learn()
    before = at(model, thing, 0.1)
    for _ in range(1500):
        live(model, thing, choose.uniform(100, 200), 500)
    model.learn()
    assert at(model, thing, 0.1) < before / 10


def test_forgotten_things_make_room_for_others() -> None:
    model = NextUseModel([5, 5])
    for i in range(20_000):
        thing = model.describe([i % 5, i % 3])
        model.waited(thing, 0, 0.2, False, 1.0)
        model.forget(thing)
    assert len(model._rows) <= 1024
    assert model.num_things == 0


def test_what_was_observed_of_a_thing_counts_though_it_was_forgotten_since() -> None:
    model = NextUseModel([2])
    for _ in range(400):
        thing = model.describe([1])
        live(model, thing, 10.0, 100)
        model.forget(thing)
    model.learn()
    other, same = model.describe([0]), model.describe([1])
    live(model, other, None, 100)
    model.learn()
    assert model.hazards([same])[0][model.bin(9)] > model.hazards([other])[0][model.bin(1)]
