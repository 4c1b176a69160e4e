"""Compares answers after approximate reuse with exact ones, and stops reuse where they drift.

A *family* is a group that the host defines: the segments of one text, of one tenant. For each
family the guard remembers what exact answers looked like: the mean entropy of their next-token
distributions, and the mean log-probability of the most likely token. An answer that follows
approximate reuse is compared with the families it used. If it is outside the spread of exact
answers by more than the bounds, it is an error of that family; after enough errors the family's
breaker opens, and its approximate reuse stops until one trial succeeds (the circuit breaker of
Nygard, *Release It!*: closed, open, half-open).
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from kvplug.reuse.settings import Breaker, GuardSettings

FAMILIES = 4096
"""Most families remembered; the least recently used is forgotten first, open ones last."""

RUNNING = 65536
"""Most requests watched at once; further ones are not watched."""

SPREADS = 2.0
"""Standard deviations around the mean of exact answers that do not count as drift."""

LEAST_ENTROPY = 0.05
"""Least mean entropy, in nats, that a relative distance is taken of."""


class BreakerState(StrEnum):
    """State of a family's circuit breaker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class History:
    """Statistics of a family's exact answers.

    Attributes:
        count: Number of answers.
        entropy: Mean of their mean entropies, nats.
        entropy_spread: Standard deviation of those, nats; 0 for one answer.
        logprob: Mean of their mean log-probabilities of the most likely token, nats.
        logprob_spread: Standard deviation of those, nats.
    """

    count: int
    entropy: float
    entropy_spread: float
    logprob: float
    logprob_spread: float


@dataclass(frozen=True, slots=True)
class FamilyDrift:
    """Distance of an answer from one family's history.

    Attributes:
        family: The family.
        entropy: Distance of its mean entropy from the history's, less `SPREADS` spreads, relative
            to the history's mean.
        logprob: The same distance of its mean log-probability, in nats.
        over: One of the two is above its bound.
        history: What it was compared with.
        state: The breaker after this answer.
    """

    family: str
    entropy: float
    logprob: float
    over: bool
    history: History
    state: BreakerState


@dataclass(frozen=True, slots=True)
class Drift:
    """An answer that drifted from the exact ones of a family it reused.

    Attributes:
        request_id: The request.
        entropies: Entropy of each watched distribution, nats.
        logprobs: Log-probability of the most likely token of each, nats.
        families: Every family it was compared with, farthest first.
    """

    request_id: str
    entropies: tuple[float, ...]
    logprobs: tuple[float, ...]
    families: tuple[FamilyDrift, ...]


@dataclass(frozen=True, slots=True)
class FamilyReport:
    """A family's current state.

    Attributes:
        family: The family.
        state: Of its breaker.
        uses: Answers compared with it.
        errors: Drifting answers in the breaker's window.
        history: Statistics of its exact answers, or None.
    """

    family: str
    state: BreakerState
    uses: int
    errors: int
    history: History | None


