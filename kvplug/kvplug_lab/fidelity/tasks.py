"""The prompts: real text, facts hidden in it, and what is asked of whoever read it.

Everything here is tokens: the same prompts can be given to another program, as JSON. A prompt has a
context, which is read with the full cache and then pruned to a budget, and tokens that follow with
what is left: fed and scored, or generated. Nothing is scored that was computed before the eviction.

* ``perplexity``: the text goes on; how likely is what comes next.
* ``greedy``: the text goes on by itself; how long is it what the full cache would have written.
* ``passkey``: a five-digit key hidden once, at a depth of its own in every prompt; the question
  is at the end of the context, so it is read before the eviction.
* ``multikey``: eight keys with names, spread over the context; one is asked for.
* ``passkey_later``, ``multikey_later``: the same, asked after the eviction: what was kept had to be
  kept without knowing the question.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvplug.errors import KVPlugError

TASKS = ("perplexity", "greedy", "passkey", "passkey_later", "multikey", "multikey_later")

KINDS = ("plain", "passkey", "multikey")

CHARACTERS = 12
"""Characters of text looked at for each token a prompt takes: more than any text needs."""

KEYS = 8
"""Keys in a multi-key prompt."""

LEAST_CONTEXT = 256
"""Fewest tokens that hold eight keys, the question and some text between."""

NAMES = (
    *("lion", "tiger", "eagle", "horse", "mouse", "whale", "snake", "rabbit", "spider", "turtle"),
    *("monkey", "camel", "donkey", "goose", "beaver", "lizard", "falcon", "badger", "salmon"),
    "otter",
)


class BadText(KVPlugError, ValueError):
    """The text is too short, or leaves no room for what is to be hidden in it."""


@dataclass(frozen=True)
class Wanted:
    """What an answer that was written freely is scored by.

    Attributes:
        group: Tasks that are averaged together, e.g. ``ruler``.
        answers: The right answers.
        score: Name of a score of `kvplug_lab.fidelity.scores`.
        classes: All classes of a classification.
        first_line: Whether only the answer's first line counts.
    """

    group: str
    answers: tuple[str, ...]
    score: str
    classes: tuple[str, ...] = ()
    first_line: bool = False


@dataclass(frozen=True)
class Prompt:
    """One thing to read and answer, in tokens.

    Attributes:
        task: One of `TASKS`, or a task of RULER or LongBench.
        name: Unique among the prompts.
        context: Tokens read before the eviction.
        then: Tokens fed after it, not scored.
        answer: Tokens scored after those, each given the right ones before it.
        new_tokens: Tokens to generate, where nothing is scored: the first one comes from the
            context's last token and is given, the others are compared. Where an answer is
            wanted, all of them are.
        wanted: How the answer is scored; None where tokens are scored or compared.
    """

    task: str
    name: str
    context: tuple[int, ...]
    then: tuple[int, ...] = ()
    answer: tuple[int, ...] = ()
    new_tokens: int = 0
    wanted: Wanted | None = None

    def plain(self) -> dict[str, Any]:
        """Convert to JSON types."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Prompt:
        """The prompt that `plain` wrote."""
        lists = {key: tuple(plain[key]) for key in ("context", "then", "answer")}
        wanted = plain.get("wanted")
        if wanted is not None:
            sets = {key: tuple(wanted[key]) for key in ("answers", "classes")}
            wanted = Wanted(**{**wanted, **sets})
        return cls(
            plain["task"], plain["name"], **lists, new_tokens=plain["new_tokens"], wanted=wanted
        )


@dataclass(frozen=True)
class PromptSizes:
    """Numbers of prompts and tokens.

    Attributes:
        context: Tokens of every context.
        samples: Prompts of each retrieval task; depths are spread evenly over them.
        passages: Passages of the tasks on plain text.
        scored: Tokens scored per passage.
        generated: Tokens generated per passage.
        seed: Seed of passages, keys and depths.
    """

    context: int = 1024
    samples: int = 10
    passages: int = 6
    scored: int = 256
    generated: int = 64
    seed: int = 0


Encode = Callable[[str], Sequence[int]]
"""Text to tokens, nothing added."""


