"""What measures tiers stores, reads and checks, and its pages say what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer

from kvplug.contract import Tier
from kvplug.tiers import wire
from kvplug_lab import tier_speed

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_a_tier_is_measured_and_left_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tier_speed, "KIB", (1, 16))
    out, folder = tmp_path / "speed.json", tmp_path / "kv"
    tiers = ["host: {size: 8MiB}", f"disk: {{path: {folder}, size: 64MiB, label: files}}"]
    tier_speed.main(tiers, rounds=2, mib=1, at_once=1, json=out)
    found = json.loads(out.read_text("utf-8"))["tiers"]
    assert list(found) == ["host", "files"]
    for rows in found.values():
        assert [row["kib"] for row in rows] == [1, 16]
        assert all(row["put"] > 0 and row["get"] > 0 and row["one_ms"] > 0 for row in rows)
    assert not list(folder.glob("*/??/*"))
    assert "files" in capsys.readouterr().out


def test_a_tier_that_loses_a_chunk_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    _, tier = tier_speed.opened("host: {size: 8MiB}")
    monkeypatch.setattr(type(tier), "get", lambda self, keys: [None] * len(keys))
    with pytest.raises(RuntimeError, match="host lost a chunk"):
        tier_speed.measure(tier, 1, 1, 1)
    monkeypatch.setattr(type(tier), "put", lambda self, items: ["full"] * len(items))
    with pytest.raises(RuntimeError, match="host did not store a chunk: full"):
        tier_speed.measure(tier, 1, 1, 1)
    assert isinstance(tier, Tier)


@pytest.mark.parametrize("text", ["host", "{}", "nothing: {}", "lru: {}"])
def test_what_is_no_tier_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        tier_speed.opened(text)


def test_the_page_of_the_wire_format_has_its_causes_and_offsets() -> None:
    page = (DOCS / "wire.md").read_text("utf-8")
    said = page[page.index("one of these causes") :].split("\n")[0]
    assert tuple(re.findall(r"`([^`]+)`", said)) == wire.CAUSES
    rows = re.findall(r"^\| (\d+) \| (\d+)? ?\| (.+) \|$", page, re.MULTILINE)
    fixed = {int(at): (int(size), content) for at, size, content in rows if size}
    assert fixed[8] == (27, f"`{wire._OPENING.decode()}`")
    assert fixed[wire._VERSION_AT][0] == 4 and f"{wire.VERSION:04}" in fixed[35][1]
    assert fixed[39] == (len(wire._BEFORE_BYTES), f"`{wire._BEFORE_BYTES.decode()}`")
    assert fixed[wire._BYTES_AT][0] == 16
    assert fixed[66] == (len(wire._BEFORE_SUM), f"`{wire._BEFORE_SUM.decode()}`")
    assert fixed[wire._SUM_AT][0] == 32 and wire._SUM_END == 108
