"""`kvplug gpu-check` on the CPU engine: real engines are built ahead, served and compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvplug_lab.gpu_check import speed
from kvplug_lab.gpu_check.engines import Engine, EngineFailed, Machine, open_machine

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return open_machine("cpu", tmp_path_factory.mktemp("machine"), ROOT)


def check(out: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    command = [sys.executable, "-m", "kvplug_lab.gpu_check", "--device", "cpu", "--engines", "1"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--out", str(out), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    data = json.loads((out / "gpu-check.json").read_text(encoding="utf-8"))
    return done.returncode, data, done.stdout


def test_parts_with_real_engines(tmp_path: Path) -> None:
    """One case of each: tokens equal to stock's, and a policy that evicts."""
    code, data, said = check(tmp_path, "--only", "exact,policies", "--cases", "{},knorm")
    assert code == 0, said
    assert data["ok"] and data["machine"]["vllm"].startswith("0.32")
    rows = {row["name"]: row for part in data["parts"].values() for row in part["rows"]}
    assert set(rows) == {"stock, own precision", "{}, tokens of stock", "knorm, fifo"}
    (evicting,) = [r for r in rows["knorm, fifo"]["reports"] if r["kind"] == "sequence"]
    assert evicting["counters"]["evictions"] > 0
    assert "policies: 1 of 1 ok" in said and "exact: 2 of 2 ok" in said
    assert (tmp_path / "engines.log").stat().st_size > 0


@pytest.mark.slow
def test_oracles_compute_while_engines_start(tmp_path: Path) -> None:
    code, data, said = check(tmp_path, "--only", "exact", "--cases", "stock,tova,kivi")
    assert code == 0, said
    assert len(data["parts"]["exact"]["rows"]) == 3


@pytest.mark.slow
def test_speed_rows_with_real_engines(machine: Machine, tiny: Path) -> None:
    rows: dict[str, Any] = {}
    speed.run_speed(
        machine,
        ["stock", "{}", "snapkv"],
        speed.Load(requests=8, prompt=700, output=40, fit=4, chunk=512),
        tiny,
        3,
        lambda row, line: rows.update({row["name"]: row}),
        time.monotonic() + 300,
    )
    assert all(row["ok"] for row in rows.values()), rows
    assert all(row["finished"] == 8 and row["decode_ms"] > 0 for row in rows.values())
    assert rows["{}"]["same_tokens"] and not rows["snapkv"]["same_tokens"]
    assert rows["stock"]["running"] == 4 and rows["stock"]["evictions"] == 0
    # One at the end of each prompt, those of the warm-up not counted.
    assert rows["snapkv"]["evictions"] == 8


def test_an_engine_that_cannot_start_or_is_gone_says_why(machine: Machine, tiny: Path) -> None:
    wrong = Engine(machine, "wrong", tiny, {"sequence": {"use": "knorn"}}, {"max_model_len": 64})
    try:
        with pytest.raises(EngineFailed, match="unknown sequence policy 'knorn'"):
            wrong.ready(time.monotonic() + 120)
        with pytest.raises(EngineFailed, match="engine"):
            wrong.ask({"requests": []}, time.monotonic() + 10)
    finally:
        wrong.stop()


def test_an_engine_has_the_environment_of_its_start_and_not_of_the_fork_server(
    machine: Machine, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is one for the whole process, and may have been started before for others."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "no number")
    asked = Engine(machine, "environment", tiny, {}, {"max_model_len": 64})
    try:
        with pytest.raises(EngineFailed, match=r"ValueError: invalid literal.*no number"):
            asked.ready(time.monotonic() + 120)
    finally:
        asked.stop()


def test_an_engine_that_is_late_says_where_it_stands(machine: Machine, tiny: Path) -> None:
    engine = {"max_model_len": 1024, "enforce_eager": True}
    late = Engine(machine, "late", tiny, None, engine)
    try:
        late.ready(time.monotonic() + 120)
        work = {"requests": [{"prompt": [5] * 8, "max_tokens": 1000}]}
        with pytest.raises(EngineFailed, match=r"(?s)in the time left.*most recent call first"):
            late.ask(work, time.monotonic())
    finally:
        late.stop()
