"""``kvplug demo`` as a newcomer runs it, on the real model: ``--quick`` in every run of the tests,
the whole one among the slow tests.

Every count asserted here comes from vLLM's own scheduler and block pool, looked at after every
step, or from the answers.
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
STOCK, KEPT, DROPPED = "stock vLLM", "int8", "quickstart"


def ran(folder: Path, smollm2: Path, *more: str) -> dict[str, Any]:
    command = [sys.executable, "-c", "from kvplug.cli import app; app()", "demo", *more]
    command += ["--json", "demo.json", "--html", "demo.html", "--model", str(smollm2)]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    data: dict[str, Any] = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    data["output"] = done.stdout
    data["page"] = (folder / "demo.html").read_text(encoding="utf-8")
    return data


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> dict[str, Any]:
    return ran(tmp_path_factory.mktemp("demo"), smollm2, "--quick")


def right(data: dict[str, Any], name: str) -> list[int]:
    """Right answers by the place of the fact, in the first round."""
    found: list[int] = data["rounds"][0][name]["right"]
    return found


@pytest.mark.timeout(600)
def test_a_deployment_that_keeps_answers_runs_more_at_once(quick: dict[str, Any]) -> None:
    (figures,) = quick["rounds"]
    assert sum(right(quick, STOCK)) == 6
    assert right(quick, KEPT) == right(quick, STOCK)
    assert (figures[STOCK]["running"], figures[KEPT]["running"]) == (2, 3)
    assert figures[KEPT]["cached"] > figures[STOCK]["cached"]
    assert figures[KEPT]["kv_mib"] < 0.6 * figures[STOCK]["kv_mib"]


def test_an_aggressive_one_loses_what_it_dropped(quick: dict[str, Any]) -> None:
    assert right(quick, DROPPED)[0] < right(quick, STOCK)[0]
    assert right(quick, DROPPED)[-1] == right(quick, STOCK)[-1]


def test_every_engine_has_the_same_memory(quick: dict[str, Any]) -> None:
    sizes = {d["name"]: d["blocks"] * d["block_bytes"] + d["beside"] for d in quick["deployments"]}
    assert max(sizes.values()) < 1.02 * min(sizes.values())


def test_it_says_what_it_takes_before_and_what_measured_after(quick: dict[str, Any]) -> None:
    lines = quick["output"].splitlines()
    assert lines[0].startswith("Nothing is downloaded")
    assert re.match(r"This takes .* (seconds|minutes) here, estimated from", lines[1])
    for name in (STOCK, KEPT, DROPPED):
        assert re.search(rf"^round 1 of 1, {name}: \d of 6 answered", quick["output"], re.MULTILINE)
    assert "NEVER ACTED" not in quick["output"]
    assert "freed_bytes" in quick["output"]
    assert "One round shows no spread" in quick["output"]
    assert not any(row["timed"] for row in quick["rows"])
    assert "kvplug demo --quick --json demo.json" in quick["output"]


def test_the_page_is_of_what_was_measured(quick: dict[str, Any]) -> None:
    page = quick["page"]
    assert page.startswith("<!doctype html>")
    assert "src=" not in page and "href=" not in page and "<script" not in page
    points = [len(s.split()) for s in re.findall(r'points="([^"]+)"', page)]
    assert sorted(points) == sorted(
        2 * [len(own["held"].split()) for own in quick["steps"].values()]
    )
    assert "differs from stock" in page and "agrees with stock" in page


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_demo(tmp_path: Path, smollm2: Path) -> None:
    data = ran(tmp_path, smollm2)
    assert [order[0] for order in data["about"]["order"]] == [STOCK, KEPT, DROPPED]
    assert len(data["rounds"]) == 3
    for figures in data["rounds"]:
        assert (figures[STOCK]["running"], figures[KEPT]["running"]) == (3, 5)
        assert figures[KEPT]["right"] == figures[STOCK]["right"]
        assert figures[KEPT]["computed"] < 0.5 * figures[STOCK]["computed"]
        assert sum(figures[DROPPED]["right"]) < sum(figures[STOCK]["right"])
    sequence = next(r for r in data["reports"][DROPPED] if r["kind"] == "sequence")["counters"]
    assert sequence["freed"] > 100
    held = [int(blocks) for blocks in data["steps"][DROPPED]["held"].split()]
    assert max(held) <= 5 * CAP
    timed = {row["key"]: row for row in data["rows"] if row["timed"]}
    assert set(timed) == {"answers_per_minute", "ttft", "cpu_seconds"}
    assert {name for name, ratio in timed["ttft"]["ratios"].items() if ratio} == {KEPT, DROPPED}
