"""Read from machine code what serving's launches run on a Hopper GPU, on a machine that has none.

``python kernels/tests/static_proof.py [--json FILE] [CASE ...]`` prints a line for each kernel of
the cases of `serving_launches` whose names begin so, all of them by default. Triton compiles each
with what the launcher passes; `machine_code` reads registers, shared memory, spills, widths of
loads and kinds of instructions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine_code
from machine_code import Counts, MachineCode

COMMAND = [sys.executable, __file__]


@dataclass(frozen=True)
class Proof:
    """One kernel of a case.

    Attributes:
        kernel: Its name.
        grid: Programs along each axis.
        code: What was read.
    """

    kernel: str
    grid: tuple[int, ...]
    code: MachineCode

    @property
    def hot(self) -> Counts:
        """What runs most: the loops, or all of a kernel that has none."""
        return self.code.loops if self.code.loops.loaded_bytes else self.code.whole

    def line(self) -> str:
        """The figures in one line."""
        hot, code = self.hot, self.code
        where = "in loops" if hot is code.loops else "no loops"
        return (
            f"{self.kernel} {self.grid}: {code.registers} registers, {code.shared_bytes} bytes of "
            f"shared memory, {code.warps} warps, {code.whole.spills} spills, {code.stack} bytes of "
            f"stack, {code.whole.instructions} instructions; {where}: "
            f"{hot.instructions} instructions, loads {hot.loads}, copies {hot.copies}, stores "
            f"{hot.stores}, {hot.tensor_cores or 'no tensor cores'}, {hot.barriers} barriers, "
            f"{hot.shuffles} shuffles, {hot.shared} of shared memory, {hot.conversions} "
            f"conversions, {hot.integer} integer, {hot.float} float, "
            f"{hot.integer / max(hot.loaded_bytes, 1):.2f} integer a loaded byte"
        )


_proofs: dict[Any, MachineCode] = {}


def prove(case: str) -> list[Proof]:
    """Compile and read every kernel of a case, in this process."""
    from cuda_compiler import compile_kernel
    from serving_launches import capture

    found = []
    for kernel, launch, grid in capture(case):
        if launch not in _proofs:
            made = compile_kernel(kernel, dict(launch.arguments), dict(launch.options))
            _proofs[launch] = machine_code.read_machine_code(made)
        found.append(Proof(launch.kernel, grid, _proofs[launch]))
    return found


class Prover:
    """A process that proves one case after another: Triton is interpreted in the tests' own."""

    def __init__(self, cache: Path) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": str(cache), "TRITON_DISABLE_LINE_INFO": "1"}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [*COMMAND, "--serve"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, case: str) -> list[Proof]:
        """The proof of a case.

        Raises:
            AssertionError: It did not compile; the message is the compiler's.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        print(case, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the prover's process died"
        error, rows = json.loads(answer)
        assert not error, error
        return [read(row) for row in rows]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def read(row: dict[str, Any]) -> Proof:
    """A proof from its row of JSON."""

    def counts(of: dict[str, Any]) -> Counts:
        widths = {n: {int(k): v for k, v in of[n].items()} for n in ("loads", "copies", "stores")}
        return Counts(**{**of, **widths})

    code = row["code"]
    parts = {name: counts(code[name]) for name in ("whole", "loops")}
    return Proof(row["kernel"], tuple(row["grid"]), MachineCode(**{**code, **parts}))


def as_row(case: str, proof: Proof) -> dict[str, Any]:
    """The row of JSON of a proof."""
    return {
        "case": case,
        "kernel": proof.kernel,
        "grid": list(proof.grid),
        "code": proof.code.as_dict(),
    }


def serve() -> None:
    """Answer each line, a case, with ``[error, rows]``."""
    for line in sys.stdin:
        error, rows = "", []
        try:
            case = line.strip()
            rows = [as_row(case, proof) for proof in prove(case)]
        except Exception:
            error = traceback.format_exc()
        print(json.dumps([error, rows]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="beginnings of cases' names")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--serve", action="store_true", help="read cases from standard input")
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    from serving_launches import CASES

    rows = []
    for case in CASES:
        if not options.cases or any(case.startswith(of) for of in options.cases):
            print(case)
            for proof in prove(case):
                print("   ", proof.line(), flush=True)
                rows.append(as_row(case, proof))
    if not rows:
        parser.error(f"no case begins so; there are: {'; '.join(CASES)}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main()
