"""The house keeps its shape: source roots, and dependencies that point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "kvplug": ROOT / "kvplug/kvplug",
    "kvplug_policies": ROOT / "policies/kvplug_policies",
    "kvplug_kernels": ROOT / "kernels/kvplug_kernels",
}


def imported(file: Path) -> set[str]:
    """Modules a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add("." * node.level + node.module)
    return found


def tops(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(file) if not name.startswith(".")}


def sources(package: str) -> list[Path]:
    files = sorted(PACKAGES[package].rglob("*.py"))
    assert files
    return files


def test_each_code_folder_is_a_source_root() -> None:
    for folder in ("kvplug", "policies", "kernels", "integration_tests"):
        assert not (ROOT / folder / "__init__.py").exists()
        for tests in ROOT.glob(f"{folder}/tests"):
            assert not list(tests.rglob("__init__.py"))


def test_test_files_have_unique_names() -> None:
    folders = ("kvplug/tests", "policies/tests", "kernels/tests", "integration_tests")
    names = [f.name for folder in folders for f in (ROOT / folder).glob("test_*.py")]
    assert len(names) == len(set(names))


def test_only_the_vllm_host_imports_vllm() -> None:
    host = PACKAGES["kvplug"] / "hosts/vllm"
    for package in PACKAGES:
        for file in sources(package):
            if host not in file.parents:
                assert "vllm" not in tops(file), file


def test_kernels_know_torch_and_triton_alone() -> None:
    allowed = {"torch", "triton", "kvplug_kernels"} | set(sys.stdlib_module_names)
    for file in sources("kvplug_kernels"):
        assert tops(file) <= allowed, file


def test_naive_is_the_specification_and_never_imports_the_kernel() -> None:
    for naive in PACKAGES["kvplug_kernels"].glob("*/naive.py"):
        assert not any(name.endswith((".kernel", ".vectorized")) for name in imported(naive))
        assert "triton" not in tops(naive)


def test_policies_know_the_contract_and_the_kernels() -> None:
    ours = {"kvplug", "kvplug.contract", "kvplug.registry"}
    for file in sources("kvplug_policies"):
        for name in imported(file):
            if name.split(".")[0] == "kvplug":
                assert name in ours, (file, name)
            else:
                assert name.split(".")[0] not in {"vllm", "transformers"}, (file, name)


@pytest.mark.parametrize("package", ["kvplug_kernels", "kvplug_policies"])
def test_imports_without_vllm(package: str) -> None:
    modules = [
        ".".join(f.relative_to(PACKAGES[package].parent).with_suffix("").parts).removesuffix(
            ".__init__"
        )
        for f in sources(package)
    ]
    code = (
        "import importlib, sys\n"
        "sys.modules['vllm'] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_kvplug_loads_nothing_heavy() -> None:
    code = (
        "import sys, kvplug, kvplug.deployment, kvplug.cli\n"
        "print(sorted({'torch', 'vllm', 'transformers', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_wheel_holds_the_packages_and_the_deployments(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == set(PACKAGES)
    for config in (ROOT / "configs").glob("*.yaml"):
        assert f"kvplug/_configs/{config.name}" in names
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
