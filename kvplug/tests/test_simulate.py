"""``kvplug simulate``: its table, its files, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tracegen import conversations
from typer.testing import CliRunner

from kvplug.cli import app
from kvplug.contract import Kind
from kvplug.hosts.trace import traces
from kvplug.hosts.trace.minimum import Minimum
from kvplug.hosts.trace.simulator import Replay
from kvplug.registry import plugins
from kvplug_policies.prefix_cache.lfu import Lfu
from kvplug_policies.prefix_cache.lru import Lru

ROOT = Path(__file__).resolve().parents[2]

Run = Callable[..., Any]


@pytest.fixture
def run() -> Run:
    runner = CliRunner()

    def invoke(*arguments: object) -> Any:
        words = ["simulate", *(str(a) for a in arguments)]
        return runner.invoke(app, words, catch_exceptions=False)

    return invoke


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "made.npz"
    traces.write(path, conversations(4, requests=200))
    return path


def refused(result: Any) -> str:
    """The one line a refusal is."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return str(line)


def test_rows_are_what_the_simulator_finds(run: Run, trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    result = run(trace, "--policy", "lfu", "--capacity", "20,9", "--json", out)
    assert result.exit_code == 0, result.output
    replay = Replay(traces.read(trace))
    rows = json.loads(out.read_text("utf-8"))
    assert [list(row) for row in rows] == [["trace", "policy", "capacity", "hit_rate"]] * 6
    found = {(row["policy"], row["capacity"]): row["hit_rate"] for row in rows}
    for size in (9, 20):
        engine = replay.engine(size)
        expected = {
            "lru": Lru(Lru.Options(), engine),
            "lfu": Lfu(Lfu.Options(), engine),
            "min": Minimum(replay.trace, engine),
        }
        for name, policy in expected.items():
            rate = replay.run(policy, size).hit_rate
            assert found.pop((name, size)) == rate
            assert f"{rate:.4f}" in result.stdout
    assert not found


def test_lru_and_min_are_in_every_table_once(run: Run, trace: Path) -> None:
    table = run(trace, "--policy", "min,fifo,lru", "--capacity", "5").stdout
    first_cells = [line.split("│")[1].strip() for line in table.splitlines() if "│" in line]
    assert first_cells == ["lru", "fifo", "min"]


def test_every_policy_that_orders_runs_by_default(run: Run, trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    assert run(trace, "--capacity", "10%", "--json", out).exit_code == 0
    names = {row["policy"] for row in json.loads(out.read_text("utf-8"))}
    assert names == {*plugins().registry.names(Kind.PREFIX_CACHE), "min"} - {"record"}
    assert not list(tmp_path.glob("kvplug-trace*")) and not Path("kvplug-trace.npz").exists()


def test_options_and_deployment_files_name_policies(run: Run, trace: Path, tmp_path: Path) -> None:
    out, config = tmp_path / "rows.json", ROOT / "configs/cpu/lfu.yaml"
    names = f"lfu:half_life=50:history=9,{config}"
    result = run(trace, "--policy", names, "--policy", "lfu", "--capacity", "15", "--json", out)
    assert result.exit_code == 0, result.output
    rows = {row["policy"]: row["hit_rate"] for row in json.loads(out.read_text("utf-8"))}
    assert list(rows) == ["lru", "lfu:half_life=50:history=9", str(config), "lfu", "min"]
    assert rows[str(config)] == rows["lfu"] != rows["lfu:half_life=50:history=9"]


def test_mooncake_lines_and_several_traces(run: Run, trace: Path, tmp_path: Path) -> None:
    lines = tmp_path / "moon.jsonl"
    row = {"timestamp": 0, "input_length": 40, "output_length": 1, "hash_ids": [5, 6, 7]}
    lines.write_text(f"{json.dumps(row)}\n" * 4, "utf-8")
    out = tmp_path / "rows.json"
    result = run(
        trace, lines, "--policy", "lru", "--capacity", "100%", "--block-size", "16", "--json", out
    )
    assert result.exit_code == 0, result.output
    assert "moon: hit rate of 4 requests, 12 blocks of 16 tokens, 3 distinct" in result.stdout
    rows = json.loads(out.read_text("utf-8"))
    assert {"trace": "moon", "policy": "lru", "capacity": 3, "hit_rate": 0.75} in rows
    assert {row["trace"] for row in rows} == {"made", "moon"}


@pytest.mark.parametrize(
    ("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")]
)
def test_a_plot_is_drawn(run: Run, trace: Path, tmp_path: Path, suffix: str, begins: bytes) -> None:
    picture = tmp_path / f"rates{suffix}"
    result = run(trace, trace, "--policy", "fifo", "--capacity", "5,10,50", "--plot", picture)
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(begins)


def test_lru_and_min_are_the_lines_of_the_plot(
    run: Run, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self))
    run(trace, "--policy", "fifo,min", "--capacity", "50,5", "--plot", tmp_path / "x.png")
    (panel,) = figures[0].axes
    lines = {str(line.get_label()): line for line in panel.get_lines()}
    assert list(lines) == ["LRU", "fifo", "MIN"]
    assert (
        lines["LRU"].get_color() == lines["MIN"].get_color() == "black" != lines["fifo"].get_color()
    )
    assert lines["LRU"].get_linestyle() != lines["MIN"].get_linestyle()
    for line in lines.values():
        assert list(line.get_xdata()) == [5, 50]
    best, other = (list(lines[name].get_ydata()) for name in ("MIN", "fifo"))
    assert all(b >= o for b, o in zip(best, other, strict=True))


