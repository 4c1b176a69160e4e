"""Every deployment of reuse under configs/cpu/ serves a real model, and what it says happens."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvplug.hosts.vllm.flags import read_config
from kvplug_lab.engine.trial import TrialRequest, TrialResult

Run = Callable[..., TrialResult]

ROOT = Path(__file__).resolve().parents[1]
NAMES = [
    "structure",
    "position",
    "mask",
    "credibility",
    "compensate",
    "guarded",
    "context_shift",
]
CALIBRATED = {"credibility", "compensate"}
ASKS = {"reuse": "approximate"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def calibration(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real calibration of the served model, from few prompts."""
    path = tmp_path_factory.mktemp("calibration") / "reuse.safetensors"
    start = [sys.executable, "-c", "from kvplug.cli import app; app()", "calibrate", "reuse"]
    sizes = ["--prompts", "4", "--held-out", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*start, str(smollm2), *sizes, "--output", str(path)], check=True, env=env)
    return path


@pytest.fixture(scope="module")
def work(smollm2: Path, passages: Callable[..., list[str]]) -> list[TrialRequest]:
    """Two documents are read, then both stand in one prompt the other way round."""
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(smollm2)
    head = encode("Answer from the documents.\n\n").input_ids
    head += encode(passages(1, 30, seed=3)[0] + "\n\n").input_ids
    one, other = (encode(p + "\n\n").input_ids for p in passages(2, 90, seed=4))
    question = encode("Question: who speaks? Answer:").input_ids
    both = {"segments": [len(head), len(other), len(one)]}
    return [
        TrialRequest(head + one, 1, 0, {"segments": [len(head), len(one)]}),
        TrialRequest(head + other, 1, 1, {"segments": [len(head), len(other)]}),
        TrialRequest(head + other + one + question, 16, 2, ASKS | both),
        TrialRequest(head + other + one + question, 16, 3, both),
    ]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_its_deployment_serves(
    run: Run,
    smollm2: Path,
    work: list[TrialRequest],
    calibration: Path,
    tmp_path: Path,
    name: str,
) -> None:
    file = read_config(ROOT / "configs/cpu" / f"{name}.yaml")
    section: dict[str, Any] = dict(file.deployment.section)
    if name in CALIBRATED:
        (options,) = [c for c in section["reuse"]["use"] if isinstance(c, dict) and name in c]
        options[name] = options[name] | {"model": str(calibration)}
    if name == "credibility":
        options[name]["threshold"] = 0.0  # what a few prompts teach is no measure
    if "guard" in section:
        section["guard"] = section["guard"] | {"records": str(tmp_path)}
    flags = ("max-num-batched-tokens", "dtype", "worker-extension-cls", "logits-processors")
    engine = {f.replace("-", "_"): file.flags[f] for f in flags if f in file.flags}
    result = run(smollm2, work, section, max_model_len=2048, **engine)
    assert [r["errors"] for r in result.reports if r["kind"] == "reuse"]
    assert not any(r["errors"] for r in result.reports)
    asked, plain = result.answers[2:]
    assert plain.kvplug is None or plain.kvplug["exact"]
    if not section["reuse"].get("approximate"):
        assert asked.kvplug is None or asked.kvplug["exact"]
        return
    assert asked.kvplug is not None
    assert asked.kvplug["exact"] is False
    document = len(work[0].prompt) - work[0].kvplug["segments"][0]
    assert asked.kvplug["shifted"] == document
    for report in result.reports:
        if report["kind"] == "reuse" and report["name"] != "compensate":
            assert report["acted"] > 0, report["name"]
    if name == "compensate":
        assert result.reports[0]["counters"]["computed"] > 0
