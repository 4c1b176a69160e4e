"""``kvplug eval``: what dropping or coding tokens costs, on real text and a real model."""

from __future__ import annotations

import importlib.util
import json as json_module
import os
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from kvplug_lab.fidelity.report import Row
    from kvplug_lab.fidelity.run import FormatVariant, Variant
    from kvplug_lab.fidelity.tasks import Prompt, Sizes

DTYPES = ("float32", "bfloat16", "float16")

WIDTH = 150
"""Columns where there is no terminal to ask."""

PLOTS = (".png", ".svg", ".pdf")


def evaluate(
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:OPTION=VALUE...],...",
            help="Sequence policies, e.g. snapkv,tova:recent=8, a deployment file, or `all`; may "
            "be repeated. Every installed policy by default.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:OPTION=VALUE...],...",
            help="Formats instead of policies, e.g. int4,kivi:bits=2, @FILE with a section, `all`, "
            "or `peers` for vLLM's own; may be repeated.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str, typer.Option(metavar="PART,...", help="Parts of the context kept, by policies.")
    ] = "0.25,0.5,0.75",
    task: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,...",
            help="perplexity, greedy, passkey, passkey_later, multikey, multikey_later; all by "
            "default. The later ones ask after the cut.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each context.")] = 1024,
    samples: Annotated[int, typer.Option(min=1, help="Prompts of each retrieval task.")] = 10,
    passages: Annotated[int, typer.Option(min=1, help="Passages of plain text.")] = 6,
    scored: Annotated[int, typer.Option(min=1, help="Tokens scored per passage.")] = 256,
    generated: Annotated[int, typer.Option(min=1, help="Tokens generated per passage.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of passages, keys and names.")] = 0,
    once: Annotated[
        bool,
        typer.Option("--once", help="Cut contexts only, never while the text goes on."),
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            envvar="KVPLUG_TEXTS", help="Plain text to read from; Shakespeare by default."
        ),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Model directory; SmolLM2-135M-Instruct by default.")
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens per block; 16, or 32 under formats.", show_default=False),
    ] = None,
    chunk: Annotated[
        int, typer.Option(min=1, help="Tokens of a context read in one pass, under formats.")
    ] = 512,
    piece: Annotated[
        int,
        typer.Option(
            min=1,
            help="Scored tokens fed in one pass, under formats: 1 as in decoding; more are faster, "
            "and flatter every format.",
        ),
    ] = 1,
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help=f"The model's type: {', '.join(DTYPES)}.")
    ] = "float32",
    device: Annotated[
        str, typer.Option(help="Where to run, e.g. cpu or cuda:0; a GPU where there is one.")
    ] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 for torch's choice.")] = 0,
    json: Annotated[
        Path | None, typer.Option(help="Write rows, and the record of every prompt, as JSON.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help=f"Draw each metric against the budget ({', '.join(PLOTS)})."),
    ] = None,
    save_prompts: Annotated[
        Path | None,
        typer.Option(help="Write the prompts, in tokens, for another program to run; then stop."),
    ] = None,
) -> None:
    """Measure what policies and formats cost: perplexity, retrieval and greedy agreement.

    The model runs under Hugging Face transformers with the policy objects that the engine runs.
    Every prompt is read once, with the whole cache, and then cut by each policy to each budget;
    the full cache is the row to compare with. With --format it is read in chunks under each
    format instead, and what follows is computed from the codes. Intervals are 95 %, over the
    prompts.
    """
    from kvplug.errors import DeploymentError, KVPlugError
    from kvplug_lab.fidelity import variants as wanted
    from kvplug_lab.fidelity.tasks import TASKS, Sizes

    terminal = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if terminal else WIDTH)
    try:
        tasks = _tasks(task, TASKS)
        _check_outputs(json, plot, save_prompts)
        if dtype not in DTYPES:
            raise KVPlugError(f"--dtype {dtype!r}: use one of {', '.join(DTYPES)}")
        if policy and format:
            raise KVPlugError(
                "--policy and --format: measure one of them at a time; the engine runs both "
                "together"
            )
        variants: Sequence[Variant | FormatVariant]
        if format:
            variants = wanted.formats(format)
        else:
            asked = {} if save_prompts else wanted.policies(policy)
            variants = wanted.variants(asked, wanted.budgets(budget), once)
        sizes = Sizes(context, samples, passages, scored, generated, seed)
        directory = _model(model, console)
        prompts = _prompts(directory, text, sizes, tasks)
        if save_prompts is not None:
            plain = {"sizes": vars(sizes), "prompts": [prompt.plain() for prompt in prompts]}
            save_prompts.write_text(json_module.dumps(plain) + "\n", encoding="utf-8")
            console.print(f"prompts: {save_prompts}", markup=False, highlight=False, soft_wrap=True)
            return
        about: dict[str, Any] = {"block_size": block_size or 16, "dtype": dtype}
        if format:
            about |= {"block_size": block_size or 32, "chunk": chunk, "piece": piece}
        about |= {"once": once, **vars(sizes)}
        _measure(console, directory, prompts, variants, about, device, threads, json, plot)
    except DeploymentError as error:
        for refusal in error.refusals:
            typer.echo(" ".join(refusal.text(error.source).splitlines()), err=True)
        raise typer.Exit(error.exit_code) from None
    except KVPlugError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None