@dataclass
class _Running:
    """Mean and standard deviation of a stream of numbers (Welford, Technometrics 4(3), 1962)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, x: float) -> None:
        self.count += 1
        away = x - self.mean
        self.mean += away / self.count
        self.squares += away * (x - self.mean)

    @property
    def spread(self) -> float:
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0


@dataclass
class _Family:
    entropy: _Running = field(default_factory=_Running)
    logprob: _Running = field(default_factory=_Running)
    uses: int = 0
    errors: deque[int] = field(default_factory=deque)  # the number of each one's use
    opened: float | None = None
    trial: str | None = None

    def history(self) -> History:
        return History(
            self.entropy.count,
            self.entropy.mean,
            self.entropy.spread,
            self.logprob.mean,
            self.logprob.spread,
        )

    def state(self, now: float, cooldown: float) -> BreakerState:
        if self.opened is None:
            return BreakerState.CLOSED
        return BreakerState.HALF_OPEN if now - self.opened >= cooldown else BreakerState.OPEN

    def recent(self, window: int) -> int:
        while self.errors and self.errors[0] <= self.uses - window:
            self.errors.popleft()
        return len(self.errors)


@dataclass
class _Answer:
    families: tuple[str, ...]
    approximate: bool
    entropies: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass
class GuardCounters:
    """Counters of the guard.

    Attributes:
        exact: Exact answers taken into histories.
        compared: Approximate answers compared with a history.
        uncompared: Approximate answers for which no family had enough history, or nothing was
            observed.
        drifted: Compared answers above a bound for some family.
        opened: Times a breaker opened, failed trials included.
        closed: Times a breaker closed after a trial.
        trials: Trials started.
        forgotten: Families forgotten to make room.
        unwatched: Requests not watched because too many already were.
    """

    exact: int = 0
    compared: int = 0
    uncompared: int = 0
    drifted: int = 0
    opened: int = 0
    closed: int = 0
    trials: int = 0
    forgotten: int = 0
    unwatched: int = 0


class Guard:
    """Watches answers and keeps the breakers. Not thread-safe: the scheduler's thread uses it.

    Args:
        settings: The ``guard`` key.
        clock: Seconds; only differences matter.
        on_compared: Told of every compared answer: its largest distances of entropy and
            log-probability over its families, as in `FamilyDrift`.
    """

    def __init__(
        self,
        settings: GuardSettings,
        clock: Callable[[], float] = time.time,
        on_compared: Callable[[float, float], None] | None = None,
    ):
        self._on_compared = on_compared
        self.settings = settings
        self._clock = clock
        self._counters = GuardCounters()
        self._families: OrderedDict[str, _Family] = OrderedDict()
        self._running: dict[str, _Answer] = {}

    @property
    def _breaker(self) -> Breaker:
        return self.settings.breaker

    def clear(self) -> None:
        """Forget all answers: other weights may give others."""
        self._families.clear()
        self._running.clear()

    def allows(self, family: str) -> bool:
        """Return True if the family may be reused approximately now. Changes nothing.

        A half-open breaker allows it until `started` reports a request that does; that request is
        the trial, and there is one at a time.
        """
        known = self._families.get(family)
        if known is None:
            return True
        state = known.state(self._clock(), self._breaker.cooldown)
        return state is BreakerState.CLOSED or (
            state is BreakerState.HALF_OPEN and known.trial is None
        )

    def started(self, request_id: str, families: Sequence[str], approximate: bool) -> None:
        """Watch a request's answer.

        A request that starts again after a preemption stays watched, and stays approximate.

        Args:
            request_id: The engine's id.
            families: Families of the segments in its text, reused or not.
            approximate: It uses approximate KV.
        """
        answer = self._running.get(request_id)
        if answer is None:
            if len(self._running) >= RUNNING:
                self._counters.unwatched += 1
                return
            answer = self._running[request_id] = _Answer((), False)
        answer.families = tuple(dict.fromkeys(families))
        answer.approximate |= approximate
        if not answer.approximate:
            return
        now = self._clock()
        for name in answer.families:
            known = self._families.get(name)
            if (
                known is not None
                and known.trial is None
                and known.state(now, self._breaker.cooldown) is BreakerState.HALF_OPEN
            ):
                known.trial = request_id
                self._counters.trials += 1

    def observe(self, request_id: str, entropies: npt.ArrayLike, logprobs: npt.ArrayLike) -> None:
        """Add the next distributions of an answer.

        Only the first ``settings.tokens`` count. Values that are not finite are ignored, and so are
        requests that were not started.

        Args:
            request_id: The engine's id.
            entropies: Nats, ``[n]``.
            logprobs: Log-probability of the most likely token, nats, ``[n]``.

        Raises:
            ValueError: The two differ in length.
        """
        answer = self._running.get(request_id)
        if answer is None:
            return
        pairs = zip(
            np.atleast_1d(np.asarray(entropies, dtype=np.float64)).tolist(),
            np.atleast_1d(np.asarray(logprobs, dtype=np.float64)).tolist(),
            strict=True,
        )
        for entropy, logprob in pairs:
            if len(answer.entropies) >= self.settings.tokens:
                return
            if math.isfinite(entropy) and math.isfinite(logprob):
                answer.entropies.append(entropy)
                answer.logprobs.append(logprob)

    def watching(self, request_id: str) -> bool:
        """Return True while more distributions of a request's answer are needed."""
        answer = self._running.get(request_id)
        return answer is not None and len(answer.entropies) < self.settings.tokens

    def finished(self, request_id: str) -> Drift | None:
        """Judge the answer of a request that ended, for whatever reason.

        Returns:
            The drift, if the answer is above a bound for some family. None for exact answers,
            which go into their families' histories, and for answers as expected or without a
            history to compare with.
        """
        answer = self._running.pop(request_id, None)
        if answer is None:
            return None
        try:
            if not answer.entropies:
                self._counters.uncompared += answer.approximate
                return None
            entropy = math.fsum(answer.entropies) / len(answer.entropies)
            logprob = math.fsum(answer.logprobs) / len(answer.logprobs)
            if not answer.approximate:
                self._learn(answer.families, entropy, logprob)
                return None
            return self._compare(request_id, answer, entropy, logprob)
        finally:
            # A trial that could not be judged leaves the breaker half-open for the next one.
            for name in answer.families:
                known = self._families.get(name)
                if known is not None and known.trial == request_id:
                    known.trial = None

    def counters(self) -> dict[str, float]:
        """Return the counters, and how many breakers are not closed."""
        states = self.states()
        found: dict[str, float] = {f"guard_{k}": v for k, v in vars(self._counters).items()}
        found["guard_open"] = sum(s is not BreakerState.CLOSED for s in states)
        return found

    def opened_and_closed(self) -> tuple[int, int]:
        """Return how often a breaker opened, and how often one closed after a trial."""
        return self._counters.opened, self._counters.closed

    def states(self) -> list[BreakerState]:
        """Return the state of every family's breaker."""
        now, cooldown = self._clock(), self._breaker.cooldown
        return [family.state(now, cooldown) for family in self._families.values()]

    def families(self) -> list[FamilyReport]:
        """Return every family remembered, most recently used last."""
        now = self._clock()
        return [
            FamilyReport(
                name,
                f.state(now, self._breaker.cooldown),
                f.uses,
                f.recent(self._breaker.window),
                f.history() if f.entropy.count else None,
            )
            for name, f in self._families.items()
        ]

    # -- inside --------------------------------------------------------------------------------

    def _learn(self, families: Sequence[str], entropy: float, logprob: float) -> None:
        self._counters.exact += 1
        for name in families:
            known = self._families.get(name)
            if known is None:
                known = self._families[name] = _Family()
                self._forget()
            self._families.move_to_end(name)
            known.entropy.add(entropy)
            known.logprob.add(logprob)

    def _forget(self) -> None:
        while len(self._families) > FAMILIES:
            closed = (n for n, f in self._families.items() if f.opened is None)
            oldest = next(closed, next(iter(self._families)))
            del self._families[oldest]
            self._counters.forgotten += 1

    def _compare(
        self, request_id: str, answer: _Answer, entropy: float, logprob: float
    ) -> Drift | None:
        found: list[FamilyDrift] = []
        for name in answer.families:
            known = self._families.get(name)
            if known is None or known.entropy.count < self.settings.history:
                continue
            self._families.move_to_end(name)
            history = known.history()
            off = _beyond(entropy, history.entropy, history.entropy_spread)
            relative = off / max(history.entropy, LEAST_ENTROPY)
            nats = _beyond(logprob, history.logprob, history.logprob_spread)
            over = (
                relative > self.settings.max_entropy_drift or nats > self.settings.max_logprob_drift
            )
            state = self._judged(known, request_id, over)
            found.append(FamilyDrift(name, relative, nats, over, history, state))
        if not found:
            self._counters.uncompared += 1
            return None
        self._counters.compared += 1
        if self._on_compared is not None:
            self._on_compared(max(f.entropy for f in found), max(f.logprob for f in found))
        if not any(f.over for f in found):
            return None
        self._counters.drifted += 1
        found.sort(key=self._distance, reverse=True)
        return Drift(request_id, tuple(answer.entropies), tuple(answer.logprobs), tuple(found))

    def _distance(self, drift: FamilyDrift) -> float:
        settings = self.settings
        return max(
            drift.entropy / settings.max_entropy_drift, drift.logprob / settings.max_logprob_drift
        )

    def _judged(self, known: _Family, request_id: str, over: bool) -> BreakerState:
        """Count one compared answer of a family; return its breaker's state afterwards."""
        now, breaker = self._clock(), self._breaker
        known.uses += 1
        if known.opened is not None:
            # Answers that began before it opened do not count.
            if known.trial == request_id:
                known.opened = now if over else None
                known.errors.clear()
                self._counters.opened += over
                self._counters.closed += not over
        else:
            if over:
                known.errors.append(known.uses)
            if known.recent(breaker.window) >= breaker.threshold:
                known.opened = now
                known.errors.clear()
                self._counters.opened += 1
        return known.state(now, breaker.cooldown)


def _beyond(x: float, mean: float, spread: float) -> float:
    return max(0.0, abs(x - mean) - SPREADS * spread)
