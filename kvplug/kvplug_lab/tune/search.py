"""Finds a deployment that is better than stock on a load, and verifies it.

Stock is measured first, and from what it shows deployments are proposed. Each is asked for the
log-probabilities of stock's own answers, and leaves where it loses more than the bound. Those that
stay take turns at the load with stock; the better half goes on, with twice the rounds, until one is
left. That one is measured again beside stock in new engines that start in the other order. Only
what wins there, with the whole interval, is written.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from kvplug.errors import KVPlugError
from kvplug_lab.engine.rounds import Round
from kvplug_lab.engine.trial import TrialRequest
from kvplug_lab.tune import intervals
from kvplug_lab.tune.bottleneck import Bottleneck, Profile, bottlenecks, percentile, profile
from kvplug_lab.tune.intervals import Interval
from kvplug_lab.tune.load import Load
from kvplug_lab.tune.proposals import Means, Proposal, combined, proposals, stock

OBJECTIVES = ("throughput", "ttft", "users")
FEWEST_ROUNDS = 3
"""Rounds of a verification at least: fewer have no interval to speak of."""

NO_TIME = "not measured: --minutes"
"""Why a proposal left that there was no time for."""

Say = Callable[[str], None]


class Refused(KVPlugError):
    """An engine does not start with a proposal; the message says why."""


class Server(Protocol):
    """An engine that serves a load."""

    def serve(
        self, requests: Sequence[TrialRequest], before: Sequence[int | None], most: int
    ) -> Round:
        """Serve a load from cold."""
        ...


class Engines(Protocol):
    """Starts engines of proposals, and ends them."""

    def get(self, proposal: Proposal) -> Server:
        """The engine of a proposal, started if it does not live.

        Raises:
            Refused: It does not start.
        """
        ...

    def end(self, *names: str) -> None:
        """End the engines of proposals; of all, without names."""
        ...


@dataclass(frozen=True)
class Bound:
    """What a deployment may lose in answers.

    Attributes:
        rise: Rise of the perplexity of stock's answers at most, as a share.
        same: Share of answers that must be stock's, word for word; 0 for none.
    """

    rise: float
    same: float = 0.0

    def __str__(self) -> str:
        rise = f"perplexity of stock's answers at most {100 * self.rise:.3g}% higher"
        return rise + (f", at least {self.same:.0%} of answers as stock's" if self.same else "")


@dataclass(frozen=True)
class Question:
    """What is asked of a search.

    Attributes:
        objective: One of `OBJECTIVES`.
        bound: What may be lost.
        means: What proposals may use.
        concurrency: Requests in flight at most.
        minutes: Time for all of it.
        rounds: Rounds of the verification.
        copy_seconds: Seconds to copy a block of KV from host memory.
    """

    objective: str
    bound: Bound
    means: Means
    concurrency: int
    minutes: float
    rounds: int = 5
    copy_seconds: float = 0.0


@dataclass(frozen=True)
class Quality:
    """Answers of a deployment against stock's.

    Attributes:
        rise: Rise of the perplexity of stock's answers, as a share.
        same: Share of answers equal to stock's; None before a round with free answers.
        until: Share of tokens before the first that differs.
        stock_same: Share of stock's own answers that are equal in another of its rounds.
    """

    rise: Interval
    same: float | None = None
    until: float | None = None
    stock_same: float | None = None

    def holds(self, bound: Bound, certain: bool) -> bool:
        """True if the bound is kept.

        Args:
            bound: The bound.
            certain: The interval's upper end counts instead of the estimate.
        """
        rise = self.rise.high if certain and self.rise.n > 1 else self.rise.value
        # Sums of logarithms differ in their last digits from batch to batch.
        kept = math.isfinite(rise) and rise <= bound.rise + 1e-4
        return kept and (self.same is None or self.same >= bound.same)


@dataclass
class Figures:
    """What one round showed, without its steps and answers."""

    tokens_per_second: float
    ttft: float
    ttft_p95: float
    tpot: float
    running: int
    hit: float
    loaded: float
    preemptions: int
    pool_tokens: int
    seconds: float
    cpu_seconds: float

    @classmethod
    def of(cls, served: Round) -> Figures:
        """Sum up a round."""
        answers = served.answers
        ttft = [a.ttft for a in answers]
        more = [a.tpot for a in answers if a.tpot]
        prompt = sum(a.prompt for a in answers) or 1
        return cls(
            tokens_per_second=served.output_tokens_per_second,
            ttft=sum(ttft) / len(ttft),
            ttft_p95=percentile(ttft, 0.95),
            tpot=sum(more) / len(more) if more else 0.0,
            running=served.peak_running,
            hit=sum(a.cached for a in answers) / prompt,
            loaded=sum(a.loaded for a in answers) / prompt,
            preemptions=served.preemptions,
            pool_tokens=served.num_blocks * served.block_size,
            seconds=served.seconds,
            cpu_seconds=served.cpu_seconds,
        )


def gained(objective: str, own: Figures, base: Figures) -> float:
    """How many times better than stock a round was."""
    if objective == "throughput":
        return own.tokens_per_second / base.tokens_per_second
    if objective == "ttft":
        return base.ttft / own.ttft
    return own.running / base.running


@dataclass
class Measured:
    """A proposal and what was measured of it.

    Attributes:
        proposal: The proposal.
        own: Its rounds.
        base: Stock's rounds beside them.
        quality: Its answers.
        out: Why it left, and when; empty for the one that stayed.
        reports: What its policies reported at last.
    """

    proposal: Proposal
    own: list[Figures] = field(default_factory=list)
    base: list[Figures] = field(default_factory=list)
    quality: Quality | None = None
    out: str = ""
    reports: list[dict[str, Any]] = field(default_factory=list)

    def ratio(self, objective: str) -> Interval:
        """Gain over stock, with its interval over rounds; above 1 is better."""
        gains = [gained(objective, a, b) for a, b in zip(self.own, self.base, strict=True)]
        return intervals.ratio(gains, [1.0] * len(gains))


@dataclass
class Found:
    """What a search found.

    Attributes:
        question: What was asked.
        profile: Stock's round.
        held: The bottlenecks.
        tried: Every proposal, in the order it was made.
        winner: The one that was verified, measured in new engines; None if none was.
        verified: True if the winner is better than stock and keeps the bound.
        says: What it comes to, in a sentence.
        seconds: Time it took.
    """

    question: Question
    profile: Profile
    held: list[Bottleneck]
    tried: list[Measured] = field(default_factory=list)
    winner: Measured | None = None
    verified: bool = False
    says: str = ""
    seconds: float = 0.0


def asked(load: Load, proposal: Proposal) -> list[TrialRequest]:
    """The load as it is sent to a deployment: options that it has no policy for are left out."""
    section = proposal.section or {}
    unknown = set()
    if "reuse" not in section:
        unknown |= {"reuse", "segments"}
    if "sequence" not in section:
        unknown.add("sequence")
    if not section:
        unknown.add("session_id")
    found = []
    for request in load.requests:
        own = {**proposal.asks, **(request.kvplug or {})}
        kept = {key: value for key, value in own.items() if key not in unknown}
        found.append(replace(request, kvplug=kept or None))
    return found


class Search:
    """One search.

    Args:
        load: The requests.
        question: What is asked.
        engines: Starts engines.
        say: Told what goes on.
        clock: Seconds, for tests.
    """

    def __init__(
        self,
        load: Load,
        question: Question,
        engines: Engines,
        say: Say,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.load = load
        self.question = question
        self.engines = engines
        self.say = say
        self._clock = clock
        self._begun = clock()
        self._before = load.before()
        self._start = 0.0
        self._round = 0.0
        self._stock: list[list[int]] = []
        self._likely: list[list[float]] = []
        self._again: float | None = None

    def run(self) -> Found:
        """Search, and verify what was found.

        Raises:
            Refused: Stock itself does not start.
        """
        found = self._measure_stock()
        try:
            self._search(found)
        finally:
            self.engines.end()
            found.seconds = self._clock() - self._begun
        return found

    # -- stock ---------------------------------------------------------------------------------

    def _measure_stock(self) -> Found:
        self.say(f"stock: starting; {self.load.says()}")
        began = self._clock()
        self.engines.get(stock())
        self._start = self._clock() - began
        began = self._clock()
        served = self._reference()
        self._round = (self._clock() - began) / 2
        seen = profile(self.load, served, self.question.copy_seconds)
        held = bottlenecks(seen)
        self.say(
            f"stock: {seen.tokens_per_second:.1f} tokens/s, {seen.ttft:.2f} s to the first token, "
            f"{seen.hit:.0%} of prompt tokens cached"
        )
        for one in held:
            self.say(f"bottleneck: {one}")
        return Found(self.question, seen, held)

    def _reference(self) -> Round:
        """Serve the load on stock as it is, and with its own answers forced."""
        self._warm(stock())
        served = self._serve(stock())
        self._stock = [a.tokens for a in served.answers]
        self._likely = [a.logprobs for a in self._serve(stock(), forced=True).answers]
        return served

    def _warm(self, proposal: Proposal) -> None:
        """The first requests of an engine pay for what is set up once."""
        first = [replace(r, max_tokens=2) for r in asked(self.load, proposal)[:2]]
        self.engines.get(proposal).serve(first, [None] * len(first), len(first))

    def _serve(self, proposal: Proposal, forced: bool = False) -> Round:
        requests = asked(self.load, proposal)
        if forced:
            answers = zip(requests, self._stock, strict=True)
            requests = [replace(r, force=t, max_tokens=len(t)) for r, t in answers]
        server = self.engines.get(proposal)
        return server.serve(requests, self._before, self.question.concurrency)

    # -- the search ----------------------------------------------------------------------------

    def _left(self) -> float:
        """Seconds left, without those that a verification takes."""
        rounds = 2 * FEWEST_ROUNDS + 4
        reserve = 2 * self._start + 1.2 * rounds * self._round
        return 60 * self.question.minutes - (self._clock() - self._begun) - reserve

    def _search(self, found: Found) -> None:
        if not found.held:
            found.says = (
                "No rule names a bottleneck on this load, so nothing was tried: stock vLLM it is."
            )
            return
        means = self.question.means
        if not self.load.real:
            means = replace(means, exact_only=True)
        made = proposals(self.load, found.profile, found.held, means)
        found.tried = [Measured(one) for one in made]
        staying = self._screened(found.tried)
        best = self._halved(found, staying)
        if best is None and all(one.out == NO_TIME for one in found.tried):
            found.says = (
                f"Nothing was measured beside stock: {self.question.minutes:g} minutes are too few "
                f"where an engine starts in {self._start:.0f} s and serves the load in "
                f"{self._round:.0f} s; pass more --minutes or fewer --requests."
            )
            return
        if best is None:
            names = ", ".join(b.name for b in found.held)
            found.says = f"No deployment that was tried against {names} is better than stock vLLM."
            return
        try:
            self._verify(found, best)
        except KVPlugError as error:
            best.out = f"not verified: {cause_of(str(error))}"
            found.says = (
                f"Nothing is better than stock vLLM for certain. {best.proposal.name}, {best.out}"
            )
            found.winner = None

    def _screened(self, tried: Sequence[Measured]) -> list[Measured]:
        """Those that start and keep the bound; the others get why they left."""
        staying = []
        for one in tried:
            if self._left() < self._start + 3 * self._round:
                one.out = NO_TIME
                continue
            name = one.proposal.name
            self.say(f"{name}: {one.proposal.reason}")
            try:
                self.engines.get(one.proposal)
                self._warm(one.proposal)
                forced = self._serve(one.proposal, forced=True)
            except KVPlugError as error:
                kind = "refused" if isinstance(error, Refused) else "failed"
                one.out = f"{kind}: {cause_of(str(error))}"
                self.say(f"{name}: {one.out}")
                self.engines.end(name)
                continue
            one.quality = Quality(
                intervals.rise([a.logprobs for a in forced.answers], self._likely)
            )
            if not one.quality.holds(self.question.bound, certain=False):
                one.out = "loses more than the bound"
                self.say(f"{name}: perplexity {one.quality.rise.value:+.2%}: {one.out}")
                self.engines.end(name)
                continue
            staying.append(one)
        return staying

    def _halved(self, found: Found, staying: list[Measured]) -> Measured | None:
        """The best, by rounds beside stock; half of them stay after each, with twice the rounds."""
        rounds, objective = 1, self.question.objective
        while staying:
            staying = self._turns(staying, rounds)
            ranked = sorted(
                (one for one in staying if not one.out), key=lambda m: -m.ratio(objective).value
            )
            for one in ranked:
                self.say(f"{one.proposal.name}: {one.ratio(objective).value:.2f} of stock")
            better = [one for one in ranked if one.ratio(objective).value > 1.0]
            for one in ranked:
                if one not in better:
                    one.out = f"not better than stock after {len(one.own)} rounds"
                    self.engines.end(one.proposal.name)
            kept = better[: max(1, -(-len(better) // 2))] if len(better) > 1 else better
            for one in better[len(kept) :]:
                one.out = f"behind others after {len(one.own)} rounds"
                self.engines.end(one.proposal.name)
            joint = self._joined(found, better) if rounds == 1 else None
            if joint is not None:
                kept.append(joint)
            if len(kept) <= 1 or self._left() <= 0:
                for one in kept[1:]:
                    one.out = one.out or "behind others when the time was over"
                return next((one for one in kept if one.own), None)
            staying, rounds = kept, 2 * rounds
        return None

    def _joined(self, found: Found, better: Sequence[Measured]) -> Measured | None:
        """The best two in one deployment, where that can be and keeps the bound."""
        for second in better[1:]:
            made = combined(better[0].proposal, second.proposal)
            if made is not None:
                one = Measured(made)
                found.tried.append(one)
                return next(iter(self._screened([one])), None)
        return None

    def _turns(self, staying: Sequence[Measured], rounds: int) -> list[Measured]:
        """Serve the load so many times on each and on stock, in turns."""
        for turn in range(rounds):
            if turn and self._left() < (len(staying) + 1) * self._round:
                break
            order = [None, *staying]
            order = order[turn % len(order) :] + order[: turn % len(order)]
            base: Figures | None = None
            own: dict[str, Round] = {}
            for one in order:
                if one is None:
                    base = self._of_stock()
                    continue
                try:
                    own[one.proposal.name] = self._serve(one.proposal)
                except KVPlugError as error:
                    one.out = f"failed: {cause_of(str(error))}"
            assert base is not None
            for one in staying:
                if one.proposal.name in own:
                    self._take(one, own[one.proposal.name], base)
        return [one for one in staying if not one.out]

    def _of_stock(self) -> Figures:
        served = self._serve(stock())
        self._again, _ = compared([a.tokens for a in served.answers], self._stock)
        return Figures.of(served)

    def _take(self, one: Measured, served: Round, base: Figures) -> None:
        one.own.append(Figures.of(served))
        one.base.append(base)
        one.reports = served.reports
        same, until = compared([a.tokens for a in served.answers], self._stock)
        assert one.quality is not None
        one.quality = replace(one.quality, same=same, until=until, stock_same=self._again)
        if not one.quality.holds(self.question.bound, certain=False):
            one.out = "loses more than the bound"

    # -- verification --------------------------------------------------------------------------

    def _verify(self, found: Found, best: Measured) -> None:
        """Measure the best beside stock in new engines that start the other way round."""
        objective, name = self.question.objective, best.proposal.name
        self.engines.end()
        self.say(f"verifying {name} in new engines")
        one = Measured(best.proposal)
        found.winner = one
        self.engines.get(best.proposal)
        self.engines.get(stock())
        self._warm(best.proposal)
        self._reference()
        forced = self._serve(best.proposal, forced=True)
        one.quality = Quality(intervals.rise([a.logprobs for a in forced.answers], self._likely))
        for turn in range(self.question.rounds):
            over = 60 * self.question.minutes - (self._clock() - self._begun)
            if turn >= FEWEST_ROUNDS and over < 2 * self._round:
                break
            if turn % 2 == 0:
                own = self._serve(best.proposal)
                base = self._of_stock()
            else:
                base = self._of_stock()
                own = self._serve(best.proposal)
            self._take(one, own, base)
            self.say(f"round {turn + 1}: {gained(objective, one.own[-1], base):.2f} of stock")
        gain = one.ratio(objective)
        better = gain.low > 1.0
        kept = one.quality.holds(self.question.bound, certain=True)
        found.verified = better and kept
        one.out = ""
        said = f"{name}: {gain.text('.2f')} times as good as stock in {objective}"
        loss = one.quality.rise
        lost = (
            f"perplexity of stock's answers {loss.value:+.2%} [{loss.low:+.2%}, {loss.high:+.2%}]"
        )
        if found.verified:
            found.says = f"{said}, {lost}, in {gain.n} rounds of new engines."
            return
        why = "" if better else "its interval reaches stock"
        if not kept:
            why += (" and " if why else "") + "it may lose more than the bound"
        best.out = one.out = f"not verified: {why}"
        found.says = f"Nothing is better than stock vLLM for certain. {said}, {lost}: {why}."


def cause_of(log: str) -> str:
    """The line of an engine's log that says why it ended."""
    lines = [
        re.sub(r"^\(\w+ pid=\d+\) (\w+ [\d:. -]+\[[\w./]+:\d+\])?", "", one).strip()
        for one in log.splitlines()
    ]
    named = [one for one in lines if re.match(r"[\w.]*(Error|Refused|Exception)\b.*: ", one)]
    return (named or [one for one in lines if one] or ["it ended without a word"])[-1][:400]


