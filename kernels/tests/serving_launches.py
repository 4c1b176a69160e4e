"""The launches of serving: each operation called as a server of a model with 8 KV heads of 128
calls it, on tensors of a GPU that have shapes and no memory.

A process that calls `capture` must not interpret Triton.
"""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from record_launches import Launch
from torch import Tensor

from kvplug_kernels.add_mass import add_mass
from kvplug_kernels.attend_exact import attend_exact, merge_attention
from kvplug_kernels.attention_mass import attention_mass
from kvplug_kernels.coding import CodedPage, Coding
from kvplug_kernels.compact_kv import compact_kv
from kvplug_kernels.compact_rows import compact_rows
from kvplug_kernels.compact_windows import compact_windows
from kvplug_kernels.hadamard import hadamard
from kvplug_kernels.key_scores import KEY_NORM, KEY_TO_MEAN, key_scores
from kvplug_kernels.move_tokens import LayerCaches, move_tokens
from kvplug_kernels.pack_pages import Packed, pack_pages, unpack_pages
from kvplug_kernels.paged_attend_quant import paged_attend_quant
from kvplug_kernels.plan_survivors import plan_survivors
from kvplug_kernels.pool_mass import pool_mass
from kvplug_kernels.project_latent import project_latent
from kvplug_kernels.quant_write import quant_write
from kvplug_kernels.rerotate import rerotate, rerotate_coded
from kvplug_kernels.resident_tokens import LatestQueries, LayerSlice, resident_tokens
from kvplug_kernels.segment_stats import segment_stats
from kvplug_kernels.select_top import select_top

HEADS, NUM_HEADS, SIZE, BLOCK_SIZE = 8, 32, 128, 16
ROWS, TOKENS = 32, 16_384
SCALE = SIZE**-0.5
MULTIPROCESSORS = 132
"""Of an H100 or an H200."""


def both(coding: Coding) -> CodedPage:
    return CodedPage(coding, coding)


LAYOUTS: dict[str, tuple[CodedPage, bool]] = {
    "int8": (both(Coding(SIZE, 8)), False),
    "int4": (both(Coding(SIZE, 4)), False),
    "int4 fitted": (both(Coding(SIZE, 4, fit=1)), False),
    "int4 in groups of 32": (both(Coding(SIZE, 4, group=32)), False),
    "int2": (both(Coding(SIZE, 2)), False),
    "fp8": (both(Coding(SIZE, 8, "fp8")), False),
    "codebook of 4 bits": (both(Coding(SIZE, 4, "codebook")), False),
    "codebook of 3 bits": (both(Coding(SIZE, 3, "codebook")), False),
    "codebook of 2 bits": (both(Coding(SIZE, 2, "codebook")), False),
    "hack of 4 bits": (CodedPage(Coding(SIZE, 4, sums=True), Coding(SIZE, 4)), True),
    "hack of 2 bits": (
        CodedPage(Coding(SIZE, 2, group=32, sums=True), Coding(SIZE, 2, group=32)),
        True,
    ),
    "kivi of 4 bits": (
        CodedPage(Coding(SIZE, 4, axis="tokens", group=32, anchored=True), Coding(SIZE, 4, fit=2)),
        False,
    ),
    "kivi of 2 bits": (
        CodedPage(Coding(SIZE, 2, axis="tokens", group=32, anchored=True), Coding(SIZE, 2, fit=2)),
        False,
    ),
    "plain": (both(Coding(SIZE, 16, "plain")), False),
}
"""The layouts of the built-in formats, and whether their products are integer."""

WRITTEN = tuple(LAYOUTS)
ATTENDED = tuple(name for name in LAYOUTS if name not in ("int4 fitted", "codebook of 3 bits"))


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def integers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return on_gpu(*shape, dtype=dtype)


def floats(*shape: int) -> Tensor:
    return on_gpu(*shape, dtype=torch.float32)


def levels_of(layout: CodedPage) -> dict[str, Tensor]:
    """The codebooks that a layout needs, as the operations name them."""
    return {
        f"{side}_levels": floats(coding.levels)
        for side, coding in (("key", layout.key), ("value", layout.value))
        if coding.kind == "codebook"
    }


def block_size(layout: CodedPage) -> int:
    """Tokens of a block: vLLM's default, or that of ``configs/gpu/kivi.yaml``."""
    return 64 if layout.key.axis == "tokens" else BLOCK_SIZE


