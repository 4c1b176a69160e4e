"""``kvplug reuse``: gains and costs of reuse beyond the exact prefix, against stock vLLM."""

from __future__ import annotations

import json as json_module
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvplug.cli.refusals import refusing
from kvplug.cli.tables import print_table
from kvplug.model_source import model_label
from kvplug.regular_file import read_regular
from kvplug_lab.cli.explain_record import explain
from kvplug_lab.cli.inputs import check_outputs, model_directory
from kvplug_lab.cli.options import MODEL, Json, Model
from kvplug_lab.cli.outputs import print_written, wide_console

if TYPE_CHECKING:
    from kvplug_lab.reuse import chat as reuse_chat
    from kvplug_lab.reuse import checks as reuse_checks
    from kvplug_lab.reuse import mixed as reuse_mixed
    from kvplug_lab.reuse import rag as reuse_rag
    from kvplug_lab.reuse.runs import ReuseVariant

WIDTH = 180
"""Columns where the output is not a terminal."""

MAX_FIGURES = 64 << 20
"""Largest file of figures that is read, in bytes."""

GOAL = 3.0
"""Speedup of the time to first token that is the goal where documents are retrieved."""

VARIANTS = (
    "nothing",
    "boundary=16",
    "boundary=32",
    "fraction=0.15",
    "compensate",
    "credibility",
    "gaps",
)
"""Compared by `rag` by default; two of them need a file from a calibration."""

app = typer.Typer(no_args_is_help=True)

Seed = Annotated[int, typer.Option(min=0, help="Seed of texts, orders and keys.")]
Dtype = Annotated[
    str,
    typer.Option(help="The model's dtype; in bfloat16, rounding varies with the batch."),
]
Quick = Annotated[bool, typer.Option("--quick", help="Smoke run; its figures mean nothing.")]
File = Annotated[
    Path | None,
    typer.Option("--deployment", help="A deployment with a reuse section, compared as well."),
]
Credibility = Annotated[Path | None, typer.Option(help="Model of the check `credibility`.")]
Compensate = Annotated[Path | None, typer.Option(help="Corrections of the check `compensate`.")]


@app.callback()
def _reuse() -> None:
    """Measure the gains and costs of reuse beyond the exact prefix, against stock vLLM."""


app.command()(explain)


@app.command()
def rag(
    variants: Annotated[
        str,
        typer.Option(
            metavar="NAME[=VALUE][+NAME...],...",
            help="Ways to reuse: nothing, boundary=N, fraction=X, gaps[=N], compensate, "
            "credibility, joined by +. Each is an engine of its own.",
        ),
    ] = ",".join(VARIANTS),
    deployment: File = None,
    credibility: Credibility = None,
    compensate: Compensate = None,
    requests: Annotated[int, typer.Option(min=3, help="Requests, of three kinds in turn.")] = 30,
    documents: Annotated[int, typer.Option(min=2, help="Documents, each read once.")] = 20,
    taken: Annotated[int, typer.Option(min=1, help="Documents per request.")] = 4,
    dtype: Dtype = "bfloat16",
    seed: Seed = 0,
    quick: Quick = False,
    model: Model = MODEL,
    json: Json = None,
) -> None:
    """Measure time to first token and answers with documents in random order before a question.

    Every engine reads each document once behind a common prefix. Then all serve the same requests
    in turn, so that a ratio compares one request in two engines, seconds apart.
    """
    from kvplug_lab.reuse import rag as reuse_rag

    sizes = replace(
        reuse_rag.RagSizes(), requests=requests, documents=documents, taken=taken, seed=seed
    )
    if quick:
        sizes = replace(reuse_rag.QUICK, seed=seed)
    with _running(model, json) as run:
        chosen = _variants(variants, deployment, credibility, compensate, run.console)
        found = reuse_rag.measure(
            run.model, run.text, sizes, chosen, run.logs, run.say, dtype=dtype
        )
        run.show(rag_tables(found), {"command": "rag", **found.plain()}, chosen)


@app.command()
def chat(
    variants: Annotated[
        str,
        typer.Option(
            metavar="NAME[=VALUE][+NAME...],...", help="Ways to reuse, as `rag` takes them."
        ),
    ] = "gaps,gaps+boundary=16",
    deployment: File = None,
    credibility: Credibility = None,
    compensate: Compensate = None,
    turns: Annotated[int, typer.Option(min=2, help="Turns of the chat.")] = 30,
    window: Annotated[int, typer.Option(min=128, help="Tokens that the client keeps.")] = 1024,
    dtype: Dtype = "bfloat16",
    seed: Seed = 0,
    quick: Quick = False,
    model: Model = MODEL,
    json: Json = None,
) -> None:
    """Measure a chat whose client drops the oldest turns: the others are re-rotated, not reread."""
    from kvplug_lab.reuse import chat as reuse_chat

    sizes = replace(reuse_chat.ChatSizes(), turns=turns, window=window, seed=seed)
    if quick:
        sizes = replace(reuse_chat.QUICK, seed=seed)
    with _running(model, json) as run:
        chosen = _variants(
            variants, deployment, credibility, compensate, run.console, checks=CHAT_CHECKS
        )
        found = reuse_chat.measure(
            run.model, run.text, sizes, chosen, run.logs, run.say, dtype=dtype
        )
        run.show([chat_table(found)], {"command": "chat", **found.plain()}, chosen)