def test_a_trace_recorded_from_a_replay_replays_alike(
    run: Run, trace: Path, tmp_path: Path
) -> None:
    again, rows = tmp_path / "again.npz", {}
    assert run(trace, "--policy", f"record:path={again}", "--capacity", "9").exit_code == 0
    for path in (trace, again):
        out = tmp_path / "rows.json"
        result = run(path, "--policy", "fifo,lfu", "--capacity", "7,30", "--json", out)
        assert result.exit_code == 0, result.output
        found = json.loads(out.read_text("utf-8"))
        rows[path.stem] = [(r["policy"], r["capacity"], r["hit_rate"]) for r in found]
    assert len(rows["made"]) == 8 and rows["made"] == rows["again"]


# -- refusals --------------------------------------------------------------------------------------


def test_a_trace_that_is_not_there(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "none.npz"
    assert refused(run(path)) == f"{path}: cannot be read: No such file or directory"


def test_a_corrupt_trace(run: Run, trace: Path) -> None:
    trace.write_bytes(trace.read_bytes()[:500])
    assert refused(run(trace)).startswith(f"{trace}: is not a readable .npz")


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("lrx", "unknown prefix_cache policy 'lrx'. Fix: did you mean lru"),
        ("snapkv", "'snapkv' is a sequence policy"),
        ("lru:size=3", "lru has no option 'size'"),
        ("lfu:half_life=-1", "half_life"),
        ("lfu:half_life", "'half_life' is not an option. Fix: write NAME:OPTION=VALUE"),
        ("lfu:=3", "'=3' is not an option"),
        ("lfu:half_life=[", "is not an option"),
        ("none.yaml", "none.yaml: file: cannot be read"),
        (str(ROOT / "configs/cpu/sink_window.yaml"), "prefix_cache: is not set"),
    ],
)
def test_a_policy_that_is_none(run: Run, trace: Path, policy: str, says: str) -> None:
    assert says in refused(run(trace, "--policy", policy))


@pytest.mark.parametrize("capacity", ["many", "0", "-1", "0%", "1e3", ",", "10%%", ""])
def test_a_capacity_that_is_none(run: Run, trace: Path, capacity: str) -> None:
    assert refused(run(trace, "--policy", "lru", "--capacity", capacity)).startswith("--capacity: ")


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_an_output_that_cannot_be_written(
    run: Run, trace: Path, tmp_path: Path, option: str
) -> None:
    assert "its folder must exist" in refused(run(trace, option, tmp_path / "no" / "x.png"))
    assert "cannot write" in refused(run(trace, option, tmp_path))


def test_a_plot_of_no_known_kind(run: Run, trace: Path, tmp_path: Path) -> None:
    assert "must end in .png, .svg, .pdf" in refused(run(trace, "--plot", tmp_path / "x.gif"))


def test_without_matplotlib_it_says_what_to_install(
    run: Run, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = refused(run(trace, "--plot", tmp_path / "x.png"))
    assert line == "--plot needs matplotlib: pip install 'kvplug[lab]'"


def test_a_policy_that_fails_ends_it_with_one_line(
    run: Run, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Lru, n: int) -> list[int]:
        raise RuntimeError("no idea")

    monkeypatch.setattr(Lru, "victims", broken)
    result = run(trace, "--policy", "lru", "--capacity", "5")
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr == "policy lru failed on made at 5 blocks: RuntimeError: no idea\n"


def test_the_command_runs_without_vllm_torch_and_matplotlib(trace: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('vllm', 'matplotlib'): sys.modules[name] = None\n"
        "from kvplug.cli import app\n"
        f"app(['simulate', {str(trace)!r}, '--policy', 'lru', '--capacity', '9'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stderr
    assert "lru" in done.stdout and done.stderr == ""
