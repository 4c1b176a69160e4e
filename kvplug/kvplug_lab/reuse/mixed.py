"""Zero pollution: exact requests to an engine that has reused approximately a thousand times.

One engine serves many small requests at once: some exact, some that opt in to approximate reuse,
some that turn reuse off, in several tenants, some in sessions, over a pool of blocks small enough
that cached ones are evicted. The texts are made of few pieces in random orders, so that nearly
every request finds pieces that others stored. Then exact requests follow, most of them the very
prompts that had been answered approximately, and must be answered token for token as by a fresh
stock engine that has served nothing else.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvplug_lab.reuse.runs import (
    Encode,
    agreement,
    encoder,
    engine_arguments,
    passages_of,
    reported,
    worker_extension,
)

if TYPE_CHECKING:
    from kvplug_lab.engine.trial import Answer, TrialRequest, TrialResult

KINDS = {"approximate": 0.5, "exact": 0.2, "unsaid": 0.2, "off": 0.1}
"""Request option ``reuse``, and the share of requests that set it so."""

TENANTS: tuple[str | None, ...] = (None, None, "tenant-a", "tenant-b")
"""Cache salts that requests draw from."""


@dataclass(frozen=True)
class MixedSizes:
    """Sizes of the experiment.

    Attributes:
        requests: Mixed requests.
        exact: Exact requests that follow.
        at_once: Mixed requests added at a time.
        pieces: Pieces of text that requests are made of.
        shortest: Tokens of the shortest piece.
        longest: Tokens of the longest.
        answer: Most tokens of a mixed request's answer.
        exact_answer: Tokens of an exact request's answer.
        blocks: Blocks of the engine's pool.
        seed: Seed of everything.
    """

    requests: int = 1000
    exact: int = 50
    at_once: int = 8
    pieces: int = 40
    shortest: int = 32
    longest: int = 56
    answer: int = 8
    exact_answer: int = 16
    blocks: int = 160
    seed: int = 0


QUICK = MixedSizes(requests=24, exact=4, at_once=6, pieces=5, answer=3, exact_answer=4, blocks=64)


@dataclass(frozen=True)
class Workload:
    """The mixed requests in waves, and the exact ones, each alone in a wave behind them.

    Attributes:
        mixed: Mixed requests.
        exact: Exact requests, with waves that begin at 0.
        modes: Mixed requests by their option ``reuse``.
        longest: Tokens of the longest prompt with its answer.
    """

    mixed: list[TrialRequest]
    exact: list[TrialRequest]
    modes: dict[str, int]
    longest: int

    def together(self) -> list[TrialRequest]:
        """Mixed requests and then the exact ones."""
        waves = 1 + max((r.wave for r in self.mixed), default=-1)
        return [*self.mixed, *(replace(r, wave=waves + r.wave) for r in self.exact)]


def workload(encode: Encode, bos: Sequence[int], text: str, sizes: MixedSizes) -> Workload:
    """The requests, the same ones for the same arguments."""
    from kvplug_lab.engine.trial import TrialRequest

    source = random.Random(f"{sizes.seed} mixed")
    end = list(encode("\n\n"))
    pieces = [
        [*tokens[: source.randint(sizes.shortest, sizes.longest) - len(end)], *end]
        for tokens, _ in passages_of(encode, text, sizes.pieces, sizes.longest, sizes.seed)
    ]
    endings = [list(encode(t)) for t in ("And then", "The king said", "Who", "What follows is")]
    kinds = source.choices(list(KINDS), list(KINDS.values()), k=sizes.requests)
    mixed, again = [], []
    for number, kind in enumerate(kinds):
        chosen = source.sample(pieces, source.randint(1, min(3, len(pieces))))
        # The first piece alone would always be where it was stored.
        lengths = [*([len(bos)] if bos else []), *map(len, chosen)]
        prompt = [*bos, *(t for piece in chosen for t in piece), *source.choice(endings)]
        options: dict[str, Any] = {"segments": lengths}
        if kind != "unsaid":
            options["reuse"] = kind
        if source.random() < 0.1:
            options["session_id"] = f"session-{source.randrange(8)}"
        salt = source.choice(TENANTS)
        mixed.append(
            TrialRequest(
                prompt,
                source.randint(1, sizes.answer),
                wave=number // sizes.at_once,
                kvplug=options,
                salt=salt,
            )
        )
        if kind == "approximate":
            again.append((prompt, lengths, salt))
    exact = []
    for number in range(sizes.exact):
        if again and number % 4 != 3:
            prompt, lengths, salt = source.choice(again)
        else:
            chosen = source.sample(pieces, min(3, len(pieces)))
            lengths, salt = [*([len(bos)] if bos else []), *map(len, chosen)], None
            prompt = [*bos, *(t for piece in chosen for t in piece), *endings[0]]
        own = {"segments": lengths} | ({"reuse": "exact"} if number % 2 else {})
        exact.append(TrialRequest(prompt, sizes.exact_answer, wave=number, kvplug=own, salt=salt))
    longest = max(len(r.prompt) + r.max_tokens for r in [*mixed, *exact])
    return Workload(mixed, exact, dict(Counter(kinds)), longest)


@dataclass(frozen=True)
class Mismatch:
    """An exact request that was not answered as by a fresh engine.

    Attributes:
        index: Which one.
        at: Tokens before the first difference.
        answer: Its tokens.
        right: The fresh engine's.
        cached: Tokens of its prompt that were not computed.
        reused: Those of them that kvplug had stored.
        approximate: Whether its answer admits approximate reuse.
        margin: By how much the fresh engine preferred its own token at the first difference, in
            nats; 0 is a tie. None where one answer ended before.
    """

    index: int
    at: int
    answer: list[int]
    right: list[int]
    cached: int
    reused: int
    approximate: bool
    margin: float | None = None


@dataclass
class MixedFigures:
    """Figures of the experiment: what was served, and whether it changed exact answers.

    Attributes:
        sizes: How much was measured.
        modes: Mixed requests by their option ``reuse``.
        approximate: Mixed requests whose answers report approximate reuse.
        exact: Those whose answers report exact reuse.
        reused: Tokens not prefilled, of mixed requests that reused.
        preemptions: Preemptions in the engine under test.
        compared: Exact requests compared with a fresh stock engine.
        mismatches: Those whose tokens differ.
        served_as: Compared requests by the reuse that their answers report.
        control: The same where the engine that served the mixed requests was stock; None
            where it was not measured.
        counters: kvplug's own counters of reuse.
        prompt_tokens: Tokens of the mixed prompts.
    """

    sizes: MixedSizes
    modes: dict[str, int]
    approximate: int = 0
    exact: int = 0
    reused: int = 0
    preemptions: int = 0
    compared: int = 0
    mismatches: list[Mismatch] = field(default_factory=list)
    served_as: dict[str, int] = field(default_factory=dict)
    control: list[Mismatch] | None = None
    counters: dict[str, float] = field(default_factory=dict)
    prompt_tokens: int = 0

    def plain(self) -> dict[str, Any]:
        """Convert to JSON types."""
        return asdict(self)


def judge(work: Workload, ours: TrialResult, fresh: TrialResult, sizes: MixedSizes) -> MixedFigures:
    """Compare a run's answers with those of a fresh stock engine."""
    result = MixedFigures(sizes, work.modes, preemptions=ours.preemptions)
    for answer in ours.answers[: len(work.mixed)]:
        result.prompt_tokens += answer.prompt_tokens
        reuse = reported(answer)
        result.approximate += reuse.approximate
        result.exact += reuse.any and not reuse.approximate
        result.reused += reuse.reused
    after = ours.answers[len(work.mixed) :]
    result.compared = len(after)
    kinds = (reported(answer) for answer in after)
    result.served_as = dict(
        Counter("approximate" if t.approximate else "exact" if t.any else "none" for t in kinds)
    )
    result.mismatches = mismatches(ours, fresh, len(work.mixed))
    for report in ours.reports:
        if report["kind"] == "reuse":
            result.counters |= report["counters"]
    return result


