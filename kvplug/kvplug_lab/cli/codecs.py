"""``kvplug codecs``: what transfer codecs save, cost in answers, and take in time."""

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
from kvplug.model_source import model_label
from kvplug_lab.cli.inputs import (
    InvalidInput,
    check_outputs,
    model_directory,
    need_transformers,
    text_of,
)
from kvplug_lab.cli.options import MODEL, Json, Model, Text, Threads
from kvplug_lab.cli.outputs import counted, print_written, wide_console
from kvplug_lab.texts import encoder_of, first_tokens

if TYPE_CHECKING:
    from kvplug_lab.fidelity.codecs import Row

DTYPES = ("float32", "bfloat16")

WIDTH = 150
"""Columns where the output is not a terminal."""

DEFAULT = ("raw", "lossless", "fp8", "fp8:entropy=true", "int8", "int4", "cachegen")
"""Codecs that need no file of the model's own."""


def codecs(
    codec: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:OPTION=VALUE...]",
            help="A codec, e.g. int4:group=64; may be repeated. Every one that needs no file by "
            "default.",
            show_default=False,
        ),
    ] = None,
    model: Model = MODEL,
    text: Text = None,
    context: Annotated[int, typer.Option(min=64, help="Tokens of a prompt.")] = 1024,
    passages: Annotated[int, typer.Option(min=0, help="Prompts of plain text.")] = 8,
    scored: Annotated[int, typer.Option(min=16, help="Tokens scored behind each.")] = 512,
    samples: Annotated[int, typer.Option(min=0, help="Prompts of each retrieval task.")] = 8,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of a chunk.")] = 32,
    rounds: Annotated[
        int, typer.Option(min=0, help="Times that every chunk is coded to measure speed.")
    ] = 3,
    dtype: Annotated[
        str, typer.Option(help="Type the model computes in; KV is bfloat16 either way.")
    ] = "float32",
    seed: Annotated[int, typer.Option(help="Of the choice of passages and keys.")] = 0,
    threads: Threads = 1,
    json: Json = None,
) -> None:
    """Send the KV of whole prompts through transfer codecs and go on from what comes back.

    Bytes are those of coded tensors over bfloat16, without headers. Speeds are bytes of bfloat16
    per second that one thread computes; codecs take turns. Answers are compared with the exact
    KV's.
    """
    console = wide_console(WIDTH)
    with refusing():
        check_outputs(json=json)
        need_transformers("codecs")
        sizes = {"context": context, "passages": passages, "scored": scored, "samples": samples}
        asked = list(codec or DEFAULT)
        if dtype not in DTYPES:
            raise InvalidInput(f"--dtype {dtype!r}: use one of {', '.join(DTYPES)}")
        every = {**sizes, "seed": seed}
        _run(console, asked, model, text, every, chunk, rounds, dtype, threads, json)


def _run(
    console: Console,
    asked: list[str],
    model: str,
    text: Path | None,
    sizes: dict[str, int],
    chunk: int,
    rounds: int,
    dtype: str,
    threads: int,
    json: Path | None,
) -> None:
    import torch
    import transformers

    from kvplug_lab import models
    from kvplug_lab.fidelity import codecs as measuring
    from kvplug_lab.fidelity.decoded import Reader
    from kvplug_lab.fidelity.tasks import PromptSizes, build

    for label in asked:
        measuring.choice(label)
    directory = model_directory(model)
    words = text_of(text)
    if threads:
        torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    prompts = build(
        encoder_of(tokenizer),
        words,
        PromptSizes(**sizes),
        measuring.TASKS,
        first_tokens(directory, tokenizer),
    )
    # A run that is cut short has some of every task.
    prompts.sort(key=lambda prompt: int(prompt.name.rpartition("-")[2]))
    kind = getattr(torch, dtype)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=kind)
    reader = Reader(loaded.eval(), sizes["context"])
    engine = measuring.engine_of(reader, "bfloat16", models.model_fingerprint(directory))
    built = {label: measuring.build(label, engine) for label in asked}
    about = {
        "model": model_label(directory),
        "text": text.name if text is not None else "Shakespeare",
        "chunk": chunk,
        "dtype": dtype,
        **sizes,
    }
    rows: list[Row] = []
    with counted(len(prompts)) as progress:
        for name, rows in measuring.fidelity(reader, prompts, built, chunk):
            _write(json, about, rows)
            progress(name)
    if rounds and prompts:
        part = {name: plane[:, : 8 * chunk] for name, plane in reader.planes().items()}
        torch.set_num_threads(1)
        measuring.with_speeds(rows, measuring.speeds(built, part, chunk, rounds))
        _write(json, about, rows)
    print_table(console, _table(rows, model_label(directory), chunk))
    if json is not None:
        print_written(console, "rows", json)


def _write(json: Path | None, about: dict[str, Any], rows: list[Row]) -> None:
    if json is not None:
        data = {**about, "rows": [asdict(row) for row in rows]}
        json.write_text(json_module.dumps(data, indent=1) + "\n", encoding="utf-8")


def _table(rows: list[Row], model: str, chunk: int) -> Table:
    tokens = max((row.tokens for row in rows), default=0)
    table = Table(
        title=f"{model}: KV of whole prompts in chunks of {chunk} tokens; {tokens:,} tokens scored",
        title_justify="left",
    )
    table.add_column("codec")
    heads = ("of bf16", "ratio", "encode GB/s", "decode GB/s", "perplexity", "first choice")
    for head in (*heads, "divergence", "passkey", "multikey"):
        table.add_column(head, justify="right")
    for row in rows:
        found = [
            f"{row.retrieved.get(task, 0)} of {row.asked[task]}" if task in row.asked else ""
            for task in ("passkey_later", "multikey_later")
        ]
        table.add_row(
            row.codec,
            f"{1 / row.ratio:.1%}",
            f"{row.ratio:.2f}",
            *("" if one[0] != one[0] else f"{one[0]:.3f}" for one in (row.encode, row.decode)),
            f"{row.perplexity[0]:+.2%}",
            f"{row.agree[0]:.1%}",
            f"{row.kl:.4f}",
            *found,
        )
    return table
