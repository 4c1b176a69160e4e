"""``kvplug calibrate reuse``: fits the learned checks to a model."""

from __future__ import annotations

import dataclasses
import importlib.util
import json as json_module
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvplug.cli import tables
from kvplug.cli.tables import print_table

if TYPE_CHECKING:
    from kvplug_reuse_learned.effects import Effect
    from kvplug_reuse_learned.learn import Learned, LearnSettings
    from kvplug_reuse_learned.placements import PlacementTrial

WIDTH = 120
"""Columns assumed without a terminal."""


def reuse(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="The same as --model.", show_default=False),
    ] = None,
    of: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="A directory, ORG/NAME of the Hugging Face hub, or a name such as smollm2.",
            show_default="smollm2",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "--out", help="The file to write.")] = Path(
        "reuse.safetensors"
    ),
    text: Annotated[
        Path | None,
        typer.Option(
            envvar="KVPLUG_TEXTS", help="Plain text to cut documents from; Shakespeare by default."
        ),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(help="What every prompt begins with.", show_default=False),
    ] = None,
    prompts: Annotated[int, typer.Option(min=2, help="Prompts to learn from.")] = 32,
    held_out: Annotated[int, typer.Option(min=1, help="Prompts to report on.")] = 16,
    documents: Annotated[int, typer.Option(min=2, help="Documents of a prompt.")] = 3,
    least: Annotated[int, typer.Option(min=8, help="Tokens of a document at least.")] = 100,
    most: Annotated[int, typer.Option(min=8, help="Tokens of a document at most.")] = 250,
    placements: Annotated[int, typer.Option(min=1, help="Placements tried of a document.")] = 2,
    follow: Annotated[
        int, typer.Option(min=4, help="Tokens after a document that are compared, at most.")
    ] = 64,
    agreement: Annotated[
        float,
        typer.Option(min=0, max=1, help="Least share of equal first choices of a kept answer."),
    ] = 0.9,
    divergence: Annotated[
        float, typer.Option(min=0, help="Largest mean KL divergence of a kept answer, nats.")
    ] = 0.05,
    kind: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="Estimator: logistic, mlp, or auto for the one that predicts left-out prompts of "
            "training better.",
        ),
    ] = "auto",
    rank: Annotated[
        int, typer.Option(min=0, max=4096, help="Directions of the correction; 0 for none.")
    ] = 64,
    ridge: Annotated[
        float,
        typer.Option(min=0, help="Penalty of the correction, relative to its inputs' variance."),
    ] = 0.01,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Credibility threshold where effects are measured.")
    ] = 0.5,
    effects: Annotated[
        bool, typer.Option("--effects", help="Measure what each way to reuse costs and keeps.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of every choice.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 for torch's choice.")] = 0,
    json: Annotated[
        Path | None,
        typer.Option(
            metavar="[FILE]",
            help="Print the figures as JSON, or write them to FILE.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Learn from real text which reuse of stored KV keeps an answer, and what corrects it.

    The file it writes is what the checks credibility and compensate ask for. What it prints of
    them was measured on documents that nothing was learned from.
    """
    from kvplug.errors import KVPlugError

    console = tables.console(WIDTH)
    try:
        for option, path in (("--output", output), ("--json", json)):
            if path is not None and (path.is_dir() or not path.parent.is_dir()):
                raise KVPlugError(f"{option}: {path} cannot be written: its folder must exist")
        if importlib.util.find_spec("transformers") is None:
            raise KVPlugError(
                "kvplug calibrate reuse needs transformers: pip install 'kvplug[lab]'"
            )
        from kvplug_reuse_learned.documents import ExperimentSizes
        from kvplug_reuse_learned.fit_estimator import Bounds
        from kvplug_reuse_learned.learn import LearnSettings

        settings = LearnSettings(
            ExperimentSizes(prompts, held_out, documents, least, most, placements, follow, seed),
            Bounds(agreement, divergence),
            kind, rank, ridge, min(rank, 32), threshold, effects,
        )  # fmt: skip
        from kvplug_lab.cli.inputs import one_model

        _run(console, one_model(model, of), output, text, prefix, settings, threads, json)
    except KVPlugError as error:
        typer.echo(" ".join(str(error).splitlines()), err=True)
        raise typer.Exit(2) from None


def _run(
    console: Console,
    model: str,
    output: Path,
    text: Path | None,
    prefix: str | None,
    settings: LearnSettings,
    threads: int,
    json: Path | None,
) -> None:
    import torch
    import transformers

    from kvplug.model_source import model_label
    from kvplug_lab import models
    from kvplug_lab.cli.inputs import model_directory, text_of
    from kvplug_lab.cli.outputs import counted
    from kvplug_lab.texts import encoder_of, first_tokens
    from kvplug_reuse_learned.learn import learn
    from kvplug_reuse_learned.placements import PREFIX

    directory = model_directory(model)
    words = text_of(text)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    encode = encoder_of(tokenizer)
    if threads:
        torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    sizes = settings.sizes
    first = [*first_tokens(directory, tokenizer), *encode(PREFIX if prefix is None else prefix)]
    rounds = sizes.prompts + sizes.held_out * (2 if settings.effects else 1)
    with counted(rounds) as progress:
        learned = learn(
            loaded.eval(),
            encode,
            words,
            first,
            output,
            settings,
            models.model_fingerprint(directory),
            model_label(directory),
            progress,
        )
    _print(console, learned, settings)
    line = f"calibration of reuse: {output} ({output.stat().st_size / 1e6:.1f} MB)"
    console.print(line, markup=False, highlight=False, soft_wrap=True)
    if json is not None:
        _write_json(json, learned)


# -- what is shown ---------------------------------------------------------------------------------


def _print(console: Console, learned: Learned, settings: LearnSettings) -> None:
    from kvplug_reuse_learned.placements import SOURCES

    bounds = settings.bounds
    grid = Table(
        title=f"{learned.calibration.model}: one document reused, against recompute; kept: at "
        f"least {bounds.agreement:.0%} equal first choices and at most {bounds.divergence:g} nats",
        title_justify="left",
    )
    grid.add_column("computed")
    for head in ("placements", "divergence", "median", "agreement", "kept", "credibility"):
        grid.add_column(head, justify="right")
    every = [*learned.training, *learned.held_out]
    for source in SOURCES:
        _add_source(grid, source, [t for t in every if t.source == source], learned, settings)
    _add_source(grid, "all", every, learned, settings)
    print_table(console, grid)

    found = learned.report
    losses = ", ".join(f"{kind} {loss:.3f}" for kind, loss in learned.losses.items())
    tried = f" (loss on left-out prompts of training: {losses} nats)" if losses else ""
    lines = [
        f"credibility: {learned.calibration.kind}{tried}",
        f"{found.placements} held-out placements, {found.kept:.0%} kept: AUC {found.auc:.3f}, "
        f"Brier score {found.brier:.3f}; of their share in training {found.brier_base:.3f}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False)
    curve = Table(title="reliability on held-out placements", title_justify="left")
    for head in ("predicted", "observed", "placements"):
        curve.add_column(head, justify="right")
    for predicted, observed, count in found.bins:
        curve.add_row(f"{predicted:.2f}", f"{observed:.2f}", str(count))
    print_table(console, curve)
    logistic = learned.calibration.tensors.get("logistic.weight")
    weights = Table(title="features", title_justify="left")
    weights.add_column("feature")
    if logistic is not None:
        weights.add_column("weight", justify="right")
    weights.add_column("AUC lost without", justify="right")
    for i, (name, lost) in enumerate(found.importance.items()):
        weight = [f"{logistic[i]:+.2f}"] if logistic is not None else []
        weights.add_row(name, *weight, f"{lost:+.3f}")
    print_table(console, weights)
    if learned.explained:
        mean = sum(learned.explained) / len(learned.explained)
        console.print(
            f"compensate: removes {mean:.1%} of the squared residual of held-out placements, mean "
            f"over layers ({min(learned.explained):.1%} to {max(learned.explained):.1%})",
            markup=False, highlight=False,
        )  # fmt: skip
    if learned.effects:
        _print_effects(console, learned.effects, settings)


def _add_source(
    grid: Table,
    source: str,
    trials: list[PlacementTrial],
    learned: Learned,
    settings: LearnSettings,
) -> None:
    from statistics import median

    from kvplug_reuse_learned.calibration import features

    if not trials:
        return
    outcomes = [t.outcome for t in trials]
    estimator = learned.calibration.estimator
    chances = [float(estimator.probability(features(t.candidate, t.request))) for t in trials]
    n = len(trials)
    grid.add_row(
        source,
        str(n),
        f"{sum(o.divergence for o in outcomes) / n:.4f}",
        f"{median(o.divergence for o in outcomes):.4f}",
        f"{sum(o.agreement for o in outcomes) / n:.1%}",
        f"{sum(settings.bounds.kept(o) for o in outcomes) / n:.0%}",
        f"{sum(chances) / n:.2f}",
    )


def _print_effects(console: Console, found: list[Effect], settings: LearnSettings) -> None:
    sizes = settings.sizes
    grid = Table(
        title=f"all {sizes.documents} documents of {sizes.held_out} held-out prompts reused; "
        f"{sizes.follow} tokens that follow, against recompute",
        title_justify="left",
    )
    grid.add_column("reuse", overflow="fold")
    for head in ("computed", "divergence", "±", "agreement", "perplexity"):
        grid.add_column(head, justify="right")
    for row in found:
        grid.add_row(
            row.label,
            f"{row.recomputed:.0%}",
            f"{row.divergence:.4f}",
            f"{row.error:.4f}",
            f"{row.agreement:.1%}",
            f"{row.perplexity:.2f}",
        )
    print_table(console, grid)


def _write_json(path: Path, learned: Learned) -> None:
    def trial(found: PlacementTrial) -> dict[str, Any]:
        stored, asked = found.candidate.fingerprint, found.request.fingerprint
        return {
            "source": found.source,
            "prompt": found.prompt,
            "length": stored.length,
            "start_then": stored.start,
            "start": asked.start,
            "ancestry": stored.ancestry,
            "tokens": found.request.num_tokens,
            "measures": dict(stored.measures),
            **dataclasses.asdict(found.outcome),
        }

    plain = {
        "model": learned.calibration.model,
        "fingerprint": learned.calibration.fingerprint,
        "text_sha256": learned.calibration.text_sha256,
        "kind": learned.calibration.kind,
        "bounds": dict(learned.calibration.bounds),
        "losses": learned.losses,
        "report": _finite(dataclasses.asdict(learned.report)),
        "explained": learned.explained,
        "effects": [dataclasses.asdict(row) for row in learned.effects],
        "training": [trial(t) for t in learned.training],
        "held_out": [trial(t) for t in learned.held_out],
    }
    path.write_text(json_module.dumps(plain, indent=1) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """Replace NaN by None: JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
