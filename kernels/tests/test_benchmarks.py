from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((KERNELS / "benchmarks").glob("bench_*.py"))
# Scripts one after another: importing torch takes longer than a quick run.
RUN_ALL = """
import pathlib, runpy, sys, traceback

folder, *scripts = sys.argv[1:]
for script in scripts:
    name = pathlib.Path(script).stem
    sys.path.insert(0, str(pathlib.Path(script).parent))
    sys.argv = [script, "--quick", "--json", f"{folder}/{name}.json"]
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception:
        pathlib.Path(folder, f"{name}.txt").write_text(traceback.format_exc())
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of every script's report, or of its traceback."""
    folder = tmp_path_factory.mktemp("reports")
    command = [sys.executable, "-c", RUN_ALL, str(folder), *map(str, SCRIPTS)]
    subprocess.run(command, check=True, timeout=600)
    return folder


def assert_measured(report: Path) -> None:
    rows = json.loads(report.read_text())
    assert rows and all(row["ratio_median"] > 0 and row["bytes"] > 0 for row in rows)


def test_every_operation_has_a_benchmark() -> None:
    operations = {naive.parent.name for naive in (KERNELS / "kvplug_kernels").glob("*/naive.py")}
    assert {script.stem.removeprefix("bench_") for script in SCRIPTS} == operations


@pytest.mark.parametrize("name", [script.stem for script in SCRIPTS])
def test_benchmark_runs(name: str, reports: Path) -> None:
    error = reports / f"{name}.txt"
    assert not error.exists(), error.read_text()
    assert_measured(reports / f"{name}.json")


def test_a_benchmark_runs_as_a_script(tmp_path: Path) -> None:
    report = tmp_path / "rows.json"
    script = KERNELS / "benchmarks" / "bench_select_top.py"
    command = [sys.executable, str(script), "--quick", "--json", str(report)]
    subprocess.run(command, check=True, timeout=600)
    assert_measured(report)