@app.command()
def mixed(
    variant: Annotated[
        str,
        typer.Option(metavar="NAME[=VALUE][+NAME...]", help="How to reuse, as `rag` takes it."),
    ] = "gaps+boundary=8",
    deployment: File = None,
    credibility: Credibility = None,
    compensate: Compensate = None,
    requests: Annotated[int, typer.Option(min=1, help="Mixed requests.")] = 1000,
    exact: Annotated[int, typer.Option(min=1, help="Exact requests that follow.")] = 50,
    at_once: Annotated[int, typer.Option(min=1, help="Mixed requests in flight at once.")] = 8,
    dtype: Dtype = "float32",
    control: Annotated[
        bool, typer.Option("--control", help="Serve the mixed requests on stock as well.")
    ] = False,
    seed: Seed = 0,
    quick: Quick = False,
    model: Model = MODEL,
    json: Json = None,
) -> None:
    """Check that, after many mixed requests, exact ones are answered as by a fresh engine.

    Exits with code 1 if one is not, and reports how sure the fresh engine was of its token there.
    """
    from kvplug_lab.reuse import mixed as reuse_mixed

    sizes = replace(
        reuse_mixed.MixedSizes(), requests=requests, exact=exact, at_once=at_once, seed=seed
    )
    if quick:
        sizes = replace(reuse_mixed.QUICK, seed=seed)
    with _running(model, json) as run:
        (chosen,) = (
            [_own(deployment)]
            if deployment is not None
            else _variants(variant, None, credibility, compensate, run.console)
        )
        found = reuse_mixed.measure(
            run.model,
            run.text,
            sizes,
            chosen.section,
            run.logs,
            run.say,
            dtype=dtype,
            control=control,
        )
        run.show([mixed_table(found)], {"command": "mixed", **found.plain()}, [chosen])
    if found.mismatches:
        typer.echo(
            f"{len(found.mismatches)} of {found.compared} exact requests were not answered as by "
            "a fresh engine",
            err=True,
        )
        raise typer.Exit(1)


@app.command()
def checks(
    segments: Annotated[
        str, typer.Option(metavar="N,...", help="Stored segments to measure at.")
    ] = "100,1000,10000",
    rag: Annotated[
        Path | None,
        typer.Option(
            help="Figures of `kvplug reuse rag --json`: the costs are shares of its times to first "
            "token; measured in a small run by default."
        ),
    ] = None,
    credibility: Credibility = None,
    rounds: Annotated[int, typer.Option(min=4, help="Requests measured per size.")] = 64,
    seed: Seed = 0,
    quick: Quick = False,
    model: Model = MODEL,
    json: Json = None,
) -> None:
    """Measure lookups and checks in the scheduler, in microseconds and as a share of TTFT."""
    from kvplug_lab.reuse import checks as reuse_checks
    from kvplug_lab.reuse import rag as reuse_rag

    try:
        sizes = [100, 300] if quick else [int(n) for n in segments.split(",")]
        if not sizes or min(sizes) < 20:
            raise ValueError
    except ValueError:
        typer.echo("--segments: must be integers of at least 20, separated by commas.", err=True)
        raise typer.Exit(2) from None
    ttft = _ttft(rag) if rag is not None else None
    with _running(model, json) as run:
        if ttft is None:
            small = replace(reuse_rag.QUICK, seed=seed)
            if not quick:
                small = replace(small, documents=8, shortest=200, longest=300, taken=4)
            nothing = _variants("nothing", None, None, None, run.console)
            measured = reuse_rag.measure(run.model, run.text, small, nothing, run.logs, run.say)
            ttft = _ttft_of(measured.plain())
        found = reuse_checks.measure(
            run.model,
            run.text,
            sizes,
            4 if quick else rounds,
            str(credibility) if credibility is not None else None,
            seed,
            run.say,
        )
        data = {"command": "checks", "ttft_s": ttft, **found.plain()}
        run.show([checks_table(found, ttft)], data, [])


# -- what the commands share -----------------------------------------------------------------------

CHAT_CHECKS = ({"structure": {"max_ancestry": 64}}, "position", "mask")
"""Past its window, a chat's own turns were computed over re-rotated ones."""


