"""LongBench's tasks from files: what is asked, and what is refused with file, line and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvplug_lab.fidelity import longbench
from kvplug_lab.fidelity.longbench import TASKS, BadTask
from kvplug_lab.fidelity.scores import SCORES

LINE: dict[str, Any] = {
    "dataset": "hotpotqa",
    "input": "Who?",
    "context": "Ann {input} met Bob.",
    "answers": ["Ann"],
    "all_classes": None,
    "length": 4,
    "language": "en",
}


def written(tmp_path: Path, *lines: dict[str, Any]) -> Path:
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def test_a_line_becomes_a_question(tmp_path: Path) -> None:
    trec = LINE | {"dataset": "trec_e", "answers": ["date"], "all_classes": ["date", "place"]}
    first, second = longbench.read([written(tmp_path, LINE, trec)])
    assert (first.task, first.name, first.group) == ("hotpotqa", "hotpotqa-0", "longbench")
    # Braces in a text are the text's own.
    assert first.context.endswith("Ann {input} met Bob.") and "Who?" in first.question
    assert first.question.endswith("Answer:") and first.chat and first.new_tokens == 32
    assert second.task == "trec" and second.classes == ("date", "place")
    assert second.first_line and not second.chat


def test_every_dataset_has_a_score_and_a_place_for_its_text() -> None:
    assert {task.score for task in TASKS.values()} == set(SCORES)
    assert all(task.template.count("{context}") == 1 for task in TASKS.values())
    assert len(TASKS) + len(longbench.CHINESE) == 21


def test_a_users_templates_replace_ours(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"hotpotqa": "Read: {context}\nQ: {input}"}))
    (one,) = longbench.read([written(tmp_path, LINE)], own=longbench.templates(path))
    assert one.context == "Read: Ann {input} met Bob." and one.question == "\nQ: Who?"
    path.write_text(json.dumps({"hotpotqa": "Read"}))
    with pytest.raises(BadTask, match=r"prompts\.json: hotpotqa: a template is a text with"):
        longbench.templates(path)
    path.write_text("[]")
    with pytest.raises(BadTask, match="an object of templates"):
        longbench.templates(path)


def test_so_many_of_each_dataset_are_taken(tmp_path: Path) -> None:
    path = written(tmp_path, LINE, LINE, LINE | {"dataset": "musique"}, LINE)
    assert [one.name for one in longbench.read([path], 2)] == [
        "hotpotqa-0", "hotpotqa-1", "musique-0"
    ]  # fmt: skip
    assert len(longbench.read([path, path])) == 8


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dataset": "hotpot"}, "line 3: dataset: 'hotpot' is none of narrativeqa"),
        ({"dataset": None}, "line 3: dataset: a text is needed, not NoneType"),
        ({"dataset": "dureader"}, "line 3: dataset: dureader is scored over Chinese words"),
        ({"context": 3}, "line 3: context: a text is needed"),
        ({"input": ["a"]}, "line 3: input: a text is needed"),
        ({"answers": []}, "line 3: answers: at least one"),
        ({"answers": "Ann"}, "line 3: answers: a list of texts"),
        ({"dataset": "trec"}, "line 3: all_classes: trec is scored against"),
        ({"all_classes": [1]}, "line 3: all_classes: a list of texts"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(BadTask, match=says):
        longbench.read([written(tmp_path, LINE, LINE | change)])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no question"),
        (b"{}\n{", "line 1: dataset"),
        (b"[1]", "line 1: an object expected, not list"),
        (b"\n{", "line 2: not JSON"),
        (b'{"a": "\xff"}', "line 1: not UTF-8"),
        (b"[" * 100_000, "line 1: not JSON"),
        (None, "cannot be read"),
    ],
)
def test_a_file_of_something_else_is_named(
    tmp_path: Path, content: bytes | None, says: str
) -> None:
    path = tmp_path / "tasks.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadTask, match=says) as caught:
        longbench.read([path])
    assert str(path) in str(caught.value)
