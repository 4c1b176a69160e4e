"""What is still known of requests that have ended is found, wherever an object keeps it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from kvplug_lab.engine.leftovers import leftovers


@dataclass
class Kept:
    """Stands for an object of kvplug's."""

    table: dict[str, Any] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    inner: list[Any] = field(default_factory=list)
    named: str = ""


Kept.__module__ = "kvplug.hosts.vllm.scheduler.kept"


class Slotted:
    """Keeps what it keeps in slots."""

    __slots__ = ("rows",)

    def __init__(self) -> None:
        self.rows = ["a", "b", None]


Slotted.__module__ = Kept.__module__


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        (Kept(), []),
        (Kept(named="a"), []),
        (Kept(table={"a": 1, "other": 2}), ["half.table (1)"]),
        (Kept(table={"other": {"a", "b"}}), ["half.table[] (2)"]),
        (Kept(names={"b"}), ["half.names (1)"]),
        (Kept(inner=[(3, Kept(names={"a"}))]), ["half.inner[][].names (1)"]),
        (Kept(inner=[Slotted()]), ["half.inner[].rows (2)"]),
        (Kept(inner=[object()]), []),
    ],
)
def test_a_container_that_mentions_a_request_is_named(kept: Kept, says: list[str]) -> None:
    assert leftovers({"half": kept}, ["a", "b"]) == says


def test_objects_in_a_circle_end() -> None:
    kept = Kept()
    kept.inner.append(kept)
    assert leftovers({"half": kept}, ["a"]) == []
