"""``kvplug reuse explain``: where a recorded answer with reuse diverges from the computed one."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvplug.cli.refusals import refusing
from kvplug.cli.tables import print_table
from kvplug_lab.cli.inputs import check_outputs, model_directory, need_transformers
from kvplug_lab.cli.options import MODEL_HELP, Json, Threads
from kvplug_lab.cli.outputs import print_written, wide_console

if TYPE_CHECKING:
    from kvplug.reuse.drift_record import DriftRecord
    from kvplug_lab.reuse.explain import Explanation, Parted

RUNS = 5
"""Runs whose layers are shown; the rest are in the JSON."""

TOKENS = 16
"""Output tokens shown."""

WIDTH = 150
"""Columns where the output is not a terminal."""


def explain(
    record: Annotated[
        Path, typer.Argument(metavar="RECORD", help="A record that the guard wrote.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help=f"{MODEL_HELP} The record's own by default.", show_default=False),
    ] = None,
    threads: Threads = 0,
    json: Json = None,
) -> None:
    """Recompute a recorded request with the stored KV it used and without.

    Shows layer by layer how far K and V of each run are from computed ones, at which output token
    the greedy answers diverge, how far apart the next-token distributions are, and whether the
    recorded entropies match the recomputed ones.
    """
    with refusing():
        check_outputs(json=json)
        found, read, tokenizer = _explained(record, model, threads)
    console = wide_console(WIDTH)
    show(console, found, read, tokenizer)
    if json is not None:
        text = json_module.dumps(asdict(found), indent=1) + "\n"
        json.write_text(text, encoding="utf-8")
        print_written(console, "figures", json)


def _explained(path: Path, model: str | None, threads: int) -> tuple[Explanation, DriftRecord, Any]:
    from kvplug.errors import KVPlugError
    from kvplug.fingerprint import model_fingerprint
    from kvplug.reuse.drift_record import DriftRecord

    record = DriftRecord.read(path)
    directory = Path(record.model) if model is None else model_directory(model)
    if model is None and not (directory / "config.json").is_file():
        raise KVPlugError(
            f"{path}: model: {record.model} is not a model directory on this machine; "
            "pass one with --model"
        )
    there = model_fingerprint(directory)
    if there != record.fingerprint:
        raise KVPlugError(
            f"{path}: fingerprint: {directory} is another model ({there or 'no weights'}, the "
            f"record is of {record.fingerprint}); pass the right one with --model"
        )
    need_transformers("reuse explain")

    from dataclasses import replace

    import torch
    import transformers

    from kvplug.hosts.transformers import Host
    from kvplug_lab.reuse.explain import adapting_checks
    from kvplug_lab.reuse.explain import explain as compute

    dtype = getattr(torch, record.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise KVPlugError(f"{path}: dtype: {record.dtype!r} is not a float dtype")
    if threads:
        torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    except (OSError, ValueError) as error:
        raise KVPlugError(f"{directory}: the model cannot be loaded: {error}") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError):
        tokenizer = None
    host = Host(loaded, record.block_size)
    engine = replace(host.engine, model=there)
    found = compute(loaded, record, adapting_checks(record, engine), host.layers)
    return found, record, tokenizer


# -- what is shown ---------------------------------------------------------------------------------


def show(console: Console, found: Explanation, record: DriftRecord, tokenizer: Any = None) -> None:
    """Print an explanation."""

    def say(line: str = "") -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    say(
        f"request {found.request_id}: {found.prompt_tokens:,} prompt tokens, "
        f"{found.loaded_tokens:,} of them from stored KV, {len(found.outputs):,} next tokens"
    )
    for family in record.families:
        drift = "beyond" if family.over else "within"
        say(
            f"guard: {drift} the bounds: entropy {family.entropy_drift:.0%} from "
            f"{family.entropy:.3f} nats, log-probability {family.logprob_drift:.3f} nats from "
            f"{family.logprob:.3f} ({family.count} exact answers); breaker {family.state}"
        )
    say()
    if found.runs:
        print_table(console, _runs_table(found.runs))
        print_table(console, _layers_table(found.runs))
    if len(found.runs) > RUNS:
        say(f"{len(found.runs) - RUNS} more runs: see --json")
    print_table(console, _outputs_table(found, tokenizer))
    say(_parting(found))
    kl = [o.kl for o in found.outputs]
    say(f"KL of the next token: mean {sum(kl) / len(kl):.4f} nats, most {max(kl):.4f}")
    exact = sum(o.entropy_exact for o in found.outputs) / len(kl)
    reused = sum(o.entropy_reused for o in found.outputs) / len(kl)
    say(f"mean entropy: {exact:.3f} nats computed, {reused:.3f} with reuse, after the same tokens")
    if found.entropy_off is not None:
        say(
            f"recorded entropies: {found.entropy_off:.4f} nats from the recomputed ones, on average"
        )
    if record.output_ids:
        same = sum(o.recorded == o.reused for o in found.outputs)
        why = "" if found.follows else ": it was sampled, or the engine broke near ties differently"
        say(f"recorded answer: {same} of {len(found.outputs)} tokens as in the recomputed one{why}")
    for note in found.notes:
        say(f"note: {note}")


def _parting(found: Explanation) -> str:
    if found.parts_at is None:
        return f"greedy answers: identical for all {len(found.outputs)} next tokens"
    return f"greedy answers: diverge at output token {found.parts_at}"


def _verdict(run: Parted) -> str:
    if run.exact is None:
        return "computed"
    return "exact" if run.exact else "approximate"


def _runs_table(runs: tuple[Parted, ...]) -> Table:
    shown = Table(title="what was reused", title_justify="left")
    for name in ("run", "segment"):
        shown.add_column(name)
    for name in ("from", "to", "re-\ncomputed", "shift"):
        shown.add_column(name, justify="right")
    shown.add_column("verdict")
    for name in ("confi-\ndence", "K error", "V error", "worst\nlayer"):
        shown.add_column(name, justify="right")
    for i, run in enumerate(runs, 1):
        worst = max(range(len(run.key)), key=lambda layer: run.key[layer] + run.value[layer])
        shown.add_row(
            str(i),
            run.name[:12] if run.exact is not None else "the rest",
            str(run.start),
            str(run.end),
            str(run.computed),
            f"{run.shift:+d}" if run.shift else "",
            _verdict(run),
            "" if run.confidence is None else f"{run.confidence:.2f}",
            _percent(sum(run.key) / len(run.key)),
            _percent(sum(run.value) / len(run.value)),
            str(worst),
        )
    return shown


def _layers_table(runs: tuple[Parted, ...]) -> Table:
    shown = Table(title="relative error of K and V, layer by layer", title_justify="left")
    shown.add_column("layer", justify="right")
    for i in range(min(RUNS, len(runs))):
        shown.add_column(f"K of\nrun {i + 1}", justify="right")
        shown.add_column(f"V of\nrun {i + 1}", justify="right")
    for layer in range(len(runs[0].key)):
        errors = [_percent(e[layer]) for run in runs[:RUNS] for e in (run.key, run.value)]
        shown.add_row(str(layer), *errors)
    return shown


def _percent(error: float) -> str:
    return f"{error:.2%}" if error else "0"


def _outputs_table(found: Explanation, tokenizer: Any) -> Table:
    shown = Table(title="next tokens, after the recorded ones", title_justify="left")
    shown.add_column("token", justify="right")
    for name in ("recorded", "computed", "with\nreuse"):
        shown.add_column(name)
    for name in ("KL", "entropy\ncomputed", "with\nreuse", "recorded"):
        shown.add_column(name, justify="right")

    def word(token: int | None) -> str:
        if token is None:
            return ""
        text = json_module.dumps(tokenizer.decode([token])) if tokenizer is not None else ""
        return f"{token} {text}".strip().replace("[", r"\[")

    for o in found.outputs[:TOKENS]:
        shown.add_row(
            str(o.index),
            word(o.recorded),
            word(o.exact),
            word(o.reused) + (" *" if o.exact != o.reused else ""),
            f"{o.kl:.4f}",
            f"{o.entropy_exact:.3f}",
            f"{o.entropy_reused:.3f}",
            "" if o.entropy_recorded is None else f"{o.entropy_recorded:.3f}",
        )
    return shown
