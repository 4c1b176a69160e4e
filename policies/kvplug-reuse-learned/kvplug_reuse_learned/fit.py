"""Fitting what reuse calibration learns: an estimator of credibility, and linear corrections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvplug.contract import EngineView, LayerView, Rope
from kvplug.contract.reuse import Placement, Verdict
from kvplug.errors import KVPlugError
from kvplug_lab.reuse.replay import Piece, rotated
from kvplug_reuse_learned.calibration import FEATURES, Estimator, features
from kvplug_reuse_learned.compensate import Compensate, places
from kvplug_reuse_learned.fit_data import Adapt, Compared, Lab, Stored, Trial

Array = npt.NDArray[np.float64]

HIDDEN = 8
"""Units of the perceptron's hidden layer."""
FOLDS = 5
PENALTY = {"logistic": 4.0, "mlp": 2.0}
"""Of squared weights, beside the loss summed over placements."""


# -- credibility -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounds:
    """When reuse kept an answer.

    Attributes:
        agreement: Least share of equal first choices.
        divergence: Largest mean KL divergence, nats.
    """

    agreement: float = 0.9
    divergence: float = 0.05

    def kept(self, outcome: Compared) -> bool:
        """Whether it did."""
        return outcome.agreement >= self.agreement and outcome.divergence <= self.divergence


def table(trials: Sequence[Trial], bounds: Bounds) -> tuple[Array, Array]:
    """Features ``[n, F]`` and labels ``[n]``."""
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
    """An estimator of ``y`` from features ``[n, F]``, by penalised maximum likelihood."""
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
    """The kind of estimator with the least loss on left-out groups, and the losses, in nats."""
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
            total -= float((y[out] * np.log(p) + (1 - y[out]) * np.log(1 - p)).sum())
        losses[kind] = total / len(y)
    return min(losses, key=lambda kind: losses[kind]), losses


