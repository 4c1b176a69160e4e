"""The guard's page says what the settings, the guard and the record say."""

from __future__ import annotations

import re
from pathlib import Path

from kvplug.reuse import guard
from kvplug.reuse.guard import BreakerState
from kvplug_lab.cli.explain_record import explain

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "guard.md").read_text(encoding="utf-8")


def test_the_numbers_are_those_of_the_guard() -> None:
    assert guard.SPREADS == 2 and "less two standard deviations" in PAGE
    assert f"at least {guard.LEAST_ENTROPY} nats" in PAGE
    assert f"{guard.FAMILIES:,} families are remembered" in PAGE


def test_the_states_are_those_of_the_breaker() -> None:
    body = PAGE.split("| state |")[1].split("\n\n")[0]
    assert re.findall(r"^\| ([a-z][a-z-]+) \|", body, re.MULTILINE) == [
        str(s) for s in BreakerState
    ]


def test_the_command_has_the_options_shown() -> None:
    (line,) = re.findall(r"^kvplug reuse explain RECORD (.*)$", PAGE, re.MULTILINE)
    given = {name for name in explain.__annotations__ if name not in ("record", "return")}
    assert set(re.findall(r"--(\w+)", line)) == given
