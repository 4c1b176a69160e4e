"""SECURITY.md: each statement names tests, and the tests are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "SECURITY.md").read_text("utf-8")


def known() -> set[str]:
    found: set[str] = set()
    for path in ROOT.glob("**/test_*.py"):
        if ".venv" not in path.parts:
            found |= set(re.findall(r"^ *def (test_\w+)", path.read_text("utf-8"), re.MULTILINE))
    return found


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 40
    assert named - known() == set()


def test_every_statement_names_a_test() -> None:
    heads = 0
    within = False
    for line in PAGE.splitlines():
        if not line.startswith("|"):
            within = False
        elif line.endswith("| test |"):
            within, heads = True, heads + 1
        elif within and not line.startswith("| ---"):
            assert re.search(r"\| `test_\w+`(, `test_\w+`)* \|$", line), line
    assert heads >= 5
