"""LongBench's tasks from files: Bai et al., "LongBench: A Bilingual, Multitask Benchmark for Long
Context Understanding", 2024.

A file has one JSON object a line with LongBench's keys. Scores and lengths of answers are
LongBench's; the instructions around a text are kvplug's own unless a file of templates, such as
LongBench's ``dataset2prompt.json``, is given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvplug.errors import KVPlugError
from kvplug.regular_file import UnreadableFile, read_regular
from kvplug_lab.fidelity.asked import Asked

GROUP = "longbench"

MAX_BYTES = 1 << 30
"""Largest file that is read."""

MAX_TEMPLATES = 1 << 20


class BadTask(KVPlugError, ValueError):
    """A file of tasks is not what it should be; the message names file, line and key."""


@dataclass(frozen=True)
class Task:
    """How one dataset is asked and scored.

    Attributes:
        score: Of `kvplug_lab.fidelity.scores.SCORES`.
        new_tokens: Most tokens of an answer.
        template: What the model reads, with ``{context}`` and, where there is one, ``{input}``.
        chat: Whether a chat template goes around it: not for tasks that are continued.
        first_line: Whether only the answer's first line counts.
    """

    score: str
    new_tokens: int
    template: str
    chat: bool = True
    first_line: bool = False


_READ = "Read the text below. You will be asked about it.\n\n{context}\n\n"
_BRIEF = (
    "Answer the question from the text above, as briefly as you can.\nQuestion: {input}\nAnswer:"
)
_QA = _READ + _BRIEF
_SUMMARY = _READ + "Write a summary of the text above, of one page at most.\nSummary:"

TASKS: dict[str, Task] = {
    "narrativeqa": Task("qa_f1", 128, _QA),
    "qasper": Task(
        "qa_f1",
        128,
        _READ
        + "Answer the question from the text above, as briefly as you can. If the text does not "
        "answer it, write “unanswerable”; if it is a yes/no question, write “yes”, “no” or "
        "“unanswerable”.\nQuestion: {input}\nAnswer:",
    ),
    "multifieldqa_en": Task("qa_f1", 64, _QA),
    "hotpotqa": Task("qa_f1", 32, _QA),
    "2wikimqa": Task("qa_f1", 32, _QA),
    "musique": Task("qa_f1", 32, _QA),
    "gov_report": Task("rouge_l", 512, _SUMMARY),
    "qmsum": Task(
        "rouge_l",
        512,
        _READ + "Answer in one or more sentences.\nQuery: {input}\nAnswer:",
    ),
    "multi_news": Task("rouge_l", 512, _SUMMARY),
    "trec": Task(
        "classification",
        64,
        "Find the type of each question, as in the examples.\n\n{context}\n{input}",
        chat=False,
        first_line=True,
    ),
    "triviaqa": Task(
        "qa_f1",
        32,
        "Answer from the passage as in the examples, and briefly.\n\n{context}\n\n{input}",
        chat=False,
        first_line=True,
    ),
    "samsum": Task(
        "rouge_l",
        128,
        "Summarise the dialogue in a few sentences, as in the examples.\n\n{context}\n\n{input}",
        chat=False,
        first_line=True,
    ),
    "lsht": Task("classification", 64, "{context}\n{input}", chat=False, first_line=True),
    "passage_count": Task(
        "count",
        32,
        "Some of the paragraphs below are the same. How many different ones are there?\n\n"
        "{context}\n\nWrite the number of different paragraphs, as in 1, 2, 3, and nothing else.\n"
        "Number:",
    ),
    "passage_retrieval_en": Task(
        "retrieval",
        32,
        "Below are 30 paragraphs and a summary of one of them.\n\n{context}\n\nThe summary:\n"
        "{input}\n\nWrite the number of the paragraph that it is of, as in “Paragraph 1”.\n"
        "Answer:",
    ),
    "passage_retrieval_zh": Task(
        "retrieval", 32, "{context}\n\n{input}\n\n请写出摘要所属段落的编号, 例如“段落1”。\n答案:"
    ),
    "lcc": Task("code_sim", 64, "Write the next line of this code.\n{context}", chat=False),
    "repobench-p": Task(
        "code_sim", 64, "Write the next line of this code.\n{context}{input}", chat=False
    ),
}
"""By LongBench's names, less those whose score needs a Chinese word segmenter."""

