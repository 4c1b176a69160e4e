"""Re-rotates the keys of stored KV to a new position, where the model's positions allow it.

Rotary embeddings (RoFormer, arXiv 2104.09864) rotate a key by its position times a frequency per
pair of elements, and rotations add up: a key of position p becomes that of p + s by rotating it by
s. ALiBi (arXiv 2108.12409) adds its bias to the scores, so nothing stored knows its position.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from kvplug.contract import (
    Candidate,
    EngineView,
    LayerView,
    Placement,
    PolicyOptions,
    ReuseCheck,
    ReuseRequest,
    Verdict,
)
from kvplug_kernels.rerotate import rerotate

ROTARY = {"rope/neox": False, "rope/gptj": True}
"""Schemes whose keys can be re-rotated; True for pairs of neighbouring elements."""
REFUSED = {
    "learned": "absolute positions",
    "rope-by-length": "rotation depends on length",
    "unknown": "positions unknown",
}
"""Schemes that tie KV to where it was computed, to the cause of refusal elsewhere."""
FREE = frozenset({"alibi", "none"})
"""Schemes under which stored KV does not depend on position."""


class Position(ReuseCheck):
    """Uses KV unchanged at its own position, and re-rotates keys computed at another."""

    name = "position"
    changes = "re-rotates the keys of stored KV to the position where it is used"
    paper = "RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv 2104.09864"

    class Options(PolicyOptions):
        """Options of `Position`."""

        max_shift: int = Field(
            1 << 20,
            ge=0,
            le=1 << 20,
            description="largest shift of a segment, in positions, either way",
        )

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self.max_shift = self.options.max_shift
        self.rotates = any(layer.rope is not None for layer in engine.layers)
        self._frequencies: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}

    def check(self, candidate: Candidate, request: ReuseRequest) -> Verdict:
        scheme, stored = candidate.fingerprint.position, candidate.fingerprint.start
        shift = request.fingerprint.start - stored
        if scheme == "rope-by-length":
            # The table depends on the longest text so far: equal starts may be rotated differently.
            return Verdict(False, REFUSED[scheme], exact=False)
        if not shift:
            return Verdict(True)
        if scheme in FREE:
            if self.rotates:
                return Verdict(False, REFUSED["unknown"], exact=False)
            return Verdict(True)
        if _rotary(scheme) is None:
            return Verdict(False, REFUSED.get(scheme, REFUSED["unknown"]), exact=False)
        if abs(shift) > self.max_shift:
            return Verdict(False, "moved too far", exact=False)
        return Verdict(True, exact=False, shift=shift)

    def adapts(self, placement: Placement) -> bool:
        return placement.verdict.shift != 0

    def adapt(
        self, layer: LayerView, placement: Placement, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Re-rotate the keys by the verdict's shift.

        Raises:
            ValueError: The layer's rotation is unknown or differs from the fingerprint's.
        """
        shift = placement.verdict.shift
        if not shift or not len(key):
            return key, value
        rope, interleaved = layer.rope, _rotary(placement.fingerprint.position)
        if rope is None or interleaved is None or rope.interleaved != interleaved:
            raise ValueError(
                f"the rotation of layer {layer.index} is not {placement.fingerprint.position}"
            )
        rerotated = key.clone(memory_format=torch.contiguous_format)
        # One block that is as long as the run: [1, heads, tokens, head_size].
        slots = torch.arange(len(rerotated), device=rerotated.device)
        rerotate(
            rerotated.permute(1, 0, 2)[None],
            slots,
            shift,
            self._table(rope.frequencies, key.device),
            interleaved=interleaved,
        )
        return rerotated, value

    def _table(self, frequencies: tuple[float, ...], device: torch.device) -> Tensor:
        at = (frequencies, device)
        if at not in self._frequencies:
            self._frequencies[at] = torch.tensor(frequencies, dtype=torch.float32, device=device)
        return self._frequencies[at]


def _rotary(scheme: str) -> bool | None:
    """True if a scheme rotates neighbouring elements; None if its keys cannot be rotated."""
    kind, _, digest = scheme.rpartition("/")
    return ROTARY.get(kind) if digest else None
