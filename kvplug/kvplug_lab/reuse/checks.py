"""Costs of finding and checking stored segments in the scheduler, at many stored segments.

The catalog holds real documents among many others; each request takes some of the real ones in
random order, as in `kvplug_lab.reuse.rag`. Measured are the look-up of every stored segment in the
request's text, each check per candidate, and the whole plan that the scheduler makes of a request.
No engine runs: what is timed is the scheduler's own code.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvplug_lab.reuse import rag as reuse_rag
from kvplug_lab.reuse.runs import CHECKS, encoder, section
from kvplug_lab.spread import Spread

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvplug_lab.engine.alone import LoneScheduler

TAKE, MATCH, PLAN = (
    "cutting a request into segments",
    "finding stored text in it",
    "the whole plan, finding and checks included",
)

FILLED = 250
"""Tokens of the segments that no request takes."""

MEASURES = {"k_drift": 0.02, "v_drift": 0.03, "sparsity": 0.2, "key_cosine": 0.6, "outgoing": 0.2}
"""Stability measures of every stored segment: of the size that real ones have."""


@dataclass
class CheckCosts:
    """Figures of the experiment.

    Attributes:
        sizes: Numbers of stored segments.
        parts: What was timed, in the order shown.
        each: Those of them that are per candidate; the others are per request.
        costs: Per size and part, microseconds.
        candidates: Candidates judged per request, mean over all.
        tokens: Tokens of a request.
    """

    sizes: list[int]
    parts: list[str]
    each: list[str]
    costs: dict[int, dict[str, Spread]] = field(default_factory=dict)
    candidates: float = 0.0
    tokens: Spread = field(default_factory=lambda: Spread.of([]))

    def plain(self) -> dict[str, Any]:
        """Convert to JSON types."""
        return asdict(self)


def fill(
    scheduler: LoneScheduler,
    prefix: npt.NDArray[np.int32],
    documents: Sequence[Sequence[int]],
    others: int,
    vocabulary: int,
    seed: int,
) -> None:
    """Enter documents, and as many other segments as are asked for, all behind one prefix."""
    source = np.random.default_rng(seed)
    for document in documents:
        scheduler.store(prefix, np.array(document, np.int32), MEASURES)
    for _ in range(others):
        tokens = source.integers(0, vocabulary, FILLED).astype(np.int32)
        scheduler.store(prefix, tokens, MEASURES)


def time_requests(
    scheduler: LoneScheduler, asked: Sequence[reuse_rag.Asked], local: int
) -> tuple[dict[str, list[float]], int]:
    """Microseconds of each part, and candidates judged.

    Args:
        scheduler: Filled.
        asked: Requests.
        local: Tokens of each that the engine itself has.
    """
    reuse = scheduler.reuse
    costs: dict[str, list[float]] = {name: [] for name in (*scheduler.checks, TAKE, MATCH, PLAN)}
    judged = 0
    for one in asked:
        options = {"reuse": "approximate", "segments": list(one.lengths)}
        request, spent = scheduler.request(one.prompt, options)
        costs[TAKE].append(spent)
        tokens = np.array(one.prompt, np.int32)
        before = time.perf_counter()
        reuse.catalog.match(tokens, "")
        costs[MATCH].append(1e6 * (time.perf_counter() - before))
        calls = dict(reuse.matcher.asked)
        plan, spent = scheduler.plan(request, local)
        costs[PLAN].append(spent)
        for name in scheduler.checks:
            costs[name].append(
                plan.costs_us[name] / (reuse.matcher.asked[name] - calls.get(name, 0))
            )
        first = scheduler.checks[0]
        judged += reuse.matcher.asked[first] - calls.get(first, 0)
    return costs, judged


def measure(
    model: Path,
    text: str,
    sizes: Sequence[int],
    rounds: int,
    credibility: str | None,
    seed: int,
    say: Callable[[str], None],
) -> CheckCosts:
    """Time the scheduler's half of reuse at each number of stored segments.

    Args:
        model: Model directory; its config and tokenizer are read.
        text: Long plain text.
        sizes: Numbers of stored segments.
        rounds: Requests measured at each.
        credibility: File of the check `credibility`, or None to leave it out.
        seed: Seed of documents and orders.
        say: Called with a line about each step.
    """
    from kvplug_lab.engine.alone import LoneScheduler

    encode, bos = encoder(model)
    work = reuse_rag.workload(encode, bos, text, reuse_rag.RagSizes(requests=rounds + 3, seed=seed))
    learnt = [{"credibility": {"model": credibility}}] if credibility is not None else []
    own = section(learnt)
    own["reuse"]["store"] = {"memory": 1 << 24, "ttl": 1e9}
    prefix = np.array(work.warm[0].prompt[: work.warm[0].lengths[0]], np.int32)
    documents = [a.prompt[a.lengths[0] :] for a in work.warm]
    each = [*CHECKS, *(["credibility"] if learnt else [])]
    result = CheckCosts(list(sizes), [*each, TAKE, MATCH, PLAN], each)
    judged = 0
    for size in sizes:
        say(f"{size:,} segments")
        scheduler = LoneScheduler(model, own, 4096)
        fill(scheduler, prefix, documents, size - len(documents), 10_000, seed)
        asked = list(work.plain)
        random.Random(seed).shuffle(asked)
        # The first requests find caches cold.
        time_requests(scheduler, asked[:3], len(prefix))
        costs, candidates = time_requests(scheduler, asked[3:], len(prefix))
        judged += candidates
        result.costs[size] = {part: Spread.of(values) for part, values in costs.items()}
    result.candidates = judged / (len(sizes) * rounds)
    result.tokens = Spread.of([len(a.prompt) for a in work.plain])
    return result
