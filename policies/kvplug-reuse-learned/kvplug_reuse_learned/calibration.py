"""The calibration file of `kvplug calibrate reuse`: its tensors, its checks, its features.

The file is safetensors: numbers and text, nothing that could run. Its metadata hold the format's
name and version, the model's name and fingerprint, the SHA-256 of the text, the bounds of the
label, the kind of estimator, the names of its features in order, the layers' KV heads, and a
SHA-256 over all of that and every tensor. With ``F`` features, ``W = 2 * H * d`` elements of K and
V of a token and ``X = W + 3``:

| name | shape | what |
| --- | --- | --- |
| ``features`` | ``[4, F]`` | mean, deviation, least and largest value of each in training |
| ``credibility_mean`` | ``[1]`` | mean credibility of the placements in training |
| ``logistic.weight``, ``logistic.bias`` | ``[F]``, ``[1]`` | of a logistic regression |
| ``hidden.weight``, ``hidden.bias`` | ``[F, h]``, ``[h]`` | of a two-layer perceptron |
| ``output.weight``, ``output.bias`` | ``[h]``, ``[1]`` | likewise |
| ``layers.{i}.mean`` | ``[X]`` | mean of stale K (before RoPE), V and `decays` |
| ``layers.{i}.encode`` | ``[X, R]`` | to the predictable directions of the residual, best first |
| ``layers.{i}.decode`` | ``[R, W]`` | to the residual of K and V |
| ``layers.{i}.residual`` | ``[W]`` | mean residual |
| ``layers.{i}.norm`` | ``[2]`` | mean and deviation of the logarithm of a token's key norm |

All are float32. Everything is read with numpy; nothing here needs torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvplug import KVPlugError, UnreadableFile, read_tensors
from kvplug.contract import Candidate, EngineView, ReuseRequest

Floats = npt.NDArray[np.float32]

MAGIC = "kvplug-reuse-calibration"
VERSION = 2

MAX_BYTES = 4 << 30
"""Largest file that is read."""

FEATURES = (
    "log_length",
    "log_shift",
    "shifted",
    "log_before",
    "log_before_then",
    "no_context_then",
    "same_context",
    "ancestry",
    "k_drift",
    "v_drift",
    "sparsity",
    "key_cosine",
    "outgoing",
    "outgoing_absent",
    "share",
    "log_after",
)
"""Features of a placement, in the estimator's order."""

MEASURES = ("k_drift", "v_drift", "sparsity", "key_cosine", "outgoing")
"""Features taken from a fingerprint's measures; absent ones count as the training mean."""

DECAYS = (4.0, 16.0, 64.0)
"""Tokens over which the regression's inputs of place fall by e: a residual is largest where a
segment begins."""

KINDS = ("logistic", "mlp")

_LARGEST = 1 << 16
_AGAIN = "run `kvplug calibrate reuse` again"
_REQUIRED = (
    "format", "version", "fingerprint", "model", "text_sha256", "kind", "features", "geometry",
    "bounds", "report",
)  # fmt: skip


def is_exact(candidate: Candidate, request: ReuseRequest) -> bool:
    """True for the same position, the same preceding text and no approximate ancestry."""
    stored, asked = candidate.fingerprint, request.fingerprint
    same = stored.start == asked.start and stored.context == asked.context
    return same and stored.ancestry == 0


def features(candidate: Candidate, request: ReuseRequest) -> npt.NDArray[np.float64]:
    """`FEATURES` of a placement, float64 ``[F]``; NaN for an absent measure."""
    stored, asked = candidate.fingerprint, request.fingerprint
    shift = asked.start - stored.start
    measures = [stored.measures.get(name, math.nan) for name in MEASURES]
    after = max(request.num_tokens - asked.start - stored.length, 0)
    return np.array(
        [
            math.log1p(stored.length),
            math.log1p(abs(shift)),
            float(shift != 0),
            math.log1p(asked.start),
            math.log1p(stored.start),
            float(stored.start == 0),
            float(stored.context == asked.context),
            float(min(stored.ancestry, 8)),
            *measures,
            float(not math.isfinite(measures[-1])),
            min(stored.length / max(request.num_tokens, 1), 1.0),
            math.log1p(after),
        ]
    )


class BadCalibration(KVPlugError, ValueError):
    """A file that is no calibration of reuse, or none of the model that is served."""

    exit_code = 2


