"""import-linter's contracts in pyproject.toml hold, and a forbidden import breaks them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "kvplug",
    "policies",
    "kernels",
    "policies/kvplug-reuse-learned",
    "policies/kvplug-attention-memo",
    "policies/kvplug-kvpress",
)
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


class Copy:
    """A copy of every package, to add modules to."""

    def __init__(self, folder: Path):
        self.folder, self.config = folder, folder / "pyproject.toml"
        shutil.copy(ROOT / "pyproject.toml", self.config)
        for source in SOURCES:
            for package in (ROOT / source).glob("*/__init__.py"):
                target = folder / package.parent.relative_to(ROOT)
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(package.parent, target, ignore=ignored)

    def lint(self, config: Path | None = None) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(str(self.folder / source) for source in SOURCES)
        command = [
            sys.executable,
            "-c",
            LINT,
            "--no-logo",
            "--cache-dir",
            str(self.folder / "cache"),
        ]
        return subprocess.run(
            [*command, str(config or self.config)],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": path, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return Copy(tmp_path_factory.mktemp("imports"))


@pytest.fixture
def added(copy: Copy, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The file of an added module, removed at the end; the parameter is its module's name."""
    name: str = request.param
    (root,) = [r for s in SOURCES if (r := copy.folder / s / name.split(".")[0]).is_dir()]
    file = root.parent / f"{name.replace('.', '/')}.py"
    assert not file.exists()
    yield file
    file.unlink()


def broken(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Names of the broken contracts."""
    return re.findall(r"^(.+) BROKEN(?: \(.*\))?\s*$", done.stdout, re.MULTILINE)


def test_the_contracts_hold(copy: Copy) -> None:
    done = copy.lint()
    assert done.returncode == 0, done.stdout + done.stderr
    assert broken(done) == []
    assert " KEPT" in done.stdout


LAYERS = "kernels <- policies <- hosts <- lab"
POLICIES = "Policies import kvplug, kvplug.contract and kvplug.registry only"
VLLM = "Only kvplug.hosts.vllm and kvplug_lab.engine import vllm"
LAWS = "The laws of a kind know no policy"
SCHEDULER = "Kinds do not import each other in the scheduler"
WORKER = "Kinds do not import each other in the worker"
BOTH = "Scheduler and worker share messages, not modules"
CIRCLES = "No import circles"


@pytest.mark.parametrize(
    ("added", "statement", "contracts"),
    [
        ("kvplug_kernels.extra", "import kvplug_policies", [LAYERS]),
        ("kvplug_kernels.extra", "import vllm", [VLLM]),
        ("kvplug_policies.extra", "import kvplug.hosts.pruning", [LAYERS, POLICIES]),
        ("kvplug_policies.extra", "from kvplug.parser import load_deployment", [POLICIES]),
        ("kvplug_policies.extra", "def late():\n    import transformers", [POLICIES]),
        ("kvplug_policies.extra", "import vllm.config", [VLLM]),
        ("kvplug.contract.extra", "import kvplug_policies", [LAYERS]),
        ("kvplug.hosts.extra", "import kvplug_lab", [LAYERS]),
        ("kvplug.testing.extra", "import kvplug_policies.coded", [LAWS]),
        ("kvplug.hosts.extra", "import kvplug_reuse_learned", [LAYERS]),
        ("kvplug.hosts.transformers.extra", "import vllm", [VLLM]),
        ("kvplug.hosts.vllm.extra", "import vllm", []),
        ("kvplug_lab.extra", "import vllm", [VLLM]),
        ("kvplug_lab.engine.extra", "import vllm", []),
        ("kvplug_lab.extra", "import kvplug_reuse_learned", [LAYERS]),
    ],
    indirect=["added"],
)
def test_a_forbidden_import_breaks_a_contract(
    copy: Copy, added: Path, statement: str, contracts: list[str]
) -> None:
    added.write_text(f"{statement}\n", encoding="utf-8")
    done = copy.lint()
    # Where it closes a circle, too, that is broken as well.
    assert [name for name in broken(done) if name != CIRCLES] == contracts
    assert done.returncode == (1 if contracts else 0)


@pytest.mark.parametrize(
    ("module", "statement", "contract"),
    [
        ("kvplug.hosts.vllm.scheduler.sequence", "from . import prefix_cache", SCHEDULER),
        ("kvplug.hosts.vllm.scheduler.reuse", "from . import sequence", SCHEDULER),
        ("kvplug.hosts.vllm.worker.format", "def late():\n    from . import reuse", WORKER),
        ("kvplug.hosts.vllm.scheduler.slots", "from ..worker import rows", BOTH),
        ("kvplug.errors", "def late():\n    import kvplug.parser", CIRCLES),
        ("kvplug_lab.texts", "def late():\n    import kvplug_lab.cli.demo", CIRCLES),
    ],
)
def test_a_forbidden_import_in_a_module_that_is_there_breaks_a_contract(
    copy: Copy, module: str, statement: str, contract: str
) -> None:
    file = copy.folder / "kvplug" / f"{module.replace('.', '/')}.py"
    text = file.read_text(encoding="utf-8")
    try:
        file.write_text(f"{text}\n{statement}\n", encoding="utf-8")
        done = copy.lint()
    finally:
        file.write_text(text, encoding="utf-8")
    assert contract in broken(done)
    assert done.returncode == 1


def test_the_one_circle_is_of_types(copy: Copy) -> None:
    text = copy.config.read_text(encoding="utf-8")
    circle = '    "kvplug.hookspecs -> kvplug.registry",\n'
    external = "include_external_packages = true\n"
    assert circle in text and external in text
    config = copy.folder / "without_types.toml"
    without = text.replace(circle, "")
    config.write_text(without, encoding="utf-8")
    assert broken(copy.lint(config)) == [CIRCLES]
    config.write_text(
        without.replace(external, f"{external}exclude_type_checking_imports = true\n"),
        encoding="utf-8",
    )
    assert broken(copy.lint(config)) == []
