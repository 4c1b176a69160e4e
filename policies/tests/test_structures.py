from __future__ import annotations

import random

import pytest

from kvplug_policies.structures import Ghosts, Ranking, VictimPlan


@pytest.mark.parametrize("seed", range(3))
def test_a_ranking_is_a_sorted_dict(seed: int) -> None:
    choose, ranking = random.Random(seed), Ranking()
    truth: dict[int, tuple[int, int]] = {}
    for step in range(4000):
        block = choose.randrange(40)
        if choose.random() < 0.6:
            truth[block] = (choose.randrange(6), step)
            ranking.put((*truth[block], block))
        else:
            truth.pop(block, None)
            ranking.discard(block)
        expected = sorted((*rank, b) for b, rank in truth.items())
        n = choose.randrange(45)
        assert ranking.first(n) == [entry[-1] for entry in expected[:n]]
        assert len(ranking) == len(truth) and (block in ranking) == (block in truth)
        if choose.random() < 0.1:
            walk = ranking.walk()
            assert [entry for entry, _ in zip(walk, range(n), strict=False)] == expected[:n]
            walk.close()
            assert list(ranking.walk()) == expected


def test_a_ranking_stays_as_large_as_what_is_in_it() -> None:
    ranking = Ranking()
    for step in range(10_000):
        ranking.put((step, step % 10))
    assert len(ranking._heap) <= 2 * 10 + 65


def test_ghosts_forget_the_oldest() -> None:
    ghosts: Ghosts[int] = Ghosts(2)
    assert ghosts.add(b"a", 1) == ghosts.add(b"b", 2) == []
    assert ghosts.add(b"a", 3) == []
    assert ghosts.add(b"c", 4) == [2]
    assert b"b" not in ghosts and b"a" in ghosts and len(ghosts) == 2
    assert ghosts.pop(b"a") == 3 and ghosts.pop(b"a") is None
    assert Ghosts[int](0).add(b"x", 7) == [7]


def test_a_plan_gives_the_moves_that_led_to_its_first_victims() -> None:
    plan: VictimPlan[str] = VictimPlan()
    plan.move("x")
    plan.evict(1)
    plan.evict(2)
    plan.move("y")
    plan.evict(3)
    plan.move("z")
    assert plan.moves_for([1]) == plan.moves_for([1, 2]) == ["x"]
    assert plan.moves_for([1, 2, 3]) == ["x", "y"]
    assert plan.moves_for([2]) == plan.moves_for([2, 1]) == plan.moves_for([]) == []
    assert plan.moves_for([1, 2, 3, 4]) == []
