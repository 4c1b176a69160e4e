"""A linear correction of KV that was computed after another text.

For each layer, calibration fits by ridge regression what is missing from a token's stored K and V
(of all KV heads, K before its rotation) to what the text gives, and keeps the directions that
explain most of it (reduced-rank regression: A. J. Izenman, Journal of Multivariate Analysis 5,
1975). The policy adds it, scaled down where reuse is credible.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from kvplug.contract import (
    Candidate,
    EngineView,
    Feature,
    LayerView,
    Placement,
    PolicyOptions,
    ReuseCheck,
    ReuseRequest,
    Rope,
    Verdict,
)
from kvplug_kernels.rerotate import rerotate
from kvplug_reuse_learned.calibration import DECAYS, ReuseCalibration, calibration_for


@dataclass(frozen=True, eq=False)
class Correction:
    """One layer's regression, float32 on one device; ``X`` inputs, ``W`` outputs, rank ``r``.

    Attributes:
        mean: ``[X]`` of the inputs.
        encode: ``[X, r]``.
        decode: ``[r, W]``.
        residual: ``[W]``, mean residual.
        norm: Mean and deviation of the logarithm of a token's key norm.
    """

    mean: Tensor
    encode: Tensor
    decode: Tensor
    residual: Tensor
    norm: tuple[float, float]

    def residual_of(
        self, key: Tensor, value: Tensor, offset: int, alpha: float
    ) -> tuple[Tensor, Tensor]:
        """Corrections of keys before rotation, and of values; float32 ``[n, H, d]``.

        Args:
            key: ``[n, H, d]`` float32, before rotation.
            value: The same.
            offset: Tokens of the segment before the first of these.
            alpha: Share of the correction, 0 to 1.
        """
        n, shape = len(key), key.shape
        given = torch.cat((key.reshape(n, -1), value.reshape(n, -1)), 1)
        inputs = torch.cat((given, places(offset, n, key.device)), 1)
        found = (inputs - self.mean) @ self.encode @ self.decode + self.residual
        found *= alpha * self.familiar(key)[:, None]
        width = found.shape[1] // 2
        return found[:, :width].view(shape), found[:, width:].view(shape)

    def familiar(self, key: Tensor) -> Tensor:
        """1 for keys ``[n, H, d]`` as long as those of calibration, falling beyond two deviations;
        float32 ``[n]``."""
        mean, deviation = self.norm
        length = key.flatten(1).norm(dim=1).clamp_min(1e-30).log()
        far = ((length - mean).abs() / max(deviation, 1e-6) - 2).clamp_min(0)
        return torch.exp(-far)


def places(offset: int, n: int, device: torch.device) -> Tensor:
    """Encode places in a segment: ``exp(-token / decay)`` for each of `DECAYS`, float32
    ``[n, 3]``."""
    at = torch.arange(offset, offset + n, device=device, dtype=torch.float32)
    return torch.exp(-at[:, None] / torch.tensor(DECAYS, device=device))


def rerotated_by(
    key: Tensor, shift: Tensor, rope: Rope | None, frequencies: Tensor | None
) -> Tensor:
    """Keys ``[n, H, d]`` rotated by ``shift`` positions each (int64 ``[n]``), a new tensor."""
    rerotated = key.clone(memory_format=torch.contiguous_format)
    if rope is not None and frequencies is not None and len(key):
        slots = torch.arange(len(rerotated), device=rerotated.device)
        # One block that is as long as the run: [1, heads, tokens, head_size].
        rerotate(
            rerotated.permute(1, 0, 2)[None],
            slots,
            shift,
            frequencies,
            interleaved=rope.interleaved,
        )
    return rerotated


class Compensate(ReuseCheck):
    """Corrects K and V of approximate placements towards what recomputation would give."""

    name = "compensate"
    changes = "adds a learned low-rank correction to stored KV used out of its context"
    paper = "kvplug; reduced-rank ridge regression (Izenman 1975)"
    supports = ReuseCheck.supports - {Feature.TENSOR_PARALLEL}

    class Options(PolicyOptions):
        """Options of `Compensate`."""

        model: str = Field(
            "reuse.safetensors",
            min_length=1,
            description="calibration file written by kvplug calibrate reuse for this model",
        )
        rank: int = Field(
            32,
            ge=1,
            le=4096,
            description="directions of the residual corrected per layer; at most the rank of "
            "the file",
        )
        keys: bool = Field(
            False,
            description="correct keys as well as values; worse on the model measured",
        )
        strength: float = Field(
            1.0,
            ge=0,
            le=1,
            description="share of the correction applied when no credibility is known",
        )

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        model = self.options.model
        self.calibration: ReuseCalibration | None = calibration_for(model, engine)
        if self.calibration is not None:
            self.calibration.check_layers(engine)
            if not self.calibration.rank:
                raise ValueError(
                    f"reuse calibration {model} has no corrections; run `kvplug calibrate "
                    "reuse` with --rank above 0"
                )
        self._made: dict[tuple[int, torch.device], tuple[Correction, Tensor | None]] = {}
        self._placements = 0

    def check(self, candidate: Candidate, request: ReuseRequest) -> Verdict:
        return Verdict(True)

    def adapts(self, placement: Placement) -> bool:
        return not placement.verdict.exact and self.alpha(placement) > 0

    def alpha(self, placement: Placement) -> float:
        """Share of the correction to add: smaller for more credible placements."""
        if self.calibration is None:
            return 0.0
        credibility = placement.verdict.confidence
        if credibility is None:
            return self.options.strength
        usual = max(1 - self.calibration.credibility_mean, 0.05)
        return self.options.strength * min((1 - credibility) / usual, 1.0)

    def adapt(
        self, layer: LayerView, placement: Placement, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add the layer's correction to values, and to keys with the option `keys`. Keys come
        in and go out rotated to their new position.

        Raises:
            ValueError: The layer's heads are not those of the calibration, or the rotation of its
                keys is unknown.
        """
        if not self.adapts(placement) or not len(key):
            return key, value
        correction, frequencies = self._of(layer, placement, key.device)
        width = key.shape[1] * key.shape[2]
        if 2 * width != correction.decode.shape[1]:
            raise ValueError(
                f"layer {layer.index} has {key.shape[1]} KV heads of {key.shape[2]} here, and "
                "the reuse calibration has other heads"
            )
        if layer.index == 0:
            self._placements += 1
        at = torch.arange(len(key), device=key.device) + placement.start
        # In float32: rotating a key there and back in bfloat16 would change it.
        bare = rerotated_by(key.float(), -at, layer.rope, frequencies)
        for_key, for_value = correction.residual_of(
            bare, value.float(), placement.offset, self.alpha(placement)
        )
        if placement.fingerprint.start == 0 and placement.offset == 0:
            # The first token of a text is an attention sink; nothing was fitted for it.
            for_key[0], for_value[0] = 0, 0
        better = (value.float() + for_value).to(value.dtype)
        if not self.options.keys:
            return key, better
        # What is added is rotated, not the sum: a key that gets nothing stays bit for bit.
        for_key = rerotated_by(for_key, at, layer.rope, frequencies)
        return (key.float() + for_key).to(key.dtype), better

    def counters(self) -> dict[str, float]:
        return {"compensated": float(self._placements)}

    def _of(
        self, layer: LayerView, placement: Placement, device: torch.device
    ) -> tuple[Correction, Tensor | None]:
        assert self.calibration is not None
        if layer.rope is None and placement.fingerprint.position.startswith("rope"):
            raise ValueError(f"the rotation of layer {layer.index} is unknown")
        made = self._made.get((layer.index, device))
        if made is None:
            tensors, at = self.calibration.tensors, f"layers.{layer.index}."
            if f"{at}mean" not in tensors:
                raise ValueError(
                    f"reuse calibration {self.calibration.path} has no layer {layer.index}"
                )
            given = {
                name: torch.from_numpy(tensors[at + name]).to(device)
                for name in ("mean", "encode", "decode", "residual")
            }
            mean, deviation = tensors[f"{at}norm"].tolist()
            correction = Correction(
                given["mean"],
                given["encode"][:, : self.options.rank].contiguous(),
                given["decode"][: self.options.rank].contiguous(),
                given["residual"],
                (mean, deviation),
            )
            table = None
            if layer.rope is not None:
                table = torch.tensor(layer.rope.frequencies, device=device)
            made = self._made[layer.index, device] = (correction, table)
        return made
