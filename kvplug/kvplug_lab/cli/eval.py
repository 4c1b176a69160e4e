"""``kvplug eval``: what evicting or encoding tokens costs, on real text and a real model."""

from __future__ import annotations

import json as json_module
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvplug.cli.refusals import refusing
from kvplug.cli.tables import print_table
from kvplug.model_source import model_label
from kvplug_lab.cli.inputs import (
    PLOTS,
    check_outputs,
    check_plot,
    model_directory,
    need_transformers,
    text_of,
)
from kvplug_lab.cli.options import MODEL, Json, Model, Text, Threads
from kvplug_lab.cli.outputs import counted, print_written, wide_console
from kvplug_lab.texts import encoder_of, first_tokens

if TYPE_CHECKING:
    from kvplug_lab.fidelity.asked import Reader
    from kvplug_lab.fidelity.report import Metric, Row
    from kvplug_lab.fidelity.ruler import Questions
    from kvplug_lab.fidelity.run import FormatVariant, Variant
    from kvplug_lab.fidelity.tasks import Prompt, PromptSizes

LATER = "later"

ASK = (LATER, "with")
"""Where a question stands: behind what is pruned, or in it."""

DTYPES = ("float32", "bfloat16", "float16")

SAVED_EVERY = 60.0
"""Seconds after which what there is of a run is written: one of an hour may be ended before."""

COLUMNS = 9
"""Most metrics side by side in a table."""

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
            help="perplexity, greedy, passkey, passkey_later, multikey, multikey_later; `own` for "
            "these, the default. RULER's: niah_single_1 to 3, niah_multikey_1 to 3, "
            "niah_multivalue, niah_multiquery, vt, cwe, fwe, qa_1, qa_2; `ruler` for those that "
            "need no file, and the two that --qa has files for.",
            show_default=False,
        ),
    ] = None,
    tasks_file: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="LongBench's tasks, one JSON object a line; may be repeated.",
            show_default=False,
        ),
    ] = None,
    templates: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Templates of those tasks, as LongBench's dataset2prompt.json.",
            show_default=False,
        ),
    ] = None,
    qa: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="SQuAD's JSON for qa_1, HotpotQA's for qa_2; may be repeated.",
            show_default=False,
        ),
    ] = None,
    ask: Annotated[
        str,
        typer.Option(
            metavar="later|with",
            help="Whether questions of RULER and LongBench come after the eviction, or are read "
            "before.",
        ),
    ] = LATER,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Ask RULER's and LongBench's questions in the chat template; by default if the "
            "model has one.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        int,
        typer.Option(
            min=1,
            help="Tokens of each context; of RULER's with question and answer; at most, of "
            "LongBench's with the question.",
        ),
    ] = 1024,
    samples: Annotated[
        int, typer.Option(min=1, help="Prompts of each retrieval task, and of each dataset.")
    ] = 10,
    passages: Annotated[int, typer.Option(min=1, help="Passages of plain text.")] = 6,
    scored: Annotated[int, typer.Option(min=1, help="Tokens scored per passage.")] = 256,
    generated: Annotated[int, typer.Option(min=1, help="Tokens generated per passage.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of passages, keys and names.")] = 0,
    once: Annotated[
        bool,
        typer.Option("--once", help="Evict once, after the prompt; never during generation."),
    ] = False,
    text: Text = None,
    model: Model = MODEL,
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
        str | None,
        typer.Option(
            metavar="TYPE",
            help=f"The model's dtype: {', '.join(DTYPES)}; on a CPU float32 by default, else "
            "bfloat16.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Device, e.g. cpu or cuda:0; a GPU if there is one.")
    ] = "auto",
    threads: Threads = 0,
    json: Json = None,
    plot: Annotated[
        Path | None,
        typer.Option(help=f"Draw each metric against the budget ({', '.join(PLOTS)})."),
    ] = None,
    save_prompts: Annotated[
        Path | None,
        typer.Option(help="Write the prompts, as tokens, for another program to run, and stop."),
    ] = None,
    save_lm_eval: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write RULER's questions as tasks of EleutherAI's lm_eval, and stop.",
        ),
    ] = None,
) -> None:
    """Measure what policies and formats cost in answers: RULER, LongBench, perplexity, retrieval.

    The model runs under Hugging Face transformers with the policy objects that the engine runs.
    Every prompt is read once, with the full cache, and then pruned by each policy to each budget;
    the row of the full cache is the baseline. With --format it is read in chunks under each format
    instead, and what follows is computed from the encoded cache. Intervals are 95 %, over the
    prompts; rows that differ from the full cache beyond noise are marked.
    """
    from kvplug.errors import KVPlugError
    from kvplug_lab.fidelity import ruler
    from kvplug_lab.fidelity import variants as wanted
    from kvplug_lab.fidelity.tasks import PromptSizes

    console = wide_console(WIDTH)
    with refusing():
        files = Files(tuple(tasks_file or ()), templates, tuple(qa or ()))
        questions = ruler.questions(files.qa)
        tasks = _tasks(task, files, sorted(questions))
        check_outputs(json=json, plot=plot, save_prompts=save_prompts, save_lm_eval=None)
        check_plot(plot)
        if ask not in ASK:
            raise KVPlugError(f"--ask {ask!r}: use {' or '.join(ASK)}")
        if dtype is not None and dtype not in DTYPES:
            raise KVPlugError(f"--dtype {dtype!r}: use one of {', '.join(DTYPES)}")
        if policy and format:
            raise KVPlugError(
                "--policy and --format cannot be measured together; an engine can run both"
            )
        writes = save_prompts is not None or save_lm_eval is not None
        variants: Sequence[Variant | FormatVariant]
        if format:
            variants = wanted.formats(format)
        else:
            asked = {} if writes else wanted.policies(policy)
            variants = wanted.variants(asked, wanted.budgets(budget), once)
        sizes = PromptSizes(context, samples, passages, scored, generated, seed)
        need_transformers("eval")
        directory = model_directory(model)
        reader, prompts = _prompts(directory, text, sizes, tasks, files, questions, ask, chat)
        if save_prompts is not None:
            plain = {"sizes": vars(sizes), "prompts": [prompt.plain() for prompt in prompts]}
            save_prompts.write_text(json_module.dumps(plain) + "\n", encoding="utf-8")
            print_written(console, "prompts", save_prompts)
        if save_lm_eval is not None:
            from kvplug_lab.fidelity.lm_eval_tasks import save

            group = save(save_lm_eval, reader, prompts)
            print_written(console, f"lm_eval --include_path, --tasks {group}", save_lm_eval)
        if writes:
            return
        about: dict[str, Any] = {"block_size": block_size or 16, "dtype": dtype}
        if format:
            about |= {"block_size": block_size or 32, "chunk": chunk, "piece": piece}
        about |= {"once": once, **vars(sizes), "tasks": tasks, "ask": ask, "chat": reader.chat}
        _measure(console, directory, reader, prompts, variants, about, device, threads, json, plot)


