"""Lines between the accelerator and a tier: what their transfers cost, as measured."""

from __future__ import annotations

from collections import deque

import numpy as np

from kvplug.contract import LinkView
from kvplug.tiers.fitting import fit_times

REMEMBERED = 64
"""Transfers of a direction that its speed is fitted to."""

FITTED_EVERY = 8
"""Transfers between two fits, once there are that many."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0
"""Seconds that a tier is left alone after its first failure in a row, and at most."""


class Link:
    """One direction of a tier's line.

    Attributes:
        queued: Bytes that wait.
        latency: Seconds of a transfer beside its bytes, as fitted.
        bandwidth: Bytes a second, as fitted; 0 before the first transfer.
    """

    def __init__(self) -> None:
        self.queued = 0
        self.latency = 0.0
        self.bandwidth = 0.0
        self._sizes: deque[int] = deque(maxlen=REMEMBERED)
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._new = 0

    def add(self, size: int, seconds: float) -> None:
        """Take note of a transfer that was made; what cannot be one is left out."""
        if size <= 0 or not 0 < seconds < 1e6:
            return
        self._sizes.append(size)
        self._seconds.append(seconds)
        self._new += 1
        if self._new >= FITTED_EVERY or len(self._sizes) <= FITTED_EVERY:
            self._fit()

    def view(self, down: bool) -> LinkView:
        """The line as policies see it."""
        return LinkView(self.latency, self.bandwidth, self.queued, down)

    def _fit(self) -> None:
        self._new = 0
        sizes, seconds = np.array(self._sizes, float), np.array(self._seconds)
        if sizes.max() < 1.5 * sizes.min():
            # One size does not tell latency from bandwidth: it is all taken for bandwidth, which
            # errs by no more than a latency for sizes other than this one.
            self.latency, self.bandwidth = 0.0, float(1 / np.median(seconds / sizes))
            return
        latency, rest = fit_times(np.stack([np.ones_like(sizes), sizes], axis=1), seconds)
        self.latency = float(latency)
        # Where bytes seem to cost nothing, the largest transfer bounds what they can have cost.
        self.bandwidth = float(1 / rest) if rest > 0 else float((sizes / seconds).max())


class Health:
    """Whether a tier is asked at all: after a failure it is left alone, longer each time in a row.

    Attributes:
        until: Time at which it is asked again.
        failures: Failures in a row.
    """

    def __init__(self) -> None:
        self.until = 0.0
        self.failures = 0

    def failed(self, now: float) -> None:
        """Take note of a failure; those within a pause count once."""
        if now < self.until:
            return
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(self.failures, 10))
        self.failures += 1
        self.until = now + pause

    def worked(self) -> None:
        """Take note that it did what it was asked."""
        self.failures = 0
        self.until = 0.0

    def down(self, now: float) -> bool:
        """True while it is left alone."""
        return now < self.until
