"""RULER's questions as tasks of EleutherAI's lm_eval: JSON lines, and YAML that names them.

``lm_eval --include_path FOLDER --tasks kvplug_ruler`` then asks a server what `kvplug eval` asks a
model, and scores it by the same rule. The folder needs nothing of kvplug's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from kvplug.errors import KVPlugError
from kvplug_lab.fidelity.asked import Reader
from kvplug_lab.fidelity.scores import MATCHES
from kvplug_lab.fidelity.tasks import Prompt

GROUP = "kvplug_ruler"

SCORE = """\
def {name}(doc, results):
    answer = results[0].lower()
    found = [one.lower() in answer for one in doc["answers"]]
    return {{"score": {value}}}
"""

VALUES = {"match_all": "sum(found) / len(found)", "match_part": "float(any(found))"}


class NoTasks(KVPlugError, ValueError):
    """There is nothing to write, or nowhere."""


def save(folder: Path, reader: Reader, prompts: Sequence[Prompt]) -> str:
    """Write tasks to a folder, which may exist.

    Args:
        folder: Where.
        reader: The tokens of the prompts.
        prompts: The prompts; those without an answer that is matched are left out.

    Returns:
        Name of the group of all tasks.

    Raises:
        NoTasks: No prompt is RULER's, or the folder cannot be written.
    """
    by_task: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        if prompt.wanted is not None and prompt.wanted.score in MATCHES:
            by_task.setdefault(prompt.task, []).append(prompt)
    if not by_task:
        raise NoTasks("--save-lm-eval writes RULER's tasks: add --task ruler")
    folder = folder.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        code = "\n\n".join(SCORE.format(name=n, value=v) for n, v in VALUES.items())
        (folder / "score.py").write_text(code, encoding="utf-8")
        for task, own in by_task.items():
            _task(folder, task, reader, own)
        group = {
            "group": GROUP,
            "task": [f"kvplug_{task}" for task in by_task],
            "aggregate_metric_list": [{"metric": "score", "weight_by_size": False}],
        }
        (folder / f"{GROUP}.yaml").write_text(yaml.safe_dump(group, sort_keys=False), "utf-8")
    except OSError as error:
        raise NoTasks(f"--save-lm-eval: {folder} cannot be written: {error}") from error
    return GROUP


def _task(folder: Path, task: str, reader: Reader, prompts: Sequence[Prompt]) -> None:
    lines = []
    for prompt in prompts:
        assert prompt.wanted is not None
        lines.append(
            {
                "name": prompt.name,
                "prompt": reader.text(prompt),
                "answers": list(prompt.wanted.answers),
            }
        )
    data = folder / f"{task}.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    first = prompts[0]
    assert first.wanted is not None
    about = {
        "task": f"kvplug_{task}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answers[0]}}",
        "generation_kwargs": {
            "until": [reader.tokenizer.decode([token]) for token in reader.ends],
            "max_gen_toks": first.new_tokens,
            "do_sample": False,
            "temperature": 0.0,
        },
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    text = yaml.safe_dump(about, sort_keys=False, width=1000)
    text += f"process_results: !function score.{first.wanted.score}\n"
    (folder / f"kvplug_{task}.yaml").write_text(text, encoding="utf-8")
