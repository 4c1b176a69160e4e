"""RULER's tasks, generated: Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context
Language Models?", 2024.

The thirteen tasks have the paper's parameters; the sentences are kvplug's own. Questions are the
same for the same arguments, and as long as fits into the tokens there are.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import string
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvplug.errors import KVPlugError
from kvplug.regular_file import UnreadableFile, read_regular
from kvplug_lab.fidelity.asked import Asked, Reader
from kvplug_lab.fidelity.tasks import BadText

GROUP = "ruler"

MAX_QA = 256 << 20
"""Largest file of questions that is read, in bytes."""

NOISE = "The kettle is on. The rain has stopped. The road is long. We walk a while. Then we rest. "

LONG = 4096
"""Tokens from which on the words of ``cwe`` are repeated as often as in the paper."""

FEWEST = 512
"""Least tokens of a prompt and its answer."""


class BadQuestions(KVPlugError, ValueError):
    """A file of questions is not what it should be; the message names it."""


@dataclass(frozen=True)
class Needles:
    """Parameters of a needle task.

    Attributes:
        hay: ``noise``, ``essay`` or ``needle``.
        key: ``word`` or ``uuid``.
        value: ``number`` or ``uuid``.
        keys: Keys hidden.
        values: Values of the key asked for.
        asked: Keys asked for.
    """

    hay: str
    key: str = "word"
    value: str = "number"
    keys: int = 1
    values: int = 1
    asked: int = 1


NEEDLES: dict[str, Needles] = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value="uuid"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", "uuid", "uuid"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", keys=4, asked=4),
}

GENERATED: tuple[str, ...] = (*NEEDLES, "vt", "cwe", "fwe")
"""Tasks that need no file."""

QA = ("qa_1", "qa_2")

FILES = {
    "qa_1": "SQuAD, e.g. dev-v2.0.json",
    "qa_2": "HotpotQA, e.g. hotpot_dev_distractor_v1.json",
}

RULER: tuple[str, ...] = (*GENERATED, *QA)
"""All thirteen."""

NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}

Make = Callable[[int, random.Random], Asked | None]
"""A question of so many units of text; None where there is not so much text."""


def build(
    reader: Reader,
    text: str,
    tasks: Sequence[str],
    context: int,
    samples: int,
    seed: int = 0,
    questions: Mapping[str, Questions] | None = None,
) -> list[Asked]:
    """The questions, the same ones for the same arguments.

    Args:
        reader: The model's tokens.
        text: Plain text that takes the place of RULER's essays.
        tasks: Which of `RULER`.
        context: Tokens of a prompt and its answer together, at most.
        samples: Questions of each task.
        seed: Seed of keys, values, words and places.
        questions: Questions of ``qa_1`` and ``qa_2``, as `questions` read them.

    Raises:
        BadText: The context is too short for a task, or the text has no sentence.
        BadQuestions: Questions are missing.
    """
    if context < FEWEST:
        raise BadText(f"a context of {context} tokens is too short; take at least {FEWEST}")
    for task in tasks:
        if task in QA and task not in (questions or {}):
            raise BadQuestions(
                f"{task} needs --qa FILE, a file of {FILES[task]}; the others need none"
            )
    sentences = _sentences(text)
    if not sentences:
        raise BadText("the text holds no sentence: a full stop ends one")
    found = []
    # A run that is ended early has as many of each task.
    for i in range(samples):
        for task in tasks:
            make = _maker(task, i, context, sentences, (questions or {}).get(task), seed)
            found.append(_fitted(reader, task, i, make, context, seed))
    return found


def _fitted(reader: Reader, task: str, index: int, make: Make, context: int, seed: int) -> Asked:
    """The longest question that fits."""

    def of(units: int) -> Asked | None:
        asked = make(units, random.Random(f"{seed} {task} {index}"))
        return asked if asked is not None and reader.length(asked) <= context else None

    best, low, high = of(1), 1, 2
    if best is None:
        raise BadText(f"{task}: a context of {context} tokens is too short for it")
    while (more := of(high)) is not None:
        best, low, high = more, high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if (more := of(middle)) is not None:
            best, low = more, middle
        else:
            high = middle
    return best


def _maker(
    task: str,
    index: int,
    context: int,
    sentences: Sequence[str],
    own: Questions | None,
    seed: int,
) -> Make:
    name = f"{task}-{index}"
    if task in NEEDLES:
        return lambda units, rng: _needles(task, name, NEEDLES[task], units, rng, sentences)
    if task == "vt":
        return lambda units, rng: _variables(name, units, rng)
    if task == "cwe":
        return lambda units, rng: _common_words(name, units, rng, context)
    if task == "fwe":
        return lambda units, rng: _frequent_words(name, units, rng)
    assert own is not None
    return lambda units, rng: own.ask(task, name, index, units, rng, seed)


# -- words -----------------------------------------------------------------------------------------


ONSETS: tuple[str, ...] = (
    "b",
    "br",
    "c",
    "d",
    "dr",
    "f",
    "g",
    "gl",
    "h",
    "k",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "r",
)
ONSETS += ("s", "st", "t", "tr", "v", "w")
VOWELS = ("a", "e", "i", "o", "u", "ai", "ou")
ENDS = ("", "l", "m", "n", "r", "s", "t", "x")


def word(rng: random.Random, syllables: int = 2) -> str:
    """A word that can be said and means nothing."""
    parts = (rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(syllables))
    return "".join(parts) + rng.choice(ENDS)


def words(rng: random.Random, count: int) -> list[str]:
    """Different words, none of which is part of another."""
    found: list[str] = []
    known: set[str] = set()
    while len(found) < count:
        one = word(rng)
        # All of one length: a longer one could hold a shorter one.
        if len(one) == 5 and one not in known:
            known.add(one)
            found.append(one)
    return found


def _key(kind: str, rng: random.Random) -> str:
    if kind == "uuid":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    if kind == "number":
        return str(rng.randrange(1_000_000, 10_000_000))
    return f"{word(rng)}-{word(rng)}"


def _sentences(text: str) -> list[str]:
    """The sentences of a text, in one line each."""
    return re.findall(r"[^.!?]+[.!?]+", " ".join(text.split()))


# -- the tasks -------------------------------------------------------------------------------------


def _needles(
    task: str,
    name: str,
    what: Needles,
    units: int,
    rng: random.Random,
    sentences: Sequence[str],
) -> Asked:
    keys: list[str] = []
    while len(keys) < what.keys:
        one = _key(what.key, rng)
        keys += [one] if one not in keys else []
    values = {key: [_key(what.value, rng) for _ in range(what.values)] for key in keys}
    asked = rng.sample(keys, what.asked)
    kind = {"number": "number", "uuid": "code"}[what.value]

    def needle(key: str, value: str) -> str:
        return f"One of the secret {kind}s for {key} is: {value}."

    facts = [needle(key, value) for key in keys for value in values[key]]
    rng.shuffle(facts)
    depths = sorted(rng.random() for _ in facts)
    first = rng.randrange(1 << 30)
    if what.hay == "noise":
        hay = [NOISE.strip()] * units
    elif what.hay == "needle":
        # Needles that nobody asks for.
        own = random.Random(first)
        hay = [needle(_key(what.key, own), _key(what.value, own)) for _ in range(units)]
    else:
        start = first % len(sentences)
        hay = [sentences[(start + i) % len(sentences)].strip() for i in range(units)]
    parts, at = [], 0
    for depth, fact in zip(depths, facts, strict=True):
        to = round(depth * len(hay))
        parts += [*hay[at:to], fact]
        at = to
    parts += hay[at:]
    joined = ("\n" if what.hay != "essay" else " ").join(parts)
    named = _listed(asked)
    many = what.values * what.asked > 1
    thing = f"{kind}s" if many else kind
    return Asked(
        task,
        GROUP,
        name,
        f"Some secret {kind}s are hidden in the text below. Remember them: you will be asked for "
        f"the {kind}s afterwards.\n{joined}",
        f"\n{'Which are all the' if many else 'Which is the'} secret {thing} for {named} in the "
        "text above?",
        f" The secret {thing} for {named} in the text {'are' if many else 'is'}",
        tuple(value for key in asked for value in values[key]),
        "match_all",
        NEW_TOKENS["niah"],
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


HOPS = 4
"""Assignments that follow the first."""


def _variables(name: str, units: int, rng: random.Random) -> Asked:
    def chain(noise: int) -> tuple[str, str, list[str]]:
        names: list[str] = []
        while len(names) < HOPS + 1:
            one = "".join(rng.choices(string.ascii_uppercase, k=5))
            if one not in names:
                names.append(one)
        value = str(rng.randrange(10_000, 100_000))
        lines = [f"VAR {names[0]} = {value}"]
        lines += [f"VAR {a} = VAR {b}" for b, a in itertools.pairwise(names)]
        depths = sorted(rng.random() for _ in lines)
        parts, at = [], 0
        for depth, line in zip(depths, lines, strict=True):
            to = round(depth * noise)
            parts += [NOISE.strip()] * (to - at) + [line]
            at = to
        return "\n".join(parts + [NOISE.strip()] * (noise - at)), value, names

    head = "Follow the chain of assignments that is hidden in the text below.\n\n"

    def question(value: str) -> str:
        return f"\nWhich variables in the text above have the value {value}?"

    def lead(value: str) -> str:
        return f" By the assignments, {HOPS + 1} variables have the value {value}: "

    text, value, names = chain(2)
    example = f"{head}{text}{question(value)}{lead(value)}{' '.join(names)}\n\n"
    text, value, names = chain(units)
    return Asked(
        "vt",
        GROUP,
        name,
        f"{example}{head}{text}",
        question(value),
        lead(value).rstrip(),
        tuple(names),
        "match_all",
        NEW_TOKENS["vt"],
    )


COMMON = 10
"""Words to be named by ``cwe``."""


def _common_words(name: str, units: int, rng: random.Random, context: int) -> Asked:
    def listed(found: Sequence[str]) -> str:
        return " ".join(f"{i + 1}. {one}" for i, one in enumerate(found))

    def drawn(others: int, often: int, seldom: int) -> tuple[str, list[str]]:
        pool = words(rng, COMMON + others)
        all_of_them = pool[:COMMON] * often + pool[COMMON:] * seldom
        rng.shuffle(all_of_them)
        return listed(all_of_them), pool[:COMMON]

    head = "Below is a list of words with numbers. Some occur more often: remember those.\n"
    question = f"\nWhich {COMMON} words occur most often in the list above?"
    lead = f" The {COMMON} words that occur most often in the list are:"
    short = context < LONG
    # The example is small enough for any context.
    shown, right = drawn(10, 3, 1) if short else drawn(30, 10, 3)
    example = f"{head}{shown}{question}{lead} {listed(right)}\n"
    shown, right = drawn(units, 6, 1) if short else drawn(units, 30, 3)
    return Asked(
        "cwe",
        GROUP,
        name,
        f"{example}{head}{shown}",
        question,
        lead,
        tuple(right),
        "match_all",
        NEW_TOKENS["cwe"],
    )


ALPHA = 2.0
"""Exponent of the frequencies of ``fwe``."""

VOCABULARY = 2000


def _frequent_words(name: str, units: int, rng: random.Random) -> Asked:
    from scipy.special import zeta

    known: dict[str, None] = {}
    while len(known) < VOCABULARY:
        known["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    ranked = ["...", *known][:VOCABULARY]
    drawn: list[str] = []
    for rank, one in enumerate(ranked, 1):
        drawn += [one] * int(units * rank**-ALPHA / zeta(ALPHA))
    rng.shuffle(drawn)
    return Asked(
        "fwe",
        GROUP,
        name,
        "Read the coded text below and count how often each coded word occurs. Dots are no word.\n"
        + " ".join(drawn),
        "\nWhich three coded words occur most often in the text above?",
        " The three coded words that occur most often are:",
        tuple(ranked[1:4]),
        "match_all",
        NEW_TOKENS["fwe"],
    )


# -- questions from files --------------------------------------------------------------------------


@dataclass(frozen=True)
class Questions:
    """Questions of one file.

    Attributes:
        asked: Each question with its right answers and the documents that answer it.
        documents: All documents of the file.
    """

    asked: Sequence[tuple[str, tuple[str, ...], tuple[str, ...]]]
    documents: Sequence[str]

    def ask(
        self, task: str, name: str, index: int, units: int, rng: random.Random, seed: int
    ) -> Asked | None:
        """The question of an index among so many documents; None where there are fewer."""
        order = list(range(len(self.asked)))
        random.Random(f"{seed} {task}").shuffle(order)
        question, answers, gold = self.asked[order[index % len(order)]]
        shown = list(gold)
        own = set(gold)
        others = [one for one in self.documents if one not in own]
        rng.shuffle(others)
        if units - 1 > len(others):
            return None
        shown += others[: units - 1]
        rng.shuffle(shown)
        text = "\n\n".join(f"Document {i + 1}:\n{one}" for i, one in enumerate(shown))
        return Asked(
            task,
            GROUP,
            name,
            "Answer the question from the documents below, with the answer and nothing else.\n\n"
            + text,
            f"\n\nAnswer the question from the documents above, briefly.\nQuestion: {question}",
            "\nAnswer:",
            answers,
            "match_part",
            NEW_TOKENS["qa"],
        )


def questions(files: Sequence[Path]) -> dict[str, Questions]:
    """Questions by task: SQuAD's are ``qa_1``'s, HotpotQA's ``qa_2``'s.

    Raises:
        BadQuestions: A file cannot be read, is neither, or holds no question with an answer.
    """
    found: dict[str, Questions] = {}
    for path in files:
        try:
            data = json.loads(read_regular(path, MAX_QA))
        except UnreadableFile as error:
            raise BadQuestions(f"--qa: {path} {error.problem}") from error
        except (ValueError, RecursionError) as error:
            raise BadQuestions(f"--qa: {path} is not JSON: {error}") from error
        task = "qa_2" if isinstance(data, list) else "qa_1"
        try:
            own = _hotpot(data) if task == "qa_2" else _squad(data)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise BadQuestions(
                f"--qa: {path} is neither SQuAD's nor HotpotQA's JSON "
                f"({type(error).__name__}: {error})"
            ) from error
        if not own.asked:
            raise BadQuestions(f"--qa: {path} holds no question with an answer")
        found[task] = own
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text expected, not {type(value).__name__}")
    return value


def _squad(data: Any) -> Questions:
    asked, documents = [], dict[str, None]()
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            document = _text(paragraph["context"])
            documents[document] = None
            for one in paragraph["qas"]:
                answers = dict.fromkeys(_text(a["text"]) for a in one["answers"] if a["text"])
                if answers and not one.get("is_impossible", False):
                    asked.append((_text(one["question"]), tuple(answers), (document,)))
    return Questions(asked, list(documents))


def _hotpot(data: Any) -> Questions:
    asked, documents = [], dict[str, None]()
    for one in data:
        own = []
        for title, sentences in one["context"]:
            document = f"{_text(title)}\n{''.join(_text(s) for s in sentences)}"
            documents[document] = None
            own.append((title, document))
        needed = {_text(title) for title, _ in one["supporting_facts"]}
        gold = tuple(document for title, document in own if title in needed)
        if gold:
            asked.append((_text(one["question"]), (_text(one["answer"]),), gold))
    return Questions(asked, list(documents))
