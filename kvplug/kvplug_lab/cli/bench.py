"""``kvplug bench``: the overhead of kvplug, as ratios and microseconds of one run."""

from __future__ import annotations

import json as json_module
import os
import platform
import sys
import tempfile
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvplug.cli.refusals import refusing
from kvplug.cli.tables import print_table
from kvplug_lab.cli.inputs import check_outputs, model_directory
from kvplug_lab.cli.options import MODEL, Json, Model
from kvplug_lab.cli.outputs import print_written


def bench(
    json: Json = None,
    model: Model = MODEL,
    rounds: Annotated[int, typer.Option(min=2, help="Turns each engine takes.")] = 12,
    steps: Annotated[int, typer.Option(min=2, help="Scheduler steps measured per row.")] = 200,
    engines: Annotated[bool, typer.Option(help="Measure engine steps as well.")] = True,
) -> None:
    """Measure the overhead of kvplug in engine steps, scheduler steps and worker steps."""
    from kvplug_lab import models
    from kvplug_lab.engine import bench as host

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    console = Console(soft_wrap=True)
    found: dict[str, Any] = {"machine": {"cpu": _cpu(), "cores": os.cpu_count()}}
    with refusing(1):
        check_outputs(json=json)
        if engines:
            directory = model_directory(model)
            found["engine_steps"] = host.engine_steps(directory, rounds, _say)
            table = Table(title="decode step of 16 requests, engines taking turns")
            for column in ("engine", "ms", "ratio to stock"):
                table.add_column(column)
            for name, row in found["engine_steps"].items():
                table.add_row(name, row["ms"].text(".2f"), row["ratio"].text(".3f"))
            print_table(console, table)
        with tempfile.TemporaryDirectory(prefix="kvplug-bench-") as scratch:
            tiny = models.tiny_llama(Path(scratch) / "tiny")
            table = Table(title="scheduler step, paired with stock on the same load, microseconds")
            for column in ("running", "section", "stock", "added by kvplug", "in the connector"):
                table.add_column(column)
            found["scheduler_steps"] = {}
            for running in (10, 100, 1000):
                _say(f"scheduler steps of {running} running requests")
                sections = {name: host.ENGINES[name] for name in ("{}", "lru", "sink_window")}
                rows = host.scheduler_steps(tiny, running, steps, sections)
                found["scheduler_steps"][running] = rows
                for name, row in rows.items():
                    table.add_row(
                        str(running),
                        name,
                        *(row[k].text(",.1f") for k in ("stock_us", "added_us", "connector_us")),
                    )
            print_table(console, table)
        table = Table(title="compacting one decode step's metadata on the worker, microseconds")
        for column in ("rows", "microseconds"):
            table.add_column(column)
        found["worker_steps"] = {}
        for rows_ in (10, 100, 1000):
            spread = host.worker_steps(rows_, steps)
            found["worker_steps"][rows_] = spread
            table.add_row(str(rows_), spread.text(",.0f"))
        print_table(console, table)
    if json is not None:
        text = json_module.dumps(found, indent=1, default=_plain)
        json.write_text(text, encoding="utf-8")
        print_written(console, "figures", json)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{value!r} is not JSON")


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
