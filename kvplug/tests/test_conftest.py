"""What every test runs under."""

from __future__ import annotations

import subprocess


def test_what_a_test_starts_writes_to_a_pipe_of_no_width() -> None:
    shown = subprocess.run(["env"], capture_output=True, text=True, check=True).stdout
    names = {line.partition("=")[0] for line in shown.splitlines()}
    assert not names & {"COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR"}