def build(
    encode: Encode,
    text: str,
    sizes: PromptSizes,
    tasks: Sequence[str] = TASKS,
    bos: Sequence[int] = (),
) -> list[Prompt]:
    """The prompts, the same ones for the same arguments.

    Args:
        encode: The model's tokenizer.
        text: Long plain text; the prompts of a task take stretches of their own while it lasts.
        sizes: How much.
        tasks: Which of `TASKS`.
        bos: Tokens every context begins with.

    Raises:
        BadText: The text is shorter than two prompts, or the context too short for a task.
    """
    if sizes.context < LEAST_CONTEXT:
        raise BadText(
            f"a context of {sizes.context} tokens is too short; take at least {LEAST_CONTEXT}"
        )
    stretches = _Stretches(encode, text, sizes)
    found: list[Prompt] = []
    plain = [t for t in ("perplexity", "greedy") if t in tasks]
    for i in range(sizes.passages if plain else 0):
        words = stretches.take("plain", i)
        context = (*bos, *words[: sizes.context - len(bos)])
        after = tuple(words[len(context) - len(bos) :])
        if "perplexity" in tasks:
            parts = (after[:1], after[1 : sizes.scored + 1])
            found.append(Prompt("perplexity", f"perplexity-{i}", context, *parts))
        if "greedy" in tasks:
            found.append(Prompt("greedy", f"greedy-{i}", context, new_tokens=sizes.generated + 1))
    for kind in ("passkey", "multikey"):
        asked = [t for t in (kind, f"{kind}_later") if t in tasks]
        for i in range(sizes.samples if asked else 0):
            source = random.Random(f"{sizes.seed} {kind} {i}")
            hidden = _hidden(kind, i, sizes.samples, source)
            words = stretches.take(kind, i)
            for task in asked:
                found.append(_retrieval(encode, task, i, hidden, words, sizes.context, bos))
    return found


@dataclass(frozen=True)
class _Hidden:
    """Facts by depth (0 to 1), the question, and the answer."""

    before: str
    facts: tuple[tuple[float, str], ...]
    question: str
    leads: str
    answer: str


def _hidden(kind: str, index: int, samples: int, source: random.Random) -> _Hidden:
    depth = (index + 0.5) / samples

    def key() -> str:
        return str(source.randrange(10_000, 100_000))

    if kind == "passkey":
        own = key()
        return _Hidden(
            "There is a pass key hidden inside the text below. Remember it.\n\n",
            ((depth, f"\nThe pass key is {own}. Remember it: {own} is the pass key.\n"),),
            "\n\nWhat is the pass key hidden in the text above? The pass key",
            " is",
            f" {own}",
        )
    names = source.sample(NAMES, KEYS)
    keys = [key() for _ in names]
    # The asked one is at another depth in every prompt.
    asked = min(KEYS - 1, int(depth * KEYS))
    facts = tuple(
        ((i + 0.5) / KEYS, f"\nThe number of the {name} is {own}.\n")
        for i, (name, own) in enumerate(zip(names, keys, strict=True))
    )
    return _Hidden(
        "There are animals and their numbers hidden inside the text below. Remember them.\n\n",
        facts,
        f"\n\nWhat is the number of the {names[asked]} in the text above? "
        f"The number of the {names[asked]}",
        " is",
        f" {keys[asked]}",
    )


def _retrieval(
    encode: Encode,
    task: str,
    index: int,
    hidden: _Hidden,
    words: Sequence[int],
    context: int,
    bos: Sequence[int],
) -> Prompt:
    later = task.endswith("_later")
    head, question = [*bos, *encode(hidden.before)], list(encode(hidden.question))
    facts = [(depth, list(encode(fact))) for depth, fact in hidden.facts]
    end = [] if later else question
    room = context - len(head) - len(end) - sum(len(fact) for _, fact in facts)
    if room < len(facts):
        raise BadText(f"{task}: a context of {context} tokens leaves no room for text")
    body: list[int] = []
    at = 0
    for depth, fact in facts:
        to = round(depth * room)
        body += [*words[at:to], *fact]
        at = to
    body += words[at:room]
    return Prompt(
        task,
        f"{task}-{index}",
        (*head, *body, *end),
        (*(question if later else ()), *encode(hidden.leads)),
        tuple(encode(hidden.answer)),
    )


class _Stretches:
    """Stretches of the text that begin at lines; which ones a task gets does not depend on what
    other tasks are asked for."""

    def __init__(self, encode: Encode, text: str, sizes: PromptSizes):
        self._encode = encode
        self._need = sizes.context + sizes.scored + 1
        self._size = CHARACTERS * self._need
        self._text = text
        self._starts = list(range(max(1, len(text) // self._size)))
        random.Random(f"{sizes.seed} text").shuffle(self._starts)

    def take(self, kind: str, index: int) -> Sequence[int]:
        """Tokens of the ``index``-th stretch of a kind of task."""
        first = KINDS.index(kind) * len(self._starts) // len(KINDS) + index
        for step in range(len(self._starts)):
            tokens = self._tokens(self._starts[(first + step) % len(self._starts)])
            if len(tokens) >= self._need:
                return tokens[: self._need]
        raise BadText(
            f"the text is too short: a prompt takes {self._need} tokens, about "
            f"{self._size:,} characters at most; the text has {len(self._text):,}"
        )

    def _tokens(self, start: int) -> Sequence[int]:
        piece = self._text[start * self._size : (start + 1) * self._size]
        line = piece.find("\n") + 1 if start else 0
        return self._encode(piece[line:])
