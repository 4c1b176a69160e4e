"""Fixtures for the kernel tests: run interpreted on a CPU machine, natively on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import cuda_compiler
import triton
from record_launches import Kind, Launch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() or tensor.is_complex():
        if tensor.element_size() == 1:
            tensor.view(torch.uint8).fill_(0x7F)
        else:
            tensor.fill_(float("nan"))
    elif tensor.dtype == torch.bool:
        tensor.fill_(True)
    else:
        limits = torch.iinfo(tensor.dtype)
        tensor.fill_(limits.min if limits.min < 0 else limits.max)
    return tensor


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN or extreme integers, so an unwritten output cannot pass."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: _poison(allocate(*args, **kwargs))

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Every Triton kernel launched during the test, as (kernel name, grid)."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    for kind in (JITFunction, InterpretedFunction):

        def run(self: Any, *args: Any, _run: Any = kind.run, **kwargs: Any) -> Any:
            seen.append((self.fn.__name__, tuple(kwargs["grid"])))
            return _run(self, *args, **kwargs)

        monkeypatch.setattr(kind, "run", run)
    return seen


class Compiler:
    """A process that compiles kernels for CUDA without a GPU, one after another. It is apart from
    the tests because Triton is interpreted there, and is started once for all of them because it
    takes longer to import torch than to compile a kernel."""

    def __init__(self, cache: Path) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(cache)
        environment["TRITON_DISABLE_LINE_INFO"] = "1"
        environment["PYTHONPATH"] = os.pathsep.join(self._path())
        self.process = subprocess.Popen(
            [sys.executable, cuda_compiler.__file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @staticmethod
    def _path() -> list[str]:
        """The import path of the tests, Triton's folder first."""
        paths = [str(Path(str(triton.__file__)).parents[1]), *sys.path]
        return [path for path in paths if path]

    def compile(
        self, module: str, name: str, arguments: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[str, str]:
        """Compile one kernel for arguments of the kinds that `record_launches.Kind` describes.
        Returns the error, or an empty string, and the PTX."""
        assert self.process.stdin is not None and self.process.stdout is not None
        request = [self._path(), module, name, arguments, options]
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        error, ptx = json.loads(answer) if answer else ("the compiler's process died", "")
        return error, ptx

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="session")
def compilers() -> Iterator[list[Compiler]]:
    """The compiler, once a test has started it."""
    started: list[Compiler] = []
    yield started
    for compiler in started:
        compiler.close()


@pytest.fixture
def compile_launch(
    compilers: list[Compiler], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Launch], str]:
    """Compile a kernel down to a cubin without a GPU: the interpreter accepts more than the
    compiler does. Returns the PTX."""

    def compile_one(launch: Launch) -> str:
        if not compilers or compilers[-1].process.poll() is not None:
            compilers.append(Compiler(tmp_path_factory.mktemp("triton")))
        arguments, options = dict(launch.arguments), dict(launch.options)
        error, ptx = compilers[-1].compile(launch.module, launch.kernel, arguments, options)
        assert not error, f"{launch}: {error}"
        return ptx

    return compile_one


@pytest.fixture
def compile_for_cuda(
    compile_launch: Callable[[Launch], str],
) -> Callable[[str, str, dict[str, str], dict[str, int | None]], str]:
    """Compile a kernel for pointers and integers of any alignment and these constants."""

    def compile_kernel(
        module: str, name: str, signature: dict[str, str], constants: dict[str, int | None]
    ) -> str:
        arguments: dict[str, Kind] = {
            name: ("constant", value) for name, value in constants.items()
        }
        for argument, type_ in signature.items():
            if type_.startswith("*"):
                arguments[argument] = ("pointer", type_[1:], False)
            else:
                arguments[argument] = ("float",) if type_ == "fp32" else ("integer", type_, "any")
        return compile_launch(Launch(module, name, tuple(arguments.items())))

    return compile_kernel
