"""The calibration file of `kvplug calibrate`: statistics of keys, values and queries.

The file is safetensors, so it holds numbers and text and nothing that could run. Its tensors, all
of them of one layer ``i`` under ``layers.{i}.``, with ``H`` KV heads of ``d`` elements:

| name | shape | what |
| --- | --- | --- |
| ``key_mean``, ``value_mean`` | ``[H, d]`` | mean of each channel |
| ``key_range``, ``value_range`` | ``[H, d]`` | largest distance of a channel from its mean |
| ``query_moment`` | ``[H, d, d]`` | mean of ``q q^T`` over the queries that read the head |
| ``key_encode``, ``key_decode`` | ``[H, d, d]`` | keys to latent coordinates, and back |
| ``key_energy`` | ``[H, d]`` | what each coordinate adds to the mean square of ``q . (k - mean)`` |
| ``value_basis`` | ``[H, d, d]`` | principal directions of values less their mean |
| ``value_energy`` | ``[H, d]`` | variance along each |
| ``key_sample``, ``value_sample`` | ``[n, H, d]`` | consecutive tokens of the text, float16 |
| ``query_sample`` | ``[m, heads, d]`` | queries of the last of these tokens, float16 |
| ``merge_FIT.errors`` | ``[H - 1]`` | error of each step that merges two groups of heads |
| ``merge_FIT.groups`` | ``[H - 1, H]`` | group of each head after the step |
| ``merge_FIT.{s}.heads`` | ``[m]`` | the heads that step ``s`` makes one of |
| ``merge_FIT.{s}.key_encode`` ... | ``[m, d, d]`` | their maps; ``[m]``, numbers, of a gain |

Energies and maps weigh a token by the attention it receives, half and half with all tokens alike.
``FIT`` is ``linear`` or ``gain``. Merged heads keep ``z = sum_h (k_h - mean_h) encode_h`` and stand
for ``k_h ~ mean_h + decode_h z``; values likewise. Row vectors are encoded from the right, columns
decoded from the left. Steps whose error is above a half have no maps.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from kvplug.contract import EngineView, Feature, FormatOptions, FormatPolicy, LayerView
from kvplug_policies.fitted_file import BadCalibration, FittedFile

SUFFIX = ".safetensors"

FILE = FittedFile(
    "calibration",
    "is not a calibration file: name one that `kvplug calibrate` wrote",
    magic="kvplug-calibration",
    version=2,
    required=("format", "version", "fingerprint", "model", "text_sha256", "tokens", "geometry"),
    command="kvplug calibrate",
)

SUPPORTS = FormatPolicy.supports - {Feature.TENSOR_PARALLEL}
"""Features that calibrated formats support: a rank does not know which heads are its own."""


class CalibratedOptions(FormatOptions):
    """Options of a format that needs a calibration file."""

    calibration: str = Field(
        "calibration.safetensors",
        min_length=1,
        description="calibration file written by kvplug calibrate for this model",
    )


@dataclass(frozen=True)
class Geometry:
    """Head counts and size of a layer.

    Attributes:
        num_kv_heads: KV heads.
        num_heads: Query heads.
        head_size: Elements per head.
    """

    num_kv_heads: int
    num_heads: int
    head_size: int


@dataclass(frozen=True, eq=False)
class Calibration:
    """A calibration file.

    Attributes:
        path: Path of the file, for messages.
        fingerprint: `kvplug.fingerprint.model_fingerprint` of the model; empty if unknown.
        model: Name of the model, for messages.
        text_sha256: SHA-256 of the text, hexadecimal.
        tokens: Tokens read.
        geometry: Each layer calibrated, by index.
        tensors: The tensors, by name, on the CPU.
        checksum: SHA-256 over all of it, hexadecimal.
    """

    path: str
    fingerprint: str
    model: str
    text_sha256: str
    tokens: int
    geometry: Mapping[int, Geometry]
    tensors: Mapping[str, Tensor]
    checksum: str = ""

    def of(self, layer: LayerView | int, name: str) -> Tensor:
        """Return a tensor of a layer. Raises BadCalibration if the file has none of that name."""
        index = layer if isinstance(layer, int) else layer.index
        found = self.tensors.get(f"layers.{index}.{name}")
        if found is None:
            raise BadCalibration(
                f"calibration {self.path} has no {name} of layer {index}; {FILE.again}"
            )
        return found

    def check(self, engine: EngineView) -> None:
        """Raise BadCalibration unless this was calibrated on the engine's model."""
        if not engine.may_run(self.fingerprint):
            raise BadCalibration(
                f"calibration {self.path} was made for another model ({self.model}, "
                f"fingerprint {self.fingerprint[:12] or 'unknown'}; the engine runs "
                f"{engine.model[:12] or 'one whose weights cannot be read'}); run "
                "`kvplug calibrate` on the model that is served"
            )
        for layer in engine.layers:
            found = self.geometry.get(layer.index)
            asked = Geometry(layer.num_kv_heads, layer.num_heads, layer.head_size)
            if found is None:
                raise BadCalibration(
                    f"calibration {self.path} for {self.model} has no layer {layer.index}; "
                    "run `kvplug calibrate` on the model that is served"
                )
            if found != asked:
                raise BadCalibration(
                    f"calibration {self.path} is for {self.model}, whose layer {layer.index} has "
                    f"{_heads(found)}, and the engine's has {_heads(asked)}; run `kvplug "
                    "calibrate` on the model that is served, without tensor parallelism"
                )

    def save(self, path: str | Path) -> str:
        """Write the file; returns its checksum."""
        metadata = {
            "fingerprint": self.fingerprint,
            "model": self.model,
            "text_sha256": self.text_sha256,
            "tokens": str(self.tokens),
            "geometry": json.dumps(
                {
                    str(i): [g.num_kv_heads, g.num_heads, g.head_size]
                    for i, g in sorted(self.geometry.items())
                }
            ),
        }
        return FILE.write(path, metadata, self.tensors)


