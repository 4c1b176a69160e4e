"""What `kvplug tune` refuses before it starts an engine, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from kvplug.hosts.trace.traces import Trace, write
from kvplug_lab.cli.tune import size_of, tune
from kvplug_lab.models import tiny_llama
from kvplug_lab.tune.load import ANSWER, from_trace, repeated
from kvplug_lab.tune.loads import LOADS

app = typer.Typer()
app.command()(tune)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "pass either --prompts FILE or --recorded TRACE"),
        (["--prompts", "a", "--recorded", "b"], "pass either"),
        (["--prompts", "a", "--objective", "speed"], "'speed' is none of throughput, ttft, users"),
        (["--prompts", "a", "--memory", "many"], "--memory: 'many' is no size"),
        (["--prompts", "a", "--json", "/no/such/folder/x"], "--json: cannot write"),
        (["--prompts", "a", "--out", "/no/such/folder/x"], "--out: cannot write"),
        (["--prompts", "a", "--model", "/no/such/model"], "is not a model directory"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_line(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and said in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


def test_a_bad_line_of_requests_is_named(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": 5}\n', encoding="utf-8")
    model = tiny_llama(tmp_path / "tiny")
    done = CliRunner().invoke(app, ["--prompts", str(file), "--model", str(model)])
    assert done.exit_code == 2 and f"{file}, line 2: has neither `prompt`" in done.stderr


def test_sizes_are_bytes() -> None:
    assert size_of("--memory", "8GiB") == 8 << 30 and size_of("--memory", "36MiB") == 36 << 20


def test_a_trace_becomes_requests_of_the_same_sharing(tmp_path: Path) -> None:
    # Two requests of one session and one of none; the second begins with the first's blocks.
    trace = Trace(
        name="x",
        off=np.array([0, 2, 5, 7]),
        ids=np.array([0, 1, 0, 1, 2, 3, 4]),
        arrival=np.array([0.0, 1.0, 2.0]),
        prompt_tokens=np.array([32, 48, 32]),
        output_tokens=np.array([5, 900, 0]),
        session=np.array([1, 1, 0]),
        block_size=16,
        num_distinct=5,
    )
    write(tmp_path / "trace.npz", trace)
    model = tiny_llama(tmp_path / "tiny")
    load = from_trace(tmp_path / "trace.npz", model, 32, 4096, 10)
    assert not load.real and load.sessions == ("s1", "s1", "") and load.before() == [None, 0, None]
    assert [len(r.prompt) for r in load.requests] == [65, 97, 65]
    assert [r.max_tokens for r in load.requests] == [5, ANSWER, 1]
    found = repeated(load, 32)
    assert (found.prefix, found.elsewhere) == (64, 0)
    assert len(from_trace(tmp_path / "trace.npz", model, 32, 4096, 2).requests) == 2


@pytest.mark.parametrize("name", sorted(LOADS))
def test_the_loads_of_the_page_are_the_same_each_time(name: str) -> None:
    first, second = LOADS[name](), LOADS[name]()
    assert first == second and len(json.dumps(first)) > 4_000
    if name == "chat":
        # A turn goes on from the one before it of its session, in any order of sessions.
        said: dict[str, list[dict[str, str]]] = {}
        for body in first:
            before = said.get(body["user"], [])
            assert body["messages"][: len(before)] == before
            said[body["user"]] = body["messages"]
        assert len(said) == 3
    else:
        documents = [body["prompt"].split("\n\n")[1:-1] for body in first]
        assert all(len(set(own)) == 3 for own in documents)
        assert len({d for own in documents for d in own}) == 5
