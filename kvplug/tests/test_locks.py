"""The lock files, and what is said when an index does not serve what they have."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("cpu.lock", "core.lock")


def pins(name: str) -> dict[str, list[str]]:
    """Digests of every pin of a lock."""
    text = (ROOT / "requirements" / name).read_text("utf-8").replace(" \\\n", "")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {line.split()[0]: line.split()[1:] for line in lines}


@pytest.mark.parametrize("name", LOCKS)
def test_every_pin_has_digests_and_nothing_of_where_it_came_from(name: str) -> None:
    found = pins(name)
    assert len(found) > 40
    for pin, digests in found.items():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin), pin
        assert digests, pin
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in digests), pin


def test_the_smaller_lock_is_a_part_of_the_other() -> None:
    assert pins("core.lock").items() <= pins("cpu.lock").items()


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (
            "ERROR: Could not find a version that satisfies the requirement attrs==26.1.0\n"
            "ERROR: No matching distribution found for attrs==26.1.0\n",
            "kvplug: pip found no attrs==26.1.0 for ",
        ),
        (
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you\n"
            "    attrs==26.1.0 from https://index/attrs.whl#sha256=1 (from -r cpu.lock (line 1)):\n"
            "        Expected sha256 1\n             Got        2\n",
            "kvplug: what pip's index serves as attrs==26.1.0 is not the file that ",
        ),
        (
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you\n"
            "    torch==2.13.0 from https://index/torch.whl#sha256=1 (from -r cpu.lock (line 1)):\n"
            "        Expected sha256 1\n             Got        2\n",
            "kvplug: pip's index serves another build of torch==2.13.0 than the CPU build that ",
        ),
        ("ERROR: the disk is full\n", "ERROR: the disk is full\nkvplug: pip failed as shown above"),
    ],
)
def test_a_failed_installation_says_what_to_do(tmp_path: Path, told: str, said: str) -> None:
    requirements = tmp_path / "requirements"
    requirements.mkdir()
    for name in ("install.sh", "cpu.lock"):
        shutil.copy(ROOT / "requirements" / name, requirements / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    # Stands for pip: there, and failing with a text of its own.
    python.write_text(
        f'#!/bin/sh\necho "$*" >>"{tmp_path}/asked"\n'
        f'case "$*" in\n"-m pip install "*) cat "{tmp_path}/told"; exit 1 ;;\nesac\n',
        "utf-8",
    )
    python.chmod(0o755)
    (tmp_path / "told").write_text(told, "utf-8")
    done = subprocess.run(
        ["bash", str(requirements / "install.sh")],
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(said), done.stderr
    (installed,) = re.findall(r"-m pip install .*", (tmp_path / "asked").read_text("utf-8"))
    assert "--require-hashes -r requirements/cpu.lock" in installed and "--no-deps" in installed
