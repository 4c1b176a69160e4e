"""What stock vLLM's time goes to on a load, by stated rules.

Each rule reads one figure of the measured round of stock, or one counted from the load, and
compares it with a limit. Rules that hold are ordered by the share of the round's time that they
speak of, where they know it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from kvplug_lab.engine.rounds import Round, RoundStep
from kvplug_lab.tune.load import Load, repeated

FEWEST_STEPS = 16
"""Decode steps from which the part of the context in their time is estimated."""


@dataclass(frozen=True)
class Profile:
    """What a round of stock showed.

    Attributes:
        ttft: Mean seconds to the first token.
        ttft_p95: Of it, the 95th percentile.
        tpot: Mean seconds for each further token.
        tokens_per_second: Generated tokens a second.
        waited: Part of the time to first token that requests waited to be scheduled.
        full: Part of the round's time in which the pool was at least 90% in use.
        pool: Mean part of the pool in use, over time.
        preemptions: Requests preempted, over requests.
        running: Most requests running at once.
        hit: Part of prompt tokens found in the prefix cache.
        again: Part of prompt tokens that were computed though an earlier prompt began with them.
        elsewhere: Part of prompt tokens that were computed though they stood in an earlier prompt,
            not at its beginning.
        prefill: Part of the round's time in steps that computed prompts.
        empty: Part of the slots of running requests that held no token, over time.
        context: Part of a decode step's time that grows with the context, the lower end of its
            interval; 0 if not known.
        transfer: Seconds to copy a token's KV from host memory, over seconds to compute it.
        load_tokens: Tokens of the load's prompts and answers that are not a repeated prefix: the
            working set.
        pool_tokens: Tokens the pool holds.
    """

    ttft: float
    ttft_p95: float
    tpot: float
    tokens_per_second: float
    waited: float
    full: float
    pool: float
    preemptions: float
    running: int
    hit: float
    again: float
    elsewhere: float
    prefill: float
    empty: float
    context: float
    transfer: float
    load_tokens: int
    pool_tokens: int


def profile(load: Load, served: Round, copy_seconds: float) -> Profile:
    """Sum up a round.

    Args:
        load: The requests.
        served: Stock's round of them.
        copy_seconds: Seconds to copy a block's KV from host memory into the pool.
    """
    answers, steps = served.answers, served.steps
    prompt = sum(a.prompt for a in answers)
    cached = sum(a.cached for a in answers)
    there = repeated(load, served.block_size)
    time = sum(s.seconds for s in steps) or 1.0
    ttft = [a.ttft for a in answers]
    prefills = [s.seconds for s in steps if not s.decode]
    computed = max(prompt - cached, 1)
    per_token = sum(prefills) / computed
    copied = copy_seconds / served.block_size

    def over_time(of: Callable[[RoundStep], float]) -> float:
        return sum(of(s) * s.seconds for s in steps) / time

    return Profile(
        ttft=statistics.fmean(ttft),
        ttft_p95=percentile(ttft, 0.95),
        tpot=statistics.fmean([a.tpot for a in answers if a.tpot] or [0.0]),
        tokens_per_second=served.output_tokens_per_second,
        waited=sum(a.waited for a in answers) / (sum(ttft) or 1.0),
        full=over_time(lambda s: s.held >= 0.9 * served.num_blocks),
        pool=over_time(lambda s: s.held / served.num_blocks),
        preemptions=served.preemptions / len(answers),
        running=served.peak_running,
        hit=cached / prompt,
        again=max(there.prefix - cached, 0) / prompt,
        elsewhere=there.elsewhere / prompt,
        prefill=sum(prefills) / time,
        empty=over_time(lambda s: s.empty / s.slots if s.slots else 0.0),
        context=context_share(steps),
        transfer=copied / per_token if per_token else 0.0,
        load_tokens=prompt - there.prefix + load.output_tokens,
        pool_tokens=served.num_blocks * served.block_size,
    )


def percentile(values: list[float], share: float) -> float:
    """The least value of the sample that so large a share of it does not exceed."""
    import numpy as np

    return float(np.quantile(values, share, method="inverted_cdf"))


def context_share(steps: list[RoundStep]) -> float:
    """Part of decode steps' time that grows with the tokens of their context, for certain.

    Seconds are fitted to a constant, the requests running and their tokens, by least squares, and
    the slope is taken two standard errors lower: on a busy machine times vary for other reasons.
    0 where there are too few decode steps or their contexts do not differ.
    """
    import numpy as np

    decode = [s for s in steps if s.decode]
    if len(decode) < FEWEST_STEPS or len({s.context for s in decode}) < FEWEST_STEPS // 2:
        return 0.0
    times = np.array([s.seconds for s in decode])
    # One pause of the machine outweighs all else: steps far above the median are left out.
    kept = times <= 3 * np.median(times)
    columns = np.array([[1.0, s.running, s.context] for s in decode])[kept]
    times = times[kept]
    fitted, _, rank, _ = np.linalg.lstsq(columns, times, rcond=None)
    left = times - columns @ fitted
    variance = float(left @ left) / max(len(times) - int(rank), 1)
    error = np.sqrt(max(variance * np.linalg.pinv(columns.T @ columns)[2, 2], 0.0))
    slope = fitted[2] - 2 * error
    return float(np.clip(slope * columns[:, 2].mean() / times.mean(), 0.0, 1.0))


@dataclass(frozen=True)
class Rule:
    """A rule by which a bottleneck is named.

    Attributes:
        name: The bottleneck.
        figure: What is read, in words.
        limit: From which on the rule holds.
        read: Reads it.
        weight: The part of the round's time that it speaks of, to order bottlenecks.
    """

    name: str
    figure: str
    limit: float
    read: Callable[[Profile], float]
    weight: Callable[[Profile], float]


MEMORY, FRAGMENTATION, RECOMPUTATION = "memory", "fragmentation", "recomputation"
ELSEWHERE, LONG_CONTEXT, TRANSFER = "recomputation elsewhere", "long context", "transfer"

RULES = (
    Rule(
        RECOMPUTATION,
        "prompt tokens computed though an earlier prompt began with them",
        0.10,
        lambda p: p.again,
        lambda p: p.prefill * p.again / max(1 - p.hit, 1e-9),
    ),
    Rule(
        ELSEWHERE,
        "prompt tokens computed though they stood elsewhere in an earlier prompt",
        0.20,
        lambda p: p.elsewhere,
        lambda p: p.prefill * p.elsewhere / max(1 - p.hit, 1e-9),
    ),
    Rule(
        MEMORY,
        "time with 90% of the pool in use and requests waiting, or requests preempted",
        0.20,
        lambda p: max(min(p.full, p.waited), p.preemptions),
        lambda p: min(p.full, p.waited),
    ),
    Rule(
        FRAGMENTATION,
        "slots of running requests that hold no token, where memory is short",
        0.10,
        lambda p: p.empty if max(min(p.full, p.waited), p.preemptions) >= 0.2 else 0.0,
        lambda p: p.empty * min(p.full, p.waited),
    ),
    Rule(
        LONG_CONTEXT,
        "time of a decode step that grows with the context",
        0.30,
        lambda p: p.context,
        lambda p: p.context * (1 - p.prefill),
    ),
    Rule(
        TRANSFER,
        "seconds to copy a token's KV from host memory, over seconds to compute it, where tokens "
        "are computed again",
        0.50,
        lambda p: p.transfer if p.again >= 0.10 else 0.0,
        lambda p: 0.0,
    ),
)
"""Every rule; the page on `kvplug tune` prints them."""


@dataclass(frozen=True)
class Bottleneck:
    """A rule that held.

    Attributes:
        name: Of the bottleneck.
        figure: What was read, in words.
        value: What it was.
        limit: From which on the rule holds.
        weight: Part of the round's time it speaks of, as an upper limit of what can be won.
    """

    name: str
    figure: str
    value: float
    limit: float
    weight: float

    def __str__(self) -> str:
        return f"{self.name}: {self.value:.0%} (from {self.limit:.0%}): {self.figure}"


def bottlenecks(found: Profile) -> list[Bottleneck]:
    """The rules that hold, those first that speak of the most time."""
    held = [
        Bottleneck(rule.name, rule.figure, rule.read(found), rule.limit, rule.weight(found))
        for rule in RULES
        if rule.read(found) >= rule.limit
    ]
    return sorted(held, key=lambda b: -b.weight)
