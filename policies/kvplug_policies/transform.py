"""The file of ``kvplug calibrate transfer``: a basis of K and one of V, over all layers and heads.

The file is safetensors. For each of ``key`` and ``value``, of ``L`` layers with ``H`` KV heads of
``d`` elements, ``n = L * H * d`` and ``r`` components in order of their energy:

| name | shape | what |
| --- | --- | --- |
| ``mean`` | ``[L, H, d]`` | mean of each channel; of keys before they are rotated |
| ``weight`` | ``[L, H, d]`` | what a channel is multiplied by, so that errors weigh alike |
| ``basis`` | ``[n, r]`` | orthonormal directions of weighted tokens less their mean, float16 |
| ``deviation`` | ``[r]`` | standard deviation along each |
| ``steps`` | ``[s]`` | steps that a component may be rounded to, ascending |
| ``rate`` | ``[g, s]`` | bits of a component, mean over the groups of `GROUP` components |
| ``loss`` | ``[g, s + 1]`` | mean square error of a component; the last is that of none stored |

All are float32 but the basis. Rates and losses were measured on tokens that the basis was not
fitted to.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvplug.contract import EngineView
from kvplug_policies.fitted_file import BadCalibration, FittedFile

GROUP = 16
"""Components that share a step."""

PLANES = ("key", "value")
TENSORS = ("mean", "weight", "basis", "deviation", "steps", "rate", "loss")

FILE = FittedFile(
    "transform",
    "is not a transform: name a file that `kvplug calibrate transfer` wrote",
    magic="kvplug-transform",
    version=1,
    required=("format", "version", "fingerprint", "model", "text_sha256", "tokens", "rope"),
    command="kvplug calibrate transfer",
)


@dataclass(frozen=True, eq=False)
class Transform:
    """Bases of K and V.

    Attributes:
        path: Path of the file, for messages.
        fingerprint: `kvplug.fingerprint.model_fingerprint` of the model; empty if unknown.
        model: Name of the model, for messages.
        text_sha256: SHA-256 of the text, hexadecimal.
        tokens: Tokens that the bases were fitted to.
        rope: Radians per position of each pair of a key; empty for keys that are not rotated.
        interleaved: Pairs are neighbouring elements.
        tensors: The tensors as ``key.basis``, on the CPU.
        checksum: SHA-256 over all of it, hexadecimal.
    """

    path: str
    fingerprint: str
    model: str
    text_sha256: str
    tokens: int
    rope: tuple[float, ...]
    interleaved: bool
    tensors: Mapping[str, Tensor]
    checksum: str = ""

    @property
    def geometry(self) -> tuple[int, ...]:
        """Layers, KV heads and elements of a head."""
        return tuple(self.tensors["key.mean"].shape)

    def check(self, engine: EngineView) -> None:
        """Raise BadCalibration unless this was fitted to the engine's model."""
        if not engine.may_run(self.fingerprint):
            raise BadCalibration(
                f"transform {self.path} was made for another model ({self.model}); run `kvplug "
                "calibrate transfer` on the model that is served"
            )
        layers = engine.layers
        if layers:
            found = {(v.num_kv_heads, v.head_size) for v in layers}
            if found != {self.geometry[1:]} or len(layers) != self.geometry[0]:
                raise BadCalibration(
                    f"transform {self.path} is for {self.model} with layers, KV heads and head "
                    f"size {self.geometry}, and the engine has {len(layers)} layers of "
                    f"{sorted(found)}; run `kvplug calibrate transfer` on the model that is "
                    "served, and serve it without tensor or pipeline parallelism"
                )

    def save(self, path: str | Path) -> str:
        """Write the file; returns its checksum."""
        metadata = {
            "fingerprint": self.fingerprint,
            "model": self.model,
            "text_sha256": self.text_sha256,
            "tokens": str(self.tokens),
            "rope": json.dumps({"frequencies": self.rope, "interleaved": self.interleaved}),
        }
        return FILE.write(path, metadata, self.tensors)


def load(path: str | Path) -> Transform:
    """Read a transform and verify its format, version, checksum and shapes.

    Raises:
        BadCalibration: The file is missing, no transform, of another version, truncated or edited;
            the message names the file, the problem and the fix.
    """
    return _load(*FILE.state(path))


