"""Fitting the linear corrections of stored KV, and measuring what they remove."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvplug.contract import EngineView, LayerView, Rope
from kvplug.contract.reuse import Placement, Verdict
from kvplug.errors import KVPlugError
from kvplug_lab.reuse.partial_forward import Piece, rotated
from kvplug_reuse_learned.compensate import Compensate, places
from kvplug_reuse_learned.effects import Adapt
from kvplug_reuse_learned.experiment import Experiment, StoredKV


class Residuals:
    """Collects what stored KV lacks, for a ridge regression in every layer.

    Args:
        experiment: Whose KV it is.
    """

    def __init__(self, experiment: Experiment):
        self.frequencies = experiment.frequencies
        self.tokens = 0
        self._xx: list[Tensor] = []
        self._xy: list[Tensor] = []
        self._yy: list[float] = []
        self._x: list[Tensor] = []
        self._y: list[Tensor] = []
        self._norms: list[list[float]] = []
        self.geometry: dict[int, tuple[int, int]] = {}

    def __call__(self, stored: StoredKV, placed: Piece, true: Piece) -> None:
        """Accumulate a placement."""
        # The sink at a text's start is unlike any other token and would outweigh all of them.
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
        """Solve the regressions; returns the file's tensors (see `calibration`) for every layer.

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
            # Of what the regression explains, the most predictive directions come first.
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
    """Share of the squared residual that a correction removes, over all placements."""

    def __init__(self, correct: Adapt):
        self._correct = correct
        self._left: list[float] = []
        self._all: list[float] = []

    def __call__(self, stored: StoredKV, placed: Piece, true: Piece) -> None:
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
        """Share removed in each layer; negative where the error grew."""
        return [
            1 - left / whole if whole else 0.0
            for left, whole in zip(self._left, self._all, strict=True)
        ]


def correcting(
    policy: Compensate, experiment: Experiment, position: str = "rope/neox/calibration"
) -> Adapt:
    """Apply the policy `compensate` to the pieces of an experiment."""
    rope = Rope(tuple(experiment.frequencies.tolist()))

    def correct(index: int, stored: StoredKV, piece: Piece) -> Piece:
        print_ = experiment.fingerprint(stored, [0] * len(piece))
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
    """Build the policy `compensate` for a calibration file."""
    options = Compensate.Options.model_validate({"model": path, "rank": rank, "keys": keys})
    return Compensate(options, EngineView(16))