def _heads(geometry: Geometry) -> str:
    return (
        f"{geometry.num_heads} query heads and {geometry.num_kv_heads} KV heads of "
        f"{geometry.head_size}"
    )


def load(path: str | Path) -> Calibration:
    """Read a calibration file and verify its format, version and checksum.

    Raises:
        BadCalibration: The file is missing, not a calibration, of another version, truncated or
            edited; the message names the file, the problem and the fix.
    """
    return _load(*FILE.state(path))


@functools.lru_cache(maxsize=4)
def _load(path: str, size: int, changed: int) -> Calibration:
    metadata, tensors, checksum = FILE.read(path)
    try:
        read: dict[str, Any] = json.loads(metadata["geometry"])
        geometry = {int(i): Geometry(*map(int, sizes)) for i, sizes in read.items()}
        tokens = int(metadata["tokens"])
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        raise BadCalibration(f"calibration {path} has unreadable metadata; {FILE.again}") from None
    return Calibration(
        path,
        metadata["fingerprint"],
        metadata["model"],
        metadata["text_sha256"],
        tokens,
        geometry,
        tensors,
        checksum,
    )


def calibration_for(path: str, engine: EngineView) -> Calibration:
    """`load`, and `Calibration.check` against the engine.

    Where no engine's layers are known, as in ``kvplug check``, the file need not be there yet.
    """
    if not engine.layers and not Path(path).exists():
        return Calibration(path, "", "", "", 0, {}, {})
    found = load(path)
    found.check(engine)
    return found


def whole_model(engine: EngineView) -> bool:
    """True if all layers of the model are here: a stage of a pipeline, or the layers that `mixed`
    gives to a format, may have none in which it saves anything."""
    return bool(engine.layers) and len(engine.layers) == engine.layers[0].num_layers


class OnDevice:
    """Tensors derived from a calibration, made once per layer and copied once to each device."""

    def __init__(self) -> None:
        self._made: dict[int, dict[str, Tensor]] = {}
        self._placed: dict[tuple[int, torch.device], dict[str, Tensor]] = {}

    def put(self, layer: LayerView, tensors: dict[str, Tensor]) -> None:
        """Set the tensors of a layer."""
        self._made[layer.index] = tensors
        self._placed = {k: v for k, v in self._placed.items() if k[0] != layer.index}

    def get(self, layer: LayerView, device: torch.device) -> dict[str, Tensor]:
        """A layer's tensors on a device."""
        found = self._placed.get((layer.index, device))
        if found is None:
            found = {name: t.to(device) for name, t in self._made[layer.index].items()}
            self._placed[layer.index, device] = found
        return found


def by_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """Query heads ``[n, heads, d]`` by the KV head they read, ``[n, kv_heads, readers, d]``."""
    return x.reshape(x.shape[0], kv_heads, -1, x.shape[-1])


# -- fits ------------------------------------------------------------------------------------------


def projection(moment: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The linear maps through fewer coordinates that lose least, for every number of them.

    With ``S`` the second moment of vectors ``x`` and ``W`` that of what they are multiplied with,
    the rank-r map ``M`` that minimises ``E (w . (x - M x))^2 = |W^(1/2) (I - M) S^(1/2)|^2`` is
    ``W^(-1/2) U_r U_r^T W^(1/2)``, with ``U`` the eigenvectors of ``W^(1/2) S W^(1/2)``; the loss
    is the sum of the eigenvalues left out. Without a weight these are principal components. The
    idea of Eigen Attention, arXiv 2408.05646, and Palu, 2407.21118, for one head or several.

    Args:
        moment: ``[..., n, n]`` of ``x``.
        weight: ``[..., n, n]``, the second moment of the other factor; None for the identity.

    Returns:
        ``encode [..., n, n]`` (row vectors from the right; keep the first columns), ``decode
        [..., n, n]`` (latent columns from the left; keep the first columns) and the energies
        ``[..., n]``, descending. float64.
    """
    moment = moment.double()
    if weight is None:
        values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
        vectors = vectors.flip(-1)
        return vectors, vectors, values.flip(-1).clamp_min(0)
    weight = weight.double()
    size = weight.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    weight = weight / size.clamp_min(1e-30)
    squares, axes = torch.linalg.eigh((weight + weight.mT) / 2)
    # Directions no query ever takes would be divided by nothing.
    squares = squares.clamp_min(1e-4)
    root = axes * squares.sqrt()[..., None, :] @ axes.mT
    inverse = axes * squares.rsqrt()[..., None, :] @ axes.mT
    values, vectors = torch.linalg.eigh(root @ moment @ root)
    vectors = vectors.flip(-1)
    energies = values.flip(-1).clamp_min(0) * size[..., 0]
    return root @ vectors, inverse @ vectors, energies