CHINESE = ("multifieldqa_zh", "dureader", "vcsum")
"""Scored over words of Chinese, which jieba finds; kvplug does not."""


def templates(path: Path) -> dict[str, str]:
    """Read templates: a JSON object of texts by dataset, each with ``{context}``.

    Raises:
        BadTask: The file cannot be read, or a template has no ``{context}``.
    """
    data = _json(_bytes(path, MAX_TEMPLATES, "--templates"), f"--templates: {path}")
    if not isinstance(data, dict):
        raise BadTask(f"--templates: {path} must be an object of templates by dataset")
    for name, text in data.items():
        if not isinstance(text, str) or "{context}" not in text:
            raise BadTask(f"--templates: {path}: {name}: a template is a text with {{context}}")
    return data


def read(
    files: Sequence[Path], samples: int | None = None, own: Mapping[str, str] | None = None
) -> list[Asked]:
    """The questions of files, in order.

    Args:
        files: JSON lines with ``input``, ``context``, ``answers``, ``dataset`` and, for
            classifications, ``all_classes``; ``length`` and ``language`` are not used.
        samples: Most questions of each dataset; None for all.
        own: Templates by dataset that replace kvplug's.

    Raises:
        BadTask: A file or a line of it is not what it should be.
    """
    found: list[Asked] = []
    counts: dict[str, int] = {}
    for path in files:
        for number, line in enumerate(_bytes(path, MAX_BYTES, "--tasks-file").split(b"\n"), 1):
            if not line.strip():
                continue
            where = f"--tasks-file: {path}, line {number}"
            asked = _asked(_json(line, where), where, own or {}, counts, samples)
            if asked is not None:
                found.append(asked)
    if not found:
        raise BadTask(f"--tasks-file: {', '.join(map(str, files))}: no question")
    return found


def _bytes(path: Path, most: int, option: str) -> bytes:
    try:
        return read_regular(path, most)
    except UnreadableFile as error:
        raise BadTask(f"{option}: {path} {error.problem}") from error


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadTask(f"{where}: not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadTask(f"{where}: not JSON: {error}") from error


def _asked(
    data: Any,
    where: str,
    own: Mapping[str, str],
    counts: dict[str, int],
    samples: int | None,
) -> Asked | None:
    if not isinstance(data, dict):
        raise BadTask(f"{where}: an object expected, not {type(data).__name__}")
    name = _text(data, "dataset", where).removesuffix("_e")
    if name in CHINESE:
        raise BadTask(
            f"{where}: dataset: {name} is scored over Chinese words, which kvplug does not "
            "segment: leave it out"
        )
    if name not in TASKS:
        raise BadTask(f"{where}: dataset: {name!r} is none of {', '.join(TASKS)}")
    task = TASKS[name]
    context, asked = _text(data, "context", where), _text(data, "input", where)
    answers = _texts(data.get("answers"), "answers", where)
    if not answers:
        raise BadTask(f"{where}: answers: at least one is needed")
    classes = data.get("all_classes")
    classes = () if classes is None else _texts(classes, "all_classes", where)
    if task.score == "classification" and not classes:
        raise BadTask(f"{where}: all_classes: {name} is scored against all classes")
    index = counts.get(name, 0)
    if samples is not None and index >= samples:
        return None
    counts[name] = index + 1
    before, _, after = own.get(name, task.template).partition("{context}")
    return Asked(
        name,
        GROUP,
        f"{name}-{index}",
        before.replace("{input}", asked) + context,
        after.replace("{input}", asked),
        "",
        answers,
        task.score,
        task.new_tokens,
        classes,
        task.first_line,
        task.chat,
    )


def _text(data: Mapping[str, Any], key: str, where: str) -> str:
    value = data.get(key)
    if not isinstance(value, str):
        raise BadTask(f"{where}: {key}: a text is needed, not {type(value).__name__}")
    return value


def _texts(value: Any, key: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise BadTask(f"{where}: {key}: a list of texts is needed")
    return tuple(value)
