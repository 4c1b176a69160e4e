from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((KERNELS / "benchmarks").glob("bench_*.py"))


def test_every_operation_has_a_benchmark() -> None:
    operations = {naive.parent.name for naive in (KERNELS / "kvplug_kernels").glob("*/naive.py")}
    assert {script.stem.removeprefix("bench_") for script in SCRIPTS} == operations


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_benchmark_runs(script: Path, tmp_path: Path) -> None:
    report = tmp_path / "rows.json"
    command = [sys.executable, str(script), "--quick", "--json", str(report)]
    subprocess.run(command, check=True, timeout=120)
    rows = json.loads(report.read_text())
    assert rows and all(row["ratio_median"] > 0 and row["bytes"] > 0 for row in rows)
