"""The rules by which `kvplug tune` names a bottleneck, on rounds that were made up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvplug_lab.engine.rounds import Round, RoundStep, Served
from kvplug_lab.engine.trial import TrialRequest
from kvplug_lab.tune import bottleneck as rules
from kvplug_lab.tune.bottleneck import Profile, bottlenecks, context_share, profile
from kvplug_lab.tune.load import Load

CALM = Profile(
    ttft=1.0,
    ttft_p95=1.0,
    tpot=0.1,
    tokens_per_second=10.0,
    waited=0.0,
    full=0.0,
    pool=0.3,
    preemptions=0.0,
    running=4,
    hit=0.5,
    again=0.0,
    elsewhere=0.0,
    prefill=0.5,
    empty=0.05,
    context=0.1,
    transfer=0.01,
    load_tokens=1000,
    pool_tokens=4000,
)


def names(found: Profile) -> list[str]:
    return [b.name for b in bottlenecks(found)]


def test_a_calm_engine_has_none() -> None:
    assert names(CALM) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"again": 0.1}, [rules.RECOMPUTATION]),
        ({"again": 0.099}, []),
        ({"elsewhere": 0.2}, [rules.ELSEWHERE]),
        ({"full": 0.9}, []),  # A full pool for which nobody waits is well used.
        ({"waited": 0.9}, []),  # And waiting for a place among the running is not memory.
        ({"full": 0.9, "waited": 0.2}, [rules.MEMORY]),
        ({"preemptions": 0.2}, [rules.MEMORY]),
        ({"empty": 0.5}, []),
        ({"empty": 0.1, "full": 0.5, "waited": 0.5}, [rules.MEMORY, rules.FRAGMENTATION]),
        ({"context": 0.3}, [rules.LONG_CONTEXT]),
        ({"transfer": 0.9}, []),
        ({"transfer": 0.5, "again": 0.2}, [rules.RECOMPUTATION, rules.TRANSFER]),
    ],
)
def test_a_rule_holds_from_its_limit_on(changes: dict[str, float], named: list[str]) -> None:
    assert names(replace(CALM, **changes)) == named


def test_what_takes_most_time_comes_first() -> None:
    memory = replace(CALM, again=0.1, full=0.9, waited=0.9)
    assert names(memory) == [rules.MEMORY, rules.RECOMPUTATION]
    again = replace(CALM, again=0.4, full=0.3, waited=0.3, prefill=1.0)
    assert names(again) == [rules.RECOMPUTATION, rules.MEMORY]


def test_a_bottleneck_says_what_was_read() -> None:
    (one,) = bottlenecks(replace(CALM, again=0.25))
    assert (one.value, one.limit) == (0.25, 0.10)
    assert str(one).startswith("recomputation: 25% (from 10%): prompt tokens computed")


def step(seconds: float, context: int, *, decode: bool = True, held: int = 10) -> RoundStep:
    return RoundStep(seconds, 2, 1, held, 64, 16, context, decode)


def test_the_part_of_the_context_is_the_slope_of_decode_steps() -> None:
    steps = [step(0.010 + 1e-5 * n, n) for n in range(100, 1100, 50)]
    mean = sum(range(100, 1100, 50)) / 20
    assert context_share(steps) == pytest.approx(1e-5 * mean / (0.010 + 1e-5 * mean), rel=1e-6)
    # One pause of the machine, and prefill, change nothing.
    steps += [step(5.0, 1000), step(3.0, 500, decode=False)]
    assert context_share(steps) == pytest.approx(1e-5 * mean / (0.010 + 1e-5 * mean), rel=1e-3)
    assert context_share(steps[:5]) == 0.0
    # A slope that could as well be chance is none.
    named = 0
    for seed in range(100):
        times = 0.01 * np.exp(np.random.default_rng(seed).normal(0, 0.4, 50))
        named += context_share([step(float(t), 200 + 2 * i) for i, t in enumerate(times)]) >= 0.3
    assert named <= 5
    assert context_share([step(0.01, 100)] * 40) == 0.0


def test_a_round_is_summed_up() -> None:
    prompt = list(range(100, 164))
    requests = (TrialRequest(prompt, 4), TrialRequest([*prompt[:33], 1, 2], 4))
    load = Load("x", requests, ("", ""))
    answers = [
        Served(64, 0, 0, [1, 2, 3, 4], ttft=1.0, waited=0.0, tpot=0.1),
        Served(35, 0, 0, [1, 2, 3, 4], ttft=3.0, waited=2.0, tpot=0.3),
    ]
    steps = [
        step(2.0, 10, decode=False, held=10),
        step(1.0, 11, held=9),
        step(1.0, 12, held=2),
    ]
    served = Round(answers, steps, 5.0, 4.0, 10, 32, 1000, 1, 0, [])
    found = profile(load, served, copy_seconds=0.0032)
    assert found.ttft == 2.0 and found.ttft_p95 == 3.0 and found.tpot == pytest.approx(0.2)
    assert found.tokens_per_second == pytest.approx(8 / 5)
    assert found.waited == pytest.approx(2 / 4)
    assert found.full == pytest.approx(3 / 4) and found.pool == pytest.approx((20 + 9 + 2) / 40)
    assert found.preemptions == 0.5 and found.running == 2
    assert found.hit == 0.0 and found.again == pytest.approx(32 / 99)
    assert found.prefill == pytest.approx(2 / 4) and found.empty == pytest.approx(16 / 64)
    # 2 s of prefill for 99 tokens; a token's copy takes 0.1 ms.
    assert found.transfer == pytest.approx(1e-4 / (2.0 / 99))
    assert found.load_tokens == 99 - 32 + 8 and found.pool_tokens == 320
