"""The probability that reusing stored KV keeps the answer.

What reuse out of context costs depends on how a segment was computed and on where it goes: whether
it stood at the front of a text, how much it leaned on what came before, how long it is. A small
model (a logistic regression, or a two-layer perceptron) learned from real text which placements
left the model's next tokens as they were; `kvplug calibrate reuse` trains it.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from kvplug.contract import (
    Candidate,
    EngineView,
    PolicyOptions,
    ReuseCheck,
    ReuseRequest,
    Verdict,
)
from kvplug_reuse_learned.calibration import Estimator, calibration_for, features, is_exact

BINS = 10


class Credibility(ReuseCheck):
    """Refuses placements whose probability of keeping the answer is below the threshold."""

    name = "credibility"
    changes = "refuses stored KV that a small trained model expects to change the answer"
    paper = "kvplug; what it predicts is in the spirit of CacheBlend, arXiv 2405.16444"

    class Options(PolicyOptions):
        """Options of `Credibility`."""

        model: str = Field(
            "reuse.safetensors",
            min_length=1,
            description="calibration file written by kvplug calibrate reuse for this model",
        )
        threshold: float = Field(
            0.5,
            ge=0,
            le=1,
            description="least probability that reuse keeps the answer; less is recomputed",
        )

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        found = calibration_for(self.options.model, engine)
        self.estimator: Estimator | None = None if found is None else found.estimator
        self._seen = np.zeros(BINS, dtype=np.int64)

    def check(self, candidate: Candidate, request: ReuseRequest) -> Verdict:
        if is_exact(candidate, request):
            return Verdict(True, confidence=1.0)
        if self.estimator is None:
            return Verdict(False, "not calibrated", exact=False)
        chance = float(self.estimator.probability(features(candidate, request)))
        self._seen[min(int(chance * BINS), BINS - 1)] += 1
        if chance < self.options.threshold:
            return Verdict(False, "not credible", exact=False, confidence=chance)
        return Verdict(True, exact=False, confidence=chance)

    def counters(self) -> dict[str, float]:
        return {
            f"credibility_{i / BINS:.1f}_to_{(i + 1) / BINS:.1f}": float(n)
            for i, n in enumerate(self._seen)
            if n
        }
