"""Documents cut from a plain text at its empty lines."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from kvplug.errors import KVPlugError


@dataclass(frozen=True)
class Document:
    """A passage of the text.

    Attributes:
        tokens: The passage, whole paragraphs.
        after: What follows it in the text.
    """

    tokens: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class ExperimentSizes:
    """Sizes of the experiment.

    Attributes:
        prompts: Prompts to learn from.
        held_out: Prompts to report on, from the last part of the text.
        documents: Documents of a prompt.
        least: Tokens of a document at least.
        most: Tokens of a document at most.
        placements: Placements tried of each document.
        follow: Tokens after a document that are compared, at most.
        seed: Of every choice.
    """

    prompts: int = 32
    held_out: int = 16
    documents: int = 3
    least: int = 100
    most: int = 250
    placements: int = 2
    follow: int = 64
    seed: int = 0

    def check(self) -> None:
        """Raise KVPlugError for contradictory sizes."""
        if self.least > self.most:
            raise KVPlugError(f"--least {self.least} is more than --most {self.most}")


def documents(
    text: str, encode: Callable[[str], list[int]], count: int, sizes: ExperimentSizes
) -> list[Document]:
    """Cut documents at empty lines, evenly from the text and in its order, without overlap.

    Args:
        text: The text.
        encode: Tokens of a string, without special tokens.
        count: How many.
        sizes: Of a document, and how much of what follows it is kept.

    Raises:
        KVPlugError: The text has fewer.
    """
    paragraphs = [
        m.group() for m in re.finditer(r"(?:(?!\n[ \t]*\n).)+?\n(?:[ \t]*\n)+", text, re.S)
    ]
    found: list[Document] = []
    gap = len(paragraphs) / max(count, 1)
    at, tokens_of = 0, {}

    def tokens(index: int) -> list[int]:
        if index not in tokens_of:
            tokens_of[index] = encode(paragraphs[index])
        return tokens_of[index]

    while len(found) < count and at < len(paragraphs):
        taken: list[int] = []
        end = at
        while end < len(paragraphs) and len(taken) < sizes.least:
            taken += tokens(end)
            end += 1
        after: list[int] = []
        follow = end
        while follow < len(paragraphs) and len(after) < sizes.follow:
            after += tokens(follow)
            follow += 1
        if sizes.least <= len(taken) <= sizes.most and len(after) >= sizes.follow:
            found.append(Document(tuple(taken), tuple(after[: sizes.follow])))
            # What follows a document is read too, so the next one begins after it.
            at = max(follow, int(gap * len(found)))
        else:
            at += 1
    if len(found) < count:
        raise KVPlugError(
            f"the text has only {len(found)} passages of {sizes.least} to {sizes.most} tokens "
            f"between empty lines, too few for {count}: give a longer text or ask for fewer prompts"
        )
    return found
