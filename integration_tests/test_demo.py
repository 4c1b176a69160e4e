"""The main job, as a newcomer runs it: ``kvplug demo`` at its full size, on the real model.

Every figure asserted here comes from vLLM's own block pool, looked at after every step.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BLOCK, SINK, WINDOW, CHUNK = 32, 64, 448, 512
CAP = -(-SINK // BLOCK) + -(-(WINDOW - 1) // BLOCK) + 1 + CHUNK // BLOCK + 1
"""Sink, window, own block, and a chunk in flight that need not start at a block's edge."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-c", "from kvplug.cli import app; app()", "demo"]
    command += ["--json", "demo.json", "--html", "demo.html", "--model", str(smollm2)]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    data: dict[str, Any] = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    data["output"] = done.stdout
    data["page"] = (folder / "demo.html").read_text(encoding="utf-8")
    return data


@pytest.mark.timeout(1500)
def test_no_request_ever_holds_more_than_the_cap(demo: dict[str, Any]) -> None:
    ours = demo["kvplug"]
    assert ours["cap_blocks"] == [CAP]
    assert len(ours["steps"]) > 100
    assert all(step["largest"] <= CAP for step in ours["steps"])
    assert all(answer["prompt_tokens"] >= 3_000 for answer in ours["answers"])


def test_four_times_as_many_run_at_once(demo: dict[str, Any]) -> None:
    stock, ours = (
        max(step["running"] for step in demo[name]["steps"]) for name in ("stock", "kvplug")
    )
    assert demo["stock"]["num_blocks"] == demo["kvplug"]["num_blocks"]
    assert stock == 4
    assert ours >= 4 * stock


def test_freed_blocks_serve_other_requests_during_the_run(demo: dict[str, Any]) -> None:
    assert demo["stock"]["handed_over"] == 0
    assert demo["kvplug"]["handed_over"] > 100
    assert demo["kvplug"]["preemptions"] == 0


def test_every_policy_says_what_it_did(demo: dict[str, Any]) -> None:
    reports = {r["kind"]: r for r in demo["kvplug"]["reports"]}
    sequence = reports["sequence"]["counters"]
    assert sequence["requests"] == len(demo["kvplug"]["answers"])
    assert sequence["freed_bytes"] == sequence["freed"] * demo["kvplug"]["block_bytes"] > 0
    assert reports["prefix_cache"]["counters"]["evicted"] > 0
    assert reports["prefix_cache"]["counters"]["reordered"] == 0
    assert demo["stock"]["reports"] == []
    assert "NEVER ACTED" not in demo["output"]


def test_progress_and_table_are_shown(demo: dict[str, Any]) -> None:
    output = demo["output"]
    assert len(re.findall(r"^stock vLLM: +\d+% \d+ running", output, re.MULTILINE)) > 5
    assert len(re.findall(r"^quickstart: +\d+% \d+ running", output, re.MULTILINE)) > 5
    for label in ("peak blocks in use", "requests running at once", "preemptions", "tokens / s"):
        assert label in output
    assert "freed_bytes" in output


def test_the_page_stands_alone(demo: dict[str, Any]) -> None:
    page = demo["page"]
    assert page.startswith("<!doctype html>")
    assert page.count("<polyline") == 4
    assert "src=" not in page and "href=" not in page and "<script" not in page
    for name in ("stock", "kvplug"):
        points = [len(s.split()) for s in re.findall(r'points="([^"]+)"', page)]
        assert len(demo[name]["steps"]) in points
