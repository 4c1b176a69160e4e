from __future__ import annotations

import pytest
from pydantic import ValidationError

from kvplug.contract import Action, EngineView, Leaving, LinkView, Move, Pressure, TierView
from kvplug_policies.lifecycle.ladder import Ladder

POOL = TierView("pool", 90, 100)


def ladder(**options: float) -> Ladder:
    return Ladder(Ladder.Options.model_validate(options), EngineView(16, 100, host="test"))


def leaving(key: bytes, returns: float | None = 0.5, **more: object) -> Leaving:
    known = {"size": 10, "seconds": 1.0} | more
    return Leaving(key, 0, 16, returns=returns, **known)  # type: ignore[arg-type]


def plan(policy: Ladder, *tiers: TierView, waiting: int = 0, **keys: list[bytes]) -> list[Move]:
    shown = {tier.name: keys.get(tier.name, []) for tier in tiers}
    sizes = {name: [10] * len(found) for name, found in shown.items()}
    return policy.plan(Pressure(0, 0.0, POOL, tiers, shown, sizes, waiting))


def test_what_does_not_return_or_does_not_pay_is_not_stored() -> None:
    chunks = [leaving(b"a", 0.01), leaving(b"b", pays=False), leaving(b"c", None), leaving(b"d")]
    assert ladder().store(chunks, [TierView("host")]) == [None, None, "host", "host"]


def test_a_line_slower_than_prefill_takes_nothing() -> None:
    slow = TierView("s3", read=LinkView(bandwidth=5.0))
    assert ladder().store([leaving(b"a", size=10, seconds=1.0)], [slow]) == [None]
    assert ladder().store([leaving(b"a", size=10, seconds=3.0)], [slow]) == ["s3"]


def test_a_full_tier_has_a_price_and_what_cannot_pay_it_goes_a_rung_lower() -> None:
    policy, host, disk = ladder(), TierView("host", 100, 100), TierView("disk", 10, 1000)
    chunks = [leaving(bytes([i]), 0.4) for i in range(20)]
    assert set(policy.store(chunks, [host, disk])) == {"host"}
    for i in range(20):
        plan(policy, host, disk, host=[bytes([i])])
    assert policy.counters()["price_host"] > 0
    found = policy.store([leaving(b"low", 0.03), leaving(b"high", 0.9)], [host, disk])
    assert found == ["disk", "host"]


def test_the_least_worth_of_what_the_order_names_first_goes() -> None:
    policy, host = ladder(low=0.9), TierView("host", 100, 100)
    policy.store([leaving(b"a", 0.9), leaving(b"b", 0.1), leaving(b"c", 0.5)], [host])
    [move] = plan(policy, host, host=[b"a", b"b", b"c"])
    assert move == Move(Action.DROP, [b"b"], "host")


def test_unknown_chunks_go_first_and_for_good() -> None:
    policy, host, disk = ladder(low=0.9), TierView("host", 100, 100), TierView("disk")
    policy.store([leaving(b"a")], [host])
    [move] = plan(policy, host, disk, host=[b"a", b"found at start"])
    assert move == Move(Action.DROP, [b"found at start"], "host")


def test_what_a_codec_changed_never_goes_to_an_exact_tier() -> None:
    policy = ladder(low=0.9)
    device, host = TierView("device", 100, 100, exact=False), TierView("host", 0, 100)
    coded = TierView("coded", 0, 100, exact=False)
    policy.store([leaving(b"a")], [device])
    [move] = plan(policy, device, host, device=[b"a"])
    assert move.action is Action.DROP
    [move] = plan(policy, device, host, coded, device=[b"a"])
    assert (move.action, move.target) == (Action.DEMOTE, "coded")


def test_urgent_requests_chunks_are_worth_more() -> None:
    policy, host = ladder(low=0.9), TierView("host", 100, 100)
    policy.store([leaving(b"a", 0.3, priority=-1), leaving(b"b", 0.4)], [host])
    [move] = plan(policy, host, host=[b"a", b"b"])
    assert move.keys == [b"b"]


def test_what_is_used_stays_longer_than_what_is_not() -> None:
    policy, host = ladder(low=0.9), TierView("host", 100, 100)
    policy.store([leaving(bytes([i])) for i in range(10)], [host])
    plan(policy, host, host=[bytes([9])])
    policy.store([leaving(bytes([10 + i])) for i in range(40)], [host])
    plan(policy, host, host=[bytes([8])])
    policy.on_used([bytes([0])])
    [move] = plan(policy, host, host=[bytes([0]), bytes([1])])
    assert move.keys == [bytes([1])]


def test_a_line_that_is_backed_up_is_left_while_requests_wait() -> None:
    policy = ladder(patience=1.0)
    late = TierView("host", write=LinkView(bandwidth=10.0, queued=11))
    assert policy.store([leaving(b"a")], [late, TierView("disk")]) == ["host"]
    plan(policy, late, waiting=1)
    assert policy.store([leaving(b"b")], [late, TierView("disk")]) == ["disk"]


def test_the_low_mark_is_below_the_high_one() -> None:
    with pytest.raises(ValidationError, match="must be below high"):
        ladder(high=0.5, low=0.5)
