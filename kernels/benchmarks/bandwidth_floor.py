"""Time an operation against a plain copy that moves the same number of bytes."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

Call = Callable[[], object]


@dataclass
class Row:
    """One operation at one size; times in microseconds, ratio is op / floor per repetition. The
    floor is a copy, or another operation that ``baseline`` names."""

    op: str
    path: str
    shape: str
    bytes: int
    repetitions: int
    op_us_median: float
    floor_us_median: float
    ratio_median: float
    ratio_p25: float
    ratio_p75: float
    ratio_min: float
    ratio_max: float
    gb_per_s: float
    device: str
    torch: str
    triton: str
    baseline: str = "a copy"


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows to PATH")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--repetitions", type=int, default=30, help="A/B pairs per row, at least 2")
    return parser.parse_args()


def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "not installed"


def _timer(call: Call, inner: int) -> Callable[[], float]:
    """A function that runs ``call`` ``inner`` times and returns microseconds per call.

    On a GPU the calls are replayed from a CUDA graph, which leaves launch overhead in Python
    out of the time.
    """
    call()
    if not torch.cuda.is_available():

        def cpu_time() -> float:
            start = time.perf_counter()
            for _ in range(inner):
                call()
            return (time.perf_counter() - start) * 1e6 / inner

        return cpu_time

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            call()
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def gpu_time() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / inner

    return gpu_time


def compare(
    op: str,
    path: str,
    shape: str,
    call: Call,
    n_bytes: int,
    *,
    repetitions: int,
    inner: int,
    baseline: tuple[str, Call] | None = None,
) -> Row:
    """Interleave ``call`` with a copy that reads and writes ``n_bytes`` in total, or with the
    baseline given."""
    if baseline is None:
        source = torch.zeros(max(n_bytes // 2, 1), dtype=torch.uint8, device=device())
        target = torch.zeros_like(source)
        baseline = ("a copy", lambda: target.copy_(source))
    time_op = _timer(call, inner)
    time_floor = _timer(baseline[1], inner)
    pairs = []
    for i in range(repetitions + 1):
        if i % 2:
            floor_us = time_floor()
            op_us = time_op()
        else:
            op_us = time_op()
            floor_us = time_floor()
        pairs.append((op_us, floor_us))
    pairs = pairs[1:]
    ratios = [op_us / floor_us for op_us, floor_us in pairs]
    quartiles = statistics.quantiles(ratios, method="inclusive")
    op_us = statistics.median(op_us for op_us, _ in pairs)
    return Row(
        op=op,
        path=path,
        shape=shape,
        bytes=n_bytes,
        repetitions=repetitions,
        op_us_median=op_us,
        floor_us_median=statistics.median(floor_us for _, floor_us in pairs),
        ratio_median=statistics.median(ratios),
        ratio_p25=quartiles[0],
        ratio_p75=quartiles[2],
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        gb_per_s=n_bytes / op_us / 1e3,
        device=_device_name(),
        torch=torch.__version__,
        triton=_triton_version(),
        baseline=baseline[0],
    )


def compare_paths(
    op: str,
    shape: str,
    taken: Callable[..., object],
    naive: Callable[..., object] | None,
    call: Callable[[Callable[..., object]], Call],
    n_bytes: int,
    *,
    repetitions: int,
    inner: int,
    most_naive: int = 3,
) -> list[Row]:
    """`compare` what an operation takes on this device and, on a CPU, its naive path, once at a
    time and ``most_naive`` times at most; None where that would take too long. ``call`` gives
    either its arguments."""
    path = "triton" if device().type == "cuda" else "vectorized"
    rows = [compare(op, path, shape, call(taken), n_bytes, repetitions=repetitions, inner=inner)]
    if naive is not None and device().type == "cpu":
        few = min(repetitions, most_naive)
        rows.append(compare(op, "naive", shape, call(naive), n_bytes, repetitions=few, inner=1))
    return rows


def report(rows: list[Row], path: Path | None) -> None:
    print(f"device {rows[0].device}, torch {rows[0].torch}, triton {rows[0].triton}")
    if not torch.cuda.is_available():
        print("no GPU: these rows time the vectorized and naive paths, not the Triton kernel")
    for row in rows:
        print(
            f"{row.op} [{row.path}] {row.shape}: {row.bytes / 1e6:.2f} MB moved, "
            f"{row.op_us_median:.1f} us against {row.baseline} at {row.floor_us_median:.1f} us, "
            f"ratio median {row.ratio_median:.2f} (quartiles {row.ratio_p25:.2f} to "
            f"{row.ratio_p75:.2f}, range {row.ratio_min:.2f} to {row.ratio_max:.2f}, "
            f"n={row.repetitions}), {row.gb_per_s:.2f} GB/s"
        )
    if path is not None:
        path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
