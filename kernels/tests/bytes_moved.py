"""Bytes that kernels move against the least possible, from their own addresses.

``python kernels/tests/bytes_moved.py [--json FILE] [CASE ...]`` runs the kernels in Triton's
interpreter on small sizes of serving's shapes and counts the 32-byte sectors of memory that each
program reads and writes, a sector once a program: what a GPU fetches if every program starts with
an empty cache and no two share one. The least possible is to read each input once and to write
each output once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

from kvplug_kernels.attention_mass.kernel import attention_mass_triton
from kvplug_kernels.coding import CodedPage, Coding
from kvplug_kernels.compact_kv.kernel import compact_kv_triton
from kvplug_kernels.hadamard.kernel import hadamard_triton
from kvplug_kernels.key_scores.kernel import key_scores_triton
from kvplug_kernels.paged_attend_quant.kernel import paged_attend_quant_triton
from kvplug_kernels.quant_write.kernel import quant_write_triton
from kvplug_kernels.rerotate.kernel import rerotate_triton
from kvplug_kernels.select_top.kernel import select_top_triton

SECTOR = 32
HEADS, GROUP, SIZE, BLOCK_SIZE = 2, 4, 128, 16


@dataclass
class Traffic:
    """What launches moved.

    Attributes:
        read: Bytes of the sectors that programs read.
        written: Bytes of the sectors that they wrote.
        programs: Programs that ran.
    """

    read: int = 0
    written: int = 0
    programs: int = 0


@contextlib.contextmanager
def watching() -> Iterator[Traffic]:
    """Count what is launched meanwhile. Triton must be interpreted."""
    from triton.runtime.interpreter import InterpreterBuilder

    traffic = Traffic()
    sectors: dict[str, set[int]] = {"read": set(), "written": set()}
    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "set_grid_idx")
    before = {name: getattr(InterpreterBuilder, name) for name in names}

    def close_program() -> None:
        for kind, seen in sectors.items():
            setattr(traffic, kind, getattr(traffic, kind) + SECTOR * len(seen))
            seen.clear()

    def note(kind: str, ptrs: Any, mask: Any) -> None:
        live = np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)
        at = ptrs.data[live] // SECTOR
        sectors[kind].update(np.unique(at).tolist())

    def load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        note("read", ptrs, mask)
        return before["create_masked_load"](self, ptrs, mask, *rest)

    def store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note("written", ptrs, mask)
        return before["create_masked_store"](self, ptrs, value, mask, *rest)

    def atomic(self: Any, operation: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        note("read", ptr, mask)
        note("written", ptr, mask)
        return before["create_atomic_rmw"](self, operation, ptr, val, mask, *rest)

    def program(self: Any, *at: int) -> Any:
        close_program()
        traffic.programs += 1
        return before["set_grid_idx"](self, *at)

    try:
        for name, function in zip(names, (load, store, atomic, program), strict=True):
            setattr(InterpreterBuilder, name, function)
        yield traffic
    finally:
        close_program()
        for name, function in before.items():
            setattr(InterpreterBuilder, name, function)


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        tokens: Tokens that the bytes are divided by: those written, read or scored.
        least: Bytes that it must read and write.
        call: The call.
    """

    tokens: int
    least: int
    call: Callable[[], Any]


def both(coding: Coding) -> CodedPage:
    return CodedPage(coding, coding)


LAYOUTS = {
    "int8": both(Coding(SIZE, 8)),
    "int4": both(Coding(SIZE, 4)),
    "codebook of 4 bits": both(Coding(SIZE, 4, "codebook")),
    "kivi of 2 bits": CodedPage(
        Coding(SIZE, 2, axis="tokens", group=16), Coding(SIZE, 2, group=32)
    ),
    "hack of 4 bits": CodedPage(Coding(SIZE, 4, sums=True), Coding(SIZE, 4)),
}


def levels_of(layout: CodedPage) -> dict[str, torch.Tensor]:
    return {
        f"{side}_levels": torch.linspace(-2, 2, coding.levels)
        for side, coding in (("key", layout.key), ("value", layout.value))
        if coding.kind == "codebook"
    }


def write(name: str) -> Case:
    """A chunk of a prompt."""
    layout, tokens = LAYOUTS[name], 128
    key, value = (torch.randn(tokens, HEADS, SIZE).bfloat16() for _ in range(2))
    blocks = tokens // BLOCK_SIZE
    pages = torch.zeros(blocks, HEADS, BLOCK_SIZE, layout.bytes_per_token, dtype=torch.uint8)
    slots = torch.arange(tokens)
    least = 2 * key.nbytes + slots.nbytes + pages.nbytes
    levels = levels_of(layout)
    return Case(
        tokens * HEADS,
        least,
        lambda: quant_write_triton(key, value, pages, slots, layout, **levels),
    )


