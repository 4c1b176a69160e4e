"""``kvplug new``: what it writes is green at once, and what it refuses it leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvplug.cli import app
from kvplug.contract import Kind
from kvplug.scaffold import KERNELS, new_policy

ROOT = Path(__file__).resolve().parents[2]
KINDS = [str(kind) for kind in Kind]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of each kind, with a kernel where there is one, found as if installed."""
    folder = tmp_path_factory.mktemp("made")
    for kind in Kind:
        package, *_ = new_policy(kind, f"made_{kind}", folder, kernel=kind in KERNELS)
        project = tomllib.loads((package / "pyproject.toml").read_text("utf-8"))["project"]
        dist = package / f"kvplug_made_{kind}-0.1.0.dist-info"
        dist.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n"
        (dist / "METADATA").write_text(metadata, "utf-8")
        entries = "".join(f"{k} = {v}\n" for k, v in project["entry-points"]["kvplug"].items())
        (dist / "entry_points.txt").write_text(f"[kvplug]\n{entries}", "utf-8")
    return folder


def run(made: Path, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    paths = [*map(str, made.iterdir()), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=cwd or made,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_its_tests_pass_at_once(made: Path) -> None:
    """One process for all: markers, laws, tests of their own and kernels."""
    command = ["pytest", "-q", "-p", "no:cacheprovider", "-p", "kvplug.testing.plugin"]
    command += ["--import-mode=importlib", "--rootdir", ".", "-m", "not engine"]
    tests = [str(p / "tests") for p in sorted(made.iterdir())]
    done = run(made, *command, "-W", "ignore::pytest.PytestUnknownMarkWarning", *tests)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = int(done.stdout.rpartition(" passed")[0].split()[-1])
    assert passed > 100, done.stdout[-2000:]


def test_it_is_clean_for_ruff(made: Path) -> None:
    for check in (["check"], ["format", "--check"]):
        done = run(made, "ruff", *check, "--no-cache", ".")
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_deployment_passes_the_check_and_finds_its_policy(made: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from kvplug.cli.check import read_checked\n"
        "for f in sorted(Path(sys.argv[1]).glob('*/*.yaml')):\n"
        "    print(f.stem, *(c.policy.name for c in read_checked(f).deployment.all()))\n"
    )
    (made / "read_deployments.py").write_text(code, "utf-8")
    try:
        done = run(made, "read_deployments", str(made))
    finally:
        (made / "read_deployments.py").unlink()
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert set(lines) == {f"made_{kind}" for kind in Kind}
    assert all(name in names for name, names in lines.items()), lines


@pytest.mark.slow
def test_it_is_clean_for_mypy(made: Path, tmp_path: Path) -> None:
    """With a kernel and without one."""
    plain = [new_policy(kind, f"plain_{kind}", tmp_path / "new")[0] for kind in KERNELS]
    command = ["mypy", "--config-file", "pyproject.toml", "--cache-dir", str(tmp_path / "cache")]
    for package in [*sorted(made.iterdir()), *plain]:
        done = run(made, *command, cwd=package)
        assert done.returncode == 0, done.stdout


def invoke(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["new", *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_it_says_what_it_made_and_what_is_next(tmp_path: Path) -> None:
    code, out, err = invoke("format", "two_bits", "--directory", str(tmp_path / "new"))
    assert (code, err) == (0, "")
    folder = tmp_path / "new/kvplug-two-bits"
    for file in ("pyproject.toml", "two_bits.yaml", "kvplug_two_bits/policy.py"):
        assert f"  {file}\n" in out and (folder / file).is_file()
    assert "kvplug check two_bits.yaml" in out
    assert "class TwoBits(FormatPolicy)" in (folder / "kvplug_two_bits/policy.py").read_text()
    assert not [p for p in folder.parent.iterdir() if p != folder]


def test_json_names_the_files(tmp_path: Path) -> None:
    code, out, _ = invoke("tiers", "shelf", "-d", str(tmp_path), "--json")
    found = json.loads(out)
    assert code == 0 and found["folder"] == str(tmp_path / "kvplug-shelf")
    assert all((tmp_path / "kvplug-shelf" / file).is_file() for file in found["files"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("prefix", "a"), "'prefix' is no kind of policy. Fix: did you mean prefix_cache?"),
        (("format", "Two-Bits"), "'Two-Bits' is no name for a policy. Fix: use lower-case"),
        (("format", "class"), "'class' is no name for a policy."),
        (("format", "auto"), "'auto' is no name for a policy."),
        (("prefix_cache", "lru"), "prefix_cache policy 'lru' is installed already: kvplug_pol"),
        (("format", "lab"), "a package kvplug_lab is installed already."),
        (("tiers", "a", "--kernel"), "--kernel: no kernel for tiers. Fix: leave it out;"),
    ],
)
def test_what_cannot_be_made_is_refused(
    arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    code, out, err = invoke(*arguments, "-d", str(tmp_path))
    assert (code, out) == (2, "")
    assert err.startswith(said), err
    assert len(err.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kvplug-mine").mkdir()
    code, _, err = invoke("format", "mine", "-d", str(tmp_path))
    assert code == 2 and "is there already. Fix: remove it" in err
    assert not list((tmp_path / "kvplug-mine").iterdir())


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    code, _, err = invoke("format", "mine", "-d", str(tmp_path / "file/below"))
    assert code == 2 and "cannot be written (Not a directory). Fix: name another" in err
