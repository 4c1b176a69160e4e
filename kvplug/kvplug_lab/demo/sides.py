"""Two answers side by side, with what differs marked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from kvplug_lab.demo.questions import Question

MOST_SHOWN = 300
"""Characters of an answer that are shown."""


@dataclass(frozen=True)
class Part:
    """A piece of an answer.

    Attributes:
        text: The piece.
        differs: True if the other answer does not have it there.
    """

    text: str
    differs: bool


@dataclass(frozen=True)
class Pair:
    """Stock's answer and a deployment's to one question.

    Attributes:
        question: The question.
        name: The deployment.
        stock: Stock's answer.
        own: The deployment's.
        stock_right: Whether stock's is right.
        own_right: Whether the deployment's is.
    """

    question: Question
    name: str
    stock: tuple[Part, ...]
    own: tuple[Part, ...]
    stock_right: bool
    own_right: bool

    @property
    def agrees(self) -> bool:
        """Whether the answers are the same."""
        return not any(part.differs for part in (*self.stock, *self.own))


def marked(left: str, right: str) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """Both texts in pieces, word by word."""
    one, other = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (left, right))
    found: tuple[list[Part], list[Part]] = ([], [])
    for kind, a, b, c, d in SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        for words, parts in ((one[a:b], found[0]), (other[c:d], found[1])):
            if words:
                parts.append(Part("".join(words), kind != "equal"))
    return tuple(found[0]), tuple(found[1])


def pairs_of(
    name: str, questions: Sequence[Question], stock: Sequence[str], own: Sequence[str]
) -> list[Pair]:
    """An answer that is stock's and one that is not, where there are such.

    Of those that agree a right one is shown, of those that differ one that stock has right and the
    deployment has wrong, if there is one.

    Args:
        name: The deployment.
        questions: All questions.
        stock: Stock's answers.
        own: The deployment's.
    """

    def pair(question: Question, left: str, right: str) -> Pair:
        a, b = marked(_shown(left), _shown(right))
        return Pair(question, name, a, b, question.answered_by(left), question.answered_by(right))

    answers = list(zip(questions, stock, own, strict=True))
    same = [one for one in answers if one[1] == one[2]]
    other = [one for one in answers if one[1] != one[2]]
    same.sort(key=lambda one: not one[0].answered_by(one[1]))
    other.sort(key=lambda one: (not one[0].answered_by(one[1]), one[0].answered_by(one[2])))
    return [pair(*one) for one in (*same[:1], *other[:1])]


def _shown(text: str) -> str:
    text = text.strip()
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + " ..."
