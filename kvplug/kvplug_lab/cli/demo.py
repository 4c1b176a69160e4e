"""``kvplug demo``: the same questions on stock vLLM and on deployments, in the same KV memory."""

from __future__ import annotations

import json as json_module
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import TextColumn
from rich.table import Table
from rich.text import Text

from kvplug.cli.refusals import refusing
from kvplug_lab.cli.inputs import check_outputs, model_directory, need_transformers
from kvplug_lab.cli.options import MODEL, Json, Model
from kvplug_lab.cli.outputs import bar, print_written

if TYPE_CHECKING:
    from kvplug_lab.demo.compare import Figures, Row
    from kvplug_lab.demo.deployments import Deployment
    from kvplug_lab.demo.machine import Measured
    from kvplug_lab.demo.questions import Work
    from kvplug_lab.demo.sides import Pair, Part
    from kvplug_lab.engine.rounds import Progress, Round

DEFAULT = ("cpu/int8", "cpu/quickstart")
"""The deployments: one that keeps answers, and one that does not."""
FORMAT = "kvplug demo 2"
WIDTH = 80
"""Columns of the table where there is no terminal."""
SAID_EVERY = 5.0
"""Seconds between two lines of progress where there is no terminal."""


@dataclass(frozen=True)
class Full:
    """Sizes of the whole demo."""

    documents: int = 5
    questions: int = 3
    tokens: int = 1024
    output_tokens: int = 32
    at_once: int = 3
    rounds: int = 3


@dataclass(frozen=True)
class Quick(Full):
    """Sizes of ``--quick``."""

    documents: int = 3
    questions: int = 2
    tokens: int = 640
    output_tokens: int = 16
    at_once: int = 2
    rounds: int = 1


@dataclass(frozen=True)
class Played:
    """Everything that was measured.

    Attributes:
        deployments: Stock first.
        work: The questions.
        rounds: For each round, the figures of each deployment.
        last: The last round of each deployment.
        answers: The last round's answers of each deployment.
        order: For each round, the names in the order in which they ran.
        load: Load averages seen.
    """

    deployments: list[Deployment]
    work: Work
    rounds: list[list[Figures]]
    last: list[Round]
    answers: list[list[str]]
    order: list[list[str]]
    load: list[float]


def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer and shorter questions, one round, no times.")
    ] = False,
    json: Json = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a self-contained page with plots.")
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option(
            help="Deployment to run beside stock, a file or a shipped name; may be repeated. "
            "cpu/int8 and cpu/quickstart by default.",
            show_default=False,
        ),
    ] = None,
    model: Model = MODEL,
    documents: Annotated[
        int, typer.Option(min=0, help="Documents, a session each; 0: 5, or 3 with --quick.")
    ] = 0,
    document_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of a document; 0: 1024, or 640 with --quick.")
    ] = 0,
    output_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of an answer; 0: 32, or 16 with --quick.")
    ] = 0,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds; 0: 3, or 1 with --quick.")] = 0,
) -> None:
    """Ask the same questions of stock vLLM and of two deployments, in the same KV memory.

    Facts are set into real text, and each is asked for: right answers are counted. The first
    deployment keeps them, the second drops most of the text and shows what that costs. Engines
    start once and take turns; counts come first, then times with their spread.
    """
    console = Console(soft_wrap=True)
    with refusing(1):
        check_outputs(json=json, html=html)
        need_transformers("demo")
        from kvplug_lab.engine.rounds import import_ahead

        own = Quick() if quick else Full()
        sizes = type(own)(
            documents or own.documents,
            own.questions,
            document_tokens or own.tokens,
            output_tokens or own.output_tokens,
            own.at_once,
            rounds or own.rounds,
        )
        console.print(where(model), markup=False, highlight=False)
        # Reading a deployment imports vLLM, as its engines' process does: both take a while.
        import_ahead()
        files = [_read(file) for file in config or map(Path, DEFAULT)]
        played, measured = _measure(console, files, model, sizes)
    from kvplug_lab.demo.compare import rows_of, verdicts
    from kvplug_lab.demo.sides import pairs_of

    rows = rows_of(played.deployments, played.work, played.rounds)
    pairs = [
        pair
        for deployment, answers in zip(played.deployments[1:], played.answers[1:], strict=True)
        for pair in pairs_of(deployment.name, played.work.questions, played.answers[0], answers)
    ]
    says = verdicts(played.deployments, played.work, played.rounds)
    policies = policy_lines(played)
    show(console, played, rows, pairs, says, policies, measured)
    if json is not None:
        data = as_data(played, rows, says, measured)
        json.write_text(json_module.dumps(data, indent=1) + "\n", encoding="utf-8")
        print_written(console, "figures", json)
    if html is not None:
        from kvplug_lab.demo.page import page

        text = page(
            played.deployments, played.last, rows, pairs, about(played), says, policies, measured
        )
        html.write_text(text, encoding="utf-8")
        print_written(console, "page", html)


