"""The guard's shadow in the scheduler: which answers are answered again, and what follows.

Of requests that may be approximated, some are watched: workers report the likeliest tokens of each
of their distributions. When one has ended, and nothing else runs, the scheduler asks the server to
send the same prompt again, with the options that make it exact, signed with a number that only the
two know (`kvplug.hosts.vllm.shadow`). Of that request, the shadow, every token is given: it answers
what the watched one answered, and its distributions are those that exact KV gives after the same
text. Their divergence goes to `ShadowControl`, which says how much of what follows may be
approximated.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.logger import init_logger

from kvplug.contract import Kind
from kvplug.hosts.vllm import compat
from kvplug.hosts.vllm.messages import ShadowReport
from kvplug.hosts.vllm.scheduler.kind import Answer, SchedulerContext
from kvplug.hosts.vllm.shadow_orders import ASK, EXACT, NUMBER, STOP, ShadowOrder
from kvplug.observe.catalogue import (
    SHADOW_BOUND,
    SHADOW_DIVERGENCE,
    SHADOW_EVIDENCE,
    SHADOW_MADE_EXACT,
    SHADOW_REQUESTS,
    SHADOW_STATE,
    SHADOW_TOKENS,
)
from kvplug.observe.events import EventType
from kvplug.observe.live import Facts, Outcome, outcomes
from kvplug.observe.metric import Sample
from kvplug.request_options import RequestOptions
from kvplug.reuse.settings import ShadowSettings
from kvplug.shadow.control import Change, ShadowControl
from kvplug.shadow.divergence import Likeliest, divergence
from kvplug.shadow.states import ShadowResult, ShadowState

logger = init_logger("vllm.kvplug")

MAX_WATCHED = 64
"""Most answers watched at once, and most that wait to be answered again."""

MAX_STOPS = 3
"""Times that traffic may stop one shadow; then it is given up."""

LOST_SECONDS = 120.0
"""Longest wait for a shadow that was asked for."""

STOP_SECONDS = 5.0
"""Longest wait for one that was stopped: the server may never have sent it."""

MAX_LOST = 3
"""Shadows in a row that never came, after which none is asked for any more."""

LATE = 2
"""Tokens that a shadow answers beyond those compared: reports come steps later."""


@dataclass
class Watched:
    """An answer to be answered again.

    Attributes:
        salt: The user's own cache salt.
        prompt: Its prompt's tokens; empty until it has ended.
        answer: The tokens that are compared, the first ones of its answer.
        found: Its distributions, as far as they have been reported.
        again: Those of its shadow.
        stops: Times its shadow was stopped.
    """

    salt: str | None
    prompt: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    found: list[Likeliest] = field(default_factory=list)
    again: list[Likeliest] = field(default_factory=list)
    stops: int = 0


@dataclass
class Asked:
    """The shadow that was asked for; there is one at a time.

    Attributes:
        number: Its secret number.
        watched: The answer it is of.
        at: When it was asked for.
        request_id: Its id, once it is there.
        stopping: The server was asked to stop it.
    """

    number: str
    watched: Watched
    at: float
    request_id: str | None = None
    stopping: bool = False


class ShadowWatch:
    """Chooses answers, orders their shadows, compares them, and makes requests exact.

    Args:
        settings: The ``shadow`` key.
        context: The scheduler's context.
        clock: Seconds; only differences matter.

    Attributes:
        control: What shadows found, and what follows from it.
        results: Watched answers by what became of them.
        divergences: Divergences found.
        made_exact: Requests that the guard made exact.
        computed: Tokens that shadows computed.
        served: Tokens that all other requests computed.
        errors: Exceptions of the watch itself; after the first, nothing is answered again.
    """

    def __init__(
        self,
        settings: ShadowSettings,
        context: SchedulerContext,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.control = ShadowControl(settings, clock)
        self.control.on_change = self._changed
        self.results: Counter[ShadowResult] = Counter()
        self.divergences = SHADOW_DIVERGENCE.distribution()
        self.made_exact = 0
        self.computed = 0
        self.served = 0
        self.errors = 0
        self._settings = settings
        self._clock = clock
        self._context = context
        self._engine_id = str(context.vllm_config.kv_transfer_config.engine_id)
        self._levers = _levers(context)
        self._live: set[str] = set()
        self._hits: dict[str, int] = {}
        self._made_exact: set[str] = set()
        self._watched: dict[str, Watched] = {}
        self._waiting: deque[Watched] = deque()
        self._reported: OrderedDict[str, list[Likeliest]] = OrderedDict()
        self._asked: Asked | None = None
        self._to_stop: str | None = None
        self._lost = 0
        self.off = False

    # -- requests ------------------------------------------------------------------------------

    def on_new_request(self, request: Any, options: RequestOptions) -> RequestOptions:
        """Take in a request, whose cache salt is still the user's own; returns its options."""
        taken: RequestOptions = self._guarded(options, self._take_in, request, options)
        return taken

    def _take_in(self, request: Any, options: RequestOptions) -> RequestOptions:
        if self._is_shadow(request):
            assert self._asked is not None
            self._asked.request_id = request.request_id
            self._lost = 0
            answer = self._asked.watched.answer
            compat.mark_shadow(request, self._engine_id, answer + answer[-1:] * LATE)
            self._report_to(request.request_id, self._asked.watched.again)
            return EXACT
        if request.sampling_params is None:
            return options
        self._live.add(request.request_id)
        asked = self._asked
        if asked is not None and self._settings.idle and not asked.stopping:
            asked.stopping, self._to_stop = True, asked.number
        mine = {
            key: exact
            for key, (approximate, exact) in self._levers.items()
            if getattr(options, key) == approximate
        }
        if not mine:
            return options
        if not self.control.admits():
            self.made_exact += 1
            self._made_exact.add(request.request_id)
            return options.model_copy(update=mine)
        if self._has_room() and _comparable(request) and self.control.chooses():
            watched = self._watched[request.request_id] = Watched(request.cache_salt)
            compat.mark_shadow(request, self._engine_id)
            self._report_to(request.request_id, watched.found)
        return options

    def is_of(self, request_id: str) -> bool:
        """Return True if a request is the shadow that runs now."""
        return self._asked is not None and self._asked.request_id == request_id

    def _is_shadow(self, request: Any) -> bool:
        given = request.kv_transfer_params
        number = given.get(NUMBER) if isinstance(given, Mapping) else None
        return (
            isinstance(number, str)
            and self._asked is not None
            and self._asked.request_id is None
            and secrets.compare_digest(number.encode(), self._asked.number.encode())
        )

    def looked_up(self, request_id: str, hit: int) -> None:
        """Take note of the tokens that a request found in the prefix cache."""
        self._hits[request_id] = hit

    def _computed(self, request: Any) -> int:
        return max(0, int(request.num_computed_tokens) - self._hits.pop(request.request_id, 0))

    def _has_room(self) -> bool:
        return not self.off and len(self._watched) + len(self._waiting) < MAX_WATCHED

    def finished(self, request: Any, answer: Answer) -> None:
        """Take in the end of a request; its answer says where the guard made it exact."""
        self._guarded(None, self._finish, request, answer)

    def _finish(self, request: Any, answer: Answer) -> None:
        request_id = request.request_id
        if self.is_of(request_id):
            self._judge(request, answer)
            return
        self.served += self._computed(request)
        self._live.discard(request_id)
        if request_id in self._made_exact:
            self._made_exact.discard(request_id)
            if answer.exact:  # not where the pool has no room for that
                answer.fields["guard"] = "exact"
        watched = self._watched.pop(request_id, None)
        if watched is None:
            return
        text: Any = request.all_token_ids
        prompt = request.num_prompt_tokens
        most = self._context.engine.max_model_len - prompt - LATE
        watched.prompt = list(text[:prompt])
        watched.answer = list(text[prompt : prompt + max(0, min(self._settings.tokens, most))])
        if answer.exact:
            self._end(watched, ShadowResult.EXACT)
        elif len(watched.answer) < 2:
            self._end(watched, ShadowResult.SHORT)
        else:
            self._waiting.append(watched)

    def _judge(self, request: Any, answer: Answer) -> None:
        asked, self._asked = self._asked, None
        assert asked is not None
        watched = asked.watched
        text: Any = request.all_token_ids
        self.computed += self._computed(request)
        self._reported.pop(request.request_id, None)
        said = list(text[request.num_prompt_tokens :][: len(watched.answer)])
        if asked.stopping and (len(said) < len(watched.answer) or watched.stops >= MAX_STOPS):
            self._stopped(watched)
        elif not answer.exact:
            self._end(watched, ShadowResult.INEXACT)
        elif said != watched.answer:
            self._end(watched, ShadowResult.FAILED)
        elif min(len(watched.found), len(watched.again), len(watched.answer)) < 2:
            self._end(watched, ShadowResult.SHORT)
        else:
            count = len(watched.answer)
            found = divergence(watched.found[:count], watched.again[:count])
            logger.debug("kvplug: guard: divergence %.4f over %d tokens", found, count)
            self.divergences.add(found)
            self._end(watched, ShadowResult.COMPARED)
            self.control.add(found)

    def _stopped(self, watched: Watched) -> None:
        watched.stops += 1
        if watched.stops >= MAX_STOPS:
            self._end(watched, ShadowResult.STOPPED)
        else:
            watched.again = []
            self._waiting.append(watched)

    def _end(self, watched: Watched, result: ShadowResult) -> None:
        self.results[result] += 1
        for name in [n for n, found in self._reported.items() if found is watched.found]:
            del self._reported[name]

    def _report_to(self, request_id: str, found: list[Likeliest]) -> None:
        self._reported[request_id] = found
        while len(self._reported) > 2 * MAX_WATCHED:
            self._reported.popitem(last=False)

    def on_report(self, report: ShadowReport) -> None:
        """Take in distributions of watched answers and of shadows."""
        self._guarded(None, self._take_report, report)

    def _take_report(self, report: ShadowReport) -> None:
        for name, ids, logprobs in report.likeliest:
            found = self._reported.get(name)
            if found is not None and len(found) < self._settings.tokens:
                found.append(Likeliest(ids, logprobs))

    # -- shadows -------------------------------------------------------------------------------

    def orders(self) -> ShadowOrder | None:
        """What the server is to do now, or None; called every step."""
        if self._to_stop is None and self._asked is None and not self._waiting:
            return None
        found: ShadowOrder | None = self._guarded(None, self._orders)
        return found

    def _orders(self) -> ShadowOrder | None:
        if self._to_stop is not None:
            number, self._to_stop = self._to_stop, None
            return {STOP: number}
        asked = self._asked
        if asked is not None:
            waited = self._clock() - asked.at if asked.request_id is None else 0.0
            if asked.stopping and waited > STOP_SECONDS:
                self._asked = None
                self._stopped(asked.watched)
            elif waited > LOST_SECONDS:
                self._lose(asked)
            return None
        if not self._waiting or self.off or (self._settings.idle and self._live):
            return None
        watched = self._waiting.popleft()
        self._asked = Asked(secrets.token_hex(16), watched, self._clock())
        return {
            ASK: self._asked.number,
            "prompt": np.array(watched.prompt, dtype=np.int32).tobytes(),
            "tokens": len(watched.answer) + LATE,
            "salt": watched.salt,
        }

    def _lose(self, asked: Asked) -> None:
        self._asked = None
        self._end(asked.watched, ShadowResult.LOST)
        self._lost += 1
        if self._lost >= MAX_LOST:
            self.off = True
            while self._waiting:
                self._end(self._waiting.popleft(), ShadowResult.LOST)
            logger.error(
                "kvplug: the guard's shadow is off: no server answers again. It needs "
                "--middleware kvplug.hosts.vllm.shadow.ShadowMiddleware, which `kvplug serve` "
                "adds, and the statistics that --disable-log-stats turns off; offline, vLLM has no "
                "server."
            )

    def clear(self) -> None:
        """Forget what was found and what is asked for: other weights may answer otherwise."""
        self._guarded(None, self._clear)

    def _clear(self) -> None:
        self._watched.clear()
        self._waiting.clear()
        self._reported.clear()
        if self._asked is not None and self._asked.request_id is None:
            self._asked = None
        elif self._asked is not None:
            self._asked.stopping, self._to_stop = True, self._asked.number
            self._asked.watched.stops = MAX_STOPS
        self.control.clear()

    # -- reports -------------------------------------------------------------------------------

    def _changed(self, change: Change) -> None:
        why = (
            f"{change.count} answers again, mean divergence {change.mean:.3f}, bound "
            f"{self._settings.max_divergence:g}"
        )
        if change.state is ShadowState.EXACT:
            said = f"new requests are exact, for {change.cooldown:g} s ({why})"
        elif change.state is ShadowState.CAUTIOUS:
            said = f"{self._settings.trial:.0%} of new requests are approximated, as a trial"
        else:
            said = f"new requests are approximated again ({why})"
        logger.warning("kvplug: guard: %s", said)
        self._context.events.add(EventType.GUARDED, None, detail=f"{change.state}: {said}")

    def samples(self) -> Iterator[Sample]:
        """What is measured of the shadow."""
        for state in ShadowState:
            yield SHADOW_STATE.of(float(self.control.state is state), str(state))
        for result in ShadowResult:
            yield SHADOW_REQUESTS.of(self.results[result], str(result))
        yield SHADOW_DIVERGENCE.of(self.divergences)
        yield SHADOW_BOUND.of(self._settings.max_divergence)
        yield SHADOW_EVIDENCE.of(self.control.evidence)
        yield SHADOW_MADE_EXACT.of(self.made_exact)
        yield SHADOW_TOKENS.of(self.computed, "shadows")
        yield SHADOW_TOKENS.of(self.served, "requests")

    def show(self, facts: Facts) -> None:
        """The state, with what became of watched answers; answers compared even where none was."""
        level = f"shadow: {self.control.state}"
        results = {str(result): count for result, count in self.results.items()}
        compared = results.pop(str(ShadowResult.COMPARED), 0)
        facts.outcomes.append(
            Outcome(level=level, cause=str(ShadowResult.COMPARED), count=compared, unit="answers")
        )
        facts.outcomes += outcomes(level, "answers", results)

    def _guarded(self, instead: Any, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call a part of the watch; if it fails, requests go on and nothing is answered again."""
        try:
            return call(*arguments)
        except Exception as error:
            self.errors += 1
            if not self.off:
                self.off = True
                logger.error("the guard's shadow failed and is off: %s", error, exc_info=error)
            return instead


def _levers(context: SchedulerContext) -> dict[str, tuple[str, str]]:
    """Request options by which a request is approximate in this deployment: the value that lets
    it be, and the one that makes it exact."""
    deployment, found = context.deployment, {}
    sequence = deployment.choice(Kind.SEQUENCE)
    if sequence is not None and not sequence.policy.exact:
        found["sequence"] = "on", "off"
    if deployment.choices.get(Kind.REUSE) and deployment.reuse.approximate:
        found["reuse"] = "approximate", "exact"
    if deployment.choice(Kind.ATTENTION) is not None:
        found["attention"] = "approximate", "exact"
    return found


def _comparable(request: Any) -> bool:
    """True if the same tokens and the model alone give the request's distributions."""
    params = request.sampling_params
    return not (
        request.lora_request is not None
        or request.mm_features
        or request.prompt_embeds is not None
        or getattr(request, "resumable", False)
        or params.structured_outputs is not None
        or params.logit_bias
        or params.allowed_token_ids
        or params.bad_words
        or params.min_tokens
        or params.prompt_logprobs is not None
        or params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1
    )