@functools.lru_cache(maxsize=2)
def _load(path: str, size: int, changed: int) -> Transform:
    metadata, tensors, checksum = FILE.read(path)
    try:
        rope: dict[str, Any] = json.loads(metadata["rope"])
        frequencies = tuple(float(one) for one in rope["frequencies"])
        interleaved, tokens = bool(rope["interleaved"]), int(metadata["tokens"])
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        raise BadCalibration(f"transform {path} has unreadable metadata; {FILE.again}") from None
    if not _shapes_fit(tensors, 2 * len(frequencies)):
        raise BadCalibration(f"transform {path} has tensors of other shapes; {FILE.again}")
    return Transform(
        path,
        metadata["fingerprint"],
        metadata["model"],
        metadata["text_sha256"],
        tokens,
        frequencies,
        interleaved,
        tensors,
        checksum,
    )


def _shapes_fit(tensors: Mapping[str, Tensor], rotated: int) -> bool:
    if set(tensors) != {f"{plane}.{name}" for plane in PLANES for name in TENSORS}:
        return False
    shape = tensors["key.mean"].shape
    if len(shape) != 3 or rotated > shape[2]:
        return False
    for plane in PLANES:
        of = {name: tensors[f"{plane}.{name}"] for name in TENSORS}
        if of["basis"].ndim != 2 or of["steps"].ndim != 1:
            return False
        r, s = of["basis"].shape[1], len(of["steps"])
        wanted = {
            "mean": shape,
            "weight": shape,
            "basis": (shape.numel(), r),
            "deviation": (r,),
            "rate": (r // GROUP, s),
            "loss": (r // GROUP, s + 1),
        }
        if r % GROUP or any(of[name].shape != size for name, size in wanted.items()):
            return False
        halves = {name for name, t in of.items() if t.dtype == torch.float16}
        if halves != {"basis"} or any(of[n].dtype != torch.float32 for n in of.keys() - halves):
            return False
        if not all(bool(t.isfinite().all()) for t in of.values()):
            return False
        if not bool((of["weight"] > 0).all() and (of["steps"] > 0).all()):
            return False
    return True


def allocate(
    rates: NDArray[np.float64], losses: NDArray[np.float64], budget: float, unit: float = 1.0
) -> NDArray[np.int64]:
    """Choose a step for each group so that the loss is least within a budget.

    Dynamic programming over the groups, by the bits spent so far in units.

    Args:
        rates: Bits of each group and step, ``[groups, steps]``.
        losses: Loss of each, ``[groups, steps + 1]``; the last column is that of nothing stored,
            which takes no bits.
        budget: Bits of all groups.
        unit: Bits that are told apart; rates are rounded up to them.

    Returns:
        Index of each group's step; the number of steps for none, ``[groups]``.
    """
    groups, steps = rates.shape
    room = max(int(budget / unit), 0)
    costs = np.concatenate([np.ceil(rates / unit), np.zeros((groups, 1))], 1).astype(np.int64)
    best = np.zeros(room + 1)
    chosen = np.zeros((groups, room + 1), np.int8)
    for g in range(groups):
        found = np.full(room + 1, np.inf)
        for s in range(steps + 1):
            cost = int(costs[g, s])
            if cost > room:
                continue
            offer = np.full(room + 1, np.inf)
            offer[cost:] = best[: room + 1 - cost] + losses[g, s]
            better = offer < found
            found[better] = offer[better]
            chosen[g, better] = s
        best = found
    picks = np.zeros(groups, np.int64)
    at = int(best.argmin())
    for g in range(groups - 1, -1, -1):
        picks[g] = chosen[g, at]
        at -= int(costs[g, picks[g]])
    return picks


def rotate(
    keys: Tensor, start: int, rope: tuple[float, ...], interleaved: bool, back: bool = False
) -> Tensor:
    """Rotate keys for their positions, or back.

    Args:
        keys: float32 ``[layers, tokens, kv_heads, head_size]``.
        start: Position of the first token.
        rope: Radians per position of each pair.
        interleaved: Pairs are neighbouring elements instead of one of either half.
        back: Undo the rotation.

    Returns:
        The same shape.
    """
    pairs = len(rope)
    if not pairs:
        return keys
    at = torch.arange(start, start + keys.shape[1], dtype=torch.float64)
    angle = at[:, None] * torch.tensor(rope, dtype=torch.float64)
    cos, sin = angle.cos().float()[:, None], angle.sin().float()[:, None]
    if back:
        sin = -sin
    found = keys.clone()
    turned = keys[..., : 2 * pairs]
    if interleaved:
        x, y = turned[..., 0::2], turned[..., 1::2]
        found[..., 0 : 2 * pairs : 2] = x * cos - y * sin
        found[..., 1 : 2 * pairs : 2] = y * cos + x * sin
    else:
        x, y = turned[..., :pairs], turned[..., pairs:]
        found[..., :pairs] = x * cos - y * sin
        found[..., pairs : 2 * pairs] = y * cos + x * sin
    return found
