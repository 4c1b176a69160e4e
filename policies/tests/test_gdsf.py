from __future__ import annotations

import pytest
from singles import Singles, evictions, skewed

from kvplug.contract import EngineView, LayerView, Released
from kvplug.testing.prefix_cache import Blocks, build
from kvplug_policies.prefix_cache.gdsf import Gdsf


def test_a_deeper_block_costs_more_and_the_sum_is_quadratic() -> None:
    engine = EngineView(16)
    policy = Gdsf(Gdsf.Options(quadratic_tokens=160), engine)
    assert [policy.cost(i) for i in (0, 1, 10)] == [16.8, 18.4, 32.8]
    whole = sum(policy.cost(i) for i in range(100))
    assert whole == pytest.approx(1600 + 1600**2 / 2 / 160)
    assert policy.cost(-1) == policy.cost(0), "an unknown depth costs what the first block does"


def test_the_share_of_attention_follows_the_model() -> None:
    layer = LayerView(0, 1, num_kv_heads=2, num_heads=9, head_size=64)
    small = Gdsf(Gdsf.Options(), EngineView(16, layers=(layer,)))
    assert small.cost(1) == pytest.approx(16 * (1 + 24 / (6 * 576)))
    unknown = Gdsf(Gdsf.Options(), EngineView(16))
    assert unknown.cost(1) == pytest.approx(16 * (1 + 24 / (6 * 4096)))


def test_plain_gives_up_the_cheap_head_first_and_chained_the_tail() -> None:
    released = Released([7, 3, 5], positions=[2, 1, 0])
    plain, chained = build(Gdsf, chained=False), build(Gdsf)
    for policy in (plain, chained):
        policy.on_release(released)
    assert plain.victims(3) == [5, 3, 7]
    assert chained.victims(3) == [7, 3, 5]


def test_use_outweighs_cost_and_age_outweighs_use() -> None:
    cache = Singles(Gdsf, 2)
    cache.use("a", "a", "a", "b", "c")
    assert cache.evicted == ["b"]
    cache.use(*"defgh")
    assert "a" in cache.evicted, "L has grown past what a is worth"


def test_only_victims_age_the_others() -> None:
    blocks = Blocks(build(Gdsf))
    blocks.release(1, 2, 3)
    blocks.forget(2)
    assert blocks.policy.counters()["age"] == 0
    blocks.evict(1)
    assert blocks.policy.counters()["age"] > 0


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_the_formula(seed: int) -> None:
    contents = skewed(seed, 3000, 60)
    cost = Gdsf(Gdsf.Options(), EngineView(16)).cost(0)
    worth: dict[int, tuple[float, int]] = {}
    uses: dict[int, int] = {}
    age, expected = 0.0, []
    for now, x in enumerate(contents):
        if x not in worth and len(worth) == 15:
            victim = min(worth, key=worth.__getitem__)
            age = worth.pop(victim)[0]
            del uses[victim]
            expected.append(victim)
        uses[x] = uses.get(x, 0) + 1
        worth[x] = (age + uses[x] * cost, now)
    assert evictions(Singles(Gdsf, 15), contents) == expected