@dataclass(frozen=True)
class Files:
    """The files of tasks that a user has: LongBench's, templates for them, and questions."""

    tasks: tuple[Path, ...] = ()
    templates: Path | None = None
    qa: tuple[Path, ...] = ()


def _loaded(directory: Path, device: str, dtype: str | None) -> tuple[Any, str, str]:
    """The model on its device, and which device and dtype those are.

    Raises:
        KVPlugError: The device does not exist, or has not the memory.
    """
    import torch
    import transformers

    from kvplug.errors import KVPlugError

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
        if dtype is None:
            dtype = "float32" if place.type == "cpu" else "bfloat16"
        # Weights are read to the device, one file after the other.
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), device_map={"": place}
        )
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        cause = " ".join(str(error).split())
        raise KVPlugError(f"--device {device!r} cannot be used: {cause}") from error
    return loaded.eval(), device, dtype


def _measure(
    console: Console,
    directory: Path,
    reader: Reader,
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
    from kvplug_lab.fidelity.records import Record, Run
    from kvplug_lab.fidelity.report import METRICS, SHOWN, metrics_of, summarise
    from kvplug_lab.fidelity.run import FormatVariant, Variant, run, run_formats, steps

    if threads:
        torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    loaded, device, about["dtype"] = _loaded(directory, device, about["dtype"])
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
    saved, records = started, list[Record]()
    try:
        with counted(steps(prompts, variants)) as progress:
            if formats:
                found = run_formats(host, prompts, formats, progress, about["piece"], reader)
            else:
                found = run(host, prompts, policies, progress, reader)
            for record in found:
                records.append(record)
                if json is not None and time.monotonic() - saved > SAVED_EVERY:
                    Run(about, records).save(json)
                    saved = time.monotonic()
    except torch.OutOfMemoryError as error:
        raise KVPlugError(
            f"--device {device}: out of memory: {' '.join(str(error).split())[:200]}; use a "
            "smaller --context, fewer policies at a time, or --dtype bfloat16"
        ) from error
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    rows = summarise(records)
    metrics = [m for m in metrics_of(records) if m.name in SHOWN or m not in METRICS]
    _print(console, rows, about["context"], metrics)
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
            "model": model_label(directory),
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

        draw(plot, rows, metrics)
        print_written(console, "plot", plot)


# -- what is asked for -----------------------------------------------------------------------------


def _tasks(asked: str | None, files: Files, questions: Sequence[str]) -> list[str]:
    """The tasks of `kvplug_lab.fidelity.tasks` and of RULER, in the order they are asked for."""
    from kvplug.errors import KVPlugError
    from kvplug_lab.fidelity.ruler import GENERATED, RULER
    from kvplug_lab.fidelity.tasks import TASKS

    if asked is None:
        return [] if files.tasks else list(TASKS)
    sets = {"own": list(TASKS), "ruler": [*GENERATED, *questions]}
    found: list[str] = []
    for one in (part.strip() for part in asked.split(",")):
        if one:
            found += [name for name in sets.get(one, [one]) if name not in found]
    known = (*TASKS, *RULER)
    unknown = [one for one in found if one not in known]
    if unknown or not found:
        raise KVPlugError(f"--task {asked!r}: use any of own, ruler, {', '.join(known)}")
    return found


def _prompts(
    directory: Path,
    text: Path | None,
    sizes: PromptSizes,
    tasks: Sequence[str],
    files: Files,
    questions: Mapping[str, Questions],
    ask: str,
    chat: bool | None,
) -> tuple[Reader, list[Prompt]]:
    from transformers import AutoTokenizer

    from kvplug_lab.fidelity import longbench, ruler
    from kvplug_lab.fidelity.asked import Reader
    from kvplug_lab.fidelity.tasks import TASKS, build

    tokenizer = AutoTokenizer.from_pretrained(directory)
    begins = first_tokens(directory, tokenizer)
    reader = Reader(tokenizer, begins, chat)
    own = [task for task in tasks if task in TASKS]
    generated = [task for task in tasks if task not in TASKS]
    words = text_of(text) if tasks else ""
    found = build(encoder_of(tokenizer), words, sizes, own, begins) if own else []
    if generated:
        found += [
            reader.prompt(asked, ask)
            for asked in ruler.build(
                reader, words, generated, sizes.context, sizes.samples, sizes.seed, questions
            )
        ]
    if files.tasks:
        shapes = {} if files.templates is None else longbench.templates(files.templates)
        found += [
            reader.prompt(asked, ask, sizes.context)
            for asked in longbench.read(files.tasks, sizes.samples, shapes)
        ]
    return reader, found


# -- what is shown ---------------------------------------------------------------------------------


def _print(console: Console, rows: Sequence[Row], context: int, metrics: Sequence[Metric]) -> None:
    from kvplug_lab.fidelity.records import FULL

    coded = any(row.bytes is not None for row in rows)
    by_key: dict[tuple[str, float], dict[str, Row]] = {}
    for row in rows:
        by_key.setdefault((row.variant, row.budget), {})[row.metric] = row
    order = list(by_key)
    ordered = sorted(by_key, key=lambda key: (key[0] != FULL, order.index(key)))
    note = (
        f"contexts of {context:,} tokens; mean and 95 % interval over the prompts; ↑ higher is "
        "better, ↓ lower; * differs from the full cache beyond noise"
        + ("; 1/n of bfloat16's bytes" if coded else "")
    )
    for at in range(0, len(metrics), COLUMNS):
        table = Table(title=note if at == 0 else None, title_justify="left")
        table.add_column("format" if coded else "policy", overflow="fold", min_width=12)
        table.add_column("bytes/token" if coded else "kept", justify="right", no_wrap=True)
        shown = metrics[at : at + COLUMNS]
        for metric in shown:
            table.add_column(f"{metric.label} {'↑' if metric.higher else '↓'}", justify="right")
        for variant, budget in ordered:
            found = by_key[variant, budget]
            kept: float | None = next(iter(found.values())).bytes
            if kept is None:
                kept = sum(row.held for row in found.values()) / len(found)
            cells = [_cell(found.get(metric.name), metric.form) for metric in shown]
            table.add_row(
                variant,
                f"{kept:,.0f}\n" + (f"1/{1 / budget:.2f}" if coded else f"{budget:.0%}"),
                *cells,
                style="dim" if variant == FULL else None,
            )
        print_table(console, table)


def _cell(row: Row | None, form: str) -> str:
    if row is None:
        return "-"
    mark = "*" if row.verdict in ("better", "worse") else ""
    return f"{row.value:{form}}{mark}\n{row.low:{form}} {row.high:{form}}"
