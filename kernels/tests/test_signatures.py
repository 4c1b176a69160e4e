from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "kvplug_kernels"
OPERATIONS = [
    (naive.parent.name, name)
    for naive in sorted(PACKAGE.glob("*/naive.py"))
    for name in importlib.import_module(f"kvplug_kernels.{naive.parent.name}").__all__
    if f"def {name}_naive(" in naive.read_text()
]


def test_every_folder_has_an_operation() -> None:
    assert {folder for folder, _ in OPERATIONS} == {
        p.parent.name for p in PACKAGE.glob("*/naive.py")
    }


@pytest.mark.parametrize(("folder", "name"), OPERATIONS)
def test_every_implementation_has_the_signature_of_its_operation(folder: str, name: str) -> None:
    """So any of them can be called in place of another; mypy holds their checks to the same."""
    operation = getattr(importlib.import_module(f"kvplug_kernels.{folder}"), name)
    for module, suffix in (("naive", "naive"), ("kernel", "triton"), ("vectorized", "vectorized")):
        implementations = importlib.import_module(f"kvplug_kernels.{folder}.{module}")
        implementation = getattr(implementations, f"{name}_{suffix}")
        assert inspect.signature(implementation) == inspect.signature(operation), module
        assert inspect.unwrap(implementation) is not implementation, f"{module} is not checked"
