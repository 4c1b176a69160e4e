"""The guard's page says what the settings, the guard and the record say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kvplug.contract.policy import PolicyOptions
from kvplug.reuse import guard
from kvplug.reuse.guard import BreakerState
from kvplug.reuse.settings import Breaker, GuardSettings
from kvplug_lab.cli.explain import explain

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "guard.md").read_text(encoding="utf-8")


def table(heading: str) -> dict[str, list[str]]:
    body = PAGE.split(f"| {heading} |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", body, re.MULTILINE)
    return {name: [cell.strip() for cell in rest.split("|")] for name, rest in rows}


def limits(info: Any) -> str:
    said = {k: getattr(m, k) for m in info.metadata for k in ("ge", "gt", "le") if hasattr(m, k)}
    if "gt" in said:
        return f"above {said['gt']}"
    return f"{said['ge']} to {said['le']}" if "le" in said else f"{said['ge']} or more"


@pytest.mark.parametrize(
    ("heading", "model"), [("key of `guard`", GuardSettings), ("key of `breaker`", Breaker)]
)
def test_the_keys_are_those_of_the_settings(heading: str, model: type[PolicyOptions]) -> None:
    rows = table(heading)
    assert list(rows) == list(model.model_fields)
    for name, info in model.model_fields.items():
        default, bounds, meaning = rows[name]
        assert meaning == info.description
        if name != "breaker":
            assert default.strip("`").strip() == str(info.default)
        if info.metadata:
            assert bounds == limits(info)


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
    (line,) = re.findall(r"^kvplug explain RECORD (.*)$", PAGE, re.MULTILINE)
    given = {name for name in explain.__annotations__ if name not in ("record", "return")}
    assert set(re.findall(r"--(\w+)", line)) == given
