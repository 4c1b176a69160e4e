from __future__ import annotations

import ast
import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from record_launches import Launch, covering, record, singles, to_compile, uniform

import kvplug_kernels

SIGNATURE = {
    **dict.fromkeys(("out_a", "lse_a", "out_b", "lse_b", "out"), "*fp32"),
    "n_pairs": "i32",
    **dict.fromkeys(
        (f"stride_{s}" for s in ("at", "ah", "lat", "lah", "bt", "bh", "lbt", "lbh", "ot", "oh")),
        "i32",
    ),
}
CONSTANTS = {"HEADS": 4, "HEAD_SIZE": 16, "BLOCK_P": 16, "BLOCK_D": 16}
KERNEL = ("kvplug_kernels.attend_exact.kernel", "merge_attention_kernel")


def test_a_kernel_that_does_not_compile_fails(
    compile_for_cuda: Callable[..., None], compilers: list[Any]
) -> None:
    """And the next one is compiled, also after the compiler's process died."""
    with pytest.raises(AssertionError, match="no_kernel"):
        compile_for_cuda(KERNEL[0], "no_kernel", SIGNATURE, CONSTANTS)
    with pytest.raises(AssertionError, match="arange's range must be a power of 2"):
        compile_for_cuda(*KERNEL, SIGNATURE, {**CONSTANTS, "BLOCK_P": 12})
    compile_for_cuda(*KERNEL, SIGNATURE, CONSTANTS)
    compilers[-1].process.kill()
    compilers[-1].process.wait()
    compile_for_cuda(*KERNEL, SIGNATURE, CONSTANTS)


PACKAGE = Path(kvplug_kernels.__file__).parent
KERNELS = sorted(
    node.name
    for file in PACKAGE.rglob("*.py")
    for node in ast.walk(ast.parse(file.read_text()))
    if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
)
WITHOUT_GPU = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU compiles what the tests launch"
)
# One for each way that integers are compiled: about a minute for all kernels.
MOST = 5


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Launch]]:
    """What the quick tests launch, by kernel."""
    return record(tmp_path_factory.mktemp("launches") / "quick.jsonl", "-m", "not slow")


@pytest.fixture(scope="module")
def all_recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Launch]]:
    """What all tests launch, by kernel."""
    return record(tmp_path_factory.mktemp("launches") / "all.jsonl")


@WITHOUT_GPU
@pytest.mark.parametrize("kernel", KERNELS)
def test_what_tests_launch_compiles(
    kernel: str, recorded: dict[str, list[Launch]], compile_launch: Callable[[Launch], str]
) -> None:
    """With integers as they come, and all of them such as Triton turns into constants, takes to be
    multiples of 16 or to need 64 bits."""
    assert kernel in recorded, "no test launches it"
    for launch in to_compile(recorded[kernel], MOST):
        compile_launch(launch)


@WITHOUT_GPU
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_size_compiles_a_kernel_again(kernel: str, recorded: dict[str, list[Launch]]) -> None:
    """Sizes change from call to call, and compiling stops a server for a second."""
    (module, sizes), *others = {
        (launch.module, frozenset(n for n in launch.integers if not n.startswith("stride_")))
        for launch in recorded[kernel]
    }
    assert not others
    function = getattr(importlib.import_module(module), kernel)
    told = set(function.kwargs["do_not_specialize"] or ())
    assert sizes <= told


@WITHOUT_GPU
@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kind_of_argument_compiles(
    kernel: str, all_recorded: dict[str, list[Launch]], compile_launch: Callable[[Launch], str]
) -> None:
    """Of what all tests launch; and each integer by itself equal to 1."""
    chosen = covering(all_recorded[kernel])
    ways = itertools.chain(*map(uniform, chosen[:3]), *map(singles, chosen[:2]))
    for launch in dict.fromkeys((*chosen, *ways)):
        compile_launch(launch)
