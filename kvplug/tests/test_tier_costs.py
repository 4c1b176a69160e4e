"""What transfers and prefill cost, fitted to measurements, and what is decided by it."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvplug.contract import EngineView, Found, LinkView
from kvplug.tiers.cost import Prefill, computing, loading, pairs
from kvplug.tiers.fitting import fit_times
from kvplug.tiers.links import FIRST_PAUSE, LONGEST_PAUSE, Health, Link
from kvplug_policies.lifecycle.everything import Everything

MIB = 1 << 20


def policy() -> Everything:
    return Everything(Everything.Options.model_validate({}), EngineView(16, 100, host="test"))


def test_pairs_are_those_of_a_causal_mask() -> None:
    for start, tokens in ((0, 1), (0, 5), (7, 3)):
        assert pairs(start, tokens) == sum(start + i + 1 for i in range(tokens))


def test_a_fit_finds_what_made_the_times_in_spite_of_outliers() -> None:
    choose = np.random.default_rng(0)
    terms = np.stack([np.ones(200), choose.uniform(1, 100, 200)], axis=1)
    seconds = (terms @ [3.0, 0.5]) * choose.uniform(0.95, 1.05, 200)
    seconds[::10] *= 20
    assert fit_times(terms, seconds) == pytest.approx([3.0, 0.5], rel=0.15)


def test_no_part_of_a_time_is_negative() -> None:
    sizes = np.array([1.0, 2.0, 3.0, 4.0])
    # Falling times: without the bound, a byte would cost less than nothing.
    found = fit_times(np.stack([np.ones(4), sizes], axis=1), np.array([4.0, 3.0, 2.0, 1.0]))
    assert (found >= 0).all() and found[0] > 0 and found[1] == 0


def test_a_line_learns_its_latency_and_its_bandwidth() -> None:
    link, choose = Link(), random.Random(0)
    for _ in range(64):
        size = choose.choice([64 << 10, MIB, 4 * MIB, 8 * MIB])
        noise = choose.uniform(0.9, 1.1) * (30 if choose.random() < 0.05 else 1)
        link.add(size, (2e-3 + size / 1e9) * noise)
    view = link.view(down=False)
    assert view.latency == pytest.approx(2e-3, rel=0.2)
    assert view.bandwidth == pytest.approx(1e9, rel=0.2)
    assert view.seconds(MIB) == pytest.approx(2e-3 + MIB / 1e9, rel=0.2)


def test_a_line_follows_a_change() -> None:
    link = Link()
    for speed in (1e9, 1e7):
        for i in range(64):
            link.add((1 + i % 4) * MIB, (1 + i % 4) * MIB / speed)
    assert link.bandwidth == pytest.approx(1e7, rel=0.1)


def test_transfers_of_one_size_are_all_bandwidth() -> None:
    link = Link()
    for _ in range(20):
        link.add(MIB, 0.01)
    assert link.latency == 0 and link.bandwidth == pytest.approx(100 * MIB)


@pytest.mark.parametrize(("size", "seconds"), [(0, 1.0), (-5, 1.0), (MIB, 0.0), (MIB, -1.0)])
def test_what_cannot_be_a_transfer_is_left_out(size: int, seconds: float) -> None:
    link = Link()
    link.add(size, seconds)
    link.add(MIB, float("nan"))
    link.add(MIB, float("inf"))
    assert link.bandwidth == 0


def test_bytes_that_wait_count_and_a_tier_that_is_down_takes_forever() -> None:
    link = LinkView(latency=1.0, bandwidth=10.0, queued=50)
    assert link.seconds(10) == 7.0
    assert LinkView(bandwidth=10.0, down=True).seconds(1) == float("inf")


def test_a_tier_is_left_alone_longer_each_time_it_fails() -> None:
    health, now, pauses = Health(), 0.0, []
    for _ in range(12):
        health.failed(now)
        pauses.append(health.until - now)
        health.failed(now)
        assert health.down(now) and health.until - now == pauses[-1], "one failure a pause"
        now = health.until
        assert not health.down(now)
    assert pauses[0] == FIRST_PAUSE and pauses[1] == 2 * FIRST_PAUSE
    assert pauses[-1] == LONGEST_PAUSE
    health.worked()
    health.failed(now)
    assert health.until - now == FIRST_PAUSE


def measured(prefill: Prefill, token: float = 1e-4, pair: float = 1e-9) -> Prefill:
    choose = random.Random(0)
    for _ in range(256):
        start, tokens = choose.randrange(0, 30_000, 1000), choose.choice([64, 512, 2048])
        seconds = 0.01 + token * tokens + pair * pairs(start, tokens)
        prefill.add(tokens, pairs(start, tokens), seconds * choose.uniform(0.95, 1.05))
    return prefill


def test_prefill_learns_its_three_parts() -> None:
    prefill = measured(Prefill())
    assert prefill.token == pytest.approx(1e-4, rel=0.1)
    assert prefill.pair == pytest.approx(1e-9, rel=0.1)
    expected = 0.01 + 1e-4 * 8192 + 1e-9 * pairs(0, 8192)
    assert prefill.seconds(0, 8192) == pytest.approx(expected, rel=0.05)
    assert prefill.speed(0, 8192) == pytest.approx(8192 / expected, rel=0.05)


def test_a_usual_token_costs_what_tokens_did_on_average() -> None:
    prefill = Prefill()
    for start in range(0, 64_000, 1000):
        prefill.add(1000, pairs(start, 1000), 1e-4 * 1000 + 1e-9 * pairs(start, 1000))
    average = prefill.seconds(0, 64_000) / 64_000
    assert prefill.typical(16) == pytest.approx(16 * average, rel=0.02)
    assert prefill.typical(16) > 1.2 * 16 * prefill.token


def test_prefill_of_nothing_known_and_of_no_tokens() -> None:
    prefill = Prefill()
    assert not prefill.known and prefill.speed(0, 100) == 0
    assert computing(prefill, 0, 100, [16, 16]) == []
    prefill.add(100, pairs(0, 100), 1.0)
    assert prefill.seconds(0, 200) == pytest.approx(2.0)
    assert prefill.seconds(0, 0) == 0


def test_both_sides_are_told_for_every_number_of_chunks() -> None:
    prefill = measured(Prefill())
    found = computing(prefill, 32, 132, [16, 16])
    assert found == [prefill.seconds(32, 100), prefill.seconds(48, 84), prefill.seconds(64, 68)]
    fast, slow = LinkView(bandwidth=100.0), LinkView(latency=5.0, bandwidth=10.0)
    times = loading([10, 10, 10, 10], ["host", "host", "s3", "s3"], {"host": fast, "s3": slow})
    assert times == pytest.approx([0, 0.1, 0.2, 6.0, 7.0]), "tiers are read side by side"
    assert loading([10], ["host"], {"host": LinkView()}) == []


def decide(seconds: list[float], compute: list[float], wait: float = 0.0) -> int:
    n = len(seconds) - 1
    found = Found(
        [16] * n, [10] * n, ["host"] * n, 0, 1000, loading=seconds, computing=compute, wait=wait
    )
    return policy().load(found, {})


def test_the_first_token_comes_as_soon_as_it_can() -> None:
    assert decide([0, 1, 2], [9, 8.5, 8]) == 0
    assert decide([0, 1, 2], [9, 5, 1]) == 2
    # A slow tier's part of the run is computed, a fast tier's is loaded.
    assert decide([0, 1, 2, 90], [9, 6, 3, 0]) == 2


def test_loading_behind_others_costs_nothing() -> None:
    assert decide([0, 1, 2], [9, 8.5, 8]) == 0
    assert decide([0, 1, 2], [9, 8.5, 8], wait=2.0) == 2


def test_all_is_loaded_before_anything_was_measured() -> None:
    assert decide([], []) == 0
    found = Found([16] * 3, [10] * 3, ["host"] * 3, 0, 100)
    assert policy().load(found, {}) == 3


def test_within_one_tier_all_or_nothing_is_best() -> None:
    """What `LifecyclePolicy.load` says: computing bends upwards, loading is a line."""
    prefill, choose = measured(Prefill()), random.Random(1)
    for _ in range(50):
        chunks, size = choose.randrange(1, 40), choose.choice([1e4, 1e6, 1e7])
        total = 512 * chunks + choose.randrange(1, 2000)
        link = LinkView(latency=choose.uniform(0, 0.2), bandwidth=choose.choice([1e7, 1e8, 1e9]))
        names = ["host"] * chunks
        found = Found(
            [512] * chunks,
            [int(size)] * chunks,
            names,
            0,
            total,
            loading=loading([int(size)] * chunks, names, {"host": link}),
            computing=computing(prefill, 0, total, [512] * chunks),
        )
        assert policy().load(found, {}) in (0, chunks)