def _read(file: Path) -> Any:
    from kvplug import configs
    from kvplug.hosts.vllm.flags import read_config

    return read_config(configs.find(file))


def _measure(
    console: Console, files: list[Any], model: str, sizes: Full
) -> tuple[Played, Measured]:
    from transformers import AutoTokenizer

    from kvplug.model_source import model_label
    from kvplug_lab import texts
    from kvplug_lab.demo.compare import figures_of
    from kvplug_lab.demo.deployments import Room, in_the_same_memory
    from kvplug_lab.demo.estimate import said, seconds_of, speed
    from kvplug_lab.demo.machine import load_average
    from kvplug_lab.demo.machine import measured as measured_here
    from kvplug_lab.demo.play import answer_text, play, started
    from kvplug_lab.demo.questions import Sizes, build

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    directory = model_directory(model)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    work = build(
        texts.encoder_of(tokenizer),
        texts.shakespeare(),
        Sizes(sizes.documents, sizes.questions, sizes.tokens, sizes.output_tokens),
        texts.first_tokens(directory, tokenizer),
    )
    engines = len(files) + 1
    deployments = in_the_same_memory(
        Room(
            directory,
            work.longest,
            sizes.output_tokens,
            sizes.documents,
            min(sizes.at_once, sizes.documents),
            engines,
        ),
        files,
    )
    dtype = str(deployments[0].engine["dtype"])
    best, usual = speed(directory, dtype, work.documents)
    say(
        f"This takes {said(seconds_of(work, best, usual, engines, sizes.rounds))} here, estimated "
        f"from {usual.prompt:,.0f} to {best.prompt:,.0f} prompt tokens a second: {engines} engines "
        f"start, and each answers {len(work.questions)} questions {_times(sizes.rounds)}."
    )
    for deployment in deployments[1:]:
        if deployment.host:
            say(f"{deployment.name} takes {deployment.host} of host memory in addition.")
    asked = str(files[0].flags.get("dtype", dtype))
    if asked != dtype:
        say(
            f"In {dtype}: this CPU has no AVX-512, and takes some twenty times as long in {asked}. "
            "KV memory is counted as of 16-bit values."
        )

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

    ends = _ends(directory, tokenizer)
    load = [load_average()]
    rounds: list[list[Figures]] = []
    order: list[list[str]] = []
    last: list[Round] = []
    answers: list[list[str]] = []
    with started(directory, deployments, work, say) as running:
        begun = time.monotonic()
        for number in range(sizes.rounds):
            with _shown(console, number, sizes.rounds, work, deployments) as (turn, ran):
                last = play(running, work, number, turn)
            answers = [
                [answer_text(decode, a.tokens, ends) for a in found.answers] for found in last
            ]
            rounds.append(
                [
                    figures_of(deployment, work, found, texts_, answers[0])
                    for deployment, found, texts_ in zip(deployments, last, answers, strict=True)
                ]
            )
            order.append(ran)
            load.append(load_average())
            left = (time.monotonic() - begun) / (number + 1) * (sizes.rounds - number - 1)
            if left:
                say(f"About {max(1, round(left / 60))} min left.")
    played = Played(deployments, work, rounds, last, answers, order, load)
    return played, measured_here(model_label(directory), dtype, load)


def _times(rounds: int) -> str:
    return "once" if rounds == 1 else f"{rounds} times"


