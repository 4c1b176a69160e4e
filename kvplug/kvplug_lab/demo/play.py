"""Runs the rounds: every engine starts once, stays, and takes turns with the others."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kvplug_lab.demo.deployments import Deployment
from kvplug_lab.demo.questions import Work
from kvplug_lab.engine.rounds import Progress, Round, RoundEngine
from kvplug_lab.engine.trial import TrialRequest, TrialSpec

WARM_TOKENS, WARM_OUTPUT = 64, 4
"""Tokens of what each engine serves before the first round, and of its answer: what is compiled at
first use is compiled then."""


def order_of(engines: int, number: int) -> list[int]:
    """Which engine goes first, second, ... in a round, counted from 0: a Latin square, so that
    in as many rounds as engines each goes once at every place."""
    return [(place + number) % engines for place in range(engines)]


@contextmanager
def started(
    model: Path, deployments: Sequence[Deployment], work: Work, say: Callable[[str], None]
) -> Iterator[list[RoundEngine]]:
    """Engines of all deployments, each in a process of its own, warm; they end with the context.

    On a CPU they start side by side; on a GPU one after another, as each measures what memory is
    free.

    Args:
        model: Model directory.
        deployments: What they run.
        work: The questions.
        say: Told what goes on.

    Raises:
        TrialFailed: One did not start.
    """
    import torch

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvplug-demo-")))
        engines = []
        for i, deployment in enumerate(deployments):
            say(f"{deployment.name}: engine is starting")
            spec = TrialSpec(str(model), [], dict(deployment.engine), deployment.section)
            engine = stack.enter_context(RoundEngine(spec, folder / f"engine-{i}.log"))
            engines.append(engine)
            if torch.cuda.is_available():
                engine.wait()
        for engine, deployment in zip(engines, deployments, strict=True):
            if not torch.cuda.is_available():
                engine.wait()
            warm = [TrialRequest(list(work.questions[0].prompt[:WARM_TOKENS]), WARM_OUTPUT)]
            engine.serve(warm, [None], 1)
            say(f"{deployment.name}: engine is ready")
        yield engines


def play(
    engines: Sequence[RoundEngine],
    work: Work,
    number: int,
    turn: Callable[[int], Callable[[Progress], None]],
) -> list[Round]:
    """One round of every engine, in the round's order.

    Args:
        engines: The engines, stock first.
        work: The questions.
        number: Number of the round, from 0.
        turn: Called with an engine's index before its turn; returns what is told how far it is.

    Returns:
        The rounds in the order of ``engines``.

    Raises:
        TrialFailed: An engine ended.
    """
    requests = [TrialRequest(list(q.prompt), work.output_tokens) for q in work.questions]
    found: dict[int, Round] = {}
    for i in order_of(len(engines), number):
        found[i] = engines[i].serve(requests, work.before, work.documents, turn(i))
    return [found[i] for i in range(len(engines))]


def answer_text(
    decode: Callable[[Sequence[int]], str], tokens: Sequence[int], ends: Sequence[int]
) -> str:
    """An answer up to the token with which the model ended it.

    Args:
        decode: The model's tokenizer.
        tokens: The answer; engines go on to its full length.
        ends: Tokens that end one.
    """
    until = min((tokens.index(end) for end in ends if end in tokens), default=len(tokens))
    return decode(tokens[:until])
