from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import machine_code
import pytest
import static_proof
from serving_launches import CASES
from static_proof import Proof, Prover

TESTS = Path(__file__).resolve().parent
NEEDS_TOOLS = pytest.mark.skipif(
    machine_code.disassembler() is None,
    reason="no cuobjdump and nvdisasm, in Triton or on PATH, to read machine code",
)


@dataclass(frozen=True)
class Expected:
    """What a kernel's machine code must show.

    Attributes:
        wide: Least share of the bytes loaded in loops, or by a kernel that has none, that come 16
            bytes a thread at a time. What is left are entries of tables, lengths and scales.
        tensor_cores: Its products run there.
        stores: Least bytes a thread of the widest store.
    """

    wide: float
    tensor_cores: bool = False
    stores: int = 4


EXPECTED = {
    "quant_write_kernel": Expected(wide=0.6, stores=8),
    "attend_kernel": Expected(wide=0.75, tensor_cores=True),
    "attend_planes_kernel": Expected(wide=0.75, tensor_cores=True),
    "merge_splits_kernel": Expected(wide=0.0),
    "attend_exact_kernel": Expected(wide=1.0, tensor_cores=True, stores=16),
    "merge_attention_kernel": Expected(wide=0.85, stores=16),
    "split_lse_kernel": Expected(wide=0.95, tensor_cores=True),
    "mass_kernel": Expected(wide=0.9, tensor_cores=True),
    "split_scores_kernel": Expected(wide=0.9),
    "key_to_mean_kernel": Expected(wide=0.9),
    # Numbers of four bytes, each beside its token.
    "resident_tokens_kernel": Expected(wide=0.0),
    "pool_mass_kernel": Expected(wide=0.0),
    "add_mass_kernel": Expected(wide=0.0),
    "plan_survivors_kernel": Expected(wide=0.0),
    # Scores are loaded four bytes at a time.
    "select_top_kernel": Expected(wide=0.0),
    "plan_moves_kernel": Expected(wide=0.0),
    "move_kernel": Expected(wide=0.5, stores=16),
    "move_tokens_kernel": Expected(wide=0.4, stores=16),
    # What is left are blocks and the cache's address.
    "pack_bytes_kernel": Expected(wide=0.6, stores=16),
    "pack_coded_kernel": Expected(wide=0.75, stores=8),
    "rerotate_kernel": Expected(wide=0.9, stores=16),
    "rerotate_coded_kernel": Expected(wide=0.3),
    "tile_stats_kernel": Expected(wide=1.0, tensor_cores=True),
    "merge_stats_kernel": Expected(wide=0.0),
    "hadamard_kernel": Expected(wide=1.0, tensor_cores=True, stores=16),
    "project_latent_kernel": Expected(wide=0.85, tensor_cores=True, stores=8),
    "compact_rows_kernel": Expected(wide=0.0),
    "compact_windows_kernel": Expected(wide=0.0),
}
# Of some cases: levels come from the cache four bytes at a time; a part of a vector of 2-bit codes
# is 16 elements, and four threads have it.
OF_CASES = {
    ("quant_write, codebook", "quant_write_kernel"): Expected(wide=0.0),
    ("quant_write, kivi of 2 bits", "quant_write_kernel"): Expected(wide=0.0, stores=8),
    # Each of four warps loads the scales of all tokens, from the nearest cache but once.
    ("paged_attend_quant, int4, a chunk", "attend_planes_kernel"): Expected(0.35, True),
    ("paged_attend_quant, int8, a chunk", "attend_planes_kernel"): Expected(0.5, True),
    # Codes of a token and head are shared by as many threads as its elements.
    ("unpack_pages", "pack_coded_kernel"): Expected(wide=0.0, stores=16),
    # Scales and zeros of channels come two bytes at a time.
    ("paged_attend_quant, kivi", "attend_planes_kernel"): Expected(0.6, True),
    # Codes of a token and head are 64 bytes, its scales, zeros and sums 40.
    ("paged_attend_quant, hack of 2 bits", "attend_planes_kernel"): Expected(0.5, True),
}
PENDING: dict[str, set[str]] = {
    # Kernel: checks that it does not pass yet. Take a kernel's line out to turn its checks on.
    "attend_kernel": {"spills", "loads"},
}
QUICK = {
    "quant_write, int4",
    "quant_write, codebook of 4 bits",
    "quant_write, kivi of 2 bits",
    "paged_attend_quant, int8",
    "paged_attend_quant, int4",
    "paged_attend_quant, kivi of 4 bits",
    "paged_attend_quant, codebook of 4 bits",
    "paged_attend_quant, int4, a chunk",
    "rerotate_coded, int4",
    *(case for case in CASES if not case.startswith(("quant_", "paged_attend", "rerotate_coded"))),
}
"""Cases of the quick tests; each takes a second or two."""


