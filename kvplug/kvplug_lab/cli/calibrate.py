"""``kvplug calibrate``: statistics of a model's K and V, and a format for each layer.

``kvplug calibrate reuse`` is a command of its own; everything else after ``calibrate`` goes to
``formats``, whose name may be left out.
"""

from __future__ import annotations

import json as json_module
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvplug.cli.installed import CommandGroup
from kvplug.cli.refusals import refusing
from kvplug.cli.tables import print_table
from kvplug.model_source import model_label
from kvplug_lab.cli.inputs import (
    check_outputs,
    model_directory,
    need_transformers,
    one_model,
    text_of,
)
from kvplug_lab.cli.options import Json, ModelArgument, ModelOption, Text, Threads
from kvplug_lab.cli.outputs import counted, print_written, wide_console
from kvplug_lab.texts import first_tokens

if TYPE_CHECKING:
    from kvplug.contract import EngineView
    from kvplug_lab.calibrate.run import Assignment, AssignmentSearch
    from kvplug_policies.calibration import Calibration

WIDTH = 150
"""Columns where the output is not a terminal."""

ERRORS = (0.01, 0.05, 0.1)
"""Errors that ranks are shown for."""


class _Commands(CommandGroup):
    """A group whose first command need not be named."""

    prefix = "calibrate."

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = args and (args[0] in self.commands or self.absent(args[0]))
        # A shell completes names of commands.
        if not named and not ctx.resilient_parsing:
            args = ["formats", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    help="Learn statistics of a model from text, for formats or for reuse.",
)


@app.command("formats")
def calibrate(
    model: ModelArgument = None,
    of: ModelOption = None,
    output: Annotated[Path, typer.Option(help="The calibration file to write.")] = Path(
        "calibration.safetensors"
    ),
    text: Text = None,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens to learn from.")] = 8192,
    window: Annotated[int, typer.Option(min=16, help="Tokens read per pass.")] = 512,
    bytes_per_token: Annotated[
        int,
        typer.Option(
            min=0,
            help="Bytes of K and V per token, all layers; a format is chosen for each layer. "
            "0: only write the calibration.",
        ),
    ] = 0,
    candidates: Annotated[
        str,
        typer.Option(metavar="NAME[:OPTION=VALUE...],...", help="Formats to choose from."),
    ] = "plain,int8,int4,kivi,kivi:key_bits=3:value_bits=2",
    by: Annotated[
        str,
        typer.Option(
            metavar="WHAT",
            help="Criterion of the assignment: divergence (of the next token's distribution), "
            "perplexity, or error (of attention outputs; the fastest).",
        ),
    ] = "divergence",
    held_out: Annotated[int, typer.Option(min=16, help="Tokens to measure candidates on.")] = 512,
    section: Annotated[
        Path | None,
        typer.Option(help="Write the chosen section as YAML; printed by default."),
    ] = None,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens per block.")] = 32,
    threads: Threads = 0,
    json: Json = None,
) -> None:
    """Learn a model's keys, values and queries from text, and choose a format for each layer.

    The formats lowrank, merge_heads and residual need the file that it writes. With
    --bytes-per-token every candidate is measured in every layer, one layer at a time; the best
    assignment within the budget is solved for, measured as a whole, and written as a section.

    Reuse of stored KV is calibrated by kvplug calibrate reuse.
    """
    console = wide_console(WIDTH)
    with refusing():
        _check(output, section, json, by)
        _run(
            console, one_model(model, of), output, text, tokens, window, bytes_per_token,
            candidates, by, held_out,
            section, block_size, threads, json,
        )  # fmt: skip


@app.command("transfer")
def transfer(
    model: ModelArgument = None,
    of: ModelOption = None,
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path(
        "transform.safetensors"
    ),
    text: Text = None,
    tokens: Annotated[int, typer.Option(min=256, help="Tokens to learn from.")] = 32768,
    held_out: Annotated[
        int, typer.Option(min=256, help="Tokens to measure rates and losses on.")
    ] = 4096,
    window: Annotated[int, typer.Option(min=64, help="Tokens read per pass.")] = 2048,
    components: Annotated[
        int, typer.Option(min=16, help="Most components kept, of keys and of values.")
    ] = 4096,
    threads: Threads = 0,
) -> None:
    """Learn the bases of K and V that the transfer codec kvtc stores them in."""
    console = wide_console(WIDTH)
    with refusing():
        check_outputs(output=output)
        need_transformers("calibrate transfer")
        chosen = one_model(model, of)
        _transfer(console, chosen, output, text, tokens, held_out, window, components, threads)


