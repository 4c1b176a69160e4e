"""``kvplug tune``: a deployment for your traffic, measured against stock and verified."""

from __future__ import annotations

import json as json_module
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvplug.cli.refusals import refusing
from kvplug.cli.tables import print_table
from kvplug_lab.cli.inputs import InvalidInput, check_outputs, model_directory, need_transformers
from kvplug_lab.cli.options import MODEL, Json, Model
from kvplug_lab.cli.outputs import print_written, wide_console

if TYPE_CHECKING:
    from kvplug_lab.tune.load import Load
    from kvplug_lab.tune.search import Found, Measured

WIDTH = 130
CPU_BLOCK, GPU_BLOCK = 32, 16
CPU_STEP, GPU_STEP = 512, 2048
"""Tokens of a step where they are not given."""


def tune(
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Requests, one body a line, as vLLM's server takes them.",
            show_default=False,
        ),
    ] = None,
    recorded: Annotated[
        Path | None,
        typer.Option(
            metavar="TRACE",
            help="A trace of `kvplug record` instead. It has no text: only exact deployments are "
            "tried.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Where the deployment is written if it is better than stock.")
    ] = Path("deployment.yaml"),
    objective: Annotated[
        str,
        typer.Option(
            help="throughput (generated tokens a second), ttft (mean seconds to the first token) "
            "or users (requests running at once)."
        ),
    ] = "throughput",
    max_loss: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Most that the perplexity of stock's own answers may rise, in percent; 0 tries "
            "exact deployments only.",
        ),
    ] = 1.0,
    same_answers: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Least share of greedy answers that equal stock's."),
    ] = 0.0,
    memory: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="KV memory of every engine, e.g. 8GiB: what your server prints when it starts.",
        ),
    ] = "1GiB",
    host: Annotated[
        str, typer.Option(metavar="SIZE", help="Host memory that a tier may take; 0 for none.")
    ] = "1GiB",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight at most.")] = 16,
    minutes: Annotated[
        float, typer.Option(min=1.0, help="Time for all of it, the verification included.")
    ] = 20.0,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds of the verification.")] = 5,
    requests: Annotated[
        int, typer.Option(min=1, help="Requests taken from the file's start.")
    ] = 200,
    engines: Annotated[
        int,
        typer.Option(
            min=2, help="Engines that live at once, stock among them; each holds the weights."
        ),
    ] = 4,
    block_size: Annotated[
        int, typer.Option(min=0, help="Tokens of a block; 0: 16 on a GPU, 32 on a CPU.")
    ] = 0,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of a step; 0: 2048 on a GPU, 512 on a CPU.")
    ] = 0,
    dtype: Annotated[
        str,
        typer.Option(
            help="Type of weights and KV, as vLLM takes it; auto: bfloat16, or float32 on a CPU "
            "without AVX-512."
        ),
    ] = "auto",
    model: Model = MODEL,
    json: Json = None,
) -> None:
    """Measure your requests on stock vLLM, name what limits it, and find a deployment that is
    better.

    Deployments against the bottleneck are measured beside stock: in the objective, and in what
    they do to the answers. What is best is measured again in new engines, and written with the
    evidence if all of its interval is better than stock and the loss is within the bound.
    Otherwise nothing is written, and the command says so.
    """
    console = Console(soft_wrap=True)
    with refusing(1):
        from kvplug_lab.tune.search import OBJECTIVES, Bound, Question, Search, plain

        need_transformers("tune")
        check_outputs(json=json, out=out)
        if (prompts is None) == (recorded is None):
            raise InvalidInput("pass either --prompts FILE or --recorded TRACE")
        if objective not in OBJECTIVES:
            raise InvalidInput(f"--objective: {objective!r} is none of {', '.join(OBJECTIVES)}")
        room = size_of("--memory", memory)
        cuda = _cuda()
        block_size = block_size or (GPU_BLOCK if cuda else CPU_BLOCK)
        directory = model_directory(model)
        load = _load(prompts, recorded, directory, block_size, requests)
        arguments = _arguments(
            load,
            cuda,
            engines,
            room,
            block_size,
            max_num_batched_tokens or (GPU_STEP if cuda else CPU_STEP),
            concurrency,
            dtype,
        )
        from kvplug_lab.tune.copies import copy_seconds
        from kvplug_lab.tune.engines import LiveEngines
        from kvplug_lab.tune.proposals import Means
        from kvplug_lab.tune.written import Where, deployment_text, evidence

        means = Means(size_of("--host", host), block_size, max_loss == 0)
        question = Question(
            objective,
            Bound(max_loss / 100, same_answers),
            means,
            concurrency,
            minutes,
            rounds,
            copy_seconds(directory, block_size, arguments["dtype"]),
        )
        say = lambda text: typer.echo(text, err=True)  # noqa: E731
        with LiveEngines(directory, arguments, engines, say) as live:
            found = Search(load, question, live, say).run()
            winner = found.winner
            written = live.arguments_of(winner.proposal) if winner is not None else {}
        command = shlex.join(["kvplug", *sys.argv[1:]])
        where = Where.here(directory, command)
        _print(found)
        if found.verified and winner is not None:
            comments = evidence(found, f"{load.name}, {load.says()}", where)
            text = deployment_text(directory, written, winner.proposal, comments)
            out.write_text(text, encoding="utf-8")
            print_written(console, "deployment", out)
        if json is not None:
            figures = plain(found) | {
                "load": {"name": load.name, "says": load.says(), "real": load.real},
                "engine": arguments,
                "model": where.model,
                "machine": where.machine,
                "date": where.date,
                "command": command,
            }
            json.write_text(json_module.dumps(figures, indent=1) + "\n", encoding="utf-8")
            print_written(console, "figures", json)


