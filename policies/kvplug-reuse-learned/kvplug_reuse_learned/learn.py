"""The run behind ``kvplug calibrate reuse``: measure, fit, write the file, judge it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvplug.contract.reuse import Candidate, ReuseRequest
from kvplug.errors import KVPlugError
from kvplug_reuse_learned.calibration import KINDS, ReuseCalibration, features, is_exact
from kvplug_reuse_learned.documents import ExperimentSizes, documents
from kvplug_reuse_learned.effects import Effect, Improvers, effects
from kvplug_reuse_learned.experiment import Experiment
from kvplug_reuse_learned.fit_correction import Explained, Residuals, built, correcting
from kvplug_reuse_learned.fit_estimator import Bounds, EstimatorReport, choose, fit, report, table
from kvplug_reuse_learned.placements import PlacementTrial, Progress, trials

AUTO = "auto"


@dataclass(frozen=True)
class LearnSettings:
    """Options of `learn`.

    Attributes:
        sizes: Sizes of the experiment.
        bounds: When reuse kept an answer.
        kind: Of the estimator, one of `KINDS`, or `AUTO` for the one that predicts left-out
            prompts of training better.
        rank: Directions of the correction that are written; 0 for none.
        ridge: Penalty of the correction, relative to the mean variance of its inputs.
        corrected: Directions used where the correction is measured.
        threshold: Credibility below which the effects recompute a document.
        effects: Whether the effects are measured.
    """

    sizes: ExperimentSizes = field(default_factory=ExperimentSizes)
    bounds: Bounds = field(default_factory=Bounds)
    kind: str = AUTO
    rank: int = 64
    ridge: float = 0.01
    corrected: int = 32
    threshold: float = 0.5
    effects: bool = False


@dataclass(frozen=True, eq=False)
class Learned:
    """Result of `learn`.

    Attributes:
        calibration: As it was written.
        losses: Loss of each kind of estimator on left-out prompts of training, nats; empty where
            one was requested.
        training: The placements that were learned from.
        held_out: Those that were not.
        report: Of the estimator, on the latter.
        explained: Share of the squared residual that the correction removes, by layer, on the
            latter; empty without one.
        effects: Of every way to reuse, on held-out prompts; empty unless requested.
    """

    calibration: ReuseCalibration
    losses: dict[str, float]
    training: list[PlacementTrial]
    held_out: list[PlacementTrial]
    report: EstimatorReport
    explained: list[float]
    effects: list[Effect]


def learn(
    model: Any,
    encode: Callable[[str], list[int]],
    text: str,
    prefix: Sequence[int],
    output: Path,
    settings: LearnSettings,
    fingerprint: str = "",
    name: str = "",
    progress: Progress | None = None,
) -> Learned:
    """Measure placements, learn from them, write the file, and report on others.

    Documents to learn from come from the first four fifths of the text, the others from the rest.

    Args:
        model: A Hugging Face ``...ForCausalLM``.
        encode: Tokens of a string, without special tokens.
        text: The text.
        prefix: Tokens that every prompt begins with.
        output: The file to write.
        settings: What is learned.
        fingerprint: Of the model.
        name: Of the model, for messages.
        progress: Called now and then with a line.

    Raises:
        KVPlugError: The text is too short, the prefix empty, or the model's attention is not
            plainly causal.
    """
    sizes = settings.sizes
    sizes.check()
    if settings.kind not in (*KINDS, AUTO):
        raise KVPlugError(f"--kind {settings.kind!r}: use one of {AUTO}, {', '.join(KINDS)}")
    if not len(prefix):
        raise KVPlugError("--prefix: the shared prefix must have at least one token")
    split = text.rfind("\n\n", 0, len(text) * 4 // 5) + 1
    learned_from = documents(text[:split], encode, sizes.prompts * sizes.documents, sizes)
    others = documents(text[split:], encode, sizes.held_out * sizes.documents, sizes)

    experiment = Experiment(model, prefix)
    residuals = Residuals(experiment)
    training = trials(
        experiment, learned_from, sizes, residuals if settings.rank else None, progress
    )
    x, y = table(training, settings.bounds)
    # Half of them without what only some hosts measure, so that it does without it too.
    blind = x.copy()
    blind[::2] = _without_outgoing(x[::2])
    kind = settings.kind
    losses: dict[str, float] = {}
    if kind == AUTO:
        kind, losses = choose(blind, y, [t.prompt for t in training], sizes.seed)
    estimator = fit(kind, blind, y, sizes.seed)
    tensors = dict(estimator.tensors) | {
        "features": estimator.scale,
        "credibility_mean": np.array([estimator.probability(x).mean()], dtype=np.float32),
    }
    if settings.rank:
        tensors |= residuals.solve(settings.rank, settings.ridge)
    heads = training[0].candidate.fingerprint.geometry
    geometry = {i: (heads[1], heads[2]) for i in range(heads[0])}

    def made(found: dict[str, float]) -> ReuseCalibration:
        return ReuseCalibration(
            str(output),
            fingerprint,
            name,
            hashlib.sha256(text.encode()).hexdigest(),
            kind,
            geometry,
            {"agreement": settings.bounds.agreement, "divergence": settings.bounds.divergence},
            found,
            tensors,
        )

    # Written before it is judged: the correction is measured through the policy and its file.
    made({}).save(output)
    correct = of_keys = None
    if settings.rank:
        correct = correcting(built(str(output), settings.corrected), experiment)
        of_keys = correcting(built(str(output), settings.corrected, keys=True), experiment)
    explained = None if of_keys is None else Explained(of_keys)
    held_out = trials(experiment, others, sizes, explained, progress, first=sizes.prompts)
    hx, hy = table(held_out, settings.bounds)
    judged = report(estimator, hx, hy, float(y.mean()))
    measured: list[Effect] = []
    if settings.effects:

        def credible(candidate: Candidate, request: ReuseRequest) -> bool:
            if is_exact(candidate, request):
                return True
            chance = float(estimator.probability(features(candidate, request)))
            return chance >= settings.threshold

        measured = effects(
            experiment, others, sizes, Improvers(correct, of_keys, credible), progress
        )
    numbers = {
        "placements": float(judged.placements),
        "kept": judged.kept,
        "auc": judged.auc,
        "brier": judged.brier,
    }
    final = made({name: value for name, value in numbers.items() if not math.isnan(value)})
    final.save(output)
    return Learned(
        final,
        losses,
        training,
        held_out,
        judged,
        explained.by_layer if explained is not None else [],
        measured,
    )


def _without_outgoing(x: np.ndarray) -> np.ndarray:
    from kvplug_reuse_learned.calibration import FEATURES

    blind = x.copy()
    blind[:, FEATURES.index("outgoing")] = np.nan
    blind[:, FEATURES.index("outgoing_absent")] = 1.0
    return blind