def _transfer(
    console: Console,
    model: str,
    output: Path,
    text: Path | None,
    tokens: int,
    held_out: int,
    window: int,
    components: int,
    threads: int,
) -> None:
    import hashlib

    import torch
    import transformers

    from kvplug.errors import KVPlugError
    from kvplug.hosts.transformers import Host
    from kvplug_lab import models
    from kvplug_lab.calibrate.run import windows
    from kvplug_lab.calibrate.statistics import Source
    from kvplug_lab.calibrate.transform import collect, fit

    directory = model_directory(model)
    words = text_of(text)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids: list[int] = tokenizer(words, add_special_tokens=False, verbose=False).input_ids
    begins = first_tokens(directory, tokenizer)
    learn, measure = windows(ids, begins, tokens, held_out, window)
    if threads:
        torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    loaded = loaded.eval()
    layers = Host(loaded, 16).layers
    if len({(v.num_kv_heads, v.head_size, v.rope) for v in layers}) != 1:
        raise KVPlugError(
            f"{model_label(directory)} has layers of different heads or rotations, which one "
            "basis cannot hold; use another transfer codec"
        )
    with counted(len(learn) + len(measure)) as progress:
        found = collect(loaded, layers, learn, measure, progress)
    digest = hashlib.sha256(words.encode()).hexdigest()
    source = Source(models.model_fingerprint(directory), model_label(directory), digest)
    made = fit(found, components, source, str(output))
    made.save(output)
    line = f"transform: {output} ({output.stat().st_size / 1e6:.1f} MB)"
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _check(output: Path, section: Path | None, json: Path | None, by: str) -> None:
    """Refuse what cannot work, before minutes are spent on it."""
    from kvplug.errors import KVPlugError
    from kvplug_lab.calibrate.run import WAYS

    check_outputs(output=output, section=section, json=json)
    if by not in WAYS:
        raise KVPlugError(f"--by {by!r}: use one of {', '.join(WAYS)}")
    need_transformers("calibrate")


def _run(
    console: Console,
    model: str,
    output: Path,
    text: Path | None,
    tokens: int,
    window: int,
    budget: int,
    asked: str,
    by: str,
    held_out: int,
    section: Path | None,
    block_size: int,
    threads: int,
    json: Path | None,
) -> None:
    import hashlib

    import torch
    import transformers

    from kvplug_lab import models
    from kvplug_lab.calibrate import candidates as known
    from kvplug_lab.calibrate.collect import collect
    from kvplug_lab.calibrate.run import search_assignments, windows
    from kvplug_lab.calibrate.statistics import Source, calibration

    wanted = known.candidates(asked, str(output)) if budget else []
    directory = model_directory(model)
    words = text_of(text)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids: list[int] = tokenizer(words, add_special_tokens=False, verbose=False).input_ids
    learn, measure = windows(
        ids, first_tokens(directory, tokenizer), tokens, held_out if budget else 0, window
    )
    if threads:
        torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    loaded = loaded.eval()
    fingerprint = models.model_fingerprint(directory)
    with counted(len(learn)) as progress:
        seen = collect(loaded, learn, progress)
    source = Source(fingerprint, model_label(directory), hashlib.sha256(words.encode()).hexdigest())
    made = calibration(seen, source, str(output))
    made.save(output)
    _print_calibration(console, made)
    line = f"calibration: {output} ({output.stat().st_size / 1e6:.1f} MB)"
    console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not budget:
        if json is not None:
            _write_json(json, made, None)
        return
    engine = _engine(loaded, directory, block_size, fingerprint)
    runs = len(measure) * (len(wanted) * (len(engine.layers) if by != "error" else 0))
    uniform = len(measure) * (1 + len(wanted))
    with counted(runs + uniform) as progress:
        found = search_assignments(loaded, engine, measure, wanted, budget, by, progress)
    _print_search(console, found)
    about = [
        f"Written by kvplug calibrate {model_label(directory)} --bytes-per-token {budget}",
        f"{found.choices[0].bytes_per_token} bytes per token, all layers; chosen by {by}",
    ]
    yaml = known.section([wanted[c] for c in found.chosen], about)
    if section is None:
        console.print(yaml, markup=False, highlight=False, soft_wrap=True)
    else:
        section.write_text(yaml, encoding="utf-8")
        print_written(console, "section", section)
    if json is not None:
        _write_json(json, made, found)


