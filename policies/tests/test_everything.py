from __future__ import annotations

from kvplug.contract import Action, EngineView, Leaving, LinkView, Pressure, TierView
from kvplug_policies.lifecycle.everything import Everything

POOL = TierView("pool", 90, 100)


def test_all_is_stored_whatever_is_known_of_it() -> None:
    policy = Everything(Everything.Options.model_validate({}), EngineView(16, 100, host="test"))
    leaving = [Leaving(b"a", 0, 16, pays=False), Leaving(b"b", 0, 16, returns=0.0)]
    assert policy.store(leaving, [TierView("host"), TierView("disk")]) == ["host", "host"]
    down = TierView("host", write=LinkView(down=True))
    assert policy.store(leaving, [down]) == [None, None]


def test_a_full_tier_hands_down_and_the_last_one_drops() -> None:
    policy = Everything(Everything.Options.model_validate({}), EngineView(16, 100, host="test"))
    host, disk = TierView("host", 100, 100), TierView("disk", 100, 100)
    assert [policy.wants(t) for t in (host, TierView("disk", 96, 100), TierView("s3", 9))] == [
        4,
        0,
        0,
    ]
    keys = {"host": [b"a"], "disk": [b"b"]}
    moves = policy.plan(Pressure(0, 0.0, POOL, (host, disk), keys, {n: [1] for n in keys}))
    assert [(m.action, m.source, m.target) for m in moves] == [
        (Action.DEMOTE, "host", "disk"),
        (Action.DROP, "disk", None),
    ]
