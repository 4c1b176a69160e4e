"""``kvplug gpu-check``: checks and measures kvplug on a machine with a GPU."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvplug import __version__
from kvplug.cli.refusals import refusing
from kvplug.errors import KVPlugError
from kvplug_lab.cli.inputs import check_outputs, model_directory
from kvplug_lab.cli.options import Json

if TYPE_CHECKING:
    from kvplug_lab.gpu_check.engines import Machine
    from kvplug_lab.gpu_check.parts import Group, Part, Report
    from kvplug_lab.gpu_check.speed import Load

PARTS = ("kernels", "exact", "policies", "speed", "bench")
RESULTS = "gpu-check.json"
CHECKOUT = Path(__file__).resolve().parents[3]


class WrongOption(KVPlugError):
    """An option has a value that cannot be used; the message says which and what to do."""

    exit_code = 2


def gpu_check(
    only: Annotated[
        str, typer.Option(metavar="PART,...", help="Parts to run, of: " + ", ".join(PARTS) + ".")
    ] = ",".join(PARTS),
    out: Annotated[
        Path,
        typer.Option(
            envvar="OUT", file_okay=False, help=f"Folder for {RESULTS} and logs of failures."
        ),
    ] = Path("gpu-check"),
    seconds: Annotated[float, typer.Option(min=1, help="Time of all parts together.")] = 470,
    cases: Annotated[
        str,
        typer.Option(
            metavar="NAME,...", help="Cases of `exact` and `policies` that begin so; all if empty."
        ),
    ] = "",
    rows: Annotated[
        str, typer.Option(metavar="NAME,...", help="Rows of `speed`; all if empty.")
    ] = "",
    tests: Annotated[
        str, typer.Option(metavar="EXPRESSION", help="Kernel tests, as pytest's -k selects them.")
    ] = "",
    requests: Annotated[int, typer.Option(min=1, help="Requests of `speed`.")] = 48,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt of `speed`.")] = 2048,
    output: Annotated[int, typer.Option(min=1, help="Tokens of an answer of `speed`.")] = 512,
    fit: Annotated[int, typer.Option(min=1, help="Full requests that fit the KV memory.")] = 8,
    row_seconds: Annotated[float, typer.Option(min=1, help="Longest time of a row.")] = 45,
    wave: Annotated[int, typer.Option(min=1, help="Engines of `speed` that live at once.")] = 7,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model for `speed`: a directory, ORG/NAME of the Hugging Face hub, or a name "
            "such as smollm2; made-up weights of 3B by default.",
            show_default=False,
        ),
    ] = None,
    engines: Annotated[
        int,
        typer.Option(
            min=0, help="Engines of checks that live at once; 0 for one per 3 cores and part."
        ),
    ] = 0,
    workers: Annotated[
        int, typer.Option(min=0, help="Workers of the kernel tests; 0 for all cores but two.")
    ] = 0,
    repetitions: Annotated[int, typer.Option(min=2, help="Repetitions of a benchmark.")] = 10,
    device: Annotated[
        str, typer.Option(help="cuda; or cpu, to try `exact` and `policies` without a GPU.")
    ] = "cuda",
    json: Json = None,
    root: Annotated[
        Path, typer.Option(file_okay=False, help="Checkout whose tests and benchmarks are run.")
    ] = CHECKOUT,
) -> None:
    """Check and measure kvplug on a machine with a GPU, within a bounded time.

    Runs the kernel tests natively (`kernels`), compares engines with oracles and with stock vLLM
    (`exact`), serves under every policy with CUDA graphs (`policies`), measures deployments
    against stock in the same KV memory (`speed`) and times kernels (`bench`). Results are printed
    as they come and written to OUT as JSON. Exits with code 1 if a check failed or did not run.
    """
    from kvplug_lab.gpu_check import speed
    from kvplug_lab.gpu_check.engines import open_machine
    from kvplug_lab.gpu_check.parts import Results, run_groups
    from kvplug_lab.gpu_check.report import summary

    end = time.monotonic() + seconds
    with refusing(2):
        chosen = _chosen(only, device, root)
        check_outputs(json=json)
        directory = model_directory(model) if model is not None else None
        out.mkdir(parents=True, exist_ok=True)
        load = speed.Load(requests, prompt, output, fit, row_seconds=row_seconds)
        cores = os.cpu_count() or 1
        with tempfile.TemporaryDirectory(prefix="kvplug-gpu-check-") as scratch:
            machine = open_machine(device, Path(scratch), root)
            results = Results(out / RESULTS, _head(machine, load), _say)
            _say(f"on {results.data['machine']}")
            side_by_side = engines or max(1, cores // 3)
            parts = _parts(
                machine,
                side_by_side,
                workers or max(1, cores - 2),
                _split(cases),
                _split(rows),
                tests,
                load,
                directory,
                wave,
                repetitions,
            )
            try:
                run_groups(_groups(chosen, parts), end - time.monotonic(), results)
            finally:
                _keep_logs(results.data, machine.folder, out)
    _say("\n" + summary(results.data))
    _say(f"results: {results.file}")
    if json is not None:
        json.write_text(results.file.read_text(encoding="utf-8"), encoding="utf-8")
    raise typer.Exit(0 if results.ok else 1)


def _say(line: str) -> None:
    print(line, flush=True)


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _chosen(only: str, device: str, root: Path) -> list[str]:
    chosen = _split(only)
    if unknown := [name for name in chosen if name not in PARTS]:
        raise WrongOption(
            f"--only: unknown part {unknown[0]!r}. Fix: choose from {', '.join(PARTS)}."
        )
    if device not in ("cuda", "cpu"):
        raise WrongOption(f"--device: must be cuda or cpu, not {device!r}. Fix: pass one of them.")
    if device == "cpu" and (measured := [n for n in chosen if n in ("speed", "bench")]):
        raise WrongOption(
            f"--device cpu: {measured[0]} measures a GPU. Fix: pass --only kernels,exact,policies."
        )
    if not (root / "kernels" / "tests").is_dir() or not (root / "integration_tests").is_dir():
        raise WrongOption(
            f"--root: {root} is no checkout: its tests are missing. Fix: pass --root CHECKOUT."
        )
    return chosen


def _parts(
    machine: Machine,
    side_by_side: int,
    workers: int,
    cases: Sequence[str],
    rows: Sequence[str],
    tests: str,
    load: Load,
    model: Path | None,
    wave: int,
    repetitions: int,
) -> dict[str, Part]:
    from kvplug_lab.gpu_check import benches, exact, kernels, policies, speed
    from kvplug_lab.gpu_check.parts import Part

    folder, root = machine.folder, machine.root

    def run_kernels(report: Report, deadline: float) -> None:
        select = ["-k", tests] if tests else []
        kernels.run_tests(root, folder, workers, report, deadline, select)

    def run_exact(report: Report, deadline: float) -> None:
        exact.run_exact(machine, _tiny(folder), cases, side_by_side, report, deadline)

    def run_policies(report: Report, deadline: float) -> None:
        policies.run_policies(machine, _tiny(folder), cases, side_by_side, report, deadline)

    def run_speed(report: Report, deadline: float) -> None:
        speed.run_speed(machine, rows, load, model, wave, report, deadline)

    def run_bench(report: Report, deadline: float) -> None:
        benches.run_benches(root, folder, report, deadline, repetitions=repetitions, quick=False)

    runs = (run_kernels, run_exact, run_policies, run_speed, run_bench)
    return {name: Part(name, run) for name, run in zip(PARTS, runs, strict=True)}


def _groups(chosen: Sequence[str], parts: dict[str, Part]) -> list[Group]:
    """Checks side by side; what is timed alone after them."""
    from kvplug_lab.gpu_check.parts import Group

    def some(*names: str) -> list[Part]:
        return [parts[name] for name in names if name in chosen]

    return [
        Group(some("kernels", "exact", "policies"), 0.38),
        Group(some("speed"), 0.52),
        Group(some("bench"), 0.10),
    ]


def _tiny(folder: Path) -> Path:
    """The tiny model, made by whoever needs it first."""
    from filelock import FileLock

    from kvplug_lab.models import tiny_llama

    with FileLock(folder / "tiny.lock"):
        made = folder / "tiny" / "model.safetensors"
        return made.parent if made.is_file() else tiny_llama(folder / "tiny")


def _head(machine: Machine, load: Load) -> dict[str, Any]:
    from kvplug_lab.gpu_check import speed

    facts = dict(machine.facts)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "kvplug": __version__,
        "commit": _output("git", "-C", str(machine.root), "rev-parse", "--short", "HEAD"),
        "machine": facts | {"driver": driver, "cores": os.cpu_count(), "host": platform.machine()},
        "load": speed.load_facts(load),
    }


def _output(*command: str) -> str | None:
    """First line that a command prints, or None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if lines else None


def _keep_logs(data: dict[str, Any], folder: Path, out: Path) -> None:
    """Keep the ends of engines' logs in one file, those of failed rows at length."""
    from kvplug_lab.gpu_check.engines import log_stem

    failed = {
        log_stem(f"{name} {row['name']}")
        for name, part in data["parts"].items()
        for row in part["rows"]
        if not row["ok"]
    }
    with (out / "engines.log").open("w", encoding="utf-8") as kept:
        for log in sorted(folder.glob("engine-*.log")):
            text = log.read_text(encoding="utf-8", errors="replace")
            mine = log.stem.removeprefix("engine-")
            kept.write(f"===== {mine}\n{text[-60_000:] if mine in failed else text[-2_000:]}\n")
    for name in ("kernel-tests.log", "bench.log"):
        if (folder / name).is_file():
            shutil.copy(folder / name, out / name)
