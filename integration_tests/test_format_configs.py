"""Every format's deployment in configs/cpu serves a real model, and takes the memory it says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvplug.contract import Kind
from kvplug.hosts.vllm.flags import read_config
from kvplug_lab.engine.trial import TrialRequest, TrialResult, pool_tokens
from kvplug_policies.builtin import BUILTIN

Run = Callable[..., TrialResult]

ROOT = Path(__file__).resolve().parents[1]
FORMATS = sorted(policy.name for policy in BUILTIN if policy.kind is Kind.FORMAT)
CALIBRATED = {"lowrank", "merge_heads", "residual"}
SAVED = {"int4": 3.2, "rotated": 3.5, "kivi": 3.2, "hack": 3.0, "lowrank": 1.05, "residual": 2.5}
"""Least ratio of pool tokens to stock's where a format is about room. The deployment of int4
leaves some layers in 8 bits, that of hack has groups."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def calibration(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real calibration of the served model, from few tokens."""
    path = tmp_path_factory.mktemp("calibration") / "calibration.safetensors"
    start = [sys.executable, "-c", "from kvplug.cli import app; app()", "calibrate", str(smollm2)]
    sizes = ["--tokens", "1024", "--window", "256"]
    # Two test processes with two threads each would mostly wait for one another.
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*start, *sizes, "--output", str(path)], check=True, env=env)
    return path


def requests(passages: Callable[..., list[str]]) -> list[TrialRequest]:
    texts = passages(3, 150)
    return [*(TrialRequest(t, 16) for t in texts), TrialRequest(texts[0], 16, wave=1)]


@pytest.fixture(scope="module")
def stock(run: Run, smollm2: Path, passages: Callable[..., list[str]]) -> TrialResult:
    return run(smollm2, requests(passages), None, max_model_len=1024)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FORMATS)
def test_its_deployment_serves(
    run: Run,
    smollm2: Path,
    passages: Callable[..., list[str]],
    stock: TrialResult,
    calibration: Path,
    tmp_path: Path,
    name: str,
) -> None:
    file = read_config(ROOT / "configs/cpu" / f"{name}.yaml")
    section: dict[str, Any] = dict(file.deployment.section)
    own = section["format"] = dict(section["format"])
    if name in CALIBRATED:
        own["calibration"] = str(calibration)
    if name == "merge_heads":
        own["max_error"] = 0.9  # heads of this model are little alike
    if "log" in own:
        own["log"] = str(tmp_path / own["log"])
    flags = {
        flag: file.flags[flag]
        for flag in ("block-size", "max-num-batched-tokens", "dtype")
        if flag in file.flags
    }
    engine = {flag.replace("-", "_"): value for flag, value in flags.items()}
    result = run(smollm2, requests(passages), section, max_model_len=1024, **engine)
    (report,) = [r for r in result.reports if r["kind"] == "format"]
    assert report["acted"] > 0 and report["errors"] == 0
    counters = report["counters"]
    assert counters["nonfinite"] == 0
    ratio = counters["stock_bytes_per_token"] / counters["bytes_per_token"]
    assert pool_tokens(result.log) / pool_tokens(stock.log) == pytest.approx(ratio, rel=0.01)
    assert ratio >= SAVED.get(name, 1.0)
    again, first = result.answers[3], result.answers[0]
    assert again.cached_tokens >= 128, "blocks of the same format are shared"
    assert len(first.token_ids) == 16 and first.kvplug is not None
    assert first.kvplug["format"].startswith(name)
    if name == "plain":
        assert [a.token_ids for a in result.answers] == [a.token_ids for a in stock.answers]
