from __future__ import annotations

import pytest
from pydantic import ValidationError

from kvplug.contract import Action, EngineView, Leaving, LinkView, Pressure, TierView
from kvplug_policies.lifecycle.watermarks import Watermarks

POOL = TierView("pool", 90, 100)


def policy(**options: float) -> Watermarks:
    return Watermarks(Watermarks.Options.model_validate(options), EngineView(16, 100, host="test"))


def pressure(*tiers: TierView, **candidates: list[bytes]) -> Pressure:
    keys = {tier.name: candidates.get(tier.name, []) for tier in tiers}
    return Pressure(0, 0.0, POOL, tiers, keys, {name: [1] * len(k) for name, k in keys.items()})


def test_what_leaves_goes_to_the_fastest_tier_that_can_be_asked() -> None:
    leaving = [Leaving(b"a", 0, 16), Leaving(b"b", 16, 16)]
    down = TierView("host", write=LinkView(down=True))
    assert policy().store(leaving, [TierView("host"), TierView("disk")]) == ["host", "host"]
    assert policy().store(leaving, [down, TierView("disk")]) == ["disk", "disk"]
    assert policy().store(leaving, [down]) == [None, None]


def test_a_tier_above_the_high_mark_shows_what_is_above_the_low_one() -> None:
    marks = policy(high=0.9, low=0.5)
    assert marks.wants(TierView("host", 90, 100)) == 0
    assert marks.wants(TierView("host", 91, 100)) == 41
    assert marks.wants(TierView("redis", 91, 0)) == 0


def test_chunks_go_down_and_at_the_bottom_for_good() -> None:
    host, disk = TierView("host", 96, 100), TierView("disk", 96, 100)
    both = policy().plan(pressure(host, disk, host=[b"a"], disk=[b"b"]))
    assert [(m.action, m.keys, m.source, m.target) for m in both] == [
        (Action.DEMOTE, [b"a"], "host", "disk"),
        (Action.DROP, [b"b"], "disk", None),
    ]


def test_a_tier_that_is_down_or_would_call_it_exact_is_passed_over() -> None:
    coded, host = TierView("device", 96, 100, exact=False), TierView("host", 0, 100)
    [move] = policy().plan(pressure(coded, host, device=[b"a"]))
    assert move.action is Action.DROP
    full = TierView("host", 96, 100)
    down = TierView("disk", write=LinkView(down=True))
    [move] = policy().plan(pressure(full, down, TierView("redis"), host=[b"a"]))
    assert move.target == "redis"


def test_the_low_mark_is_below_the_high_one() -> None:
    with pytest.raises(ValidationError, match="must be below high"):
        policy(high=0.5, low=0.5)
