"""What shadows found decides how much is approximated: full, cautious, exact."""

from __future__ import annotations

import pytest

from kvplug.reuse.settings import ShadowSettings
from kvplug.shadow.control import Change, ShadowControl
from kvplug.shadow.states import ShadowState

FULL, CAUTIOUS, EXACT = ShadowState


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def made(clock: Clock, **settings: object) -> tuple[ShadowControl, list[Change]]:
    control = ShadowControl(ShadowSettings.model_validate(settings), clock, seed=0)
    changes: list[Change] = []
    control.on_change = changes.append
    return control, changes


def feed(control: ShadowControl, divergence: float, most: int = 500) -> int:
    """Feed one divergence until the state changes; returns how often."""
    before = control.state
    for n in range(1, most + 1):
        control.add(divergence)
        if control.state is not before:
            return n
    return most


def test_harm_leads_to_exact_and_says_what_was_found(clock: Clock) -> None:
    control, changes = made(clock)
    assert control.admits()
    needed = feed(control, 0.4)
    assert needed < 10
    assert changes == [Change(EXACT, FULL, needed, pytest.approx(0.4), 600.0)]
    assert not control.admits()
    assert control.evidence == 1


def test_harmless_answers_change_nothing(clock: Clock) -> None:
    control, changes = made(clock)
    for _ in range(2000):
        control.add(0.05)
    assert (control.state, changes) == (FULL, [])


def test_a_trial_follows_the_cooldown_and_leads_back(clock: Clock) -> None:
    control, changes = made(clock, cooldown=60, trial=0.25)
    feed(control, 0.4)
    clock.now = 59.9
    assert not any(control.admits() for _ in range(100))
    clock.now = 60
    admitted = sum(control.admits() for _ in range(1000))
    assert control.state is CAUTIOUS
    assert 200 < admitted < 300
    assert all(control.chooses() for _ in range(100))
    feed(control, 0.01)
    assert [c.state for c in changes] == [EXACT, CAUTIOUS, FULL]
    assert control.admits()


def test_a_failed_trial_doubles_the_cooldown_and_a_passed_one_resets_it(clock: Clock) -> None:
    control, changes = made(clock, cooldown=10)
    feed(control, 0.4)
    for expected in (20, 40, 80, 160, 160):
        clock.now += changes[-1].cooldown
        control.admits()
        feed(control, 0.4)
        assert changes[-1].cooldown == expected
    clock.now += 160
    control.admits()
    feed(control, 0.0)
    assert control.state is FULL
    feed(control, 0.4)
    assert changes[-1].cooldown == 10


def test_a_trial_at_the_bound_stays_a_trial(clock: Clock) -> None:
    control, _ = made(clock, cooldown=10)
    feed(control, 0.4)
    clock.now = 10
    control.admits()
    feed(control, 0.05)
    assert control.state is CAUTIOUS


def test_answers_that_began_before_do_not_count_while_exact(clock: Clock) -> None:
    control, _ = made(clock, cooldown=10)
    feed(control, 0.4)
    for _ in range(100):
        control.add(0.0)
    clock.now = 10
    control.admits()
    assert control.evidence == 0
    assert feed(control, 0.4) < 10


def test_one_in_so_many_is_chosen(clock: Clock) -> None:
    control, _ = made(clock, one_in=10)
    assert 850 < sum(control.chooses() for _ in range(10_000)) < 1150
    every, _ = made(clock, one_in=1)
    assert all(every.chooses() for _ in range(100))


def test_other_weights_start_over(clock: Clock) -> None:
    control, _ = made(clock)
    feed(control, 0.4)
    control.clear()
    assert control.state is FULL
    assert control.evidence == 0
    assert control.admits()