def coded_pages(layout: CodedPage, tokens: int) -> Tensor:
    size = block_size(layout)
    return on_gpu(tokens // size, HEADS, size, layout.bytes_per_token, dtype=torch.uint8)


def paged(rows: int, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """bfloat16 keys and values as vLLM lays them out on a GPU, tokens before heads; block table
    and lengths."""
    width = tokens // BLOCK_SIZE
    pages = on_gpu(2, rows * width, BLOCK_SIZE, HEADS, SIZE)
    keys, values = pages.transpose(2, 3)
    return keys, values, integers(rows, width), integers(rows)


def write(name: str, tokens: int) -> None:
    layout, _ = LAYOUTS[name]
    key, value = on_gpu(tokens, HEADS, SIZE), on_gpu(tokens, HEADS, SIZE)
    pages, slots = coded_pages(layout, 1 << 20), integers(tokens, dtype=torch.int64)
    more = levels_of(layout)
    if layout.key.axis == "tokens":
        more["recent_slots"] = integers(tokens, dtype=torch.int64)
        more["recent_key"] = on_gpu(ROWS, block_size(layout), HEADS, SIZE)
    bad = integers(1, dtype=torch.int64)
    quant_write(key, value, pages, slots, layout, nonfinite=bad, **more)


def attend(name: str, queries: int) -> None:
    """One query of each of 32 rows, or a chunk of one request's prompt."""
    layout, integer = LAYOUTS[name]
    rows = ROWS if queries == 1 else 1
    width = TOKENS // block_size(layout)
    paged_attend_quant(
        on_gpu(rows * queries, NUM_HEADS, SIZE),
        coded_pages(layout, rows * TOKENS),
        layout,
        integers(rows, width),
        integers(rows),
        integers(rows + 1),
        SCALE,
        causal=False,
        integer=integer,
        max_query_len=queries,
        max_len=TOKENS,
        out=floats(rows * queries, NUM_HEADS, SIZE),
        lse=floats(rows * queries, NUM_HEADS),
        **levels_of(layout),
    )


def attend_recent(rows: int, queries: int, recent: int) -> None:
    tokens = rows * queries
    kept: dict[str, Any] = {}
    if recent:
        kept["recent_key"], kept["recent_value"] = (
            on_gpu(rows, recent, HEADS, SIZE) for _ in range(2)
        )
        kept |= {"recent_slots": integers(rows, dtype=torch.int64), "recent_lens": integers(rows)}
    out, lse = attend_exact(
        on_gpu(tokens, NUM_HEADS, SIZE),
        on_gpu(tokens, HEADS, SIZE),
        on_gpu(tokens, HEADS, SIZE),
        integers(rows + 1),
        SCALE,
        max_query_len=queries,
        **kept,
    )
    past, past_lse = floats(tokens, NUM_HEADS, SIZE), floats(tokens, NUM_HEADS)
    merge_attention(past, past_lse, out, lse, on_gpu(tokens, NUM_HEADS, SIZE))


def mass(window: int) -> None:
    keys, _, table, lens = paged(ROWS, TOKENS)
    attention_mass(on_gpu(ROWS, window, NUM_HEADS, SIZE), keys, table, lens, SCALE)


def scores() -> None:
    key_scores(*paged(ROWS, TOKENS))


def key_score(which: int) -> None:
    key_scores(*paged(ROWS, TOKENS), which=(which,))


LAYERS, KEPT = 28, 512


def residents() -> None:
    """Of one request whose budget is KEPT, in all layers, with the latest 32 queries."""
    size, places = BLOCK_SIZE, LAYERS * 65 * 32
    count = KEPT + 128
    ring = on_gpu(places, NUM_HEADS, SIZE)
    numbers = integers(1, 5 + count // size)
    latest = LatestQueries(
        ring, integers(LAYERS, dtype=torch.int64), numbers[:, 3], numbers[:, 2], 32, 32
    )
    resident_tokens(
        integers(64, 4096),
        numbers[:, 0],
        numbers[:, 5:],
        numbers[:, 1],
        integers(LAYERS * 4096, HEADS, size),
        LayerSlice(0, LAYERS, 1, 4096),
        count=count,
        totals=floats(LAYERS * 4096, HEADS, size),
        latest=latest,
    )


def pool(kernel: int) -> None:
    mass, tokens = floats(LAYERS, NUM_HEADS, KEPT + 128), integers(LAYERS)
    pool_mass(
        mass,
        integers(LAYERS, HEADS, KEPT + 128),
        tokens,
        latest=32,
        longest=1 << 17,
        query_positions=integers(LAYERS, 32),
        kernel=kernel,
        kept=1e30,
    )


def survivors(rows: int, held: int) -> None:
    shape = (rows, HEADS, held)
    tokens = integers(rows)
    plan_survivors(
        floats(*shape), integers(*shape), tokens, candidates=shape[2], count=KEPT, sink=4, recent=32
    )


def add() -> None:
    totals, table = floats(LAYERS * 4096, HEADS, BLOCK_SIZE), integers(LAYERS, 64)
    add_mass(totals, table, floats(LAYERS, NUM_HEADS, KEPT + 128), new=32)


def select(rows: int = ROWS, tokens: int = TOKENS) -> None:
    select_top(floats(rows, HEADS, tokens), KEPT, integers(rows))


def compact() -> None:
    keys, values, table, _ = paged(ROWS, TOKENS)
    compact_kv([keys, values], table, integers(ROWS, HEADS, 512), count=512)


def move() -> None:
    layers = 28
    pages = on_gpu(layers, 4096, BLOCK_SIZE, HEADS, 2 * SIZE)
    caches = LayerCaches(list(pages.transpose(2, 3)))
    move_tokens(caches, integers(8, 64), integers(layers, 8, HEADS, 512))


def move_folded() -> None:
    """Of all layers as one cache, with positions and totals beside it."""
    pages = on_gpu(LAYERS * 4096, BLOCK_SIZE, HEADS, 2 * SIZE).transpose(1, 2)
    beside = (LAYERS * 4096, HEADS, BLOCK_SIZE)
    values = (LAYERS, HEADS, KEPT + 128)
    move_tokens(
        LayerCaches([pages]),
        integers(LAYERS, 64),
        integers(1, LAYERS, HEADS, KEPT),
        [(integers(*beside), integers(*values)), (floats(*beside), floats(*values))],
    )


PACKED: dict[str, Coding | None] = {
    "bytes": None,
    "int8": Coding(SIZE, 8),
    "int4": Coding(SIZE, 4),
    "fp8": Coding(SIZE, 8, "fp8"),
}


def pack(name: str, *, back: bool = False) -> None:
    """Keys and values of 8 chunks of 256 tokens, in all layers."""
    pages = on_gpu(LAYERS, 4096, BLOCK_SIZE, HEADS, 2 * SIZE).transpose(2, 3)
    caches = LayerCaches([*pages[..., :SIZE], *pages[..., SIZE:]])
    coding, blocks = PACKED[name], integers(8, 256 // BLOCK_SIZE, dtype=torch.int64)
    buffer = on_gpu(Packed.room(caches, 8, 256, coding), dtype=torch.uint8)
    packed = Packed.within(buffer, caches, 8, 256, coding)
    (unpack_pages if back else pack_pages)(caches, blocks, packed, coding)


def rotate() -> None:
    keys, *_ = paged(1, TOKENS)
    rerotate(keys, integers(TOKENS, dtype=torch.int64), 100, floats(SIZE // 2))


def rotate_coded(name: str) -> None:
    layout, _ = LAYOUTS[name]
    slots = integers(TOKENS, dtype=torch.int64)
    levels = {k: v for k, v in levels_of(layout).items() if k == "key_levels"}
    pages = coded_pages(layout, 1 << 16)
    rerotate_coded(pages, slots, 100, layout, floats(SIZE // 2), **levels)


def stats() -> None:
    n, m = 1024, 16
    key, value = on_gpu(n, HEADS, SIZE), on_gpu(n, HEADS, SIZE)
    segment_stats(key, value, on_gpu(m, NUM_HEADS, SIZE), on_gpu(4096, HEADS, SIZE), SCALE)


def rows_of_blocks() -> None:
    width = 2048
    compact_rows(
        integers(ROWS, width),
        integers(ROWS),
        integers(ROWS + 1),
        integers(ROWS),
        integers(ROWS, 4),
        BLOCK_SIZE,
        protected=0,
        out_table=integers(ROWS, width),
        out_lens=integers(ROWS),
        ring=64,
        places=integers(ROWS),
    )


def windows_of_blocks() -> None:
    width = 2048
    compact_windows(
        integers(ROWS, width),
        integers(ROWS),
        integers(ROWS + 1),
        BLOCK_SIZE,
        sink=64,
        window=448,
        out_table=integers(ROWS, width),
        out_lens=integers(ROWS),
    )


CASES: dict[str, Callable[[], None]] = {
    **{f"quant_write, {n}": lambda n=n: write(n, 4096) for n in WRITTEN},
    **{f"paged_attend_quant, {n}": lambda n=n: attend(n, 1) for n in ATTENDED},
    **{f"paged_attend_quant, {n}, a chunk": lambda n=n: attend(n, 2048) for n in ("int8", "int4")},
    "attend_exact, one query": lambda: attend_recent(ROWS, 1, 64),
    "attend_exact, a chunk": lambda: attend_recent(2, 2048, 0),
    "attention_mass, 32 queries": lambda: mass(32),
    "attention_mass, one query": lambda: mass(1),
    "key_scores": scores,
    "key_scores, key norm": lambda: key_score(KEY_NORM),
    "key_scores, to the mean": lambda: key_score(KEY_TO_MEAN),
    "resident_tokens": residents,
    "pool_mass": lambda: pool(7),
    "pool_mass, no neighbours": lambda: pool(1),
    "add_mass": add,
    "plan_survivors": lambda: survivors(LAYERS, KEPT + 128),
    "plan_survivors, a long row": lambda: survivors(1, 1 << 17),
    "select_top": select,
    "select_top, a long row": lambda: select(1, 1 << 17),
    "compact_kv": compact,
    "move_tokens": move,
    "move_tokens, folded": move_folded,
    **{f"pack_pages, {n}": lambda n=n: pack(n) for n in PACKED},
    **{f"unpack_pages, {n}": lambda n=n: pack(n, back=True) for n in PACKED},
    "rerotate": rotate,
    **{f"rerotate_coded, {n}": lambda n=n: rotate_coded(n) for n in ("int8", "int4")},
    "segment_stats": stats,
    "hadamard": lambda: hadamard(on_gpu(4096, HEADS, SIZE), floats(SIZE)),
    "project_latent": lambda: project_latent(
        on_gpu(4096, HEADS, SIZE), on_gpu(HEADS, SIZE, 64), floats(HEADS, SIZE)
    ),
    "compact_rows": rows_of_blocks,
    "compact_windows": windows_of_blocks,
}
"""What a server launches, by name: the operation, and what of it."""


def capture(name: str) -> list[tuple[Any, Launch, tuple[int, ...]]]:
    """What a case launches: each kernel with its specialisation and its grid, in order.

    Raises:
        KeyError: There is no such case.
        RuntimeError: Triton is interpreted in this process.
    """
    from triton import knobs
    from triton.runtime.jit import JITFunction

    if knobs.runtime.interpret:
        raise RuntimeError("launches of serving are captured where TRITON_INTERPRET is not set")
    case = CASES[name]
    found: list[tuple[Any, Launch, tuple[int, ...]]] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        assert not callable(grid), f"{self.fn.__name__}'s grid is not known before it is launched"
        found.append((self, Launch.of(self.fn, args, kwargs), tuple(grid)))

    original, JITFunction.run = JITFunction.run, run
    try:
        with a_gpu_without_memory():
            case()
    finally:
        JITFunction.run = original
    assert found, f"{name} launches nothing"
    return found


@contextlib.contextmanager
def a_gpu_without_memory() -> Iterator[None]:
    """Tensors on a Hopper GPU that have shapes, strides, and addresses that are never read."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    hopper = types.SimpleNamespace(
        name="Hopper",
        major=9,
        minor=0,
        multi_processor_count=MULTIPROCESSORS,
        shared_memory_per_multiprocessor=228 << 10,
        total_memory=80 << 30,
        warp_size=32,
    )
    addresses: dict[int, int] = {}
    kept: list[Any] = []

    def data_ptr(tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata not in addresses:
            kept.append(storage)
            addresses[storage._cdata] = (len(addresses) + 1) << 36
        return addresses[storage._cdata] + tensor.storage_offset() * tensor.element_size()

    plain_getitem = torch.Tensor.__getitem__

    def getitem(tensor: Tensor, index: Any) -> Tensor:
        """Indexing asks torch for the device, which this build may not know."""
        if not tensor.is_cuda:
            return plain_getitem(tensor, index)
        parts = index if isinstance(index, tuple) else (index,)
        picks = any(isinstance(part, Tensor | list) for part in parts)
        twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        moved = tuple(p.to("meta") if isinstance(p, Tensor) else p for p in parts)
        view = plain_getitem(twin, moved)
        if picks:
            return torch.empty_like(view, device=tensor.device)
        offset = tensor.storage_offset() + view.storage_offset()
        return tensor.as_strided(view.shape, view.stride(), offset)

    changed = {
        (torch.cuda, "device_of"): lambda tensor: contextlib.nullcontext(),
        (torch.cuda, "get_device_properties"): lambda device=None: hopper,
        (torch.cuda, "get_device_capability"): lambda device=None: (9, 0),
        (torch.cuda, "current_device"): lambda: 0,
        (torch.Tensor, "data_ptr"): data_ptr,
        (torch.Tensor, "__getitem__"): getitem,
        (torch.Tensor, "__setitem__"): lambda tensor, index, value: None,
    }
    before = {(of, name): getattr(of, name) for of, name in changed}
    with warnings.catch_warnings(), FakeTensorMode():
        warnings.simplefilter("ignore")
        try:
            for (of, name), value in changed.items():
                setattr(of, name, value)
            yield
        finally:
            for (of, name), value in before.items():
                setattr(of, name, value)
