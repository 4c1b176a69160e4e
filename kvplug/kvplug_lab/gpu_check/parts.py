"""Runs the parts of a check side by side and one after another, and keeps their results."""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
"""Version of the JSON that `Results` writes."""


class Results:
    """Results of a check: printed and written as they come, so that a run cut off still tells.

    The file is one JSON object: ``schema``, `SCHEMA`; the keys of ``head``, among them ``machine``;
    ``seconds``; ``ok``; and ``parts``, by name: ``ok``, ``seconds``, ``error`` (null, or why the
    part ended early) and ``rows``, a list of objects that each have ``name`` and ``ok``.

    Args:
        file: JSON file to write.
        head: What the file states first.
        say: Prints a line.
    """

    def __init__(self, file: Path, head: Mapping[str, Any], say: Callable[[str], None]):
        self.file, self.say = file, say
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self.data: dict[str, Any] = {"schema": SCHEMA, **head, "seconds": 0.0, "ok": True}
        self.data["parts"] = {}

    @property
    def ok(self) -> bool:
        """True while nothing failed."""
        return bool(self.data["ok"])

    def begin(self, part: str) -> None:
        """Enter a part with no rows."""
        with self._lock:
            self.data["parts"][part] = {"ok": True, "seconds": 0.0, "error": None, "rows": []}

    def row(self, part: str, row: Mapping[str, Any], line: str) -> None:
        """Add a row, print ``line`` about it, and write the file."""
        with self._lock:
            self.data["parts"][part]["rows"].append(dict(row))
            if not row["ok"]:
                self._fail(part)
            self._write()
        self.say(f"{part}: {line}")

    def end(self, part: str, seconds: float, error: str | None) -> None:
        """Close a part, and write the file."""
        with self._lock:
            entry = self.data["parts"][part]
            entry["seconds"], entry["error"] = round(seconds, 1), error
            if error is not None:
                self._fail(part)
            self._write()
        rows = self.data["parts"][part]["rows"]
        good = sum(bool(r["ok"]) for r in rows)
        self.say(
            f"{part}: {good} of {len(rows)} ok, {seconds:.0f} s" + (f": {error}" * bool(error))
        )

    def _fail(self, part: str) -> None:
        self.data["parts"][part]["ok"] = self.data["ok"] = False

    def _write(self) -> None:
        self.data["seconds"] = round(time.monotonic() - self._start, 1)
        scratch = self.file.with_suffix(".new")
        scratch.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        scratch.replace(self.file)


Report = Callable[[Mapping[str, Any], str], None]
"""``report(row, line)``: a row of the part's results and a line about it."""


@dataclass(frozen=True)
class Part:
    """A part of a check.

    Attributes:
        name: Its name.
        run: ``run(report, deadline)``: does the work until the deadline on the clock of
            `time.monotonic`, and raises where something other than a row failed.
    """

    name: str
    run: Callable[[Report, float], None]


@dataclass(frozen=True)
class Group:
    """Parts that run side by side.

    Attributes:
        parts: The parts.
        share: Their share of the time of the whole check.
    """

    parts: Sequence[Part]
    share: float


def run_groups(groups: Sequence[Group], seconds: float, results: Results) -> None:
    """Run groups one after another; time that one leaves goes to those after it.

    Args:
        groups: The groups.
        seconds: Time of all together.
        results: Where rows and errors of parts go.
    """
    end = time.monotonic() + seconds
    groups = [group for group in groups if group.parts]
    for i, group in enumerate(groups):
        left = end - time.monotonic()
        share = group.share / sum(other.share for other in groups[i:])
        deadline = time.monotonic() + left * share
        with ThreadPoolExecutor(len(group.parts)) as pool:
            for done in [pool.submit(_run, part, deadline, results) for part in group.parts]:
                done.result()


def _run(part: Part, deadline: float, results: Results) -> None:
    results.begin(part.name)
    start = time.monotonic()
    error = None
    try:
        part.run(lambda row, line: results.row(part.name, row, line), deadline)
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"
        results.say("".join(traceback.format_exception(problem)).rstrip())
    results.end(part.name, time.monotonic() - start, error)