@pytest.fixture(scope="module")
def prover(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prover]:
    started = Prover(tmp_path_factory.mktemp("triton"))
    yield started
    started.close()


def expected(case: str, kernel: str) -> Expected:
    """What is expected of a kernel in a case."""
    for (beginning, of), found in OF_CASES.items():
        if case.startswith(beginning) and kernel == of:
            return found
    return EXPECTED[kernel]


def faults(proof: Proof, wanted: Expected) -> dict[str, str]:
    """What of a proof is not as expected, by check."""
    hot, code = proof.hot, proof.code
    found = {}
    if code.whole.spills or code.stack:
        found["spills"] = f"{code.whole.spills} accesses of {code.stack} bytes of local memory"
    if hot.wide_share() < wanted.wide:
        loaded = f"loads {hot.loads}, copies {hot.copies}"
        found["loads"] = (
            f"{hot.wide_share():.2f} of {hot.loaded_bytes} bytes 16 at a time: {loaded}"
        )
    if wanted.tensor_cores and not hot.tensor_cores:
        found["tensor cores"] = "no matrix instruction"
    if max(code.whole.stores, default=0) < wanted.stores:
        found["stores"] = f"the widest of {code.whole.stores}"
    return found


@NEEDS_TOOLS
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES],
)
def test_machine_code_is_as_expected(case: str, prover: Prover) -> None:
    """Of every kernel that serving launches, with the arguments of the launcher itself."""
    wrong = [
        f"{proof.kernel} [{check}]: {what}. {proof.line()}"
        for proof in prover(case)
        for check, what in faults(proof, expected(case, proof.kernel)).items()
        if check not in PENDING.get(proof.kernel, ())
    ]
    assert not wrong, "\n".join(wrong)


@NEEDS_TOOLS
def test_every_kernel_of_an_operation_is_proved(prover: Prover) -> None:
    """One that serving launches and nobody states anything of would be in none of the tables."""
    proved = {proof.kernel for case in QUICK for proof in prover(case)}
    assert proved == set(EXPECTED)


LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;          /* 0x00000a00ff017b82 */
                                                                   /* 0x000e220000000800 */
        /*0010*/                   STL.64 [R1], R8 ;               /* 0x0000000000027919 */
        /*0020*/                   LDG.E.U16 R3, desc[UR6][R8.64] ; /* 0x00 */
        /*0030*/              @!P2 LDG.E.128.CONSTANT R12, desc[UR6][R8.64] ; /* 0x00 */
        /*0040*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR6][R8.64] ; /* 0x00 */
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ; /* 0x00 */
        /*0060*/                   ULOP3.LUT UR4, UR4, 0x3, URZ, 0xc0, !UPT ; /* 0x00 */
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ; /* 0x00 */
        /*0080*/               @P0 BRA 0x30 ; /* 0x00 */
        /*0090*/                   LDL.64 R8, [R1] ; /* 0x00 */
        /*00a0*/                   STG.E.64 desc[UR6][R8.64], R4 ; /* 0x00 */
        /*00b0*/                   EXIT ; /* 0x00 */
        /*00c0*/                   BRA 0xc0; /* 0x00 */
        /*00d0*/                   NOP; /* 0x00 */
"""


def test_machine_code_is_read_by_instruction() -> None:
    lines = machine_code.instructions(LISTING)
    whole = machine_code.count(lines)
    assert (whole.instructions, whole.spills) == (13, 2)
    assert (whole.loads, whole.copies, whole.stores) == ({2: 1, 16: 1}, {16: 1}, {8: 1})
    assert whole.wide_share() == pytest.approx(32 / 34)
    loop = machine_code.count(machine_code.in_loops(lines))
    assert (loop.instructions, loop.loads, loop.spills) == (6, {16: 1}, 0)
    assert (loop.tensor_cores, loop.integer, loop.barriers) == ({"HMMA": 1}, 1, 1)


def test_a_fault_of_each_kind_is_found() -> None:
    lines = machine_code.instructions(LISTING)
    whole = machine_code.count(lines)
    code = machine_code.MachineCode(32, 8, 0, 4, whole, machine_code.count([]))
    proof = Proof("kernel", (1,), code)
    assert set(faults(proof, Expected(wide=1.0, stores=16))) == {"spills", "loads", "stores"}
    bare = machine_code.MachineCode(32, 0, 0, 4, machine_code.count(lines[2:5]), code.loops)
    proof = Proof("kernel", (1,), bare)
    wanted = Expected(wide=0.9, tensor_cores=True, stores=0)
    assert set(faults(proof, wanted)) == {"tensor cores"}


@NEEDS_TOOLS
def test_the_command_writes_what_it_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [*static_proof.COMMAND, "compact_windows", "--json", str(file)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (row,) = json.loads(file.read_text())
    proof = static_proof.read(row)
    assert (row["case"], proof.kernel) == ("compact_windows", "compact_windows_kernel")
    assert proof.line() in done.stdout and proof.code.registers > 0