def _measure(
    console: Console,
    directory: Path,
    prompts: Sequence[Prompt],
    variants: Sequence[Variant | FormatVariant],
    about: dict[str, Any],
    device: str,
    threads: int,
    json: Path | None,
    plot: Path | None,
) -> None:
    import time

    import torch
    import transformers

    from kvplug import __version__
    from kvplug.errors import KVPlugError
    from kvplug.hosts.transformers import Host
    from kvplug_lab.fidelity.records import Run
    from kvplug_lab.fidelity.report import summarise
    from kvplug_lab.fidelity.run import FormatVariant, Variant, run, run_formats, steps

    if threads:
        torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, about["dtype"])
    )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        loaded = loaded.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split())
        raise KVPlugError(f"--device {device!r} cannot be used: {said}") from error
    formats = [variant for variant in variants if isinstance(variant, FormatVariant)]
    policies = [variant for variant in variants if isinstance(variant, Variant)]
    if formats:
        # What an engine holds and codes, whatever the model is measured in.
        kv_dtype = torch.bfloat16 if about["dtype"] == "float32" else None
        host = Host(loaded, about["block_size"], about["chunk"], kv_dtype)
        for format in formats:
            format.build(host)
    else:
        host = Host(loaded, about["block_size"])
        for variant in policies:
            variant.build(host, about["context"])
    started, cpu = time.monotonic(), time.process_time()
    with _shown(steps(prompts, variants)) as progress:
        if formats:
            records = list(run_formats(host, prompts, formats, progress, about["piece"]))
        else:
            records = list(run(host, prompts, policies, progress))
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    rows = summarise(records)
    _print(console, rows, about["context"])
    console.print(
        f"{len(prompts)} prompts, {len(variants)} "
        f"{'formats' if formats else 'policies and budgets'}, {seconds:,.0f} s "
        f"({cpu:,.0f} s of processor time).",
        markup=False,
        highlight=False,
    )
    if json is not None:
        about = {
            "program": f"kvplug {__version__}",
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "model": directory.name,
            "device": device,
            "threads": torch.get_num_threads(),
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1),
            **about,
        }
        Run(about, records).save(json, [row.plain() for row in rows])
        console.print(f"rows: {json}", markup=False, highlight=False, soft_wrap=True)
    if plot is not None:
        from kvplug_lab.fidelity.plot import draw

        draw(plot, rows)
        console.print(f"plot: {plot}", markup=False, highlight=False, soft_wrap=True)


# -- what is asked for -----------------------------------------------------------------------------


def _tasks(asked: str | None, known: Sequence[str]) -> list[str]:
    from kvplug.errors import KVPlugError

    if asked is None:
        return list(known)
    found = [one.strip() for one in asked.split(",") if one.strip()]
    unknown = [one for one in found if one not in known]
    if unknown or not found:
        raise KVPlugError(f"--task {asked!r}: use some of {', '.join(known)}")
    return found