class _Run:
    """Inputs and outputs of a command."""

    def __init__(self, console: Console, model: Path, text: str, logs: Path, json: Path | None):
        self.console, self.model, self.text = console, model, text
        self.logs, self.json = logs, json

    def say(self, line: str) -> None:
        """Print progress to stderr."""
        typer.echo(line, err=True)

    def show(
        self, tables: Sequence[Table], data: Mapping[str, Any], variants: Sequence[ReuseVariant]
    ) -> None:
        """Print tables, and write the figures if a file was asked for."""
        for table in tables:
            print_table(self.console, table)
        if self.json is not None:
            sections = {v.name: v.section for v in variants}
            plain = {**data, "model": model_label(self.model), "sections": sections}
            self.json.write_text(json_module.dumps(_finite(plain), indent=1), encoding="utf-8")
            print_written(self.console, "figures", self.json)


def _finite(value: Any) -> Any:
    """The same with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


@contextmanager
def _running(model: str, json: Path | None) -> Iterator[_Run]:
    """Model, text and a folder for logs; errors become messages and exit codes."""
    from kvplug_lab import texts

    console = wide_console(WIDTH)
    with refusing(1):
        check_outputs(json=json)
        directory = model_directory(model)
        with _quiet(), tempfile.TemporaryDirectory(prefix="kvplug-reuse-") as logs:
            yield _Run(console, directory, texts.shakespeare(), Path(logs), json)


@contextmanager
def _quiet() -> Iterator[None]:
    """Engines started within log errors only."""
    ours = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    added = [name for name in ours if name not in os.environ]
    os.environ.update({name: ours[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _own(deployment: Path) -> ReuseVariant:
    from kvplug.cli.check import read_checked
    from kvplug.errors import DeploymentError, Refusal
    from kvplug_lab.reuse.runs import ReuseVariant

    section = read_checked(deployment).deployment.section
    if "reuse" not in section:
        refusal = Refusal("kvplug.reuse", "is not set.", "add a reuse section with checks.")
        raise DeploymentError(str(deployment), [refusal])
    return ReuseVariant(deployment.stem, section)


def _variants(
    asked: str,
    deployment: Path | None,
    credibility: Path | None,
    compensate: Path | None,
    console: Console,
    *,
    checks: Sequence[Any] | None = None,
) -> list[ReuseVariant]:
    """The ways to reuse that were asked for.

    One of the default ways whose file is not given is left out, with a message.

    Raises:
        DeploymentError: One is unknown or cannot run.
    """
    from kvplug_lab.reuse.runs import without_file

    files = {"credibility": credibility, "compensate": compensate}
    found = []
    for name in filter(None, asked.split(",")):
        lacking = without_file(name, files)
        if lacking and name in VARIANTS:
            console.print(
                f"{name}: skipped, it needs --{lacking} FILE (from `kvplug calibrate reuse`)",
                markup=False,
            )
            continue
        found.append(_variant(name, files, checks))
    if deployment is not None:
        found.append(_own(deployment))
    return found


def _variant(
    name: str, files: Mapping[str, Path | None], checks: Sequence[Any] | None
) -> ReuseVariant:
    from kvplug.errors import DeploymentError, Refusal
    from kvplug.parser import load_deployment
    from kvplug_lab.reuse.runs import named

    try:
        found = named(name, files, checks)
    except ValueError as error:
        fix = "use the names in `kvplug reuse rag --help`."
        raise DeploymentError("--variants", [Refusal(name, str(error), fix)]) from None
    load_deployment(dict(found.section))
    return found


def _ttft(file: Path) -> dict[str, float]:
    try:
        return _ttft_of(json_module.loads(read_regular(file, MAX_FIGURES)))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        typer.echo(f"--rag: {file} does not hold figures of `kvplug reuse rag --json`.", err=True)
        raise typer.Exit(2) from None


def _ttft_of(figures: Mapping[str, Any]) -> dict[str, float]:
    """Median seconds to the first token: of stock, and of the first way to reuse."""
    rows = [figures["stock"][0], *figures["variants"][:1]]
    return {row["variant"]: float(row["ttft_s"]["median"]) for row in rows}


# -- what is shown ---------------------------------------------------------------------------------


def _spread(plain: Mapping[str, Any], form: str, unit: str = "") -> str:
    low, middle, high = (format(plain[k], form) for k in ("low", "median", "high"))
    return f"{middle}{unit} [{low}, {high}]"


def _columns(table: Table, first: str, *others: str) -> Table:
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def rag_tables(found: reuse_rag.RagFigures) -> list[Table]:
    """Time to first token and answers, a row for every way to reuse."""
    plain = found.plain()
    sizes, tokens = plain["sizes"], plain["prompt_tokens"]["median"]
    title = (
        f"{sizes['requests']} requests of {sizes['taken']} out of {sizes['documents']} documents, "
        f"{tokens:,.0f} tokens: median [quartiles]; goal {GOAL:g}x"
    )
    table = _columns(
        Table(title=escape(title)),
        "",
        "time to first token, s",
        "stock / this",
        "processor time",
        "tokens reused",
        "recomputed",
        "answers identical",
        "tokens before they differ",
        "perplexity",
        "pass keys",
    )
    for row in [*plain["stock"], *plain["variants"]]:
        keys = row["passkeys"]
        table.add_row(
            row["variant"],
            _spread(row["ttft_s"], ".3f"),
            _spread(row["ttft_ratio"], ".2f", "x"),
            f"{row['processor_ratio']['median']:.2f}x",
            f"{row['reused_share']:.0%}",
            f"{row['computed_share']:.0%}",
            f"{row['greedy']['identical']:.0%}",
            f"{row['greedy']['tokens_share']:.0%}",
            f"{row['perplexity']:.2f}",
            f"{keys['found']} of {keys['asked']}",
        )
    table.add_section()
    table.add_row(
        f"{plain['published']['system']}, as published",
        "",
        plain["published"]["ttft"],
        *[""] * 7,
    )
    table.caption = (
        "answers are compared with stock's; processor time: the same ratio in CPU seconds; "
        f"perplexity of the true continuation without any document: {found.bare:.2f}; "
        f"CacheBlend: {plain['published']['source']}, against "
        f"{plain['published']['against']}"
    )
    return [table]


def chat_table(found: reuse_chat.ChatFigures) -> Table:
    """A row per engine and part of the chat."""
    plain = found.plain()
    sizes = plain["sizes"]
    table = _columns(
        Table(
            title=f"a chat of {sizes['turns']} turns over {sizes['window']:,} tokens, "
            f"{plain['different_replies']} different replies"
        ),
        "",
        "turns",
        "time to first token, s",
        "stock / this",
        "processor time",
        "tokens reused",
        "recomputed",
        "replies identical",
        "tokens before they differ",
        "perplexity",
    )
    for name, parts in plain["summary"].items():
        for part, row in parts.items():
            if row["turns"]:
                table.add_row(
                    f"{name}, {part}",
                    str(row["turns"]),
                    _spread(row["ttft_s"], ".3f"),
                    _spread(row["ttft_ratio"], ".2f", "x"),
                    f"{row['processor_ratio']['median']:.2f}x",
                    f"{row['reused_share']:.0%}",
                    f"{row['computed_share']:.0%}",
                    f"{row['identical']:.0%}",
                    f"{row['tokens_share']:.0%}",
                    f"{row['perplexity']:.2f}",
                )
    return table


def mixed_table(found: reuse_mixed.MixedFigures) -> Table:
    """Requests served, and answers that differed afterwards."""
    modes = ", ".join(f"{n} {kind}" for kind, n in sorted(found.modes.items()))
    rows = {
        "mixed requests": f"{sum(found.modes.values()):,} ({modes})",
        "reused approximately": f"{found.approximate:,}",
        "reused exactly": f"{found.exact:,}",
        "tokens reused": f"{found.reused:,} of {found.prompt_tokens:,}",
        "preemptions": f"{found.preemptions:,}",
        "exact requests compared": f"{found.compared}",
        "reuse in their answers": ", ".join(f"{n} {k}" for k, n in found.served_as.items()),
        "answered differently than by a fresh engine": f"{len(found.mismatches)}",
    }
    if found.mismatches:
        rows["margin of the fresh engine's token, nats"] = _margins(found.mismatches)
    if found.control is not None:
        rows["differing after mixed requests on stock"] = f"{len(found.control)}"
        if found.control:
            rows["its margin there, nats"] = _margins(found.control)
    table = Table(title="exact requests after mixed ones", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _margins(differing: Sequence[reuse_mixed.Mismatch]) -> str:
    return ", ".join("" if m.margin is None else f"{m.margin:.3f}" for m in differing)


def checks_table(found: reuse_checks.CheckCosts, ttft: Mapping[str, float]) -> Table:
    """Microseconds per stored segments, a row per part of the work."""
    times = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in ttft.items())
    table = _columns(
        Table(title=escape(f"microseconds, median [quartiles]; time to first token: {times}")),
        "",
        *(f"{n:,} segments" for n in found.sizes),
        *(f"share of TTFT, {name}" for name in ttft),
    )
    for part in found.parts:
        spreads = [found.costs[n][part] for n in found.sizes]
        shares = [
            f"{spreads[-1].median / 1e6 / seconds:.3%}" if part not in found.each else ""
            for seconds in ttft.values()
        ]
        table.add_row(part, *(s.text(",.1f") for s in spreads), *shares)
    return table