@dataclass(frozen=True, eq=False)
class Estimator:
    """A logistic regression or a two-layer perceptron over standardised features.

    Attributes:
        kind: One of `KINDS`.
        scale: ``[4, F]``: mean, deviation, least and largest value of each feature in training.
        tensors: Its weights, by the names of the file.
    """

    kind: str
    scale: Floats
    tensors: Mapping[str, Floats]

    def standard(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Features ``[..., F]`` standardised and clipped to their range in training."""
        mean, deviation, least, largest = self.scale.astype(np.float64)
        inside = np.clip(np.where(np.isfinite(x), x, mean), least, largest)
        standard: npt.NDArray[np.float64] = (inside - mean) / deviation
        return standard

    def probability(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Probability that reuse keeps the answer, ``[...]`` of features ``[..., F]``."""
        z = self.standard(x)
        if self.kind == "logistic":
            logit = z @ self.tensors["logistic.weight"] + self.tensors["logistic.bias"][0]
        else:
            hidden = np.tanh(z @ self.tensors["hidden.weight"] + self.tensors["hidden.bias"])
            logit = hidden @ self.tensors["output.weight"] + self.tensors["output.bias"][0]
        chance: npt.NDArray[np.float64] = 1 / (1 + np.exp(-np.clip(logit, -30, 30)))
        return chance


@dataclass(frozen=True, eq=False)
class ReuseCalibration:
    """A calibration of reuse.

    Attributes:
        path: Where it lies, for messages.
        fingerprint: `kvplug.fingerprint.model_fingerprint` of the model; empty where it had none.
        model: Name of the model, for messages.
        text_sha256: SHA-256 of the text, hexadecimal.
        kind: Kind of the estimator, one of `KINDS`.
        geometry: ``(kv_heads, head_size)`` of each layer, by index.
        bounds: Of the label: ``agreement``, the least share of equal first choices, and
            ``divergence``, the largest mean KL divergence in nats.
        report: What was found on held-out documents, by name.
        tensors: The tensors, float32.
    """

    path: str
    fingerprint: str
    model: str
    text_sha256: str
    kind: str
    geometry: Mapping[int, tuple[int, int]]
    bounds: Mapping[str, float]
    report: Mapping[str, float]
    tensors: Mapping[str, Floats]

    @property
    def estimator(self) -> Estimator:
        """The estimator of the credibility."""
        return Estimator(self.kind, self.tensors["features"], self.tensors)

    @property
    def credibility_mean(self) -> float:
        """Mean credibility in training."""
        return float(self.tensors["credibility_mean"][0])

    @property
    def rank(self) -> int:
        """Largest rank of the corrections in the file; 0 where it has none."""
        found = [t.shape[1] for n, t in self.tensors.items() if n.endswith(".encode")]
        return min(found, default=0)

    def check_model(self, engine: EngineView) -> None:
        """Raise BadCalibration unless this was calibrated on the engine's model."""
        if not engine.may_run(self.fingerprint):
            raise BadCalibration(
                f"reuse calibration {self.path} was made for another model ({self.model}, "
                f"fingerprint {self.fingerprint[:12] or 'unknown'}; the engine runs "
                f"{engine.model[:12] or 'one whose weights cannot be read'}); run "
                "`kvplug calibrate reuse` on the model that is served"
            )

    def check_layers(self, engine: EngineView) -> None:
        """Raise BadCalibration unless it has a correction for every layer of the engine."""
        for layer in engine.layers:
            found, asked = (
                self.geometry.get(layer.index),
                (layer.num_kv_heads, layer.head_size),
            )
            if found != asked:
                has = f"{found[0]} KV heads of {found[1]}" if found else "no such layer"
                raise BadCalibration(
                    f"reuse calibration {self.path} (of {self.model}) has {has} where layer "
                    f"{layer.index} of the engine has {asked[0]} KV heads of {asked[1]}; run "
                    "`kvplug calibrate reuse` on the model that is served, without tensor "
                    "parallelism"
                )

    def save(self, path: str | Path) -> str:
        """Write the file; returns its checksum. Raises ValueError where it could not be read."""
        from safetensors.numpy import save_file

        tensors = {n: np.ascontiguousarray(t, dtype=np.float32) for n, t in self.tensors.items()}
        _check_tensors(str(path), self.kind, self.geometry, tensors)
        metadata = {
            "format": MAGIC,
            "version": str(VERSION),
            "fingerprint": self.fingerprint,
            "model": self.model,
            "text_sha256": self.text_sha256,
            "kind": self.kind,
            "features": json.dumps(FEATURES),
            "geometry": json.dumps({str(i): list(g) for i, g in sorted(self.geometry.items())}),
            "bounds": json.dumps(dict(self.bounds), sort_keys=True),
            "report": json.dumps(dict(self.report), sort_keys=True),
        }
        checksum = _checksum(metadata, tensors)
        save_file(tensors, path, metadata={**metadata, "checksum": checksum})
        # safetensors makes a file only its owner can read; a server may be somebody else.
        mask = os.umask(0)
        os.umask(mask)
        Path(path).chmod(0o666 & ~mask)
        return checksum


def load(path: str | Path) -> ReuseCalibration:
    """Read a calibration of reuse, and verify its format, version, checksum and tensors.

    Raises:
        BadCalibration: It is missing, another file, of another version, truncated, edited, or its
            tensors do not fit each other; the message names the file and what to do.
    """
    try:
        stat = Path(path).stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadCalibration(
            f"reuse calibration {path} cannot be read ({reason}); create it with "
            f"`kvplug calibrate reuse --output {path}`"
        ) from None
    return _load(str(path), stat.st_size, stat.st_mtime_ns)


def calibration_for(path: str, engine: EngineView) -> ReuseCalibration | None:
    """`load`, checked against the engine's model.

    None if the engine's layers are unknown, as in ``kvplug check``, and there is no file yet.
    """
    if not engine.layers and not Path(path).exists():
        return None
    found = load(path)
    found.check_model(engine)
    return found


# -- inside ----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _load(path: str, size: int, changed: int) -> ReuseCalibration:
    try:
        metadata, tensors = read_tensors(path, "np", MAX_BYTES)
    except UnreadableFile as error:
        raise BadCalibration(f"reuse calibration {path} {error.problem}; {_AGAIN}") from None
    if metadata.get("format") != MAGIC:
        raise BadCalibration(
            f"{path} is not a reuse calibration: name a file that `kvplug calibrate reuse` wrote"
        )
    if metadata.get("version") != str(VERSION):
        raise BadCalibration(
            f"reuse calibration {path} has version {metadata.get('version')!r}, this release reads "
            f"{VERSION}; {_AGAIN}"
        )
    checksum = metadata.pop("checksum", "")
    absent = [name for name in _REQUIRED if name not in metadata]
    if absent or checksum != _checksum(metadata, tensors):
        raise BadCalibration(
            f"reuse calibration {path} was edited or damaged (its checksum does not match); "
            f"{_AGAIN}"
        )
    try:
        names = tuple(json.loads(metadata["features"]))
        geometry = {
            int(i): (int(g[0]), int(g[1])) for i, g in json.loads(metadata["geometry"]).items()
        }
        bounds = _numbers(json.loads(metadata["bounds"]))
        report = _numbers(json.loads(metadata["report"]))
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError, OverflowError):
        raise BadCalibration(
            f"reuse calibration {path} has unreadable metadata; {_AGAIN}"
        ) from None
    if names != FEATURES:
        raise BadCalibration(
            f"reuse calibration {path} has features that this release does not know; {_AGAIN}"
        )
    _check_tensors(path, metadata["kind"], geometry, tensors)
    return ReuseCalibration(
        path,
        metadata["fingerprint"],
        metadata["model"],
        metadata["text_sha256"],
        metadata["kind"],
        geometry,
        bounds,
        report,
        tensors,
    )


