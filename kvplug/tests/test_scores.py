"""Scores of answers, against values worked out by hand."""

from __future__ import annotations

import pytest

from kvplug_lab.fidelity.scores import rouge_l, score


@pytest.mark.parametrize(
    ("name", "answer", "right", "expected"),
    [
        # RULER: a share of the answers that occur, in any case; any of them.
        ("match_all", "It is 12 and AB.", ["12", "ab", "34", "cd"], 0.5),
        ("match_all", "", ["12"], 0.0),
        ("match_part", "the Tower of London", ["paris", "london"], 1.0),
        ("match_part", "Rome", ["paris", "london"], 0.0),
        # Normalised to "cat sat" and "cat sat on mat": 2 * 2 / (2 + 4).
        ("qa_f1", "The cat sat!", ["a cat sat on the mat"], 2 / 3),
        # "b b" and "b": one word in common, 2 * 1 / (2 + 1).
        ("qa_f1", "b b", ["b"], 2 / 3),
        ("qa_f1", "the", ["the"], 0.0),
        ("qa_f1", "no", ["yes", "no"], 1.0),
        # Two numbers, one of them right; a number within another is not it.
        ("retrieval", "Paragraph 4 or 17", ["Paragraph 4"], 0.5),
        ("retrieval", "14", ["Paragraph 4"], 0.0),
        ("retrieval", "段落7", ["段落7"], 1.0),
        ("count", "12 of 30, so 12", ["12"], 2 / 3),
        ("count", "none", ["12"], 0.0),
        # The first line without a mark of a comment or a fence: equal, then 2 * 3 / (4 + 3).
        ("code_sim", "# a\n```\nx = 1\ny", ["x = 1"], 1.0),
        ("code_sim", "abcd", ["abc"], 0.86),
        ("code_sim", "", ["abc"], 0.0),
    ],
)
def test_a_score_is_what_its_definition_gives(
    name: str, answer: str, right: list[str], expected: float
) -> None:
    assert score(name, answer, right) == pytest.approx(expected)


def test_a_class_counts_among_those_that_are_named() -> None:
    classes = ["date", "birth date", "place"]
    # `date` is part of the right name and is not counted against it.
    assert score("classification", "birth date", ["birth date"], classes) == 1
    assert score("classification", "birth date or place", ["birth date"], classes) == 0.5
    assert score("classification", "place", ["birth date"], classes) == 0


def test_rouge_l_is_over_sentences_and_different_words() -> None:
    # The subsequence "a c" of three words and two: 2 * (2/2 * 2/3) / (2/2 + 2/3).
    assert rouge_l("a c", "a b c") == pytest.approx(0.8)
    # One sentence each way: {a, b} of {a, b} and of {b, a, c}.
    assert rouge_l("a b", "b. a c") == pytest.approx(0.8)
    # The order counts: "a b" or "a c", of three words each.
    assert rouge_l("a c b", "a b c") == pytest.approx(2 / 3)
    # Repeated words are one.
    assert rouge_l("a a a", "a") == pytest.approx(1.0)
    assert rouge_l("", "a") == rouge_l("x", "a") == 0


def test_only_the_first_line_counts_where_a_task_says_so() -> None:
    assert score("qa_f1", "\nred\nblue", ["red"], first_line=True) == 1
    assert score("qa_f1", "\nred\nblue", ["red"]) == pytest.approx(2 / 3)
