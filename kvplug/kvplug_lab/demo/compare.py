"""What rounds of several engines say side by side: counts first, then times with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from kvplug_lab.demo.deployments import Deployment
from kvplug_lab.demo.questions import Work
from kvplug_lab.engine.rounds import Round
from kvplug_lab.spread import Spread

MIB = 1 << 20
NO_DIFFERENCE = "no difference seen"


@dataclass(frozen=True)
class Figures:
    """One round of one engine.

    Attributes:
        running: Most requests running at once.
        kv_mib: Mean KV memory of a running request, in MiB; of values of 16 bits where no format
            codes them, and with what is kept beside the blocks.
        computed: Prompt tokens computed, what preempted requests computed again left out.
        cached: Prompt tokens found in the prefix cache or loaded.
        preemptions: Times a request was preempted.
        right: Right answers, by the place of the fact in the document, first to last.
        same: Answers that are stock's, in the same round.
        seconds: From the first question sent to the last answer.
        cpu_seconds: Processor time of them, all threads.
        ttft: Median seconds from sending a question to the answer's first token.
    """

    running: int
    kv_mib: float
    computed: int
    cached: int
    preemptions: int
    right: tuple[int, ...]
    same: int
    seconds: float
    cpu_seconds: float
    ttft: float

    def answers_per_minute(self, answers: int) -> float:
        """Answers in a minute."""
        return 60 * answers / self.seconds if self.seconds else 0.0


def figures_of(
    deployment: Deployment,
    work: Work,
    found: Round,
    answers: Sequence[str],
    of_stock: Sequence[str],
) -> Figures:
    """Figures of a round.

    Args:
        deployment: What the engine ran.
        work: The questions.
        found: The round.
        answers: Its answers as text.
        of_stock: Stock's answers in the same round.
    """
    busy = [step for step in found.steps if step.running]
    running = sum(step.running for step in busy)
    held = sum(step.held for step in busy) * deployment.block_bytes / max(running, 1)
    rings = deployment.beside / work.documents
    groups = places(work)
    right = [0] * len(groups)
    for question, answer in zip(work.questions, answers, strict=True):
        right[_group(groups, question.place)] += question.answered_by(answer)
    cached = sum(a.cached for a in found.answers)
    return Figures(
        running=found.peak_running,
        kv_mib=(held + rings) / MIB,
        computed=sum(a.prompt for a in found.answers) - cached,
        cached=cached,
        preemptions=found.preemptions,
        right=tuple(right),
        same=sum(a == b for a, b in zip(answers, of_stock, strict=True)),
        seconds=found.seconds,
        cpu_seconds=found.cpu_seconds,
        ttft=statistics.median(a.ttft for a in found.answers),
    )


def places(work: Work) -> list[int]:
    """Places of facts in a document, first to last: the mean over the documents, in tokens."""
    by_document: dict[int, list[int]] = {}
    for question in work.questions:
        by_document.setdefault(question.document, []).append(question.place)
    columns = zip(*(sorted(own) for own in by_document.values()), strict=True)
    return [round(statistics.mean(column)) for column in columns]


def _group(groups: Sequence[int], place: int) -> int:
    return min(range(len(groups)), key=lambda i: abs(groups[i] - place))


@dataclass(frozen=True)
class Cell:
    """One figure of one deployment.

    Attributes:
        text: The figure, with its spread if rounds differ.
        ratio: Its ratio to stock with its spread; empty where there is none to show.
    """

    text: str
    ratio: str = ""


@dataclass(frozen=True)
class Row:
    """A figure of every deployment, stock first.

    Attributes:
        key: Its name in data.
        label: What it is.
        cells: One for each deployment.
        timed: True if it depends on how busy the machine was.
    """

    key: str
    label: str
    cells: tuple[Cell, ...]
    timed: bool = False

    @property
    def ratios(self) -> bool:
        """Whether a ratio is shown."""
        return any(cell.ratio for cell in self.cells)


def spread_text(values: Sequence[float], form: str) -> str:
    """``median (lowest..highest)``, or the value alone where all rounds agree."""
    shown = [format(value, form) for value in values]
    if len(set(shown)) == 1:
        return shown[0]
    spread = Spread.of(values, tail=0.0)
    return f"{spread.median:{form}} ({spread.low:{form}}..{spread.high:{form}})"


def ratio_text(own: Sequence[float], stock: Sequence[float]) -> str:
    """Ratio to stock, round by round: ``median (lowest..highest)``, or that none was seen.

    Returns:
        Nothing for a single round, which shows no spread; and where stock's value is 0.
    """
    if len(own) < 2 or not all(stock):
        return ""
    spread = Spread.of([a / b for a, b in zip(own, stock, strict=True)], tail=0.0)
    if spread.low <= 1.0 <= spread.high:
        return NO_DIFFERENCE
    return f"{spread.median:.2f}x ({spread.low:.2f}..{spread.high:.2f})"


def rows_of(
    deployments: Sequence[Deployment], work: Work, rounds: Sequence[Sequence[Figures]]
) -> list[Row]:
    """The rows: counted ones, then timed ones where there is more than one round.

    Args:
        deployments: Stock first.
        work: The questions.
        rounds: For each round, the figures of each deployment.
    """
    total = len(work.questions)
    own = [[one[i] for one in rounds] for i in range(len(deployments))]

    def counted(key: str, label: str, values: Sequence[Sequence[float]], form: str) -> Row:
        return Row(key, label, tuple(Cell(spread_text(v, form)) for v in values))

    def of(name: str) -> list[list[float]]:
        return [[float(getattr(f, name)) for f in figures] for figures in own]

    rows = [
        counted(
            "pool_tokens",
            "tokens that the KV memory holds",
            _once(deployments, "pool_tokens"),
            ",.0f",
        ),
        counted("running", "requests running at once", of("running"), ".0f"),
        counted("kv_mib", "KV of a running request, MiB", of("kv_mib"), ",.1f"),
        counted("computed", "prompt tokens computed", of("computed"), ",.0f"),
        counted("cached", "prompt tokens found in the cache", of("cached"), ",.0f"),
        counted("preemptions", "requests preempted", of("preemptions"), ".0f"),
        counted(
            "right",
            f"right answers, of {total}",
            [[float(sum(f.right)) for f in figures] for figures in own],
            ".0f",
        ),
    ]
    at = places(work)
    each = total // len(at)
    if len(at) > 1:
        for i, place in enumerate(at):
            rows.append(
                counted(
                    f"right_{i}",
                    f"  fact at token {place:,}, of {each}",
                    [[float(f.right[i]) for f in figures] for figures in own],
                    ".0f",
                )
            )
    rows.append(counted("same", f"answers as stock's, of {total}", of("same"), ".0f"))
    if len(rounds) > 1:
        rows += _timed(own, total)
    return rows


def verdicts(
    deployments: Sequence[Deployment], work: Work, rounds: Sequence[Sequence[Figures]]
) -> list[str]:
    """What each deployment came to by count, a sentence each, stock's figures beside its own."""
    total = len(work.questions)

    def of(i: int, name: str) -> str:
        return spread_text([float(getattr(one[i], name)) for one in rounds], ",.0f")

    def right(i: int) -> str:
        return spread_text([float(sum(one[i].right)) for one in rounds], ".0f")

    return [
        f"{deployment.name}: {right(i)} of {total} answers right (stock: {right(0)}), "
        f"{of(i, 'running')} requests at once (stock: {of(0, 'running')}), "
        f"{of(i, 'computed')} prompt tokens computed (stock: {of(0, 'computed')})."
        for i, deployment in enumerate(deployments)
        if i
    ]


def _once(deployments: Sequence[Deployment], name: str) -> list[list[float]]:
    return [[float(getattr(deployment, name))] for deployment in deployments]


def _timed(own: Sequence[Sequence[Figures]], total: int) -> list[Row]:
    wanted = {
        "answers_per_minute": (
            "answers a minute",
            [[f.answers_per_minute(total) for f in figures] for figures in own],
            ".1f",
        ),
        "ttft": ("seconds to the first token, median", [[f.ttft for f in fs] for fs in own], ".1f"),
        "cpu_seconds": ("CPU seconds", [[f.cpu_seconds for f in fs] for fs in own], ".0f"),
    }
    rows = []
    for key, (label, values, form) in wanted.items():
        cells = [
            Cell(spread_text(v, form), ratio_text(v, values[0]) if i else "")
            for i, v in enumerate(values)
        ]
        rows.append(Row(key, label, tuple(cells), timed=True))
    return rows
