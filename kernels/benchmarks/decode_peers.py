"""Decoding over coded pages beside the decodes of vLLM and FlashInfer over the same tokens.

Each shape times all that runs on it in turn, round after round, each beside a copy of the bytes
that it must read. A row says how many times as long as its copy it takes, and how many times as
fast as vLLM's FlashAttention 3 over bfloat16 it is. What cannot run is a row that says why.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bandwidth_floor import Call, _device_name, _timer, _triton_version, device
from torch import Tensor

from kvplug_kernels.coding import CodedPage, Coding
from kvplug_kernels.paged_attend_quant import paged_attend_quant

BASE = "FA3 bf16"


@dataclass(frozen=True)
class Shape:
    """A decode step: one query of each row.

    Attributes:
        rows: Requests.
        tokens: Of each.
        group: Query heads of a KV head.
        size: Elements of a head.
        block: Tokens of a block.
        heads: KV heads.
    """

    rows: int
    tokens: int
    group: int = 4
    size: int = 128
    block: int = 16
    heads: int = 8

    @property
    def blocks(self) -> int:
        """Blocks of all rows."""
        return self.rows * -(-self.tokens // self.block)

    def __str__(self) -> str:
        return (
            f"{self.rows} x {self.tokens} tokens, {self.heads * self.group} heads on {self.heads} "
            f"of {self.size}, blocks of {self.block}"
        )


SHAPES = [
    Shape(32, 16384),
    Shape(1, 131072),
    Shape(256, 2048),
    Shape(32, 16384, group=8),
    Shape(32, 16384, group=7),
    Shape(32, 16384, size=64),
    Shape(32, 16384, block=64),
]
"""The first three with every format; the others differ from the first in one thing."""
EVERY_FORMAT = 3
QUICK = [Shape(2, 48, group=2, size=32, heads=2)]


@dataclass(frozen=True)
class Contender:
    """A decode.

    Attributes:
        name: What of whom.
        n_bytes: Bytes of K and V that it must read.
        make: Makes the call, or raises what keeps it from running.
    """

    name: str
    n_bytes: int
    make: Callable[[], Call]


class Step:
    """The tensors of a decode step that all decodes share."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.target = shape, device()
        rng = torch.Generator().manual_seed(0)
        table = torch.randperm(shape.blocks, generator=rng).view(shape.rows, -1)
        self.table = table.to(self.target, torch.int32)
        self.lens = torch.full((shape.rows,), shape.tokens, dtype=torch.int32, device=self.target)
        self.starts = torch.arange(shape.rows + 1, dtype=torch.int32, device=self.target)
        num_heads = shape.heads * shape.group
        self.query = torch.randn(shape.rows, num_heads, shape.size, generator=rng)
        self.query = self.query.to(self.target, torch.bfloat16)
        self.scale = shape.size**-0.5
        self.n_vectors = 2 * shape.rows * shape.tokens * shape.heads

    def token_major(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Random keys and values as vLLM lays them out, ``[blocks, block, heads, size]``."""
        shape = self.shape
        size = (2, shape.blocks, shape.block, shape.heads, shape.size)
        pages = torch.empty(size, dtype=torch.bfloat16, device=self.target).normal_()
        keys, values = pages.to(dtype)
        return keys, values


def layouts(size: int) -> dict[str, tuple[CodedPage, bool]]:
    """The formats measured, and whether their products are integer."""

    def both(coding: Coding) -> CodedPage:
        return CodedPage(coding, coding)

    group = min(32, size)
    kivi = CodedPage(Coding(size, 2, axis="tokens", group=16), Coding(size, 2, group=group))
    return {
        "int4": (both(Coding(size, 4)), False),
        "int8": (both(Coding(size, 8)), False),
        "kivi of 2 bits": (kivi, False),
        "rotated of 4 bits": (both(Coding(size, 4, "codebook")), False),
        "hack of 4 bits": (CodedPage(Coding(size, 4, sums=True), Coding(size, 4)), True),
    }


def coded(step: Step, layout: CodedPage, integer: bool) -> Call:
    """kvplug's decode over random codes with scales of an ordinary size."""
    from bench_paged_attend_quant import make_pages

    shape = step.shape
    pages = make_pages(layout, shape.blocks, shape.heads, shape.block)
    levels = {
        f"{side}_levels": torch.linspace(-2, 2, coding.levels, device=step.target)
        for side, coding in (("key", layout.key), ("value", layout.value))
        if coding.kind == "codebook"
    }
    out = torch.zeros(step.query.shape, device=step.target)
    lse = torch.zeros(step.query.shape[:2], device=step.target)
    return partial(
        paged_attend_quant,
        step.query,
        pages,
        layout,
        step.table,
        step.lens,
        step.starts,
        step.scale,
        causal=False,
        integer=integer,
        max_query_len=1,
        max_len=shape.tokens,
        out=out,
        lse=lse,
        **levels,
    )


def flash_attention(step: Step, dtype: torch.dtype = torch.bfloat16) -> Call:
    """vLLM's FlashAttention 3 over bfloat16 or e4m3 pages."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    if not hasattr(torch.ops._vllm_fa3_C, "fwd"):
        raise RuntimeError("this build of vLLM has no FlashAttention 3")
    keys, values = step.token_major(dtype)
    more: dict[str, Any] = {}
    if dtype != torch.bfloat16:
        one = torch.ones(step.shape.rows, step.shape.heads, device=step.target)
        more = {"q_descale": one, "k_descale": one, "v_descale": one}
    return partial(
        flash_attn_varlen_func,
        step.query.to(dtype),
        keys,
        values,
        max_seqlen_q=1,
        cu_seqlens_q=step.starts,
        max_seqlen_k=step.shape.tokens,
        seqused_k=step.lens,
        softmax_scale=step.scale,
        causal=True,
        block_table=step.table,
        fa_version=3,
        **more,
    )


def vllm_int4(step: Step) -> Call:
    """vLLM's decode of ``--kv-cache-dtype int4_per_token_head``, as its Triton backend calls it."""
    from vllm.v1.attention.ops.int4_per_token_head import unified_attention_int4

    shape = step.shape
    half = shape.size // 2 + 4
    size = (shape.blocks, shape.heads, shape.block, 2 * half)
    cache = torch.empty(size, dtype=torch.uint8, device=step.target).random_(0, 256)
    words = cache.view(torch.float32)
    scales = [words[..., at // 4].transpose(1, 2) for at in (half - 4, 2 * half - 4)]
    for scale in scales:
        scale.fill_(0.01)
    keys, values = cache.transpose(1, 2).split(half, dim=-1)
    num_heads, segments = shape.heads * shape.group, 16
    part = torch.empty(shape.rows, num_heads, segments, shape.size, device=step.target)
    top, total = (torch.empty(part.shape[:3], device=step.target) for _ in range(2))
    return partial(
        unified_attention_int4,
        step.query,
        keys,
        values,
        torch.empty_like(step.query),
        cu_seqlens_q=step.starts,
        max_seqlen_q=1,
        seqused_k=step.lens,
        max_seqlen_k=shape.tokens,
        softmax_scale=step.scale,
        window_size=(-1, -1),
        block_table=step.table,
        softcap=0.0,
        sinks=None,
        alibi_slopes=None,
        use_alibi_sqrt=False,
        qq_bias=None,
        output_scale=None,
        mm_prefix_range=None,
        k_scale_cache=scales[0],
        v_scale_cache=scales[1],
        # Programs below which vLLM's backend splits a row.
        seq_threshold_3D=128 // shape.heads,
        num_par_softmax_segments=segments,
        softmax_segm_output=part,
        softmax_segm_max=top,
        softmax_segm_expsum=total,
    )


def flashinfer(step: Step) -> Call:
    """FlashInfer's paged decode over bfloat16."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    shape = step.shape
    keys, values = step.token_major(torch.bfloat16)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=step.target)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        step.starts * step.table.shape[1],
        step.table.flatten(),
        (step.lens - 1) % shape.block + 1,
        shape.heads * shape.group,
        shape.heads,
        shape.size,
        shape.block,
        q_data_type=step.query.dtype,
        kv_data_type=step.query.dtype,
        sm_scale=step.scale,
    )
    return partial(wrapper.run, step.query, (keys, values))


def on_gpu(make: Callable[[Step], Call], step: Step) -> Call:
    """What ``make`` makes of the step.

    Raises:
        RuntimeError: The step is not on a GPU.
    """
    if step.target.type != "cuda":
        raise RuntimeError("it needs a GPU")
    return make(step)


def contenders(step: Step, every_format: bool) -> list[Contender]:
    """Everything that is timed on a step; the baseline first."""
    size, n = step.shape.size, step.n_vectors
    fp8 = partial(flash_attention, dtype=torch.float8_e4m3fn)
    found = [
        Contender(BASE, n * 2 * size, partial(on_gpu, flash_attention, step)),
        Contender("FA3 fp8", n * size, partial(on_gpu, fp8, step)),
        Contender("vLLM int4", n * (size // 2 + 4), partial(on_gpu, vllm_int4, step)),
        Contender("FlashInfer bf16", n * 2 * size, partial(on_gpu, flashinfer, step)),
    ]
    for name, (layout, integer) in layouts(size).items():
        if every_format or name in ("int4", "int8"):
            n_bytes = n // 2 * layout.bytes_per_token
            found.append(Contender(name, n_bytes, partial(coded, step, layout, integer)))
    return found


def time_in_turn(
    step: Step, found: Iterable[Contender], repetitions: int, deadline: float
) -> list[dict[str, Any]]:
    """A row for each contender, timed in turn with its copy.

    Args:
        step: The step.
        found: What is timed on it.
        repetitions: Rounds; the first, which warms up, is not counted.
        deadline: Of `time.monotonic`, after which no contender is made and no round begun.
    """
    timers: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {}
    rows: list[dict[str, Any]] = []
    for one in found:
        row = {
            "op": f"decode {one.name}",
            "name": one.name,
            "path": "triton" if step.target.type == "cuda" else "vectorized",
            "shape": str(step.shape),
            **asdict(step.shape),
            "bytes": one.n_bytes,
            "baseline": "a copy",
            "device": _device_name(),
            "torch": torch.__version__,
            "triton": _triton_version(),
            "left_out": None,
        }
        rows.append(row)
        if time.monotonic() > deadline:
            row["left_out"] = "no time left"
            continue
        try:
            timer = _timer(one.make(), 1)
        except Exception as error:  # Whatever keeps a peer from running is its row.
            first = (str(error).splitlines() or [""])[0]
            row["left_out"] = f"{type(error).__name__}: {first[:160]}"
            continue
        source = torch.zeros(max(one.n_bytes // 2, 1), dtype=torch.uint8, device=step.target)
        timers[one.name] = timer, _timer(partial(torch.zeros_like(source).copy_, source), 1)
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in timers}
    for i in range(repetitions + 1):
        if i > 2 and time.monotonic() > deadline:
            break
        for name, (timer, copy) in timers.items():
            pair = (timer(), copy()) if i % 2 else (copy(), timer())[::-1]
            if i:
                rounds[name].append(pair)
    for row in rows:
        if row["left_out"] is None:
            row |= summary(rounds[row["name"]], rounds.get(BASE), row["bytes"])
    return rows


def summary(
    pairs: Sequence[tuple[float, float]],
    base: Sequence[tuple[float, float]] | None,
    n_bytes: int,
) -> dict[str, Any]:
    """Medians and spreads of rounds.

    Args:
        pairs: Microseconds of a decode and of its copy, by round.
        base: Those of the baseline in the same rounds, if it ran.
        n_bytes: Bytes that the decode must read.
    """
    ratios = [us / copy for us, copy in pairs]
    quartiles = statistics.quantiles(ratios, method="inclusive")
    found = {
        "repetitions": len(pairs),
        "op_us_median": statistics.median(us for us, _ in pairs),
        "floor_us_median": statistics.median(copy for _, copy in pairs),
        "ratio_median": statistics.median(ratios),
        "ratio_p25": quartiles[0],
        "ratio_p75": quartiles[2],
        "times_fa3": None,
    }
    found["gb_per_s"] = n_bytes / found["op_us_median"] / 1e3
    if base:
        faster = [theirs / us for (us, _), (theirs, _) in zip(pairs, base, strict=True)]
        found["times_fa3"] = statistics.median(faster)
        found["times_fa3_p25"], _, found["times_fa3_p75"] = statistics.quantiles(
            faster, method="inclusive"
        )
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text, a shape after another."""
    lines = []
    shape = None
    for row in rows:
        if row["shape"] != shape:
            shape = row["shape"]
            lines.append(shape)
        if row["left_out"]:
            lines.append(f"  {row['name']:20} left out: {row['left_out']}")
            continue
        fa3 = "" if row["times_fa3"] is None else f", {row['times_fa3']:.2f} times {BASE}"
        lines.append(
            f"  {row['name']:20} {row['op_us_median']:9.1f} us, {row['ratio_median']:.2f} of a "
            f"copy of its bytes ({row['ratio_p25']:.2f} to {row['ratio_p75']:.2f}){fa3}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows to PATH")
    parser.add_argument("--quick", action="store_true", help="a tiny size, to see that it runs")
    parser.add_argument("--repetitions", type=int, default=20, help="rounds, at least 2")
    parser.add_argument("--seconds", type=float, default=115, help="time of all shapes (115)")
    options = parser.parse_args()
    if options.repetitions < 2:
        parser.error("--repetitions must be 2 or more: a spread needs two rounds")
    shapes = QUICK if options.quick or device().type != "cuda" else SHAPES
    repetitions = 3 if options.quick else options.repetitions
    deadline = time.monotonic() + options.seconds
    rows: list[dict[str, Any]] = []
    for i, shape in enumerate(shapes):
        step = Step(shape)
        part = time_in_turn(step, contenders(step, i < EVERY_FORMAT), repetitions, deadline)
        print(table(part), flush=True)
        rows += part
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