def where(model: str) -> str:
    """What is downloaded or made, and where.

    Raises:
        ModelNotFound: There is no such model.
    """
    from kvplug.model_source import NotDownloaded, resolve
    from kvplug_lab import models

    if model == MODEL and not (Path(model) / "config.json").is_file():
        made = models.cache_home() / "models" / models.SMOLLM2
        here = (made / "config.json").is_file()
        what = "is there already" if here else "is made now, once, which takes about 20 s"
        return (
            f"Nothing is downloaded. The model, SmolLM2-135M-Instruct, is in the installed package "
            f"{models.CARRIER} (98 MB); its conversion (273 MB) {what}: {made}"
        )
    try:
        return f"Nothing is downloaded: the model is in {resolve(model, network=False).folder}"
    except NotDownloaded:
        from huggingface_hub.constants import HF_HUB_CACHE

        return f"{model} is downloaded from the Hugging Face hub, once, into {HF_HUB_CACHE}"


def _ends(directory: Path, tokenizer: Any) -> list[int]:
    """Tokens that end an answer."""
    found = {tokenizer.eos_token_id}
    file = directory / "generation_config.json"
    if file.is_file():
        stated = json_module.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        found |= set(stated if isinstance(stated, list) else [stated])
    return sorted(end for end in found if isinstance(end, int))


Turn = Callable[[int], "Callable[[Progress], None]"]


@contextmanager
def _shown(
    console: Console, number: int, rounds: int, work: Work, deployments: Sequence[Deployment]
) -> Iterator[tuple[Turn, list[str]]]:
    """Show a round's progress: a bar for each engine on a terminal, lines elsewhere.

    Yields:
        A function to call before an engine's turn, and the names of those that had theirs.
    """
    total = len(work.questions)
    ran: list[str] = []
    state = TextColumn("{task.fields[state]}")
    with bar("{task.description:<14}", state, console=console, transient=True) as progress:

        def turn(index: int) -> Callable[[Progress], None]:
            name = deployments[index].name
            ran.append(name)
            task = progress.add_task(name, total=total, state="")
            printed = time.monotonic() - SAID_EVERY

            def update(found: Progress) -> None:
                nonlocal printed
                says = (
                    f"{found.answered} of {total} answered, {found.running} running, "
                    f"{found.waiting} waiting, {found.held} blocks in use"
                )
                progress.update(task, completed=found.answered, state=says)
                if progress.disable and time.monotonic() - printed > SAID_EVERY:
                    printed = time.monotonic()
                    print(f"round {number + 1} of {rounds}, {name}: {says}", flush=True)

            return update

        yield turn, ran


def about(played: Played) -> list[str]:
    """What was asked, and of what memory; a sentence or two each."""
    stock, work = played.deployments[0], played.work
    each = len(work.questions) // work.documents
    mib = stock.blocks * stock.block_bytes / 2**20
    return [
        f"{work.documents} documents of real text, each with {each} facts set into it; "
        f"{work.documents} sessions side by side, each asking {each} questions of its document "
        f"one after the other: {len(work.questions)} questions, {work.prompt_tokens:,} prompt "
        f"tokens, {work.output_tokens} tokens out each.",
        f"Every engine has the same {mib:,.0f} MiB of KV memory, in which stock vLLM holds "
        f"{stock.blocks * stock.block_size // work.longest} whole requests of "
        f"{work.longest:,} tokens.",
    ]


def show(
    console: Console,
    played: Played,
    rows: Sequence[Row],
    pairs: Sequence[Pair],
    says: Sequence[str],
    policies: Sequence[str],
    measured: Measured,
) -> None:
    """Print everything."""
    table = wide(console)
    console.print()
    for line in about(played):
        table.print(line, markup=False, highlight=False)
    for line in says:
        table.print(line, markup=False, highlight=False, style="bold")
    console.print()
    table.print(table_of(played.deployments, rows))
    if len(played.rounds) == 1:
        table.print("One round shows no spread, so no times: kvplug demo runs three.")
    elif measured.busy:
        table.print("Other work ran here meanwhile: take times as a direction only.")
    for pair in pairs:
        console.print()
        table.print(pair_text(pair))
    console.print()
    for line in policies:
        console.print(line, markup=False, highlight=False)
    console.print()
    for line in measured.lines():
        console.print(line, markup=False, highlight=False, style="dim")


