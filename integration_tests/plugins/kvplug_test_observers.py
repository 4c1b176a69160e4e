"""Observers, chosen by the environment variable KVPLUG_TEST_OBSERVER.

``record:PATH`` appends a JSON line to PATH for every hook called; ``raise`` raises in every one.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from kvplug import hookimpl
from kvplug.contract import EngineView, PolicyReport
from kvplug.observe.events import Event


class Recorder:
    """Records every hook called."""

    def __init__(self, path: Path):
        self._path = path

    def _write(self, hook: str, **what: object) -> None:
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"hook": hook, **what}) + "\n")

    @hookimpl
    def kvplug_engine_started(self, engine: EngineView) -> None:
        self._write("started", num_blocks=engine.num_blocks, block_size=engine.block_size)

    @hookimpl
    def kvplug_event(self, event: Event) -> None:
        self._write("event", **asdict(event))

    @hookimpl
    def kvplug_engine_stopping(self, reports: list[PolicyReport]) -> None:
        self._write("stopping", reports=[asdict(r) for r in reports])


class Raiser:
    """Raises in every hook."""

    @hookimpl
    def kvplug_engine_started(self, engine: EngineView) -> None:
        raise RuntimeError("a start is not wanted")

    @hookimpl
    def kvplug_event(self, event: Event) -> None:
        raise RuntimeError("an event is not wanted")

    @hookimpl
    def kvplug_engine_stopping(self, reports: list[PolicyReport]) -> None:
        raise RuntimeError("a stop is not wanted")


class Nobody:
    """Implements no hook."""


def _choose() -> object:
    what, _, path = os.environ.get("KVPLUG_TEST_OBSERVER", "").partition(":")
    match what:
        case "record":
            return Recorder(Path(path))
        case "raise":
            return Raiser()
    return Nobody()


chosen = _choose()