def _check_outputs(json: Path | None, plot: Path | None, prompts: Path | None) -> None:
    """Refuse outputs that cannot be written before minutes are spent on them."""
    from kvplug.errors import KVPlugError

    for option, path in (("--json", json), ("--plot", plot), ("--save-prompts", prompts)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise KVPlugError(f"{option}: {path} cannot be written: its folder must exist")
    if plot is None:
        return
    if plot.suffix not in PLOTS:
        raise KVPlugError(f"--plot: {plot} must end in {', '.join(PLOTS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise KVPlugError("--plot needs matplotlib: pip install 'kvplug[plots]'")


def _model(asked: Path | None, console: Console) -> Path:
    from kvplug.errors import KVPlugError
    from kvplug_lab import models

    if importlib.util.find_spec("transformers") is None:
        raise KVPlugError("kvplug eval needs transformers: pip install 'kvplug[demo]'")
    if asked is None:
        return models.smollm2(progress=lambda line: console.print(line, markup=False))
    if not (asked / "config.json").is_file():
        raise KVPlugError(f"--model: {asked} is no model directory: it has no config.json")
    return asked


def _prompts(
    directory: Path, text: Path | None, sizes: Sizes, tasks: Sequence[str]
) -> list[Prompt]:
    from transformers import AutoTokenizer

    from kvplug.errors import KVPlugError
    from kvplug_lab import texts
    from kvplug_lab.fidelity.tasks import build

    if text is None:
        words = texts.shakespeare()
    else:
        try:
            words = text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
            raise KVPlugError(f"--text: {text} cannot be read: {reason}") from error
    tokenizer = AutoTokenizer.from_pretrained(directory)

    def encode(part: str) -> list[int]:
        ids: list[int] = tokenizer(part, add_special_tokens=False).input_ids
        return ids

    return build(encode, words, sizes, tasks, _bos(directory, tokenizer))


def _bos(directory: Path, tokenizer: Any) -> list[int]:
    """What a text begins with: what the tokenizer adds, and for Gemma what it should."""
    config = json_module.loads((directory / "config.json").read_text(encoding="utf-8"))
    if str(config.get("model_type", "")).startswith("gemma"):
        return [tokenizer.bos_token_id]
    added: list[int] = tokenizer("").input_ids
    return added[:1]


# -- what is shown ---------------------------------------------------------------------------------


class _Bar:
    def __init__(self, total: int):
        self._progress = Progress(
            TextColumn("{task.description:<36}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("reading", total=total)

    def __enter__(self) -> Callable[[str], None]:
        self._progress.start()
        return lambda line: self._progress.update(self._task, advance=1, description=line)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


class _Lines:
    """A line now and then, where there is no terminal for a bar."""

    def __init__(self, total: int):
        self._total, self._done, self._said = total, 0, 0

    def __enter__(self) -> Callable[[str], None]:
        return self._step

    def _step(self, line: str) -> None:
        self._done += 1
        part = self._done * 20 // self._total
        if part > self._said:
            self._said = part
            typer.echo(f"{self._done / self._total:4.0%} {line}", err=True)

    def __exit__(self, *_: object) -> None:
        return None


def _shown(total: int) -> _Bar | _Lines | nullcontext[Callable[[str], None]]:
    return _Bar(total) if Console(stderr=True).is_terminal else _Lines(total)


def _print(console: Console, rows: Sequence[Row], context: int) -> None:
    from kvplug_lab.fidelity.records import FULL
    from kvplug_lab.fidelity.report import METRICS, SHOWN

    shown = [m for m in METRICS if m.name in SHOWN and any(r.metric == m.name for r in rows)]
    coded = any(row.bytes is not None for row in rows)
    table = Table(
        title=f"contexts of {context:,} tokens; mean and 95 % interval over the prompts; "
        "↑ higher is better, ↓ lower" + ("; 1/n of bfloat16's bytes" if coded else ""),
        title_justify="left",
    )
    table.add_column("format" if coded else "policy", overflow="fold", min_width=12)
    table.add_column("bytes/token" if coded else "kept", justify="right", no_wrap=True)
    for metric in shown:
        table.add_column(f"{metric.label} {'↑' if metric.higher else '↓'}", justify="right")
    by_key: dict[tuple[str, float], dict[str, Row]] = {}
    for row in rows:
        by_key.setdefault((row.variant, row.budget), {})[row.metric] = row
    ordered = sorted(by_key, key=lambda key: (key[0] != FULL, list(by_key).index(key)))
    for variant, budget in ordered:
        found = by_key[variant, budget]
        kept: float | None = next(iter(found.values())).bytes
        if kept is None:
            kept = sum(row.held for row in found.values()) / len(found)
        cells = []
        for metric in shown:
            one = found.get(metric.name)
            cells.append(
                "-"
                if one is None
                else f"{one.value:{metric.form}}\n{one.low:{metric.form}} {one.high:{metric.form}}"
            )
        table.add_row(
            variant,
            f"{kept:,.0f}\n" + (f"1/{1 / budget:.2f}" if coded else f"{budget:.0%}"),
            *cells,
            style="dim" if variant == FULL else None,
        )
    console.print(table)
