"""Drawings made by hand: small, named, of the page's colour, and of what there is."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from kvplug.contract import Kind

ROOT = Path(__file__).resolve().parents[2]
DRAWINGS = sorted((ROOT / "docs" / "assets").glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("path", DRAWINGS, ids=lambda path: path.stem)
def test_a_drawing_is_small_and_says_what_it_shows(path: Path) -> None:
    assert path.stat().st_size < 30_000
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    title = root.findtext(f"{SVG}title")
    assert title and len(title) > 40
    assert {one.get("fill") for one in root.iter(f"{SVG}text")} <= {None, "currentColor", "#3b8ed0"}
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = re.compile(rf'figure\("{path.stem}"\)|docs/assets/{path.stem}\.svg')
    assert any(shown.search(page.read_text(encoding="utf-8")) for page in pages)


def test_each_kind_has_its_place_on_the_map() -> None:
    root = ElementTree.fromstring((ROOT / "docs/assets/map.svg").read_text(encoding="utf-8"))
    words = {one.text for one in root.iter(f"{SVG}text")}
    assert {str(kind) for kind in Kind} <= words
    said = root.findtext(f"{SVG}title") or ""
    assert all(str(kind) in said for kind in Kind)