# -- what is asked for -----------------------------------------------------------------------------


def _engine(loaded: Any, directory: Path, block_size: int, fingerprint: str) -> EngineView:
    """The engine that will serve the model: K and V in the type its config names."""
    from dataclasses import replace

    from kvplug.hosts.transformers import Host

    config = json_module.loads((directory / "config.json").read_text(encoding="utf-8"))
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    host = Host(loaded, block_size)
    layers = tuple(replace(layer, dtype=dtype) for layer in host.layers)
    return replace(host.engine, layers=layers, model=fingerprint)


# -- what is shown ---------------------------------------------------------------------------------


def _print_calibration(console: Console, made: Calibration) -> None:
    from kvplug_policies.format.lowrank import smallest_rank

    table = Table(
        title=f"{made.model}: {made.tokens:,} tokens; smallest rank of keys / values by the energy "
        "that may be lost, and the least energy lost by merging two KV heads",
        title_justify="left",
    )
    table.add_column("layer", justify="right")
    for error in ERRORS:
        table.add_column(f"rank at {error:.0%}", justify="right")
    table.add_column("merge, linear", justify="right")
    table.add_column("merge, gain", justify="right")
    for index, geometry in made.geometry.items():
        ranks = [
            " / ".join(
                str(smallest_rank(made.of(index, f"{side}_energy"), error))
                for side in ("key", "value")
            )
            for error in ERRORS
        ]
        merges = ["", ""]
        if geometry.num_kv_heads > 1:
            merges = [
                f"{float(made.of(index, f'merge_{fit}.errors')[0]):.1%}"
                for fit in ("linear", "gain")
            ]
        table.add_row(str(index), *ranks, *merges)
    print_table(console, table)


def _print_search(console: Console, found: AssignmentSearch) -> None:
    shown = not all(math.isnan(loss.divergence) for row in found.losses for loss in row)
    table = Table(
        title="relative attention-output error"
        + (" and divergence (10⁻³ nats)" if shown else "")
        + ", one layer at a time; * chosen",
        title_justify="left",
    )
    table.add_column("layer", justify="right")
    for candidate in found.candidates:
        table.add_column(candidate.label, justify="right", overflow="fold")
    for row, losses in enumerate(found.losses):
        cells = []
        for c, loss in enumerate(losses):
            kl = f"  {loss.divergence * 1e3:.2f}" if shown else ""
            mark = " *" if found.chosen[row] == c else "  "
            cells.append(f"{loss.error:.1%}{kl}{mark}")
        table.add_row(str(row), *cells)
    print_table(console, table)
    base = math.exp(found.nll)
    table = Table(
        title=f"all layers together; perplexity of the full cache: {base:.3f}",
        title_justify="left",
    )
    heads = ("bytes per token", "mean output error", "predicted", "perplexity", "divergence")
    table.add_column("formats")
    for head in heads:
        table.add_column(head, justify="right")
    best = found.uniform
    for choice in found.choices:
        name = "chosen by layer" if choice is found.choices[0] else f"{choice.label} in all"
        table.add_row(
            f"{name}{' (best of these)' if choice is best else ''}", *_cells(choice, found)
        )
    print_table(console, table)


def _cells(choice: Assignment, found: AssignmentSearch) -> Sequence[str]:
    base = math.exp(found.nll)

    def change(nll: float) -> str:
        return "" if math.isnan(nll) else f"{base * math.expm1(nll):+.3f}"

    return (
        f"{choice.bytes_per_token:,}",
        f"{choice.predicted.error:.2%}",
        change(choice.predicted.nll),
        change(choice.measured.nll),
        f"{choice.measured.divergence:.4f}",
    )


def _write_json(path: Path, made: Calibration, found: AssignmentSearch | None) -> None:
    import dataclasses

    plain: dict[str, Any] = {
        "model": made.model,
        "fingerprint": made.fingerprint,
        "text_sha256": made.text_sha256,
        "tokens": made.tokens,
    }
    if found is not None:
        plain["candidates"] = [c.label for c in found.candidates]
        plain["bytes"] = found.sizes
        plain["losses"] = [[dataclasses.asdict(loss) for loss in row] for row in found.losses]
        plain["chosen"] = found.chosen
        plain["choices"] = [dataclasses.asdict(choice) for choice in found.choices]
        plain["nll"] = found.nll
    path.write_text(json_module.dumps(plain, indent=1) + "\n", encoding="utf-8")
