"""``kvplug sessions`` without an engine: its workload, its variants, and what runs add up to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from kvplug_lab.cli import sessions as command
from kvplug_lab.cli.inputs import InvalidInput
from kvplug_lab.engine import sessions as host
from kvplug_lab.engine.trial import Answer, TrialResult

MODEL = Path("/nowhere")


@pytest.fixture(autouse=True)
def text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_text", lambda model: list(range(20_000)))


def made(concurrency: int = 1) -> host.Workload:
    return host.workload(
        MODEL,
        sessions=5,
        turns=3,
        turn_tokens=64,
        visitors=2,
        output_tokens=8,
        concurrency=concurrency,
    )


@pytest.mark.parametrize("concurrency", [1, 3])
def test_sessions_take_turns_and_visitors_never_return(concurrency: int) -> None:
    work = made(concurrency)
    assert len(work.requests) == 3 * (5 + 2) and len(work.returning) == 10
    # Nobody is sent the same text twice.
    pieces = [tuple(one.prompt) for one in work.requests]
    assert len(set(pieces)) == len(pieces)
    waves = [one.wave for one in work.requests]
    assert waves == sorted(waves) and max(map(waves.count, waves)) == concurrency
    followed = [one.after for one in work.requests if one.after is not None]
    assert len(set(followed)) == len(followed), "a turn goes on from the latest"
    for i in work.returning:
        one = work.requests[i]
        assert one.after is not None and work.requests[one.after].wave < one.wave
    # Between two turns of a session come all the others.
    if concurrency == 1:
        assert all(i - (work.requests[i].after or 0) >= 5 for i in work.returning)
    assert work.longest == 3 * 72 and work.tokens == 7 * 3 * 72


def test_more_text_than_there_is_is_refused() -> None:
    with pytest.raises(host.SessionsError, match="64000 tokens of text are needed"):
        host.workload(
            MODEL,
            sessions=10,
            turns=10,
            turn_tokens=640,
            visitors=0,
            output_tokens=1,
            concurrency=1,
        )


def test_the_pool_is_so_many_times_smaller_and_holds_what_runs() -> None:
    work = made()
    blocks = host.pool_blocks(work, 3, 1)
    assert work.tokens / 3 <= blocks * host.BLOCK < work.tokens / 3 + 2 * host.BLOCK
    with pytest.raises(host.SessionsError, match="use more sessions"):
        host.pool_blocks(work, 50, 1)


def test_places_in_a_section_are_filled_in_everywhere() -> None:
    section = {"tiers": [{"host": {"size": "{host}"}}, {"disk": {"path": ["{folder}/a"]}}], "n": 3}
    found = host.filled_in(section, host="5", folder="/f")
    assert found == {"tiers": [{"host": {"size": "5"}}, {"disk": {"path": ["/f/a"]}}], "n": 3}


def test_rounds_begin_with_another_variant_each() -> None:
    variants = [host.Variant(name) for name in "abc"]
    found = [(turn, variant.name) for turn, variant in host.interleaved(variants, 2)]
    assert found == [(0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a")]


def answer(prompt: int, cached: int, ttft: float) -> Answer:
    return Answer(prompt, cached, [1, 2], "", None, ttft)


def result(**more: Any) -> TrialResult:
    answers = [answer(64, 0, 0.4)] * 21
    for i in made().returning:
        answers[i] = answer(128, 96, 0.1)
    given: dict[str, Any] = {
        "steps": [],
        "num_blocks": 9,
        "block_size": 32,
        "block_bytes": 1000,
        "seconds": 4.0,
        "preemptions": 0,
        "handed_over": 0,
        "reports": [],
        "cap_blocks": [],
        "classes": {},
    }
    return TrialResult(answers, **(given | more))


def test_a_run_tells_returns_from_others_and_tiers_from_the_pool() -> None:
    report = {"kind": "tiers", "counters": {"stored": 20, "useful": 5, "stored_bytes": 640}}
    more = {"kind": "tiers", "counters": {"stored": 3, "useful": 0, "stored_bytes": 60}}
    reports = [report | {"name": "host"}, more | {"name": "disk"}]
    hits = {"vllm:external_prefix_cache_hits": 900.0}
    run = host.of(result(reports=reports, metrics=hits), made(), host.Variant("x", {"tiers": []}))
    assert len(run.ttft) == 10 and len(run.first) == 11
    assert (run.prompt, run.cached, run.loaded) == (10 * 128 + 11 * 64, 960, 900)
    assert (run.stored, run.useful, run.stored_bytes) == (23, 5, 700)
    assert run.counters["host stored"] == 20 and run.counters["disk stored"] == 3
    counted = {"offload_stored": 7.0, "offload_useful": 2.0}
    run = host.of(result(metrics=counted), made(), host.Variant("y", offload=True))
    assert (run.stored, run.useful, run.stored_bytes) == (7, 2, 7000)
    row = host.summary(host.Variant("y"), [run, run])
    assert row["ttft_median"]["median"] == row["ttft_p95"]["median"] == 0.1
    assert row["hit_rate"]["median"] == 960 / 1984 and row["from_tiers"]["median"] == 0
    assert row["prompt_tokens_per_second"]["median"] == 496


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("{tiers: [{host: {size: '1'}}, {disk: {}}]}", "kvplug: host, disk"),
        ("host, int8={tiers: [{host: {size: '1'}}], transfer: int8}", "host, int8"),
    ],
)
def test_a_section_has_a_name(text: str, name: str) -> None:
    variant = command._variant(text)
    assert variant.name == name and variant.section is not None and "tiers" in variant.section


@pytest.mark.parametrize("text", ["x={tiers: [", "[1, 2]", "tiers"])
def test_what_is_no_section_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="--section"):
        command._variant(text)


def test_the_command_compares_and_writes_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, int]] = []

    def run(model: Path, work: Any, variant: host.Variant, blocks: int, size: int) -> host.Run:
        asked.append((variant.name, size))
        return host.Run([0.2] * 3, [0.4], 100, 50, 25, 2.0, tokens=[[1], [2]])

    monkeypatch.setattr(host, "run", run)
    monkeypatch.setattr(command, "bytes_per_token", lambda model: 10)
    app = Typer()
    app.command()(command.sessions)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    file = tmp_path / "figures.json"
    arguments = ["--model", str(tmp_path), "--repeat", "2", "--json", str(file), "--times", "3"]
    shown = CliRunner().invoke(app, [*arguments, "--turn-tokens", "64"])
    assert shown.exit_code == 0, shown.output
    assert [name for name, _ in asked].count(host.OFFLOAD) == 2 and len(asked) == 6
    figures = json.loads(file.read_text())
    assert [row["variant"] for row in figures["rows"]] == [
        host.STOCK,
        host.OFFLOAD,
        "kvplug: host",
    ]
    assert figures["rows"][0]["hit_rate"]["median"] == 0.5
    assert figures["rows"][0]["same_answers"] == 1
    assert figures["workload"]["sessions"] == 10


def test_a_restart_is_shown_by_length() -> None:
    rows = [host.Restarted(1024, [4.0, 5.0], [0.5, 0.4], 1000)]
    table = command.restart_table("disk", rows)
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells[0] == "1,024" and cells[3] == "10.0" and cells[4] == "1,000"
