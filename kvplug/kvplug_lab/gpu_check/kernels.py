"""The kernel tests, natively, on many workers."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvplug.errors import KVPlugError
from kvplug_lab.gpu_check.parts import Report

REPORTS = "KVPLUG_TEST_REPORTS"
"""Environment variable that names the file to which this module, as a plugin of pytest, writes."""
LISTED = 40
"""Groups of failures that become rows."""


def pytest_runtest_logreport(report: Any) -> None:
    """Write the outcome of a test at once, so that a run that is cut off still tells."""
    if report.when == "call" or report.failed:
        crash = getattr(getattr(report.longrepr, "reprcrash", None), "message", "")
        line = {"test": report.nodeid, "outcome": report.outcome, "message": crash[:400]}
        with Path(os.environ[REPORTS]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def run_tests(
    root: Path, folder: Path, workers: int, report: Report, deadline: float, select: Sequence[str]
) -> None:
    """Run ``kernels/tests`` of a checkout.

    Args:
        root: Checkout.
        folder: Where its log goes.
        workers: Processes side by side.
        report: Gets one row per test function that failed, and one for all.
        deadline: When what still runs is killed.
        select: Further arguments of pytest, e.g. ``-k NAME``.

    Raises:
        KVPlugError: The tests ended early, or none ran.
    """
    reports = folder / "kernel-tests.jsonl"
    reports.write_text("", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", __name__]
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    with (folder / "kernel-tests.log").open("w", encoding="utf-8") as log:
        child = subprocess.Popen(
            [*command, "kernels/tests", *select],
            cwd=root,
            env=os.environ | {REPORTS: str(reports)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        late = False
        try:
            child.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            code = child.wait()
    outcomes: Counter[str] = Counter()
    failures: Counter[tuple[str, str]] = Counter()
    example: dict[tuple[str, str], str] = {}
    for line in reports.read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        outcomes[found["outcome"]] += 1
        if found["outcome"] == "failed":
            message = (found["message"].strip().splitlines() or [""])[0][:160]
            key = found["test"].split("[")[0].removeprefix("kernels/tests/"), message
            failures[key] += 1
            example.setdefault(key, found["test"])
    for (test, message), count in failures.most_common(LISTED):
        row = {"name": test, "ok": False, "failed": count, "message": message}
        report(row | {"example": example[test, message]}, f"{count} x {test}: {message}")
    passed, failed = outcomes["passed"], outcomes["failed"]
    row = {"name": "all", "ok": not failed, "passed": passed, "failed": failed}
    report(
        row | {"skipped": outcomes["skipped"]},
        f"{passed} passed, {failed} failed, {outcomes['skipped']} skipped",
    )
    if late:
        raise KVPlugError(f"out of time after {sum(outcomes.values())} tests")
    if code not in (0, 1) or not outcomes:
        tail = (folder / "kernel-tests.log").read_text(encoding="utf-8", errors="replace")[-1500:]
        raise KVPlugError(f"pytest exited with code {code}:\n{tail}")
