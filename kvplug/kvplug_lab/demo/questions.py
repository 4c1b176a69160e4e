"""Questions that a text answers: facts set into real text, each asked for once.

A document is a passage with facts at even depths, one of each question. A session asks the
questions of its document one after the other, so that the document comes back; sessions run side by
side. Which fact a session asks for first differs from session to session.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from kvplug_lab import texts
from kvplug_lab.fidelity.tasks import NAMES, BadText, Encode

HEAD = "There are animals and their numbers hidden inside the text below. Remember them.\n\n"
FACT = "\nThe number of the {name} is {key}.\n"
ASKED = "\n\nWhat is the number of the {name} in the text above? The number of the {name} is"

LEAST_TOKENS = 128
"""Fewest tokens of a document: its facts and some text between them."""


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        document: Number of its document.
        place: Tokens of the document before the fact that answers it.
        text: The question, as it stands behind the document.
        key: The right answer, digits.
        prompt: Document and question, in tokens.
    """

    document: int
    place: int
    text: str
    key: str
    prompt: tuple[int, ...]

    def answered_by(self, text: str) -> bool:
        """Whether the first number of a text is the right one."""
        found = re.search(r"\d+", text)
        return found is not None and found[0] == self.key


@dataclass(frozen=True)
class Work:
    """All questions, in the order in which they are sent.

    Attributes:
        questions: The questions.
        before: Index of the question that each one waits for: the one before it in its session.
        documents: How many documents there are, which is how many sessions run side by side.
        output_tokens: Tokens that each answer takes.
    """

    questions: tuple[Question, ...]
    before: tuple[int | None, ...]
    documents: int
    output_tokens: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(q.prompt) for q in self.questions)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, its answer among them."""
        return max(len(q.prompt) for q in self.questions) + self.output_tokens


@dataclass(frozen=True)
class Sizes:
    """How much is asked.

    Attributes:
        documents: Documents; each is a session.
        questions: Questions of each.
        tokens: Tokens of a document.
        output_tokens: Tokens of an answer.
        seed: Seed of passages, names and numbers.
    """

    documents: int
    questions: int
    tokens: int
    output_tokens: int
    seed: int = 0


def build(encode: Encode, text: str, sizes: Sizes, bos: Sequence[int] = ()) -> Work:
    """The questions, the same ones for the same arguments.

    Args:
        encode: The model's tokenizer; adds no special tokens.
        text: Long plain text.
        sizes: How much.
        bos: Tokens that every prompt begins with.

    Raises:
        BadText: The text is too short for so many documents, or a document for its facts.
    """
    if sizes.tokens < LEAST_TOKENS:
        raise BadText(
            f"a document of {sizes.tokens} tokens is too short; take at least {LEAST_TOKENS}"
        )
    if sizes.questions > len(NAMES):
        raise BadText(f"a document holds at most {len(NAMES)} facts, not {sizes.questions}")
    try:
        # A word is a token or more.
        passages = texts.passages(text, sizes.documents, sizes.tokens, sizes.seed)
    except ValueError as error:
        raise BadText(
            f"the text is too short for {sizes.documents} documents of {sizes.tokens} tokens"
        ) from error
    asked = [_document(encode, i, passage, sizes, bos) for i, passage in enumerate(passages)]
    order = [
        (document, (turn + document) % sizes.questions)
        for turn in range(sizes.questions)
        for document in range(sizes.documents)
    ]
    return Work(
        questions=tuple(asked[document][which] for document, which in order),
        before=tuple(
            i - sizes.documents if i >= sizes.documents else None for i in range(len(order))
        ),
        documents=sizes.documents,
        output_tokens=sizes.output_tokens,
    )


def _document(
    encode: Encode, number: int, passage: str, sizes: Sizes, bos: Sequence[int]
) -> list[Question]:
    source = random.Random(f"{sizes.seed} document {number}")
    names = source.sample(NAMES, sizes.questions)
    keys = [str(source.randrange(10_000, 100_000)) for _ in names]
    facts = [
        list(encode(FACT.format(name=name, key=key))) for name, key in zip(names, keys, strict=True)
    ]
    words = list(encode(passage))
    body = [*bos, *encode(HEAD)]
    room = sizes.tokens - len(body) - sum(map(len, facts))
    if room < len(facts) or len(words) < room:
        raise BadText(f"{len(facts)} facts do not fit into a document of {sizes.tokens} tokens")
    places, at = [], 0
    for i, fact in enumerate(facts):
        to = round((i + 0.5) / len(facts) * room)
        body += words[at:to]
        places.append(len(body))
        body += fact
        at = to
    body += words[at:room]
    found = []
    for name, key, place in zip(names, keys, places, strict=True):
        asked = ASKED.format(name=name)
        found.append(Question(number, place, asked.strip(), key, (*body, *encode(asked))))
    return found