@dataclass(frozen=True)
class Report:
    """How good an estimator is on placements it has not seen.

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
    """Area under the ROC curve, ties half; NaN where only one class is there."""
    good, bad = p[y > 0.5], p[y <= 0.5]
    if not len(good) or not len(bad):
        return math.nan
    wins = (good[:, None] > bad).sum() + 0.5 * (good[:, None] == bad).sum()
    return float(wins / (len(good) * len(bad)))


def report(estimator: Estimator, x: Array, y: Array, base: float, bins: int = 5) -> Report:
    """Of an estimator on held-out placements; ``base`` is the share kept in training."""
    p = estimator.probability(x)
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
    return Report(
        len(y),
        float(y.mean()),
        auc(p, y),
        float(((p - y) ** 2).mean()),
        float(((base - y) ** 2).mean()),
        [(float(p[part].mean()), float(y[part].mean()), len(part)) for part in parts],
        importance,
    )


# -- correction ------------------------------------------------------------------------------------


class Residuals:
    """Collects what stored KV lacks, for a ridge regression in every layer.

    Args:
        lab: Whose KV it is.
    """

    def __init__(self, lab: Lab):
        self.frequencies = lab.frequencies
        self.tokens = 0
        self._xx: list[Tensor] = []
        self._xy: list[Tensor] = []
        self._yy: list[float] = []
        self._x: list[Tensor] = []
        self._y: list[Tensor] = []
        self._norms: list[list[float]] = []
        self.geometry: dict[int, tuple[int, int]] = {}

    def __call__(self, stored: Stored, placed: Piece, true: Piece) -> None:
        """Take in a placement."""
        # The sink of a text of its own is like no other token and would outweigh all of them.
        skip = 1 if stored.start == 0 else 0
        n = len(placed)
        back = -torch.arange(placed.start, placed.start + n)
        where = places(0, n, torch.device("cpu"))
        if n <= skip:
            return
        for layer in range(len(placed.key)):
            heads, size = placed.key[layer].shape[1:]
            width = heads * size
            rows = []
            for piece in (placed, true):
                key = rotated(piece.key[layer].float(), back, self.frequencies)
                rows.append(torch.cat((key.flatten(1), piece.value[layer].float().flatten(1)), 1))
            x = torch.cat((rows[0], where), 1)[skip:]
            y = (rows[1] - rows[0])[skip:]
            if len(self._xx) <= layer:
                self.geometry[layer] = (heads, size)
                self._xx.append(torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64))
                self._xy.append(torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64))
                self._x.append(torch.zeros(x.shape[1], dtype=torch.float64))
                self._y.append(torch.zeros(y.shape[1], dtype=torch.float64))
                self._yy.append(0.0)
                self._norms.append([0.0, 0.0])
            self._xx[layer] += x.T @ x
            self._xy[layer] += x.T @ y
            self._x[layer] += x.sum(0)
            self._y[layer] += y.sum(0)
            self._yy[layer] += float(y.square().sum())
            norm = x[:, :width].norm(dim=1).clamp_min(1e-30).log()
            self._norms[layer][0] += float(norm.sum())
            self._norms[layer][1] += float(norm.square().sum())
        self.tokens += n - skip

    def solve(self, rank: int, ridge: float) -> dict[str, npt.NDArray[np.float32]]:
        """The tensors of `kvplug_reuse_learned.calibration` for every layer.

        Args:
            rank: Directions kept, at most; no more than a token's K and V have.
            ridge: Penalty, relative to the mean variance of the inputs.
        """
        if not self.tokens:
            raise KVPlugError("there is no placement to learn a correction from")
        made: dict[str, npt.NDArray[np.float32]] = {}
        for layer, (xx, xy) in enumerate(zip(self._xx, self._xy, strict=True)):
            x, y = self._x[layer] / self.tokens, self._y[layer] / self.tokens
            cov = xx / self.tokens - x[:, None] * x
            cross = xy / self.tokens - x[:, None] * y
            penalty = ridge * cov.diagonal().mean() + 1e-12
            weight = torch.linalg.solve(cov + penalty * torch.eye(len(cov)).double(), cross)
            # Of what the regression explains, the directions that tell most come first.
            _, directions = torch.linalg.eigh(weight.T @ cov @ weight)
            directions = directions.flip(1)[:, : min(rank, len(y))]
            mean = self._norms[layer][0] / self.tokens
            spread = max(self._norms[layer][1] / self.tokens - mean**2, 0.0) ** 0.5
            at = f"layers.{layer}."
            found = {
                "mean": x,
                "encode": weight @ directions,
                "decode": directions.T,
                "residual": y,
                "norm": torch.tensor([mean, spread]),
            }
            for name, tensor in found.items():
                made[at + name] = tensor.contiguous().numpy().astype(np.float32)
        assert all(made[f"layers.{i}.mean"].shape[0] == len(xx) for i, xx in enumerate(self._xx))
        return made


class Explained:
    """Share of the squared residual that a correction removes, over the placements it is shown."""

    def __init__(self, correct: Adapt):
        self._correct = correct
        self._left: list[float] = []
        self._all: list[float] = []

    def __call__(self, stored: Stored, placed: Piece, true: Piece) -> None:
        better = self._correct(0, stored, placed)
        for layer in range(len(placed.key)):
            if len(self._all) <= layer:
                self._all.append(0.0)
                self._left.append(0.0)
            for was, now, is_ in (
                (placed.key, better.key, true.key),
                (placed.value, better.value, true.value),
            ):
                self._all[layer] += float((is_[layer] - was[layer])[1:].square().sum())
                self._left[layer] += float((is_[layer] - now[layer])[1:].square().sum())

    @property
    def by_layer(self) -> list[float]:
        """Share removed in each layer; negative where it did harm."""
        return [
            1 - left / whole if whole else 0.0
            for left, whole in zip(self._left, self._all, strict=True)
        ]


def correcting(policy: Compensate, lab: Lab, position: str = "rope/neox/calibration") -> Adapt:
    """The policy `compensate` on a lab's pieces."""
    rope = Rope(tuple(lab.frequencies.tolist()))

    def correct(index: int, stored: Stored, piece: Piece) -> Piece:
        print_ = lab.fingerprint(stored, [0] * len(piece))
        placement = Placement(print_, 0, len(piece), piece.start, Verdict(True, exact=False))
        keys, values = [], []
        for i, (key, value) in enumerate(zip(piece.key, piece.value, strict=True)):
            view = LayerView(i, len(piece.key), key.shape[1], 0, key.shape[2], rope=rope)
            k, v = policy.adapt(view, placement, key, value)
            keys.append(k)
            values.append(v)
        return Piece(piece.start, keys, values)

    return correct


def built(path: str, rank: int, keys: bool = False) -> Compensate:
    """The policy `compensate` with a file."""
    options = Compensate.Options.model_validate({"model": path, "rank": rank, "keys": keys})
    return Compensate(options, EngineView(16))
