"""What the demo makes of its rounds: figures, spread, ratios, answers side by side."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvplug_lab.demo.compare import (
    NO_DIFFERENCE,
    Figures,
    figures_of,
    places,
    ratio_text,
    rows_of,
    spread_text,
    verdicts,
)
from kvplug_lab.demo.deployments import STOCK, Deployment
from kvplug_lab.demo.play import answer_text, order_of
from kvplug_lab.demo.questions import Question, Work
from kvplug_lab.demo.sides import Part, marked, pairs_of
from kvplug_lab.engine.rounds import Round, RoundStep, Served

KEYS = ("11111", "22222", "33333", "44444")
WORK = Work(
    tuple(
        Question(i // 2, 100 + 400 * (i % 2), f"which {i}?", key, (7,) * 50)
        for i, key in enumerate(KEYS)
    ),
    (None, None, 0, 1),
    documents=2,
    output_tokens=4,
)
RIGHT = tuple(f" {key}." for key in KEYS)


def deployment(name: str = STOCK, beside: int = 0) -> Deployment:
    return Deployment(name, None, {}, "", True, 20, 32, 1 << 20, beside, 640)


def figures(**own: object) -> Figures:
    found = Figures(2, 3.0, 180, 20, 0, (2, 2), 4, 10.0, 8.0, 1.0)
    return replace(found, **own)  # type: ignore[arg-type]


def test_figures_are_counted_from_steps_and_answers() -> None:
    steps = [RoundStep(0.1, n, 0, held, 0, 0, 0, False) for n, held in ((1, 3), (2, 6), (0, 0))]
    served = [
        Served(50, cached, 0, [1], ttft, 0.0, 0.0)
        for cached, ttft in ((0, 1), (0, 2), (32, 3), (32, 9))
    ]
    found = Round(served, steps, 12.0, 6.0, 20, 32, 1 << 20, 1, 0, [])
    answers = [RIGHT[0], " 99999.", RIGHT[2], "nothing"]
    own = figures_of(deployment(beside=4 << 20), WORK, found, answers, RIGHT)
    assert own.running == 2
    assert own.kv_mib == pytest.approx(9 / 3 + 4 / 2)
    assert (own.computed, own.cached, own.preemptions) == (136, 64, 1)
    assert own.right == (2, 0)
    assert own.same == 2
    assert (own.seconds, own.cpu_seconds, own.ttft) == (12.0, 6.0, 2.5)
    assert own.answers_per_minute(4) == 20.0
    assert places(WORK) == [100, 500]


def test_rounds_that_agree_show_one_figure_and_others_their_spread() -> None:
    assert spread_text([4.0, 4.0, 4.0], ".0f") == "4"
    assert spread_text([4.0, 6.0, 5.0], ".0f") == "5 (4..6)"


def test_a_ratio_stands_with_its_spread_or_not_at_all() -> None:
    assert ratio_text([20.0, 44.0, 30.0], [10.0, 20.0, 10.0]) == "2.20x (2.00..3.00)"
    assert ratio_text([9.0, 11.0], [10.0, 10.0]) == NO_DIFFERENCE
    assert ratio_text([10.0, 12.0], [10.0, 10.0]) == NO_DIFFERENCE
    assert ratio_text([20.0], [10.0]) == ""
    assert ratio_text([20.0, 20.0], [0.0, 10.0]) == ""


def test_rounds_are_compared_within_a_round() -> None:
    """A machine that was slower for a whole round does not change the ratio."""
    fast, slow = figures(seconds=10.0), figures(seconds=40.0)
    rounds = [
        [fast, replace(fast, seconds=5.0)],
        [slow, replace(slow, seconds=20.0)],
        [fast, replace(fast, seconds=5.0)],
    ]
    rows = {row.key: row for row in rows_of([deployment(), deployment("own")], WORK, rounds)}
    assert rows["answers_per_minute"].cells[1].ratio == "2.00x (2.00..2.00)"
    assert rows["answers_per_minute"].cells[0].text == "24.0 (6.0..24.0)"
    assert rows["cpu_seconds"].cells[1].ratio == NO_DIFFERENCE


def test_counts_come_first_and_one_round_shows_no_times() -> None:
    both = [deployment(), deployment("own")]
    one = rows_of(both, WORK, [[figures(), figures(right=(0, 2), same=1)]])
    assert not any(row.timed for row in one)
    shown = {row.label: [cell.text for cell in row.cells] for row in one}
    assert shown["right answers, of 4"] == ["4", "2"]
    assert shown["  fact at token 100, of 2"] == ["2", "0"]
    assert shown["  fact at token 500, of 2"] == ["2", "2"]
    assert shown["answers as stock's, of 4"] == ["4", "1"]
    timed = [row.timed for row in rows_of(both, WORK, [[figures(), figures()]] * 3)]
    assert timed == sorted(timed) and any(timed)


def test_a_verdict_says_the_counts_beside_those_of_stock() -> None:
    rounds = [[figures(), figures(right=(0, 2), running=n, computed=9_000)] for n in (3, 4, 4)]
    assert verdicts([deployment(), deployment("own")], WORK, rounds) == [
        "own: 2 of 4 answers right (stock: 4), 4 (3..4) requests at once (stock: 2), "
        "9,000 prompt tokens computed (stock: 180)."
    ]


def test_every_engine_goes_first_once() -> None:
    orders = [order_of(3, number) for number in range(3)]
    assert [sorted(order) for order in orders] == [[0, 1, 2]] * 3
    assert all(sorted(column) == [0, 1, 2] for column in zip(*orders, strict=True))


def test_an_answer_ends_where_the_model_ended_it() -> None:
    def decode(tokens: object) -> str:
        return str(tokens)

    assert answer_text(decode, [5, 6, 2, 7, 0], [0, 2]) == "[5, 6]"
    assert answer_text(decode, [5, 6], [0, 2]) == "[5, 6]"


def test_words_that_differ_are_marked() -> None:
    left, right = marked("is 12345. Then", "is 12999. Then more")
    assert left == (Part("is ", False), Part("12345", True), Part(". Then", False))
    assert right == (
        Part("is ", False),
        Part("12999", True),
        Part(". Then", False),
        Part(" more", True),
    )
    for one, other in (("", "a b"), ("a b", ""), ("", ""), ("a\n b", "a\n b")):
        for text, parts in zip((one, other), marked(one, other), strict=True):
            assert "".join(part.text for part in parts) == text


def test_a_right_answer_that_agrees_and_one_that_was_lost_are_shown() -> None:
    stock = [" 99999.", RIGHT[1], RIGHT[2], RIGHT[3]]
    own = [" 99999.", RIGHT[1], RIGHT[2] + " More", " 55555."]
    agrees, differs = pairs_of("own", WORK.questions, stock, own)
    assert agrees.agrees and agrees.stock_right and agrees.question.key == KEYS[1]
    assert not differs.agrees and differs.question.key == KEYS[3]
    assert (differs.stock_right, differs.own_right) == (True, False)
    assert [p.agrees for p in pairs_of("own", WORK.questions, RIGHT, RIGHT)] == [True]
    other = ["none"] * len(RIGHT)
    assert [p.agrees for p in pairs_of("own", WORK.questions, RIGHT, other)] == [False]
