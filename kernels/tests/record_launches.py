"""A pytest plugin that notes what tests launch instead of running it, and what of it to compile.

``python -m pytest kernels/tests -p record_launches --record FILE`` writes one line for each
specialisation of a kernel that a launch asks for. Tests fail under it, most of them at their first
launch, since nothing computes.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

TESTS = Path(__file__).resolve().parent
# What Triton calls the types of torch.
TYPES = {
    "bool": "i1",
    "uint8": "u8",
    "bfloat16": "bf16",
    "float8_e4m3fn": "fp8e4nv",
    **{f"int{bits}": f"i{bits}" for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"fp{bits}" for bits in (16, 32, 64)},
}
Kind = tuple[Any, ...]
"""What of an argument decides how a kernel is compiled: ``("constant", value)``, ``("pointer",
type, divisible by 16)``, ``("integer", type, "1", "16" or "any")`` or ``("float",)``."""


@dataclass(frozen=True)
class Launch:
    """A specialisation of a kernel.

    Attributes:
        module: Module of the kernel.
        kernel: Its name.
        arguments: Name and kind of each argument.
        options: Compiler options of the launch.
    """

    module: str
    kernel: str
    arguments: tuple[tuple[str, Kind], ...]
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
        """The specialisation that a launch asks for."""
        signature = inspect.signature(kernel)
        own = {name: kwargs[name] for name in kwargs if name in signature.parameters}
        bound = signature.bind(*args, **own)
        arguments = []
        for name, value in bound.arguments.items():
            constant = "constexpr" in str(signature.parameters[name].annotation)
            # The interpreter alone multiplies bfloat16 as float32 and has no instructions of a GPU.
            value = False if name in ("WIDEN", "INTERPRETED") else value
            arguments.append((name, ("constant", value) if constant else kind_of(value)))
        options = {n: v for n, v in kwargs.items() if n not in own and n not in ("grid", "warmup")}
        return cls(kernel.__module__, kernel.__name__, tuple(arguments), tuple(options.items()))

    def with_integers(self, change: dict[str, Kind]) -> Launch:
        """The same with other kinds of some integer arguments."""
        arguments = tuple((name, change.get(name, kind)) for name, kind in self.arguments)
        return Launch(self.module, self.kernel, arguments, self.options)

    @property
    def integers(self) -> list[str]:
        """Names of the integer arguments."""
        return [name for name, kind in self.arguments if kind[0] == "integer"]


def kind_of(value: Any) -> Kind:
    """How a run-time argument decides what is compiled."""
    if value is None:
        return ("constant", None)
    if isinstance(value, torch.Tensor):
        return ("pointer", TYPES[str(value.dtype).split(".")[1]], value.data_ptr() % 16 == 0)
    if isinstance(value, float):
        return ("float",)
    assert isinstance(value, int) and not isinstance(value, bool), value
    size = "i32" if -(2**31) <= value < 2**31 else "i64"
    return ("integer", size, "1" if value == 1 else "16" if value % 16 == 0 else "any")


def uniform(launch: Launch) -> Iterator[Launch]:
    """The launch with all of its integers alike: any, 1, multiples of 16; and with wide strides."""
    for kind in ("any", "1", "16"):
        yield launch.with_integers(dict.fromkeys(launch.integers, ("integer", "i32", kind)))
    strides = [name for name in launch.integers if name.startswith("stride_")]
    yield launch.with_integers(dict.fromkeys(strides, ("integer", "i64", "any")))


def singles(launch: Launch) -> Iterator[Launch]:
    """The launch with one integer after another equal to 1 and the others any."""
    anything = dict.fromkeys(launch.integers, ("integer", "i32", "any"))
    for name in launch.integers:
        yield launch.with_integers({**anything, name: ("integer", "i32", "1")})


def covering(launches: list[Launch]) -> list[Launch]:
    """Some launches of a kernel that together have every kind of every argument, those that show
    most first. Of many numbers of a constant the smallest, the largest and one in between do."""
    extremes = {}
    for name, _ in launches[0].arguments:
        kinds = {dict(launch.arguments)[name] for launch in launches}
        numbers = [k[1] for k in kinds if k[0] == "constant" and type(k[1]) is int]
        extremes[name] = {min(numbers), max(numbers)} if len(numbers) > 4 else set(numbers)

    def shown(launch: Launch) -> set[Any]:
        found: set[Any] = {launch.options}
        for name, kind in launch.arguments:
            number = kind[0] == "constant" and type(kind[1]) is int
            middle = number and kind[1] not in extremes[name]
            found.add((name, ("constant", "...") if middle else kind))
        return found

    chosen = []
    missing = set().union(*map(shown, launches))
    while missing:
        chosen.append(max(launches, key=lambda launch: len(shown(launch) & missing)))
        missing -= shown(chosen[-1])
    return chosen


def to_compile(launches: list[Launch], most: int | None = None) -> list[Launch]:
    """A covering part of a kernel's launches, their integers in turn as launched and in each
    uniform way; at least one for each way, and ``most`` at most."""
    chosen = covering(launches)
    ways = 1 + len(list(uniform(chosen[0])))
    count = min(max(len(chosen), ways), most or sys.maxsize)
    picked = (
        [launch, *uniform(launch)][i % ways]
        for i, launch in enumerate(itertools.islice(itertools.cycle(chosen), count))
    )
    return list(dict.fromkeys(picked))


def record(file: Path, *options: str) -> dict[str, list[Launch]]:
    """What the tests launch, by kernel.

    Args:
        file: Written.
        options: Of pytest.
    """
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    command = [sys.executable, "-m", "pytest", str(TESTS), "-q", "--tb=no", "-rN", "-p"]
    command += ["no:cacheprovider", "-p", "record_launches", "--record", str(file), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert file.exists(), done.stdout + done.stderr
    found: dict[str, list[Launch]] = defaultdict(list)
    for line in file.read_text().splitlines():
        launch = as_launch(json.loads(line))
        found[launch.kernel].append(launch)
    return found


def as_launch(row: list[Any]) -> Launch:
    """The launch that a line of the record describes."""
    module, kernel, arguments, options = row
    kinds = tuple((name, tuple(kind)) for name, kind in arguments)
    return Launch(module, kernel, kinds, tuple((name, value) for name, value in options))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if launches_something(item)]


def launches_something(item: pytest.Item) -> bool:
    """False for what runs an implementation in torch, many random cases or other processes."""
    if item.path.stem in (
        "test_compile_for_cuda",
        "test_benchmarks",
        "test_grid",
        "test_static_proof",
        "test_decode_peers",
        "test_bytes_moved",
    ):
        return False
    if "compile_for_cuda" in getattr(item, "fixturenames", ()):
        return False
    if hasattr(getattr(item, "obj", None), "hypothesis"):
        return False
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    modules = {str(getattr(value, "__module__", "")).split(".")[-1] for value in parameters}
    return not modules & {"naive", "vectorized"}


def pytest_configure(config: pytest.Config) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    seen: dict[Launch, None] = {}

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        seen.setdefault(Launch.of(self.fn, args, kwargs))

    InterpretedFunction.run = run
    config.add_cleanup(lambda: write(config.getoption("record"), seen))


def write(file: Path, launches: Iterable[Launch]) -> None:
    """Write one line a launch."""
    rows = [(launch.module, launch.kernel, launch.arguments, launch.options) for launch in launches]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
