"""Scores of an answer's text: RULER's two and LongBench's, from 0 to 1.

Each takes the answer, one right answer and all classes, as LongBench's do; `score` takes the best
over the right answers. RULER's ``all`` is a mean over them.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
NUMBERS = re.compile(r"\d+")
PUNCTUATION = str.maketrans("", "", string.punctuation)
UNPRINTABLE = re.compile(r"[\x00-\x1f]")


def match_all(answer: str, right: Sequence[str]) -> float:
    """Share of the right answers that stand in the answer, in any case of letters."""
    return sum(one.lower() in answer.lower() for one in right) / len(right)


def match_part(answer: str, right: Sequence[str]) -> float:
    """Whether any of the right answers stands in the answer, in any case of letters."""
    return float(any(one.lower() in answer.lower() for one in right))


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and runs of white space."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def qa_f1(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words of both, normalised."""
    found, wanted = normalised(answer).split(), normalised(right).split()
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def rouge_l(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """F1 of ROUGE-L over sentences, as the package ``rouge`` counts it: of the different words of
    both, those in the longest common subsequence of any two sentences."""
    found, wanted = _sentences(answer), _sentences(right)
    words = {word for sentence in found for word in sentence}
    named = {word for sentence in wanted for word in sentence}
    common: set[str] = set()
    for one in wanted:
        for other in found:
            common |= _common(one, other)
    if not words or not named or not common:
        return 0.0
    precision, recall = len(common) / len(words), len(common) / len(named)
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    return [part.split() for part in text.split(".") if part.split()]


def _common(one: Sequence[str], other: Sequence[str]) -> set[str]:
    """The words of a longest common subsequence."""
    lengths = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            lengths[i + 1][j + 1] = (
                lengths[i][j] + 1 if a == b else max(lengths[i][j + 1], lengths[i + 1][j])
            )
    i, j, words = len(one), len(other), set()
    while i and j:
        if one[i - 1] == other[j - 1]:
            words.add(one[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def classification(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """One over the classes that the answer names, if the right one is among them; a class whose
    name is part of the right one's is not counted."""
    named = [c for c in classes if c in answer and (c == right or c not in right)]
    return 1 / len(named) if right in named else 0.0


def retrieval(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the answer that are the right paragraph's."""
    own = re.search(r"(?:Paragraph |段落)(\d+)", right)
    return count(answer, own[1]) if own else 0.0


def count(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the answer that are the right one."""
    numbers = NUMBERS.findall(answer)
    return numbers.count(right) / len(numbers) if numbers else 0.0


def code_sim(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Similarity of the answer's first line of code with the right one, in hundredths."""
    lines = answer.lstrip("\n").split("\n")
    line = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    ratio = difflib.SequenceMatcher(None, line, right).ratio() if line and right else 0.0
    return round(100 * ratio) / 100


Score = Callable[[str, str, Sequence[str]], float]

SCORES: dict[str, Score] = {
    "qa_f1": qa_f1,
    "rouge_l": rouge_l,
    "classification": classification,
    "retrieval": retrieval,
    "count": count,
    "code_sim": code_sim,
}
"""LongBench's, by name."""

MATCHES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "match_all": match_all,
    "match_part": match_part,
}
"""RULER's, by name. What they give never falls as an answer gets longer."""


def score(
    name: str,
    answer: str,
    right: Sequence[str],
    classes: Sequence[str] = (),
    first_line: bool = False,
) -> float:
    """Score an answer.

    Args:
        name: Of `SCORES` or `MATCHES`.
        answer: What the model wrote.
        right: The right answers, at least one.
        classes: All classes, for ``classification``.
        first_line: Whether only the answer's first line counts.
    """
    if name in MATCHES:
        return MATCHES[name](UNPRINTABLE.sub("\n", answer.strip()).strip(), right)
    if first_line:
        answer = answer.lstrip("\n").split("\n")[0]
    return max(SCORES[name](answer, one, classes) for one in right)
