"""Fitting the estimator of credibility, and judging it on held-out placements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvplug_reuse_learned.calibration import FEATURES, Estimator, features
from kvplug_reuse_learned.experiment import Compared
from kvplug_reuse_learned.placements import PlacementTrial

Array = npt.NDArray[np.float64]


HIDDEN = 8
"""Units of the perceptron's hidden layer."""


FOLDS = 5


PENALTY = {"logistic": 4.0, "mlp": 2.0}
"""Weight of the squared weights, against the loss summed over placements."""


@dataclass(frozen=True)
class Bounds:
    """Bounds within which reuse counts as keeping the answer.

    Attributes:
        agreement: Least share of equal first choices.
        divergence: Largest mean KL divergence, nats.
    """

    agreement: float = 0.9
    divergence: float = 0.05

    def kept(self, outcome: Compared) -> bool:
        """True if the outcome is within the bounds."""
        return outcome.agreement >= self.agreement and outcome.divergence <= self.divergence


def table(trials: Sequence[PlacementTrial], bounds: Bounds) -> tuple[Array, Array]:
    """Features ``[n, F]`` and labels ``[n]`` of trials."""
    x = np.stack([features(t.candidate, t.request) for t in trials])
    return x, np.array([float(bounds.kept(t.outcome)) for t in trials])


def scale(x: Array) -> npt.NDArray[np.float32]:
    """Mean, deviation, least and largest of each feature, ``[4, F]``; of what is not NaN."""
    known = np.isfinite(x)
    some = known.any(0)
    filled = np.where(known, x, 0.0)
    count = np.maximum(known.sum(0), 1)
    mean = filled.sum(0) / count
    deviation = np.sqrt((np.where(known, x - mean, 0.0) ** 2).sum(0) / count)
    least = np.where(some, np.where(known, x, np.inf).min(0, initial=np.inf), 0.0)
    largest = np.where(some, np.where(known, x, -np.inf).max(0, initial=-np.inf), 0.0)
    found = np.stack([mean, np.where(deviation > 1e-6, deviation, 1.0), least, largest])
    rounded = found.astype(np.float32)
    rounded[0] = np.clip(rounded[0], rounded[2], rounded[3])
    return rounded


def fit(kind: str, x: Array, y: Array, seed: int = 0) -> Estimator:
    """Fit an estimator of ``y`` to features ``[n, F]`` by penalised maximum likelihood."""
    empty = Estimator(kind, scale(x), {})
    z, target = torch.from_numpy(empty.standard(x)), torch.from_numpy(y)
    source = torch.Generator().manual_seed(seed)
    # Half a placement of either kind, so that one class alone gives no infinite weights.
    base = math.log((y.sum() + 0.5) / (len(y) - y.sum() + 0.5))
    if kind == "logistic":
        shapes: dict[str, tuple[int, ...]] = {"logistic.weight": (z.shape[1],)}
    else:
        shapes = {"hidden.weight": (z.shape[1], HIDDEN), "output.weight": (HIDDEN,)}
    weights: dict[str, Tensor] = {
        name: torch.randn(shape, generator=source, dtype=torch.float64) * 0.3
        for name, shape in shapes.items()
    }
    if kind == "logistic":
        weights["logistic.weight"].zero_()
        weights["logistic.bias"] = torch.tensor([base], dtype=torch.float64)
    else:
        weights["hidden.bias"] = torch.zeros(HIDDEN, dtype=torch.float64)
        weights["output.bias"] = torch.tensor([base], dtype=torch.float64)
    for weight in weights.values():
        weight.requires_grad_()

    def loss() -> Tensor:
        if kind == "logistic":
            logit = z @ weights["logistic.weight"] + weights["logistic.bias"]
        else:
            hidden = torch.tanh(z @ weights["hidden.weight"] + weights["hidden.bias"])
            logit = hidden @ weights["output.weight"] + weights["output.bias"]
        penalty = sum(
            (weights[name].square().sum() for name in shapes), torch.zeros((), dtype=torch.float64)
        )
        misses = torch.nn.functional.binary_cross_entropy_with_logits(logit, target)
        return misses + PENALTY[kind] / len(y) * penalty

    solver = torch.optim.LBFGS(
        list(weights.values()), max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-7
    )

    def step() -> Tensor:
        solver.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(step)  # type: ignore[no-untyped-call]
    made = {name: w.detach().numpy().astype(np.float32) for name, w in weights.items()}
    return Estimator(kind, empty.scale, made)


def choose(
    x: Array, y: Array, groups: Sequence[int], seed: int = 0
) -> tuple[str, dict[str, float]]:
    """Choose the kind of estimator by cross-validation; returns it and the losses in nats."""
    from sklearn.metrics import log_loss

    names = sorted(set(groups))
    folds = min(FOLDS, len(names))
    losses = {}
    for kind in ("logistic", "mlp"):
        total = 0.0
        for fold in range(folds):
            out = np.isin(np.array(groups), names[fold::folds])
            if out.all() or not out.any():
                continue
            p = fit(kind, x[~out], y[~out], seed).probability(x[out]).clip(1e-6, 1 - 1e-6)
            total += float(log_loss(y[out], p, normalize=False, labels=[0.0, 1.0]))
        losses[kind] = total / len(y)
    return min(losses, key=lambda kind: losses[kind]), losses


@dataclass(frozen=True)
class EstimatorReport:
    """Quality of an estimator on held-out placements.

    Attributes:
        placements: How many.
        kept: Share of them that kept the answer.
        auc: Chance that one that did is given more than one that did not; NaN with one class.
        brier: Mean squared distance of the probability from what happened.
        brier_base: The same of the share of training as probability for all.
        bins: ``(predicted, observed, count)`` of equally many placements each, by probability.
        importance: By feature: how much the AUC falls when its values are shuffled.
    """

    placements: int
    kept: float
    auc: float
    brier: float
    brier_base: float
    bins: list[tuple[float, float, int]]
    importance: dict[str, float]


def auc(p: Array, y: Array) -> float:
    """Area under the ROC curve, ties count half; NaN if only one class is present."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(y, p)) if len(set(y)) == 2 else math.nan


def report(estimator: Estimator, x: Array, y: Array, base: float, bins: int = 5) -> EstimatorReport:
    """Judge an estimator on held-out placements; ``base`` is the share kept in training."""
    from sklearn.metrics import brier_score_loss

    def brier(chance: Array) -> float:
        return float(brier_score_loss(y, chance, pos_label=1.0))

    p = estimator.probability(x).astype(np.float64)
    order = np.argsort(p, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    shuffle = np.random.default_rng(0)
    importance = {}
    for f, name in enumerate(FEATURES):
        drops = []
        for _ in range(10):
            other = x.copy()
            other[:, f] = shuffle.permutation(other[:, f])
            drops.append(auc(p, y) - auc(estimator.probability(other), y))
        importance[name] = float(np.mean(drops))
    return EstimatorReport(
        len(y),
        float(y.mean()),
        auc(p, y),
        brier(p),
        brier(np.full(len(y), base)),
        [(float(p[part].mean()), float(y[part].mean()), len(part)) for part in parts],
        importance,
    )