def mismatches(ours: TrialResult, fresh: TrialResult, mixed: int) -> list[Mismatch]:
    """Exact requests whose tokens differ from the fresh engine's."""
    found = []
    for index, (own, right) in enumerate(zip(ours.answers[mixed:], fresh.answers, strict=True)):
        if own.token_ids != right.token_ids:
            at, reuse = agreement(own.token_ids, right.token_ids), reported(own)
            found.append(
                Mismatch(
                    index,
                    at,
                    own.token_ids,
                    right.token_ids,
                    own.cached_tokens,
                    reuse.reused,
                    reuse.approximate,
                )
            )
    return found


def measure(
    model: Path,
    text: str,
    sizes: MixedSizes,
    section: Mapping[str, Any],
    logs: Path,
    say: Callable[[str], None],
    *,
    dtype: str = "bfloat16",
    control: bool = False,
) -> MixedFigures:
    """Serve the mixed requests and then the exact ones; and the exact ones alone, on stock.

    Args:
        model: Model directory.
        text: Long plain text.
        sizes: Sizes of the experiment.
        section: The ``kvplug`` section of the engine under test.
        logs: Folder for the engines' logs.
        say: Called with a line about each step.
        dtype: Of the model.
        control: Serve the mixed requests on stock as well: differences there come from rounding,
            which depends on batches and cache hits, and not from reuse.
    """
    from kvplug_lab.engine.trial import TrialSpec, run_fresh

    encode, bos = encoder(model)
    work = workload(encode, bos, text, sizes)
    engine = engine_arguments(work.longest, dtype) | {
        "max_num_batched_tokens": 512,
        "max_num_seqs": sizes.at_once,
        "num_gpu_blocks_override": sizes.blocks,
    }

    def progress_of(name: str, total: int) -> Callable[[dict[str, Any]], None]:
        shown = 0

        def progress(what: dict[str, Any]) -> None:
            nonlocal shown
            done = int(what.get("finished", 0))
            if done >= shown + max(total // 10, 1):
                shown = done
                say(f"{name}: {done} of {total} requests")

        return progress

    def run(name: str, requests: list[TrialRequest], own: Any) -> TrialResult:
        say(f"starting engine: {name}")
        extra = worker_extension(own) if own is not None else {}
        spec = TrialSpec(str(model), requests, engine | extra, own)
        return run_fresh(
            spec, progress_of(name, len(requests)), log=logs / f"{name.replace(' ', '-')}.log"
        )

    fresh = run("fresh stock", work.exact, None)
    ours = run("mixed", work.together(), dict(section))
    result = judge(work, ours, fresh, sizes)
    if control:
        stock = run("mixed on stock", work.together(), None)
        result.control = mismatches(stock, fresh, len(work.mixed))
    differing = [*result.mismatches, *(result.control or [])]
    if differing:
        asked = [r for m in differing for r in either(work.exact[m.index], m)]
        answers = run("fresh stock on what differs", asked, None).answers
        found = [replace(m, margin=margin(answers, m, 2 * i)) for i, m in enumerate(differing)]
        result.mismatches = found[: len(result.mismatches)]
        if result.control is not None:
            result.control = found[len(result.mismatches) :]
    return result


def either(request: TrialRequest, differing: Mismatch) -> list[TrialRequest]:
    """The request made to answer as the fresh engine did up to the first difference, and to go on
    with its token and with the other one."""
    common = differing.right[: differing.at]
    ends = (differing.right[differing.at :][:1], differing.answer[differing.at :][:1])
    return [
        replace(request, wave=0, kvplug=None, force=[*common, *end], max_tokens=len(common) + 1)
        for end in ends
    ]


def margin(answers: Sequence[Answer], differing: Mismatch, first: int) -> float | None:
    """Log-probability ratio of the last tokens of two answers, in nats."""
    if min(len(differing.right), len(differing.answer)) <= differing.at:
        return None
    right, other = answers[first].logprobs, answers[first + 1].logprobs
    assert right is not None and other is not None
    return right[-1] - other[-1]
