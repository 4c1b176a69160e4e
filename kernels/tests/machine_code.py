"""What a GPU's machine code says of a kernel: registers, spills, widths of loads, tensor cores."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
TENSOR_CORES = ("HMMA", "IMMA", "HGMMA", "IGMMA", "QGMMA", "QMMA", "BMMA", "DMMA")
CONVERSIONS = ("I2F", "F2I", "F2F", "I2FP", "F2FP", "FRND")
INTEGER = {
    *("IADD", "IADD3", "VIADD", "IMAD", "LOP", "LOP3", "LOP32I", "SHF", "PRMT", "LEA", "ISETP"),
    *("IMNMX", "VIMNMX", "SEL", "SGXT", "BMSK", "IABS", "POPC", "FLO", "I2I", "I2IP", "IDP"),
}
FLOAT = {
    *("FADD", "FMUL", "FFMA", "FMNMX", "FSETP", "FSEL", "MUFU"),
    *("HADD2", "HMUL2", "HFMA2", "HMNMX2", "HSETP2"),
}


@functools.lru_cache
def disassembler() -> str | None:
    """The path of cuobjdump, Triton's or the machine's; None where there is neither."""
    import triton

    bundled = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin"
    found = shutil.which("cuobjdump", path=str(bundled)) or shutil.which("cuobjdump")
    return found if found and shutil.which("nvdisasm", path=str(Path(found).parent)) else None


@dataclass(frozen=True)
class Counts:
    """Instructions of a stretch of code, each counted once.

    Attributes:
        instructions: All of them, padding left out.
        loads: Loads of global memory by bytes a thread and instruction.
        copies: Asynchronous copies from global to shared memory, the same way.
        stores: Stores to global memory, the same way.
        tensor_cores: Matrix instructions by name: HMMA (16 bits), IMMA (integers), HGMMA ...
        shared: Loads and stores of shared memory and the matrix moves among them (LDSM, STSM).
        shuffles: Exchanges between the threads of a warp.
        barriers: Barriers of a program's threads.
        conversions: Between kinds of numbers, roundings to whole numbers among them.
        integer: Integer and logical operations, addresses among them.
        float: Floating-point operations outside the tensor cores.
        spills: Loads and stores of local memory.
    """

    instructions: int = 0
    loads: dict[int, int] = field(default_factory=dict)
    copies: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    tensor_cores: dict[str, int] = field(default_factory=dict)
    shared: int = 0
    shuffles: int = 0
    barriers: int = 0
    conversions: int = 0
    integer: int = 0
    float: int = 0
    spills: int = 0

    @property
    def loaded_bytes(self) -> int:
        """Bytes that the loads and the asynchronous copies move, a thread."""
        return sum(width * n for of in (self.loads, self.copies) for width, n in of.items())

    def wide_share(self, width: int = 16) -> float:
        """Share of the loaded bytes that come ``width`` bytes at a time or more."""
        wide = sum(w * n for of in (self.loads, self.copies) for w, n in of.items() if w >= width)
        return wide / self.loaded_bytes if self.loaded_bytes else 1.0


@dataclass(frozen=True)
class MachineCode:
    """One compiled kernel.

    Attributes:
        registers: Of a thread.
        stack: Bytes of local memory of a thread.
        shared_bytes: Shared memory of a program, static and dynamic.
        warps: Of a program.
        whole: All of its instructions.
        loops: Those inside any loop.
    """

    registers: int
    stack: int
    shared_bytes: int
    warps: int
    whole: Counts
    loops: Counts

    def as_dict(self) -> dict[str, Any]:
        """Plain containers, for JSON."""
        return asdict(self)


def read_machine_code(made: Any) -> MachineCode:
    """Read what Triton compiled.

    Raises:
        RuntimeError: There is no disassembler, or its output has no instructions.
    """
    tool = disassembler()
    if tool is None:
        raise RuntimeError("no cuobjdump and nvdisasm, in Triton or on PATH")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()

        def run(option: str) -> str:
            command = [tool, option, cubin.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        resources, listing = run("-res-usage"), run("-sass")
    sizes = RESOURCES.search(resources)
    lines = instructions(listing)
    if sizes is None or not lines:
        raise RuntimeError(f"{tool} shows no instructions: {resources[:200]} {listing[:200]}")
    registers, stack, shared, local = map(int, sizes.groups())
    return MachineCode(
        registers=registers,
        stack=stack + local,
        # The first kilobyte is the system's.
        shared_bytes=max(shared - 1024, 0) + int(made.metadata.shared),
        warps=int(made.metadata.num_warps),
        whole=count(lines),
        loops=count(in_loops(lines)),
    )


def instructions(listing: str) -> list[tuple[int, str, str]]:
    """Address, name with its modifiers, and operands of each instruction of a listing."""
    found = []
    for line in listing.splitlines():
        match = LINE.match(line)
        if match and match[2] != "NOP":
            found.append((int(match[1], 16), match[2], match[3]))
    return found


def in_loops(lines: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """The instructions between a branch backwards and where it goes."""
    spans = []
    for at, name, operands in lines:
        target = re.search(r"0x([0-9a-f]+)\s*$", operands)
        # A branch to itself, behind the last exit, ends the code.
        if name.startswith("BRA") and target and int(target[1], 16) < at:
            spans.append((int(target[1], 16), at))
    return [line for line in lines if any(low <= line[0] <= high for low, high in spans)]


def count(lines: list[tuple[int, str, str]]) -> Counts:
    """Count instructions by what they do."""
    by_width: dict[str, Counter[int]] = {n: Counter() for n in ("LDG", "LDGSTS", "STG")}
    tensor_cores: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    for _, name, _ in lines:
        base = name.split(".")[0]
        if base in by_width:
            by_width[base][width_of(name)] += 1
        elif base in TENSOR_CORES:
            tensor_cores[base] += 1
        for kind, names in (
            ("shared", ("LDS", "STS", "LDSM", "STSM")),
            ("shuffles", ("SHFL",)),
            ("barriers", ("BAR",)),
            ("conversions", CONVERSIONS),
            ("integer", INTEGER),
            ("float", FLOAT),
            ("spills", ("LDL", "STL")),
        ):
            # Operations on a warp's common registers begin with U.
            if base in names or (kind == "integer" and base[:1] == "U" and base[1:] in names):
                sums[kind] += 1
    return Counts(
        instructions=len(lines),
        loads=dict(sorted(by_width["LDG"].items())),
        copies=dict(sorted(by_width["LDGSTS"].items())),
        stores=dict(sorted(by_width["STG"].items())),
        tensor_cores=dict(tensor_cores),
        **sums,
    )


def width_of(name: str) -> int:
    """Bytes a thread that a load or store moves."""
    for part in name.split(".")[1:]:
        if part in ("128", "64", "32"):
            return int(part) // 8
        if part in ("U8", "S8", "U16", "S16"):
            return int(part[1:]) // 8
    return 4