def size_of(option: str, text: str) -> int:
    """Bytes of a size such as 8GiB.

    Raises:
        InvalidInput: It is none.
    """
    from pydantic import TypeAdapter, ValidationError

    from kvplug.contract.tiers import Size

    try:
        return int(TypeAdapter(Size).validate_python(text))
    except ValidationError as error:
        raise InvalidInput(
            f"{option}: {text!r} is no size; write e.g. 8GiB, 16GB or a number of bytes"
        ) from error


def _cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _load(
    prompts: Path | None, recorded: Path | None, model: Path, block_size: int, most: int
) -> Load:
    from kvplug_lab.tune import load

    if prompts is not None:
        return load.read(prompts, load.encoder(model), most)
    assert recorded is not None
    return load.from_trace(recorded, model, block_size, load.LONGEST, most)


def _arguments(
    load: Load,
    cuda: bool,
    engines: int,
    memory: int,
    block_size: int,
    batched: int,
    concurrency: int,
    dtype: str,
) -> dict[str, Any]:
    from kvplug_lab.cpu_dtype import fast_dtype

    found: dict[str, Any] = {
        "dtype": fast_dtype() if dtype == "auto" else dtype,
        "block_size": block_size,
        # One more than the longest, in blocks of every size that is proposed.
        "max_model_len": -(-(load.longest + 1) // 64) * 64,
        "max_num_batched_tokens": batched,
        "max_num_seqs": concurrency,
        "kv_cache_memory_bytes": memory,
        "enable_prefix_caching": True,
        "enforce_eager": not cuda,
    }
    if cuda:
        # Engines that live at once share the card; memory for KV is stated.
        found["gpu_memory_utilization"] = round(0.9 / engines, 3)
    return found


def _print(found: Found) -> None:
    console = wide_console(WIDTH)
    shown = Table(title=f"{found.question.objective}, in turns with stock", title_justify="left")
    shown.add_column("deployment")
    for column in ("of stock", "rounds", "TTFT, s", "tokens/s", "perplexity", "same answers"):
        shown.add_column(column, justify="right")
    shown.add_column("")
    for one in found.tried:
        shown.add_row(*_row(one, found.question.objective))
    if found.winner is not None:
        shown.add_section()
        shown.add_row(*_row(found.winner, found.question.objective, verified=found.verified))
    if found.tried:
        print_table(console, shown)
    for line in [*(f"Bottleneck: {b}." for b in found.held), found.says]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _row(one: Measured, objective: str, verified: bool | None = None) -> tuple[str, ...]:
    name = one.proposal.name
    if verified is not None:
        name += ", verification"
    gain = ttft = rate = rounds = ""
    if one.own:
        ratio = one.ratio(objective)
        gain = f"{ratio.value:.2f}" if ratio.n == 1 else ratio.text(".2f")
        rounds = str(ratio.n)
        ttft = f"{sum(f.ttft for f in one.own) / len(one.own):.2f}"
        rate = f"{sum(f.tokens_per_second for f in one.own) / len(one.own):.1f}"
    rise = f"{one.quality.rise.value:+.2%}" if one.quality is not None else ""
    same = f"{one.quality.same:.0%}" if one.quality and one.quality.same is not None else ""
    said = one.out or ("better than stock" if verified else "")
    return name, gain, rounds, ttft, rate, rise, same, said