def _numbers(read: Any) -> dict[str, float]:
    return {str(name): float(value) for name, value in read.items()}


def _check_tensors(
    path: str, kind: str, geometry: Mapping[int, tuple[int, int]], tensors: Mapping[str, Any]
) -> None:
    """Raise BadCalibration unless every tensor is there, float32, finite and of its shape."""
    if kind not in KINDS:
        raise BadCalibration(
            f"reuse calibration {path} has an unknown kind of estimator {kind!r}; known: "
            f"{', '.join(KINDS)}; {_AGAIN}"
        )
    count = len(FEATURES)
    shapes: dict[str, tuple[int | str, ...]] = {"features": (4, count), "credibility_mean": (1,)}
    if kind == "logistic":
        shapes |= {"logistic.weight": (count,), "logistic.bias": (1,)}
    else:
        shapes |= {"hidden.weight": (count, "h"), "hidden.bias": ("h",)}
        shapes |= {"output.weight": ("h",), "output.bias": (1,)}
    corrected = any(name.startswith("layers.") for name in tensors)
    for layer, (heads, size) in geometry.items() if corrected else ():
        width = 2 * heads * size
        inputs, at = width + len(DECAYS), f"layers.{layer}."
        shapes |= {f"{at}mean": (inputs,), f"{at}encode": (inputs, "r")}
        shapes |= {f"{at}decode": ("r", width), f"{at}residual": (width,), f"{at}norm": (2,)}
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        found = tensors.get(name)
        if found is None or found.dtype != np.float32 or not np.isfinite(found).all():
            raise BadCalibration(f"reuse calibration {path} lacks a valid tensor {name}; {_AGAIN}")
        fits = found.ndim == len(shape) and all(
            got == (sizes.setdefault(want, got) if isinstance(want, str) else want)
            and 0 < got <= _LARGEST
            for want, got in zip(shape, found.shape, strict=True)
        )
        if not fits:
            raise BadCalibration(
                f"reuse calibration {path}: {name} has the shape {tuple(found.shape)}; {_AGAIN}"
            )
    if set(tensors) != set(shapes):
        other = sorted(set(tensors) - set(shapes))[0]
        raise BadCalibration(f"reuse calibration {path} has an unknown tensor {other}; {_AGAIN}")
    mean, deviation, least, largest = tensors["features"]
    if not ((deviation > 0).all() and (least <= mean).all() and (mean <= largest).all()):
        raise BadCalibration(
            f"reuse calibration {path} has inconsistent feature statistics; {_AGAIN}"
        )


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Any]) -> str:
    found = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        found.update(f"{name}:{tensor.dtype}:{tensor.shape}:".encode())
        found.update(tensor.tobytes())
    return found.hexdigest()