def paged(rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values with tokens before heads, block table and lengths."""
    width = tokens // BLOCK_SIZE
    pages = torch.randn(2, rows * width, BLOCK_SIZE, HEADS, SIZE).bfloat16()
    keys, values = pages.transpose(2, 3)
    table = torch.arange(rows * width, dtype=torch.int32).view(rows, width)
    return keys, values, table, torch.full((rows,), tokens, dtype=torch.int32)


def attend(name: str) -> Case:
    """A decode step over coded pages."""
    layout, rows, tokens = LAYOUTS[name], 2, 512
    width = tokens // BLOCK_SIZE
    shape = (rows * width, HEADS, BLOCK_SIZE, layout.bytes_per_token)
    pages = torch.zeros(shape, dtype=torch.uint8)
    table = torch.arange(rows * width, dtype=torch.int32).view(rows, width)
    lens = torch.full((rows,), tokens, dtype=torch.int32)
    query = torch.randn(rows, HEADS * GROUP, SIZE).bfloat16()
    out, lse = torch.zeros(query.shape), torch.zeros(query.shape[:2])
    least = pages.nbytes + table.nbytes + lens.nbytes + query.nbytes + out.nbytes + lse.nbytes
    return Case(
        rows * tokens * HEADS,
        least,
        lambda: paged_attend_quant_triton(
            query,
            pages,
            layout,
            table,
            lens,
            torch.arange(rows + 1, dtype=torch.int32),
            SIZE**-0.5,
            causal=False,
            integer=name.startswith("hack"),
            max_query_len=1,
            max_len=tokens,
            out=out,
            lse=lse,
            **levels_of(layout),
        ),
    )


def mass() -> Case:
    rows, tokens, window = 1, 512, 8
    keys, _, table, lens = paged(rows, tokens)
    query = torch.randn(rows, window, HEADS * GROUP, SIZE).bfloat16()
    out = torch.zeros(rows, HEADS * GROUP, tokens)
    least = keys.numel() * 2 + query.nbytes + out.nbytes + table.nbytes + lens.nbytes
    return Case(
        rows * tokens * HEADS,
        least,
        lambda: attention_mass_triton(query, keys, table, lens, SIZE**-0.5, out=out),
    )


def scores() -> Case:
    rows, tokens = 1, 512
    keys, values, table, lens = paged(rows, tokens)
    out = torch.zeros(4, rows, HEADS, tokens)
    least = 4 * keys.numel() + out.nbytes + table.nbytes + lens.nbytes
    return Case(
        rows * tokens * HEADS,
        least,
        lambda: key_scores_triton(keys, values, table, lens, out=out),
    )


def select() -> Case:
    found = torch.randn(1, HEADS, 4096)
    out = torch.zeros(1, HEADS, 512, dtype=torch.int32)
    least = found.nbytes + out.nbytes
    return Case(found.numel(), least, lambda: select_top_triton(found, 512, out=out))


def compact() -> Case:
    tokens, count = 256, 128
    keys, values, table, _ = paged(1, tokens)
    kept = torch.stack([torch.randperm(tokens)[:count].sort().values for _ in range(HEADS)])
    keep = kept.view(1, HEADS, count).int()
    moved = int((keep >= count).sum())
    least = 2 * 2 * 2 * moved * SIZE + 2 * keep.nbytes + table.nbytes
    return Case(moved, least, lambda: compact_kv_triton([keys, values], table, keep, count=count))


def rotate() -> Case:
    tokens = 256
    keys, *_ = paged(1, tokens)
    slots, frequencies = torch.arange(tokens), torch.rand(SIZE // 2)
    least = 2 * 2 * keys.numel() + slots.nbytes
    return Case(tokens * HEADS, least, lambda: rerotate_triton(keys, slots, 100, frequencies))


def transform() -> Case:
    x = torch.randn(256, HEADS, SIZE).bfloat16()
    signs, out = torch.ones(SIZE), torch.empty_like(x)
    least = 2 * x.nbytes + signs.nbytes
    return Case(256 * HEADS, least, lambda: hadamard_triton(x, signs, out=out))


CASES: dict[str, Callable[[], Case]] = {
    **{f"quant_write, {n}": lambda n=n: write(n) for n in LAYOUTS},
    **{f"paged_attend_quant, {n}": lambda n=n: attend(n) for n in LAYOUTS},
    "attention_mass": mass,
    "key_scores": scores,
    "select_top": select,
    "compact_kv": compact,
    "rerotate": rotate,
    "hadamard": transform,
}


@dataclass(frozen=True)
class Moved:
    """What a case moved, in bytes a token and head.

    Attributes:
        case: Its name.
        tokens: Tokens and heads that the bytes are divided by.
        read: Bytes read.
        written: Bytes written.
        least: The least possible, read and written.
        ratio: Of what is moved to the least.
    """

    case: str
    tokens: int
    read: float
    written: float
    least: float
    ratio: float


def measure(name: str) -> Moved:
    """Run a case in the interpreter.

    Raises:
        KeyError: There is no such case.
    """
    torch.manual_seed(0)
    case = CASES[name]()
    with watching() as traffic:
        case.call()
    assert traffic.programs, "nothing was interpreted"
    total = traffic.read + traffic.written
    per = (traffic.read, traffic.written, case.least)
    read, written, least = (round(n / case.tokens, 2) for n in per)
    return Moved(name, case.tokens, read, written, least, round(total / case.least, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="beginnings of cases' names")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    options = parser.parse_args()
    chosen = [n for n in CASES if not options.cases or n.startswith(tuple(options.cases))]
    if not chosen:
        parser.error(f"no case begins so; there are: {'; '.join(CASES)}")
    rows = []
    for name in chosen:
        row = measure(name)
        rows.append(asdict(row))
        print(
            f"{name}: {row.read:.1f} bytes read and {row.written:.1f} written a token and head, "
            f"{row.least:.1f} at least: {row.ratio:.2f}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
