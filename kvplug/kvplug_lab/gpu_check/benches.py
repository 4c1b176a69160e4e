"""The kernel benchmarks, one after another in one process, so that torch is imported once."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from kvplug.errors import KVPlugError
from kvplug_lab.gpu_check.parts import Report

PEERS = "decode_peers"
"""Beside the operations': decoding against vLLM's and FlashInfer's."""
FIRST = (PEERS, "paged_attend_quant", "quant_write", "compact_kv", "attention_mass", "select_top")
"""Operations whose figures matter most come first: time may run out."""


def run_benches(
    root: Path, folder: Path, report: Report, deadline: float, *, repetitions: int, quick: bool
) -> None:
    """Run ``kernels/benchmarks/bench_*.py`` and ``decode_peers.py`` of a checkout until the
    deadline.

    Args:
        root: Checkout.
        folder: Where JSON and logs go.
        report: Gets a row per operation and size: the fields of the benchmark's own rows.
        deadline: When what still runs is killed.
        repetitions: Repetitions per row.
        quick: Measure tiny sizes alone.

    Raises:
        KVPlugError: Some benchmarks did not run in time.
    """
    benchmarks = root / "kernels" / "benchmarks"
    names = [file.stem.removeprefix("bench_") for file in sorted(benchmarks.glob("bench_*.py"))]
    names += [PEERS] if (benchmarks / f"{PEERS}.py").exists() else []
    names.sort(key=lambda name: (name not in FIRST, FIRST.index(name) if name in FIRST else 0))
    while names:
        # A fault on the device spoils the whole process: the next one goes on after it.
        with (folder / "bench.log").open("a", encoding="utf-8") as log:
            child = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "kvplug_lab.gpu_check.benches",
                    str(benchmarks),
                    str(folder),
                    str(repetitions),
                    str(int(quick)),
                    *names,
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
            assert child.stdout is not None
            timer = _Killer(child, deadline)
            try:
                for line in child.stdout:
                    if line.startswith("done "):
                        _report(json.loads(line[5:]), folder, report)
                        names.remove(json.loads(line[5:])["name"])
            finally:
                timer.stop()
                child.wait()
        if names and time.monotonic() >= deadline:
            raise KVPlugError(f"out of time before {', '.join(names)}")
        if names:
            failed = names.pop(0)
            tail = (folder / "bench.log").read_text(encoding="utf-8", errors="replace")[-600:]
            row = {"name": failed, "ok": False, "error": f"exit code {child.returncode}: {tail}"}
            report(row, f"{failed}: the process ended with code {child.returncode}")


def _report(done: dict[str, Any], folder: Path, report: Report) -> None:
    if done["error"]:
        report({**done, "ok": False}, f"{done['name']}: {done['error']}")
        return
    file = folder / f"bench-{done['name']}.json"
    for row in json.loads(file.read_text(encoding="utf-8")):
        line = f"{row['op']} [{row['path']}] {row['shape']}: "
        if row.get("left_out"):
            line += f"left out: {row['left_out']}"
        else:
            line += f"{row['op_us_median']:.1f} us, {row['ratio_median']:.2f} of {row['baseline']}"
        if row.get("times_fa3"):
            line += f", {row['times_fa3']:.2f} times FA3 bf16"
        report({**row, "name": row["op"], "ok": True}, line)
    file.unlink()


class _Killer:
    """Ends a process at a deadline unless it was stopped before."""

    def __init__(self, child: subprocess.Popen[str], deadline: float):
        from threading import Timer

        self._child = child
        self._timer = Timer(max(0.0, deadline - time.monotonic()), self._kill)
        self._timer.daemon = True
        self._timer.start()

    def _kill(self) -> None:
        os.killpg(self._child.pid, signal.SIGKILL)

    def stop(self) -> None:
        self._timer.cancel()


def _main(benchmarks: str, folder: str, repetitions: str, quick: str, *names: str) -> None:
    """A child: run the named benchmarks, and print a line after each."""
    sys.path.insert(0, benchmarks)
    out = os.dup(1)
    os.dup2(2, 1)
    for name in names:
        output = Path(folder) / f"bench-{name}.json"
        sys.argv = [name, "--json", str(output), "--repetitions", repetitions]
        sys.argv += ["--quick"] * int(quick)
        error = None
        try:
            script = f"{name}.py" if name == PEERS else f"bench_{name}.py"
            runpy.run_path(str(Path(benchmarks) / script), run_name="__main__")
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"[:600]
            if "CUDA" in error:
                raise
        os.write(out, f"done {json.dumps({'name': name, 'error': error})}\n".encode())


if __name__ == "__main__":
    _main(*sys.argv[1:])
