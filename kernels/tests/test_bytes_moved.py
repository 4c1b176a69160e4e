# Triton's compile-time arguments are upper case by its own convention.
# ruff: noqa: N803

from __future__ import annotations

import json
import sys
from pathlib import Path

import bytes_moved
import pytest
import torch
import triton
import triton.language as tl

INTERPRETED = pytest.mark.skipif(
    torch.cuda.is_available(), reason="addresses are counted in Triton's interpreter"
)
MOST = {
    "quant_write": 1.05,
    "paged_attend_quant": 1.25,
    # Each reads keys twice.
    "attention_mass": 2.4,
    "key_scores": 1.6,
    "select_top": 1.05,
    "compact_kv": 1.05,
    "rerotate": 1.05,
    "hadamard": 1.05,
}
"""Of the bytes that are moved to the least possible."""


@triton.jit
def twice_kernel(x, out, n, BLOCK: tl.constexpr, TIMES: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(x + o, mask=o < n, other=0)
    for i in tl.static_range(TIMES):
        b += tl.load(x + (o + i * BLOCK) % n, mask=o < n, other=0)
    tl.store(out + o, b, mask=o < n)


@INTERPRETED
@pytest.mark.parametrize(("times", "read"), [(1, 4096), (2, 8192), (3, 12288)])
def test_a_sector_counts_once_a_program(times: int, read: int) -> None:
    """Four programs of 256 floats: one reads its own again from its cache, and others' from
    memory."""
    x, out = torch.zeros(1024), torch.zeros(1024)
    with bytes_moved.watching() as traffic:
        twice_kernel[(4,)](x, out, 1024, BLOCK=256, TIMES=times)
    assert (traffic.programs, traffic.read, traffic.written) == (4, read, 4096)
    twice_kernel[(4,)](x, out, 1024, BLOCK=256, TIMES=times)
    assert traffic.programs == 4


@INTERPRETED
def test_narrow_accesses_move_whole_sectors() -> None:
    x, out = torch.zeros(1024), torch.zeros(1024)
    with bytes_moved.watching() as traffic:
        twice_kernel[(1,)](x, out, 9, BLOCK=16, TIMES=0)
    assert (traffic.read, traffic.written) == (64, 64)


@INTERPRETED
@pytest.mark.parametrize("case", bytes_moved.CASES)
def test_bytes_are_near_the_least(case: str) -> None:
    row = bytes_moved.measure(case)
    assert 0.95 <= row.ratio <= MOST[case.split(",")[0]], row


@INTERPRETED
def test_the_command_writes_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["bytes_moved.py", "hadamard", "--json", str(file)])
    bytes_moved.main()
    (row,) = json.loads(file.read_text())
    assert row["case"] == "hadamard" and f"{row['ratio']:.2f}" in capsys.readouterr().out
