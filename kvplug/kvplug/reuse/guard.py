"""Does what is reused still answer as what is computed did? And a breaker where it does not.

A *family* is what the host says belongs together: the segments of one text, of one tenant. Of each
family the guard remembers what answers looked like whose KV was exact: the mean entropy of their
next-token distributions, and the mean log-probability of the likeliest token. An answer that
follows approximate reuse is compared with the families it used. Where it lies outside of what exact
answers spread over by more than the bounds, it is an error of that family; with enough of them the
family's breaker opens, and its approximate reuse stops until one trial goes well (the circuit
breaker of Nygard, *Release It!*: closed, open, half-open).
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
"""Families remembered; beyond, the one unused for longest is forgotten, open ones last."""

RUNNING = 65536
"""Requests watched at once; beyond, new ones are not watched."""

SPREADS = 2.0
"""Standard deviations of exact answers around their mean that are no drift."""

LEAST_ENTROPY = 0.05
"""Nats a mean entropy counts as at least when a distance from it is taken."""


class BreakerState(StrEnum):
    """Of a family's breaker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class History:
    """What the exact answers of a family were like.

    Attributes:
        count: Answers.
        entropy: Mean of their mean entropies, nats.
        entropy_spread: Standard deviation of those, nats; 0 for one answer.
        logprob: Mean of their mean log-probabilities of the likeliest token, nats.
        logprob_spread: Standard deviation of those, nats.
    """

    count: int
    entropy: float
    entropy_spread: float
    logprob: float
    logprob_spread: float


@dataclass(frozen=True, slots=True)
class FamilyDrift:
    """How far an answer lies from one family's history.

    Attributes:
        family: The family.
        entropy: Distance of its mean entropy from the history's, less `SPREADS` spreads, relative
            to the history's mean.
        logprob: The same distance of its mean log-probability, in nats.
        over: Whether one of the two is above its bound.
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
    """An answer unlike the exact ones of a family it reused.

    Attributes:
        request_id: The request.
        entropies: Entropy of each watched distribution, nats.
        logprobs: Log-probability of the likeliest token of each, nats.
        families: Every family it was compared with, the farthest first.
    """

    request_id: str
    entropies: tuple[float, ...]
    logprobs: tuple[float, ...]
    families: tuple[FamilyDrift, ...]


@dataclass(frozen=True, slots=True)
class FamilyReport:
    """A family at this moment.

    Attributes:
        family: The family.
        state: Of its breaker.
        uses: Answers compared with it.
        errors: Drifting ones among the latest that its breaker counts.
        history: Its exact answers, or None.
    """

    family: str
    state: BreakerState
    uses: int
    errors: int
    history: History | None


@dataclass
class _Running:
    """Mean and spread of a stream of numbers (Welford, Technometrics 4(3), 1962)."""

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
    errors: deque[int] = field(default_factory=deque)  # which use each one was
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
    """What the guard saw.

    Attributes:
        exact: Exact answers taken into histories.
        compared: Approximate answers compared with a history.
        uncompared: Approximate answers that no family had enough history for, or that nothing was
            heard of.
        drifted: Compared answers above a bound for some family.
        opened: Times a breaker opened, a failed trial counted.
        closed: Times one closed after a trial.
        trials: Trials begun.
        forgotten: Families forgotten for room.
        unwatched: Requests not watched because too many were.
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
    """Watches answers and holds the breakers. One thread, the scheduler's.

    Args:
        settings: The ``guard`` key.
        clock: Seconds; only differences matter.
    """

    def __init__(self, settings: GuardSettings, clock: Callable[[], float] = time.time):
        self.settings = settings
        self._clock = clock
        self._counters = GuardCounters()
        self._families: OrderedDict[str, _Family] = OrderedDict()
        self._running: dict[str, _Answer] = {}

    @property
    def _breaker(self) -> Breaker:
        return self.settings.breaker

    def allows(self, family: str) -> bool:
        """Whether the family may be reused approximately now. Changes nothing.

        A half-open breaker allows it until `started` names a request that does: that is its trial,
        and there is one at a time.
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

        A request that starts anew (it was preempted) stays watched, and is approximate if it ever
        was.

        Args:
            request_id: The engine's id.
            families: Of the segments in its text, reused or not.
            approximate: Whether KV it uses is approximate.
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
        """Take in what an answer's next distributions were like.

        Only the first ``settings.tokens`` count; numbers that are not finite do not, nor do those
        of requests nobody started.

        Args:
            request_id: The engine's id.
            entropies: Nats, ``[n]``.
            logprobs: Log-probability of the likeliest token, nats, ``[n]``.

        Raises:
            ValueError: The two have other lengths.
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
        """Whether more is wanted of a request's answer."""
        answer = self._running.get(request_id)
        return answer is not None and len(answer.entropies) < self.settings.tokens

    def finished(self, request_id: str) -> Drift | None:
        """Judge a request's answer, whatever ended it.

        Returns:
            The drift of an answer that lies beyond a bound for a family, else None: exact answers
            have taught their families what to expect, and others were as expected or could not be
            compared.
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
            # A trial that could not be judged leaves the breaker half-open, for the next one.
            for name in answer.families:
                known = self._families.get(name)
                if known is not None and known.trial == request_id:
                    known.trial = None

    def counters(self) -> dict[str, float]:
        """What it saw, and how many breakers are not closed now."""
        states = [f.state for f in self.families()]
        found: dict[str, float] = {f"guard_{k}": v for k, v in vars(self._counters).items()}
        found["guard_open"] = sum(s is not BreakerState.CLOSED for s in states)
        return found

    def families(self) -> list[FamilyReport]:
        """Every family remembered, the latest used last."""
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
        """Count one compared answer of a family; its breaker's state afterwards."""
        now, breaker = self._clock(), self._breaker
        known.uses += 1
        if known.opened is not None:
            # Those that began before it opened say nothing new.
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
