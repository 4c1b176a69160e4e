"""Laws of lifecycle policies, and the states of tiers to check them with."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

from kvplug.contract import (
    Action,
    Due,
    Found,
    Leaving,
    LifecyclePolicy,
    LinkView,
    Move,
    Pressure,
    TierView,
)
from kvplug.testing.laws import PolicyLaws, law

MIB = 1 << 20
LINE = LinkView(latency=1e-4, bandwidth=1e9)
TIERS = (
    TierView("host", 60 * MIB, 64 * MIB, read=LINE, write=LINE),
    TierView(
        "disk", 100 * MIB, 512 * MIB, durable=True, read=LinkView(1e-3, 1e8), write=LinkView()
    ),
)
"""A host tier that is almost full, above a disk."""


def leaving(count: int, seed: int = 0) -> list[Leaving]:
    """Chunks about to be evicted, of texts of four chunks each."""
    choose = random.Random(seed)
    found = []
    for i in range(count):
        found.append(
            Leaving(
                key=_key(i),
                start=16 * (i % 4),
                tokens=16,
                uses=choose.randint(1, 5),
                idle=choose.random() * 100,
                misses=choose.choice([0, 0, 1]),
                returns=choose.choice([None, 0.0, 0.5, 1.0]),
                session=choose.random() < 0.5,
                priority=choose.choice([0, 1, -1]),
                parent=_key(i - 1) if i % 4 else b"",
                text=_key(i // 4),
                pays=choose.random() < 0.8,
                size=MIB,
                seconds=choose.choice([0.0, 0.01]),
            )
        )
    return found


def pressure(
    tiers: tuple[TierView, ...] = TIERS, *, count: int = 6, step: int = 1, due: bool = False
) -> Pressure:
    """The state from which moves are planned: ``count`` candidates of each tier.

    Args:
        tiers: The tiers, fastest first.
        count: Candidates of each, of 1 MiB.
        step: Scheduler step; one takes 0.1 s.
        due: Whether a session is about to return whose chunks stand in the last tier.
    """
    keys = {t.name: [_key(100 * n + i) for i in range(count)] for n, t in enumerate(tiers)}
    last = tiers[-1].name
    return Pressure(
        step,
        0.1 * step,
        TierView("pool", 90 * MIB, 100 * MIB),
        tiers,
        keys,
        {name: [MIB] * len(found) for name, found in keys.items()},
        waiting=step % 3,
        running=4,
        thrash=0.1,
        due=(Due([_key(900)], last, 0.9),) if due and len(tiers) > 1 else (),
    )


def _key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def _states() -> Iterator[tuple[str, tuple[TierView, ...]]]:
    host, disk = TIERS
    yield "a host tier without content", (replace(host, used=0),)
    yield "a full host tier alone", (replace(host, used=host.capacity),)
    yield "a host tier almost full, above a disk", TIERS
    yield "a tier without a limit", (host, replace(disk, capacity=0, shared=True))
    yield "a full host tier above a full disk", tuple(replace(t, used=t.capacity) for t in TIERS)
    down = replace(host, write=LinkView(down=True), read=LinkView(down=True))
    yield "a host tier that is down, above a disk", (down, disk)
    coded = replace(host, exact=False)
    yield "a coded host tier above an exact disk", (coded, disk)


class LifecycleLaws(PolicyLaws):
    """Laws of every lifecycle policy."""

    policy: ClassVar[type[LifecyclePolicy]]

    @law("LifecyclePolicy.store", "Choose the tier that each chunk about to be evicted is stored")
    def test_each_chunk_goes_to_a_tier_that_is_there_or_to_none(self) -> None:
        for what, tiers in _states():
            policy: LifecyclePolicy = self.build()
            names = {None, *(t.name for t in tiers)}
            for count in (0, 1, 40):
                found = list(policy.store(leaving(count), tiers))
                assert len(found) == count, f"{what}: {len(found)} answers for {count} chunks"
                assert set(found) <= names, f"{what}: stored in {set(found)}"

    @law("LinkView", "True if the tier failed lately and is left alone for a while.")
    def test_a_tier_that_is_down_is_given_nothing(self) -> None:
        down = replace(TIERS[0], write=LinkView(down=True), read=LinkView(down=True))
        for tiers in ((down,), (down, TIERS[1])):
            found = list(self.build().store(leaving(8), tiers))
            assert down.name not in found, f"of {len(tiers)} tiers, {found} where host is down"

    @law("LifecyclePolicy.plan", "Return the moves to make now")
    def test_moves_lead_from_a_tier_to_another(self) -> None:
        for what, tiers in _states():
            place = {t.name: i for i, t in enumerate(tiers)}
            for step, move in self._moves(tiers):
                said = f"{what}, step {step}: {move}"
                assert isinstance(move, Move) and move.source in place, said
                if move.action is Action.DROP:
                    assert move.target is None, f"{said}: a drop has no target"
                    continue
                assert move.target in place and move.target != move.source, said
                below = place[move.target] > place[move.source]
                assert below == (move.action is not Action.PROMOTE), f"{said}: the wrong way"

    @law("Pressure", "chunks in the order in which they would leave it")
    def test_what_moves_was_shown(self) -> None:
        for what, tiers in _states():
            for step, move in self._moves(tiers):
                state = pressure(tiers, step=step, due=step == 2)
                shown = {*state.candidates[move.source]}
                shown |= {k for d in state.due if d.source == move.source for k in d.keys}
                unknown = [k for k in move.keys if k not in shown]
                assert not unknown, f"{what}, step {step}: {len(unknown)} keys that were not shown"

    @law("LifecyclePolicy.load", "Return how many of the chunks found to load")
    def test_a_number_of_the_chunks_found_is_loaded(self) -> None:
        tiers = {t.name: t for t in TIERS}
        for count in (1, 2, 7):
            for measured in (False, True):
                found = Found(
                    [16] * count,
                    [MIB] * count,
                    ["host"] * (count - count // 2) + ["disk"] * (count // 2),
                    start=32,
                    total=32 + 16 * count + 5,
                    prefill=1000.0 * measured,
                    loading=[0.01 * n for n in range(count + 1)] if measured else (),
                    computing=[0.02 * (count + 1 - n) for n in range(count + 1)]
                    if measured
                    else (),
                )
                number = self.build().load(found, tiers)
                said = f"{count} chunks found, measured={measured}: load gave {number!r}"
                assert isinstance(number, int) and 0 <= number <= count, said

    @law("LifecyclePolicy.wants", "Bytes of candidates of a tier that `plan` wants to see now")
    def test_what_it_wants_is_a_number_of_bytes(self) -> None:
        policy = self.build()
        for what, tiers in _states():
            for tier in tiers:
                wanted = policy.wants(tier)
                assert isinstance(wanted, int) and wanted >= 0, f"{what}: {tier.name}: {wanted!r}"

    @law("LifecyclePolicy.on_used", "Take note that a request loads chunks.")
    def test_unknown_chunks_may_be_used(self) -> None:
        policy: LifecyclePolicy = self.build()
        policy.on_used([_key(5000)])
        policy.on_used([])
        assert len(list(policy.store(leaving(2), TIERS))) == 2, "after on_used of an unknown key"

    def _moves(self, tiers: tuple[TierView, ...]) -> Iterator[tuple[int, Move]]:
        policy: LifecyclePolicy = self.build()
        policy.store(leaving(12), tiers)
        for step in (1, 2, 3):
            for tier in tiers:
                policy.wants(tier)
            for move in policy.plan(pressure(tiers, step=step, due=step == 2)):
                yield step, move