def wide(console: Console) -> Console:
    """The console of tables: 80 columns where it is not a terminal."""
    return console if console.is_terminal else Console(width=WIDTH)


def table_of(deployments: Sequence[Deployment], rows: Sequence[Row]) -> Table:
    """The rows as a table: counted ones, then timed ones with their ratios below."""
    table = Table(title="the same questions in the same KV memory", title_justify="left")
    table.add_column("")
    for deployment in deployments:
        table.add_column(deployment.name, justify="right")
    timed = False
    for row in rows:
        if row.timed and not timed:
            table.add_section()
            timed = True
        table.add_row(row.label, *(_two_lines(cell.text) for cell in row.cells))
        if row.ratios:
            ratios = (_two_lines(cell.ratio) for cell in row.cells)
            table.add_row("  of stock", *ratios, style="dim")
    return table


def _two_lines(text: str) -> str:
    """A figure above its spread, which leaves room for what it is."""
    return text.replace(" (", "\n(").replace(" seen", "\nseen")


def pair_text(pair: Pair) -> Text:
    """Two answers, one below the other; what differs stands in [brackets] and in reverse."""
    question = pair.question
    text = Text(overflow="fold")
    text.append(f"{pair.name} {'agrees with' if pair.agrees else 'differs from'} stock", "bold")
    text.append(f": {question.text} ...\n")
    text.append(
        f"  {'the text says':<14} {question.key}, at token {question.place:,} of document "
        f"{question.document + 1}\n"
    )
    for name, parts, right in (
        ("stock vLLM", pair.stock, pair.stock_right),
        (pair.name, pair.own, pair.own_right),
    ):
        text.append(f"  {name:<14} ")
        _append(text, parts)
        text.append(f"   {'right' if right else 'wrong'}\n", "green" if right else "red")
    text.right_crop(1)
    return text


def _append(text: Text, parts: Sequence[Part]) -> None:
    if not parts:
        text.append("(nothing)")
    for part in parts:
        shown = part.text.replace("\n", "\\n")
        text.append(f"[{shown}]" if part.differs else shown, "reverse" if part.differs else "")


def policy_lines(played: Played) -> list[str]:
    """What each policy did, one line each, by deployment."""
    from kvplug.contract import PolicyReport
    from kvplug.observe.summary import summary_lines

    lines = []
    for deployment, found in zip(played.deployments, played.last, strict=True):
        if deployment.section is not None:
            reports = [PolicyReport(**report) for report in found.reports]
            lines.append(f"{deployment.name}:")
            lines += [f"  {line}" for line in summary_lines(reports, len(found.steps))]
    return lines


def as_data(
    played: Played, rows: Sequence[Row], says: Sequence[str], measured: Measured
) -> dict[str, Any]:
    """All measurements as plain data; what was looked at after every step of the last round is one
    text of numbers."""
    names = [deployment.name for deployment in played.deployments]
    return {
        "format": FORMAT,
        "about": asdict(measured)
        | {
            "says": [*about(played), *says],
            "documents": played.work.documents,
            "output_tokens": played.work.output_tokens,
            "order": played.order,
        },
        "deployments": [
            asdict(d) | {"section": dict(d.section) if d.section is not None else None}
            for d in played.deployments
        ],
        "rows": [
            {
                "key": row.key,
                "label": row.label.strip(),
                "timed": row.timed,
                "cells": {name: cell.text for name, cell in zip(names, row.cells, strict=True)},
                "ratios": {name: cell.ratio for name, cell in zip(names, row.cells, strict=True)},
            }
            for row in rows
        ],
        "rounds": [
            {name: asdict(f) for name, f in zip(names, figures, strict=True)}
            for figures in played.rounds
        ],
        "answers": [
            {
                "document": question.document,
                "place": question.place,
                "question": question.text,
                "key": question.key,
                "prompt_tokens": len(question.prompt),
                "says": {name: own[i] for name, own in zip(names, played.answers, strict=True)},
            }
            for i, question in enumerate(played.work.questions)
        ],
        "reports": {name: found.reports for name, found in zip(names, played.last, strict=True)},
        "steps": {
            name: {
                what: " ".join(str(getattr(step, what)) for step in found.steps)
                for what in ("running", "waiting", "held")
            }
            for name, found in zip(names, played.last, strict=True)
        },
    }
