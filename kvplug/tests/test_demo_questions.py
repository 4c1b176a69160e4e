"""What the demo asks, and how answers are counted."""

from __future__ import annotations

import pytest

from kvplug_lab.demo.questions import Sizes, Work, build
from kvplug_lab.fidelity.tasks import BadText

TEXT = " ".join(f"word{i}" for i in range(9_000))


def encode(text: str) -> list[int]:
    """A token a character."""
    return [ord(letter) for letter in text]


def work(documents: int = 3, questions: int = 3, tokens: int = 600) -> Work:
    return build(encode, TEXT, Sizes(documents, questions, tokens, 8), [1])


def decoded(tokens: tuple[int, ...]) -> str:
    return "".join(map(chr, tokens))


def test_the_text_answers_each_question_at_its_place() -> None:
    for question in work().questions:
        name = question.text.split("number of the ")[1].split(" ")[0]
        fact = f"\nThe number of the {name} is {question.key}.\n"
        assert decoded(question.prompt[question.place :]).startswith(fact)
        assert decoded(question.prompt).count(question.key) == 1
        assert decoded(question.prompt).endswith(question.text)
        assert question.prompt[0] == 1


def test_a_document_comes_back_with_its_next_question() -> None:
    found = work()
    assert [q.document for q in found.questions] == [0, 1, 2] * 3
    for question, before in zip(found.questions, found.before, strict=True):
        if before is not None:
            earlier = found.questions[before]
            assert earlier.document == question.document
            assert earlier.prompt[:600] == question.prompt[:600]
            assert earlier.key != question.key
    assert found.before[:4] == (None, None, None, 0)


def test_each_wave_asks_for_facts_at_every_place() -> None:
    found = work()
    for first in (0, 3, 6):
        places = sorted(q.place for q in found.questions[first : first + 3])
        assert places[0] < 200 < places[1] < 400 < places[2]


def test_documents_are_as_long_as_asked_and_the_same_every_time() -> None:
    found = work(tokens=500)
    assert found == work(tokens=500)
    for question in found.questions:
        assert len(question.prompt) == 500 + len("\n\n" + question.text)
    assert found.longest == max(len(q.prompt) for q in found.questions) + 8


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" {}.\nThe", True),
        ("the number {}", True),
        (" 1{}.", False),
        (" 11111, or {}", False),
        ("", False),
        ("none", False),
    ],
)
def test_the_first_number_is_the_answer(text: str, right: bool) -> None:
    question = work().questions[0]
    assert question.answered_by(text.format(question.key)) is right


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(BadText, match="at least 128"):
        work(tokens=100)
    with pytest.raises(BadText, match="too short for 40 documents"):
        work(documents=40)
    with pytest.raises(BadText, match="do not fit"):
        work(questions=5, tokens=200)
