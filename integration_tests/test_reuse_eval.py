"""`kvplug reuse` as one runs it, at its small size, on the real model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def reuse(folder: Path, model: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    command = [sys.executable, "-c", "from kvplug.cli import app; app()", "reuse", *arguments]
    command += ["--quick", "--json", "figures.json", "--model", str(model)]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    data: dict[str, Any] = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    return data, done.stdout


def test_documents_in_any_order_are_reused(tmp_path: Path, smollm2: Path) -> None:
    found, shown = reuse(tmp_path, smollm2, "rag", "--variants", "nothing,gaps+boundary=8")
    stock = {row["variant"]: row for row in found["stock"]}
    rows = {row["variant"]: row for row in found["variants"]}
    assert set(stock) == {"stock", "stock, headed"}
    assert set(rows) == {"nothing", "gaps+boundary=8"}
    for name, base in (("nothing", "stock"), ("gaps+boundary=8", "stock, headed")):
        row = rows[name]
        assert row["requests"] == 6 and row["approximate_requests"] >= 4
        assert row["reused_share"] > 0.5 > stock[base]["reused_share"]
        # A wrong key or value anywhere would leave nothing of the texts.
        assert row["perplexity"] < found["perplexity_without_documents"]
    assert rows["nothing"]["computed_share"] == 0 < rows["gaps+boundary=8"]["computed_share"]
    assert rows["nothing"]["greedy"]["answers"] == 2
    assert found["counters"]["nothing"]["shifted_tokens"] > 0
    assert "CacheBlend" in shown and "2.2x to 3.3x" in shown


def test_a_chat_over_its_window_reuses_what_is_left(tmp_path: Path, smollm2: Path) -> None:
    # In bfloat16 a tie may fall otherwise where a batch has another shape.
    found, _ = reuse(tmp_path, smollm2, "chat", "--variants", "gaps", "--dtype", "float32")
    turns = found["turns"]
    assert [t["dropped"] for t in turns["gaps"]] == [0, 0, 0, 0, 1, 2]
    within, over = (turns["gaps"][:4], turns["gaps"][4:])
    assert not any(t["approximate"] for t in within) and all(t["approximate"] for t in over)
    assert all(t["before"] == t["reply"] for t in within)
    for mine, stock in zip(over, turns["stock"][4:], strict=True):
        assert mine["reused"] > 2 * stock["reused"]


def test_exact_requests_after_mixed_ones_are_answered_as_by_a_fresh_engine(
    tmp_path: Path, smollm2: Path
) -> None:
    found, shown = reuse(tmp_path, smollm2, "mixed")
    assert found["mismatches"] == [] and found["compared"] == 4
    assert found["approximate"] > 0 and found["reused"] > 0
    assert "approximate" not in found["served_as"]
    assert found["counters"]["approximate_requests"] == found["approximate"]
    assert "answered differently than by a fresh engine" in shown


def test_checks_are_timed_beside_the_times_to_first_token(tmp_path: Path, smollm2: Path) -> None:
    found, shown = reuse(tmp_path, smollm2, "checks")
    assert set(found["costs"]) == {"100", "300"}
    assert set(found["ttft_s"]) == {"stock", "nothing"}
    assert found["each"] == ["structure", "position", "mask"]
    for costs in found["costs"].values():
        assert set(costs) == set(found["parts"])
        assert all(cost["median"] > 0 and cost["n"] == 4 for cost in costs.values())
    assert found["candidates"] >= 3
    assert "share of TTFT, stock" in shown
