from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from kvplug.contract import ResidentView
from kvplug.testing.sequence import build, random_residents, residents
from kvplug_policies.scores import ALWAYS
from kvplug_policies.sequence.smart_window import SmartWindow

HELD, WINDOW = 40, 4


def case(
    totals: Tensor, attended: int | None = None, positions: Tensor | None = None
) -> ResidentView:
    """One head of flat keys; the window's queries look at one held token, if asked to."""
    keys = torch.zeros(1, 1, HELD, 8)
    queries = torch.zeros(1, WINDOW, 1, 8)
    if attended is not None:
        keys[0, 0, attended, 0] = 1.0
        queries[..., 0] = 30.0
    held = residents(keys, queries=queries, positions=positions, totals=totals[None, None])
    return replace(held, scale=1.0)


def smart(**options: object) -> SmartWindow:
    made = build(SmartWindow, **{"window": WINDOW, "recent": 0, "sink": 0, **options})
    assert isinstance(made, SmartWindow)
    return made


def test_a_token_in_fair_use_is_worth_one() -> None:
    """Had every query looked at its whole text alike, no old token is worth more than another."""
    positions = torch.arange(HELD)
    fair = (HELD / (positions + 1.0)).log()
    scores = smart(kernel=1).score(case(fair))[0, 0]
    torch.testing.assert_close(scores[:-WINDOW], torch.ones(HELD - WINDOW), rtol=0.05, atol=0.0)
    assert (scores[-WINDOW:] == ALWAYS).all()


def test_a_token_that_once_mattered_stays_before_one_that_never_did() -> None:
    totals = torch.zeros(HELD)
    totals[10] = 3.0
    scores = smart(kernel=1).score(case(totals))[0, 0, :-WINDOW]
    assert scores.argmax() == 10
    fair = math.log(HELD / 11)
    assert scores[10].item() == pytest.approx((3.0 + 1.0) / (fair + 1.0), rel=1e-5)


def test_what_it_received_is_diluted_slowly_and_never_forgotten() -> None:
    totals = torch.zeros(HELD)
    totals[10] = 8.0
    worth = []
    for length in (50, 500, 5000, 50000):
        positions = torch.cat([torch.arange(HELD - WINDOW), length - WINDOW + torch.arange(WINDOW)])
        held = case(totals, positions=positions[None, None])
        worth.append(smart(kernel=1).score(held)[0, 0, 10].item())
    assert worth == sorted(worth, reverse=True)
    assert worth[-1] > worth[0] / 5


def test_a_token_needed_now_is_kept_at_once() -> None:
    totals = torch.zeros(HELD)
    totals[10] = 3.0
    scores = smart(kernel=1).score(case(totals, attended=20))[0, 0, :-WINDOW]
    assert scores.argmax() == 20
    assert scores[20].item() == pytest.approx(HELD, rel=1e-3)


def test_neighbours_in_the_text_share_what_a_token_receives() -> None:
    scores = smart(kernel=5).score(case(torch.full((HELD,), 0.01), attended=20))[0, 0]
    around = scores[18:23]
    torch.testing.assert_close(around, torch.full_like(around, HELD / 5), rtol=1e-3, atol=0.0)
    assert (scores[[17, 23]] < 1).all()


def test_what_the_latest_tokens_receive_is_not_shared() -> None:
    scores = smart(kernel=5).score(case(torch.full((HELD,), 0.01), attended=HELD - WINDOW))[0, 0]
    assert (scores[:-WINDOW] < 1).all() and (scores[-WINDOW:] == ALWAYS).all()


def test_measure_is_what_a_smaller_window_would_have_lost() -> None:
    """Tokens 0 to 8 looked least worth before. A window of 40 * 0.75 holds none of them, and
    neither the oldest of the others."""
    totals = torch.cat([torch.zeros(9), torch.full((HELD - 9,), 9.0)])
    for attended, lost in ((3, 1.0), (9, 1.0), (10, 0.0), (20, 0.0)):
        now = totals.clone()
        now[attended] += WINDOW
        policy = smart(budget=HELD)
        held = case(now, attended=attended)
        far_paid, lost_paid, base = policy.measure(held, policy.score(held))[0].tolist()
        assert far_paid == pytest.approx(1.0, abs=1e-3)
        assert lost_paid == pytest.approx(lost, abs=1e-3)
        assert base == HELD


def test_once_tokens_are_gone_the_window_is_what_was_held_before_the_interval() -> None:
    """Of 40 held 16 are new, so the window is 24: a smaller one holds the latest 4 and 14 more."""
    positions = torch.arange(HELD) + 100
    totals = torch.linspace(9.0, 1.0, HELD)  # worth falls with the slot
    for attended, lost in ((13, 0.0), (14, 1.0)):
        now = totals.clone()
        now[attended] += WINDOW
        policy = smart(budget=HELD, interval=16)
        held = case(now, attended=attended, positions=positions[None, None])
        assert policy.measure(held, policy.score(held))[0, 1].item() == pytest.approx(
            lost, abs=1e-3
        )


def test_attention_inside_the_window_is_not_far() -> None:
    policy = smart()
    totals = torch.zeros(HELD)
    held = case(totals, attended=HELD - WINDOW)
    far_paid, lost_paid, _ = policy.measure(held, policy.score(held))[0].tolist()
    assert far_paid == pytest.approx(0.0, abs=1e-3)
    assert lost_paid == pytest.approx(0.0, abs=1e-3)


def test_measuring_without_scoring_first_is_the_same() -> None:
    policy, other = smart(), smart()
    held = random_residents(policy)
    scores = policy.score(held)
    torch.testing.assert_close(other.measure(held, scores), policy.measure(held, scores))


def test_a_window_grows_stays_and_shrinks_between_its_bounds() -> None:
    policy = smart(budget=1000, min=0.5, max=2.0, grow=0.03, shrink=0.01, step=1.25)
    sizes = [1000]
    for lost in [0.05] * 5 + [0.02] * 2 + [0.001] * 8:
        sizes.append(policy.resize([0.4, lost, 1000.0], sizes[-1], 9000))
    assert sizes[:6] == [1000, 1250, 1562, 1952, 2000, 2000]
    assert sizes[6:8] == [2000, 2000]
    assert sizes[8:] == [1600, 1280, 1024, 819, 655, 524, 500, 500]
    counters = policy.counters()
    assert (counters["grew"], counters["stayed"], counters["shrank"]) == (4, 4, 7)
    assert (counters["smallest_window"], counters["largest_window"]) == (500, 2000)
    assert counters["mean_window"] == pytest.approx(sum(sizes[1:]) / 15)
    assert counters["far_attention"] == pytest.approx(0.4)
    assert counters["lost_attention"] == pytest.approx((0.05 * 5 + 0.02 * 2 + 0.001 * 8) / 15)


def test_nothing_is_counted_before_a_decision() -> None:
    assert smart().counters() == {}


def test_it_resizes_by_cumulative_attention() -> None:
    assert smart().resizes
    assert smart().wants_cumulative_attention


def test_totals_are_missed() -> None:
    held = replace(case(torch.zeros(HELD)), cumulative_attention=None)
    with pytest.raises(ValueError, match="cumulative attention"):
        smart().score(held)


@pytest.mark.parametrize(
    "options",
    [
        {"grow": 0.04},
        {"kernel": 2},
        {"min": 0.0},
        {"max": 0.5},
        {"step": 1.0},
        {"budget": 33, "sink": 4, "recent": 0},
    ],
)
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SmartWindow.Options.model_validate(options)
