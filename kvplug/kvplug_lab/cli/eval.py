"""``kvplug eval``: what evicting or encoding tokens costs, on real text and a real model."""

from __future__ import annotations

import json as json_module
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvplug.cli.refusals import refusing
from kvplug_lab.cli.inputs import (
    PLOTS,
    check_outputs,
    check_plot,
    encoder_of,
    first_tokens,
    model_directory,
    need_transformers,
    text_of,
)
from kvplug_lab.cli.options import Model, Text, Threads
from kvplug_lab.cli.outputs import counted, print_written, wide_console

if TYPE_CHECKING:
    from kvplug_lab.fidelity.report import Row
    from kvplug_lab.fidelity.run import FormatVariant, Variant
    from kvplug_lab.fidelity.tasks import Prompt, PromptSizes

DTYPES = ("float32", "bfloat16", "float16")

WIDTH = 150
"""Columns where the output is not a terminal."""


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
        str, typer.Option(metavar="PART,...", help="Shares of the context that policies keep.")
    ] = "0.25,0.5,0.75",
    task: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,...",
            help="perplexity, greedy, passkey, passkey_later, multikey, multikey_later; all by "
            "default. The later ones ask after the eviction.",
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
        typer.Option("--once", help="Evict once, after the prompt; never during generation."),
    ] = False,
    text: Text = None,
    model: Model = None,
    block_size: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens per block; 16, or 32 under formats.", show_default=False),
    ] = None,
    chunk: Annotated[
        int, typer.Option(min=1, help="Tokens of a context read per pass, under formats.")
    ] = 512,
    piece: Annotated[
        int,
        typer.Option(
            min=1,
            help="Scored tokens fed per pass, under formats: 1 as in decoding; more is faster, and "
            "makes every format look better.",
        ),
    ] = 1,
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help=f"The model's dtype: {', '.join(DTYPES)}.")
    ] = "float32",
    device: Annotated[
        str, typer.Option(help="Device, e.g. cpu or cuda:0; a GPU if there is one.")
    ] = "auto",
    threads: Threads = 0,
    json: Annotated[
        Path | None, typer.Option(help="Write the rows and the record of every prompt as JSON.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help=f"Draw each metric against the budget ({', '.join(PLOTS)})."),
    ] = None,
    save_prompts: Annotated[
        Path | None,
        typer.Option(help="Write the prompts, as tokens, for another program to run, and stop."),
    ] = None,
) -> None:
    """Measure what policies and formats cost: perplexity, retrieval and greedy agreement.

    The model runs under Hugging Face transformers with the policy objects that the engine runs.
    Every prompt is read once, with the full cache, and then pruned by each policy to each budget;
    the row of the full cache is the baseline. With --format it is read in chunks under each format
    instead, and what follows is computed from the encoded cache. Intervals are 95 %, over the
    prompts.
    """
    from kvplug.errors import KVPlugError
    from kvplug_lab.fidelity import variants as wanted
    from kvplug_lab.fidelity.tasks import TASKS, PromptSizes

    console = wide_console(WIDTH)
    with refusing():
        tasks = _tasks(task, TASKS)
        check_outputs(json=json, plot=plot, save_prompts=save_prompts)
        check_plot(plot)
        if dtype not in DTYPES:
            raise KVPlugError(f"--dtype {dtype!r}: use one of {', '.join(DTYPES)}")
        if policy and format:
            raise KVPlugError(
                "--policy and --format cannot be measured together; an engine can run both"
            )
        variants: Sequence[Variant | FormatVariant]
        if format:
            variants = wanted.formats(format)
        else:
            asked = {} if save_prompts else wanted.policies(policy)
            variants = wanted.variants(asked, wanted.budgets(budget), once)
        sizes = PromptSizes(context, samples, passages, scored, generated, seed)
        need_transformers("eval")
        directory = model_directory(model, console)
        prompts = _prompts(directory, text, sizes, tasks)
        if save_prompts is not None:
            plain = {"sizes": vars(sizes), "prompts": [prompt.plain() for prompt in prompts]}
            save_prompts.write_text(json_module.dumps(plain) + "\n", encoding="utf-8")
            print_written(console, "prompts", save_prompts)
            return
        about: dict[str, Any] = {"block_size": block_size or 16, "dtype": dtype}
        if format:
            about |= {"block_size": block_size or 32, "chunk": chunk, "piece": piece}
        about |= {"once": once, **vars(sizes)}
        _measure(console, directory, prompts, variants, about, device, threads, json, plot)


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
        cause = " ".join(str(error).split())
        raise KVPlugError(f"--device {device!r} cannot be used: {cause}") from error
    formats = [variant for variant in variants if isinstance(variant, FormatVariant)]
    policies = [variant for variant in variants if isinstance(variant, Variant)]
    if formats:
        # An engine encodes its KV dtype, whatever dtype the model is measured in.
        kv_dtype = torch.bfloat16 if about["dtype"] == "float32" else None
        host = Host(loaded, about["block_size"], about["chunk"], kv_dtype)
        for format in formats:
            format.build(host)
    else:
        host = Host(loaded, about["block_size"])
        for variant in policies:
            variant.build(host, about["context"])
    started, cpu = time.monotonic(), time.process_time()
    with counted(steps(prompts, variants)) as progress:
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
        print_written(console, "rows", json)
    if plot is not None:
        from kvplug_lab.fidelity.plot import draw

        draw(plot, rows)
        print_written(console, "plot", plot)


# -- what is asked for -----------------------------------------------------------------------------


def _tasks(asked: str | None, known: Sequence[str]) -> list[str]:
    from kvplug.errors import KVPlugError

    if asked is None:
        return list(known)
    found = [one.strip() for one in asked.split(",") if one.strip()]
    unknown = [one for one in found if one not in known]
    if unknown or not found:
        raise KVPlugError(f"--task {asked!r}: use any of {', '.join(known)}")
    return found


def _prompts(
    directory: Path, text: Path | None, sizes: PromptSizes, tasks: Sequence[str]
) -> list[Prompt]:
    from transformers import AutoTokenizer

    from kvplug_lab.fidelity.tasks import build

    words = text_of(text)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return build(encoder_of(tokenizer), words, sizes, tasks, first_tokens(directory, tokenizer))


# -- what is shown ---------------------------------------------------------------------------------


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
