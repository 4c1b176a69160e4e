"""How much may be approximated, by what shadows found.

Three states. *Full*: every request as the deployment says. *Exact*: no request is approximated.
*Cautious*, between them: a share of the requests is, and each answer of it is answered again. A
test that the mean divergence exceeds the bound leads to exact; after a cooldown, doubled each time
the trial fails, cautious begins; there a second test, that the mean is within the bound, leads back
to full, and the first one, started anew, back to exact.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvplug.reuse.settings import ShadowSettings
from kvplug.shadow.sequential import MeanTest
from kvplug.shadow.states import ShadowState

MOST_COOLDOWNS = 16
"""Longest cooldown, as a multiple of the first."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change of state.

    Attributes:
        state: The state from now on.
        before: The state before.
        count: Divergences found in the state before.
        mean: Their mean; 0 for none.
        cooldown: Seconds until a trial, in the state exact; else 0.
    """

    state: ShadowState
    before: ShadowState
    count: int
    mean: float
    cooldown: float = 0.0


class ShadowControl:
    """Decides which requests may be approximated and which answers are answered again.

    Args:
        settings: The ``shadow`` key.
        clock: Seconds; only differences matter.
        seed: Seed of the random choices; None for a new one.

    Attributes:
        state: The state.
        on_change: Called with each change.
    """

    def __init__(
        self,
        settings: ShadowSettings,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
    ):
        self.settings = settings
        self.on_change: Callable[[Change], None] = lambda change: None
        self._clock = clock
        self._random = random.Random(seed)
        self._cooldowns = 1
        self.clear()

    def clear(self) -> None:
        """Start over, in the state full: what was found is about other weights."""
        self.state = ShadowState.FULL
        self._cooldowns = 1
        self._begin()

    def _begin(self) -> None:
        settings, cautious = self.settings, self.state is ShadowState.CAUTIOUS
        bound = settings.max_divergence
        self._harmful = MeanTest(bound, settings.alpha, "above", changes=not cautious)
        self._harmless = MeanTest(bound, settings.beta, "below")
        self._since = self._clock()
        self._sum = 0.0

    @property
    def evidence(self) -> float:
        """Evidence that the mean divergence is above the bound, as a share of what leads to the
        state exact; 1 in that state."""
        return 1.0 if self.state is ShadowState.EXACT else self._harmful.evidence

    def admits(self) -> bool:
        """Return True if a new request may be approximated; after a cooldown, begins the trial."""
        if self.state is ShadowState.EXACT:
            if self._clock() - self._since < self.settings.cooldown * self._cooldowns:
                return False
            self._change(ShadowState.CAUTIOUS)
        if self.state is ShadowState.CAUTIOUS:
            return self._random.random() < self.settings.trial
        return True

    def chooses(self) -> bool:
        """Return True if the answer of a request that was admitted is to be answered again."""
        return self.state is ShadowState.CAUTIOUS or (
            self._random.random() * self.settings.one_in < 1
        )

    def add(self, divergence: float) -> None:
        """Take in the divergence of an answer that was answered again, within ``[0, 1]``.

        In the state exact it is of a request that began before, and tells nothing new.
        """
        if self.state is ShadowState.EXACT:
            return
        self._sum += divergence
        harmless = self._harmless.add(divergence)
        if self._harmful.add(divergence):
            failed = self.state is ShadowState.CAUTIOUS
            self._cooldowns = min(MOST_COOLDOWNS, 2 * self._cooldowns) if failed else 1
            self._change(ShadowState.EXACT)
        elif harmless and self.state is ShadowState.CAUTIOUS:
            self._cooldowns = 1
            self._change(ShadowState.FULL)

    def _change(self, state: ShadowState) -> None:
        count = self._harmful.count
        change = Change(
            state,
            self.state,
            count,
            self._sum / count if count else 0.0,
            self.settings.cooldown * self._cooldowns if state is ShadowState.EXACT else 0.0,
        )
        self.state = state
        self._begin()
        self.on_change(change)