def compared(own: Sequence[Sequence[int]], right: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Share of answers that are equal, and share of tokens before the first difference."""
    before = 0
    equal = 0
    for a, b in zip(own, right, strict=True):
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        before += min(len(a), len(b)) if at is None else at
        equal += list(a) == list(b)
    return equal / len(right), before / (sum(map(len, right)) or 1)


def plain(found: Found) -> dict[str, Any]:
    """A search as JSON types."""

    def one(measured: Measured | None) -> dict[str, Any] | None:
        if measured is None:
            return None
        proposal = measured.proposal
        made: dict[str, Any] = {
            "name": proposal.name,
            "section": proposal.section,
            "flags": dict(proposal.flags),
            "reason": proposal.reason,
            "exact": proposal.exact,
            "takes": proposal.takes,
            "asks": dict(proposal.asks),
            "prices": [str(p) for p in proposal.prices],
            "rounds": [asdict(f) for f in measured.own],
            "stock_rounds": [asdict(f) for f in measured.base],
            "out": measured.out,
            "quality": asdict(measured.quality) if measured.quality else None,
        }
        if measured.own:
            made["gain"] = {name: asdict(measured.ratio(name)) for name in OBJECTIVES}
        finite: dict[str, Any] = _finite(made)
        return finite

    question = found.question
    return {
        "objective": question.objective,
        "bound": asdict(question.bound),
        "means": asdict(question.means),
        "concurrency": question.concurrency,
        "minutes": question.minutes,
        "profile": asdict(found.profile),
        "bottlenecks": [asdict(b) for b in found.held],
        "tried": [one(m) for m in found.tried],
        "winner": one(found.winner),
        "verified": found.verified,
        "says": found.says,
        "seconds": found.seconds,
    }


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_finite(own) for own in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
