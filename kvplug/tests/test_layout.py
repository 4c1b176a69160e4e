"""The repository keeps its shape: source roots, distributions and what they depend on."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from kvplug.cli.installed import COMMANDS, EXTRAS

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "kvplug": ROOT / "kvplug/kvplug",
    "kvplug_lab": ROOT / "kvplug/kvplug_lab",
    "kvplug_policies": ROOT / "policies/kvplug_policies",
    "kvplug_kernels": ROOT / "kernels/kvplug_kernels",
    "kvplug_reuse_learned": ROOT / "policies/kvplug-reuse-learned/kvplug_reuse_learned",
    "kvplug_attention_memo": ROOT / "policies/kvplug-attention-memo/kvplug_attention_memo",
    "kvplug_kvpress": ROOT / "policies/kvplug-kvpress/kvplug_kvpress",
}
DISTRIBUTIONS = {
    "kvplug": (ROOT, ("kvplug", "kvplug_policies", "kvplug_kernels")),
    "kvplug-lab": (ROOT / "kvplug/kvplug_lab", ("kvplug_lab",)),
    "kvplug-reuse-learned": (ROOT / "policies/kvplug-reuse-learned", ("kvplug_reuse_learned",)),
    "kvplug-attention-memo": (ROOT / "policies/kvplug-attention-memo", ("kvplug_attention_memo",)),
    "kvplug-kvpress": (ROOT / "policies/kvplug-kvpress", ("kvplug_kvpress",)),
}
"""Folder of each distribution's pyproject.toml, and its packages."""
HOSTS_BRING = {
    "opentelemetry",
    "prometheus_client",
    "vllm",
    "triton",
    "transformers",
    "huggingface_hub",
}
"""Imported only by a host or a GPU kernel, and installed with vLLM."""
OPTIONAL = {
    "usearch": ("prefetch", "near_duplicates.py"),
    "redis": ("redis", "redis.py"),
    "obstore": ("s3", "s3.py"),
    "mooncake": ("mooncake", "mooncake.py"),
    "pynvml": ("energy", "energy.py"),
    "pytest": ("testing", "plugin.py"),
}
"""Modules of the product's own extras: the extra, and the one file that imports them."""


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


def project(distribution: str) -> dict[str, Any]:
    """The ``project`` table of a distribution's pyproject.toml."""
    text = (DISTRIBUTIONS[distribution][0] / "pyproject.toml").read_text(encoding="utf-8")
    table: dict[str, Any] = tomllib.loads(text)["project"]
    return table


def required(distribution: str) -> set[str]:
    """Names of the distributions that one declares as dependencies."""
    return {re.split(r"[^\w-]", line)[0] for line in project(distribution)["dependencies"]}


def test_each_code_folder_is_a_source_root() -> None:
    roots = ["kvplug", "policies", "kernels", "integration_tests"]
    roots += [str(p.parent.relative_to(ROOT)) for p in PACKAGES.values()]
    for folder in roots:
        assert not (ROOT / folder / "__init__.py").exists()
        for tests in ROOT.glob(f"{folder}/tests"):
            assert not list(tests.rglob("__init__.py"))


def test_test_files_have_unique_names() -> None:
    folders = ["kvplug/tests", "policies/tests", "policies/kvplug-reuse-learned/tests"]
    folders += ["policies/kvplug-attention-memo/tests", "policies/kvplug-kvpress/tests"]
    folders += ["kernels/tests", "integration_tests"]
    names = [f.name for folder in folders for f in (ROOT / folder).glob("test_*.py")]
    assert len(names) == len(set(names))


def test_kernels_know_torch_and_triton_alone() -> None:
    allowed = {"torch", "triton", "kvplug_kernels"} | set(sys.stdlib_module_names)
    for file in sources("kvplug_kernels"):
        assert tops(file) <= allowed, file


def test_naive_is_the_specification_and_never_imports_the_kernel() -> None:
    for naive in PACKAGES["kvplug_kernels"].glob("*/naive.py"):
        assert not any(name.endswith((".kernel", ".vectorized")) for name in imported(naive))
        assert "triton" not in tops(naive)


def test_every_distribution_is_known() -> None:
    found = {f.parent for f in [*ROOT.glob("*/*/pyproject.toml"), ROOT / "pyproject.toml"]}
    assert found == {folder for folder, _ in DISTRIBUTIONS.values()}


def test_kvplug_declares_what_it_imports_and_no_more() -> None:
    # A distribution that has no module of its name.
    modules = {"pyyaml": "yaml"}
    _, packages = DISTRIBUTIONS["kvplug"]
    found = set().union(*(tops(file) for package in packages for file in sources(package)))
    found -= {*sys.stdlib_module_names, *PACKAGES, *HOSTS_BRING, *OPTIONAL}
    assert found == {modules.get(name, name) for name in required("kvplug")}


def test_a_module_of_an_extra_is_imported_by_one_file() -> None:
    distributions = {
        "mooncake": "mooncake-transfer-engine-non-cuda",
        "pynvml": "nvidia-ml-py",
    }
    for module, (extra, name) in OPTIONAL.items():
        (line,) = project("kvplug")["optional-dependencies"][extra]
        assert re.split(r"[^\w-]", line)[0] == distributions.get(module, module)
        files = [f for package in DISTRIBUTIONS["kvplug"][1] for f in sources(package)]
        assert [f.name for f in files if module in tops(f)] == [name]


def test_extras_and_the_commands_that_come_with_them_match() -> None:
    own = project("kvplug")
    for name in DISTRIBUTIONS.keys() - {"kvplug"}:
        extra = name.removeprefix("kvplug-")
        assert own["optional-dependencies"][extra] == [f"{name}=={project(name)['version']}"]
        assert f"kvplug=={own['version']}" in project(name)["dependencies"]
        commands = project(name).get("entry-points", {}).get(COMMANDS, {})
        assert set(EXTRAS.get(extra, ())) == set(commands)
        assert all(value.split(".")[0] in DISTRIBUTIONS[name][1] for value in commands.values())


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


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_wheel_holds_its_packages_and_nothing_else(distribution: str, tmp_path: Path) -> None:
    folder, packages = DISTRIBUTIONS[distribution]
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    expected = {
        str(file.relative_to(PACKAGES[package].parent))
        for package in packages
        for file in [*sources(package), PACKAGES[package] / "py.typed"]
    }
    if distribution == "kvplug":
        configs = ROOT / "configs"
        expected |= {f"kvplug/_configs/{f.relative_to(configs)}" for f in configs.glob("*/*.*")}
        expected.add("kvplug/planning/measured.json")
        page = PACKAGES["kvplug"] / "observe/page_files"
        files = [f for f in page.rglob("*") if f.is_file()]
        assert len(files) == 6
        expected |= {str(f.relative_to(PACKAGES["kvplug"].parent)) for f in files}
        templates = list((PACKAGES["kvplug"] / "scaffold/template").rglob("*.j2"))
        assert len(templates) == 29
        expected |= {str(f.relative_to(PACKAGES["kvplug"].parent)) for f in templates}
        kernels = PACKAGES["kvplug_kernels"]
        compiled = [*kernels.glob("cpu/*.h"), *kernels.glob("*/cpu.cpp")]
        assert len(compiled) == 6
        expected |= {str(file.relative_to(kernels.parent)) for file in compiled}
    if distribution == "kvplug-lab":
        expected.add("kvplug_lab/demo/page.html.jinja")
    assert names == expected
