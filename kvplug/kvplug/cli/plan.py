"""``kvplug plan``: what a model's KV takes, and what each deployment makes of a GPU's memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvplug.cli import complete
from kvplug.cli.json_output import print_json
from kvplug.cli.refusals import refusing

if TYPE_CHECKING:
    from kvplug.planning.candidates import Candidate
    from kvplug.planning.model import Model
    from kvplug.planning.plan import Planned, Question
    from kvplug.planning.prices import Price

GIB = 1 << 30
STOCK = "stock"
OF_THE_PLAN = frozenset(
    {
        "model",
        "dtype",
        "max-model-len",
        "max-num-seqs",
        "num-gpu-blocks-override",
        "gpu-memory-utilization",
        "tensor-parallel-size",
        "shutdown-timeout",
    }
)
"""Flags of a file that the question answers instead."""
WIDTH = 400
"""Columns where the output is not a terminal."""
NUMBER = len("1,000,000")
"""Columns of a number at least, so that none is cut on a narrow terminal."""

ModelName = Annotated[
    str,
    typer.Option(
        help="A directory, ORG/NAME of the Hugging Face hub, smollm2, or a config.json alone.",
        show_default=False,
        autocompletion=complete.models,
    ),
]
Memory = Annotated[
    str, typer.Option(help="Memory of one GPU, e.g. 80GiB.", show_default=False, metavar="SIZE")
]
Context = Annotated[
    int, typer.Option(help="Tokens of a request with its answer.", show_default=False)
]


def plan(
    model: ModelName,
    memory: Memory,
    context: Context,
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE...]",
            help="Deployments to plan instead of kvplug's own list: files, or names as "
            "`kvplug check` takes them.",
            show_default=False,
            autocompletion=complete.deployments,
        ),
    ] = None,
    users: Annotated[
        int, typer.Option(help="Requests that are to fit at once; 0: as many as there is room for.")
    ] = 0,
    output_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 512,
    budget: Annotated[
        int, typer.Option(help="Tokens that sequence policies keep of a request.")
    ] = 2048,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Memory of the weights on all GPUs, e.g. 16GB; from the model's files or config "
            "if left out.",
            show_default=False,
            metavar="SIZE",
        ),
    ] = None,
    overhead: Annotated[
        str,
        typer.Option(
            help="Memory of one GPU that is neither weights nor KV; vLLM prints it when it starts.",
            metavar="SIZE",
        ),
    ] = "3GiB",
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Part of the memory that vLLM may use.")
    ] = 0.92,
    tensor_parallel: Annotated[int, typer.Option(help="GPUs that share the model.")] = 1,
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="vLLM's flag of that name: tokens of a step.")
    ] = 8192,
    max_num_seqs: Annotated[
        int, typer.Option(help="vLLM's flag of that name; 0: as many requests as fit.")
    ] = 0,
    dtype: Annotated[str, typer.Option(help="The model's dtype; auto: what its config says.")] = (
        "auto"
    ),
    host: Annotated[
        str | None,
        typer.Option(
            help="Host memory for a tier, e.g. 64GiB: says how many tokens fit there.",
            show_default=False,
            metavar="SIZE",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_yaml: Annotated[
        str | None,
        typer.Option(
            "--yaml",
            help="Print one deployment of the plan as a file ready to serve.",
            show_default=False,
            metavar="DEPLOYMENT",
        ),
    ] = None,
) -> None:
    """Plan a model's KV cache: tokens in the pool and users at once, for each deployment.

    Starts no engine and needs no GPU. Layouts and limits are the policies' own,
    prices are the documentation's measurements; what was not measured is said.
    """
    from kvplug.planning.candidates import candidates
    from kvplug.planning.files import deployment_file
    from kvplug.planning.model import read_model
    from kvplug.planning.plan import Question
    from kvplug.planning.plan import plan as planned
    from kvplug.planning.weights import Weights, weights_of

    with refusing():
        found = read_model(model, dtype)
        given = Weights(_size("--weights", weights), "as given") if weights else weights_of(found)
        question = Question(
            memory=_size("--memory", memory),
            context=context,
            weights=given,
            output=output_tokens,
            users=users,
            ranks=tensor_parallel,
            utilization=gpu_memory_utilization,
            overhead=_size("--overhead", overhead),
            batched=max_num_batched_tokens,
            slots=max_num_seqs,
            host=_size("--host", host) if host else 0,
        )
        these = [_given(file) for file in files] if files else candidates(budget)
        rows = planned(found, question, these)
        if as_yaml is not None:
            typer.echo(deployment_file(found, question, _named(rows, as_yaml)), nl=False)
        elif as_json:
            print_json(_data(found, question, rows))
        else:
            _print(found, question, rows)


def _size(option: str, text: str) -> int:
    from pydantic import TypeAdapter, ValidationError

    from kvplug.contract.tiers import Size
    from kvplug.errors import KVPlugError

    try:
        return int(TypeAdapter(Size).validate_python(text))
    except ValidationError:
        raise KVPlugError(
            f"{option}: {text!r} is no size. Fix: write e.g. 80GiB, 16GB or a number of bytes."
        ) from None


def _given(file: Path) -> Candidate:
    """A deployment from a file or by name."""
    from kvplug.configs import find
    from kvplug.hosts.vllm.flags import read_config
    from kvplug.planning.candidates import Candidate

    config = read_config(find(file))
    flags = {name: value for name, value in config.flags.items() if name not in OF_THE_PLAN}
    kept = ("kv_load_failure_policy",)
    return Candidate(
        str(file),
        config.deployment.section,
        flags,
        _measured_as(config.deployment),
        {name: config.transfer[name] for name in kept if name in config.transfer},
    )


def _measured_as(deployment: Any) -> tuple[str, ...]:
    """Name under which the policies of a deployment, with any options, were measured."""
    from kvplug.contract import Kind

    shaping = [deployment.choice(kind) for kind in (Kind.SEQUENCE, Kind.FORMAT)]
    name = "+".join(choice.policy.name for choice in shaping if choice is not None)
    return (name,) if name else ()


def _named(rows: Sequence[Planned], name: str) -> Planned:
    from kvplug.errors import KVPlugError

    found = {row.candidate.name: row for row in rows}
    if name not in found:
        raise KVPlugError(
            f"--yaml: the plan has no deployment {name!r}. Fix: choose from {', '.join(found)}."
        )
    if found[name].refused is not None:
        raise KVPlugError(f"--yaml: {name} cannot run: {found[name].refused}")
    return found[name]


def _data(model: Model, question: Question, rows: Sequence[Planned]) -> dict[str, Any]:
    return {
        "model": model.name,
        "dtype": model.dtype,
        "layers": model.num_layers,
        "layers_with_kv": len(model.layers),
        "token_bytes": model.token_bytes(),
        "context_bytes": model.context_bytes(question.context),
        "features": sorted(map(str, model.features)),
        "memory": question.memory,
        "weights": question.weights.bytes,
        "weights_source": question.weights.source,
        "overhead": question.overhead,
        "kv_bytes": question.kv_bytes,
        "context": question.context,
        "output_tokens": question.output,
        "users": question.users,
        "tensor_parallel": question.ranks,
        "deployments": [row.as_data() for row in rows],
    }


def _print(model: Model, question: Question, rows: Sequence[Planned]) -> None:
    from rich.table import Table
    from rich.text import Text

    from kvplug.cli.tables import console, print_table

    on = console(WIDTH)
    for line in _summary(model, question):
        on.print(Text(line))
    table = Table(box=None, pad_edge=False)
    for heading in ("deployment", "answers"):
        table.add_column(heading, no_wrap=True)
    for heading in ("tokens in pool", f"users at {question.context:,}"):
        table.add_column(heading, justify="right", min_width=NUMBER)
    if question.users:
        table.add_column(f"context at {question.users:,} users", justify="right", min_width=NUMBER)
    if question.host:
        table.add_column("tokens in host tier", justify="right", min_width=NUMBER)
    for heading in ("CUDA graphs", "prefix cache", "runner", "measured"):
        table.add_column(heading)
    sources: dict[str, int] = {}
    for row in rows:
        if row.pool is None:
            continue
        shown = _shown(row)
        marks = [sources.setdefault(price.source, len(sources) + 1) for price in shown]
        prices = [f"{p.short} [{mark}]" for p, mark in zip(shown, marks, strict=True)]
        cells = [
            row.candidate.name,
            "exact" if row.exact else "approximate",
            f"{row.pool.tokens:,}",
            f"{row.users:,}",
            *([f"{row.longest:,}"] if question.users else []),
            *([f"{row.host_tokens:,}"] if question.host else []),
            row.needs.graphs,
            row.needs.prefix_cache,
            row.needs.runner,
            "; ".join(prices) or "not measured",
        ]
        table.add_row(*map(Text, cells))
    print_table(on, table)
    for source, mark in sources.items():
        on.print(Text(f"[{mark}] {source}"))
    refused: dict[str, list[str]] = {}
    for row in rows:
        if row.refused is not None:
            problem = row.refused.removeprefix(f"{row.candidate.name}: ")
            if " cannot run on a model " in problem:
                problem = f"cannot run on a model {problem.split(' cannot run on a model ', 1)[1]}"
            refused.setdefault(problem, []).append(row.candidate.name)
    for problem, names in refused.items():
        on.print(Text(f"not planned: {', '.join(names)}: {problem}"))


def _summary(model: Model, question: Question) -> list[str]:
    token = model.token_bytes()
    sliding = sum(layer.window is not None for layer in model.layers)
    kinds = f"{len(model.layers)} layers"
    if sliding:
        kinds += f", {sliding} of them with a sliding window"
    if len(model.layers) < model.num_layers:
        kinds += f", {model.num_layers - len(model.layers)} more attend over their KV"
    if model.latent:
        kinds += ", multi-head latent attention"
    gpus = f"{question.ranks} GPUs of " if question.ranks > 1 else ""
    lines = [
        f"{model.name}: {token:,} bytes of KV a token in {model.dtype} ({kinds}); "
        f"{model.context_bytes(question.context) / GIB:.2f} GiB at {question.context:,} tokens",
        f"{gpus}{question.memory / GIB:.1f} GiB x {question.utilization:g} - "
        f"{question.weights.bytes / question.ranks / GIB:.1f} GiB of weights "
        f"({question.weights.source}) - {question.overhead / GIB:.1f} GiB assumed for everything "
        f"else = {question.kv_bytes / GIB:.1f} GiB for KV",
    ]
    if model.longest and question.context > model.longest:
        lines.append(f"note: the model's config states {model.longest:,} tokens at most")
    return lines


def _shown(row: Planned) -> list[Price]:
    """What was measured of a deployment; of several budgets the one nearest to the plan's."""
    parts = [price for price in row.prices if price.is_part]
    shown = [price for price in row.prices if not price.is_part and price.name != STOCK]
    if parts:
        shown.append(min(parts, key=lambda price: abs((price.budget or 0) - row.kept)))
    return shown
