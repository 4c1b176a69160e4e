"""Shared parts of the reuse experiments: sections to compare, engines, measures of answers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvplug.errors import KVPlugError
from kvplug_lab.spread import Spread

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvplug_lab.engine.trial import Answer
    from kvplug_lab.engine.turns import Engine

Encode = Callable[[str], Sequence[int]]
"""Text to tokens, nothing added; special tokens in the text are single tokens."""

BLOCK = 32
"""Tokens per block; a size that vLLM supports on CPUs, too."""

STOCK = "stock"
"""Name of the engine that the others are compared with."""

CHECKS = ("structure", "position", "mask")
"""Checks that every section of an experiment begins with."""


@dataclass(frozen=True)
class ReuseVariant:
    """One way to reuse.

    Attributes:
        name: Its name in tables.
        section: The ``kvplug`` section.
        headed: Whether its requests have a heading before every document.
    """

    name: str
    section: Mapping[str, Any]
    headed: bool = False


def section(
    learnt: Sequence[Any] = (), *, checks: Sequence[Any] = CHECKS, **recompute: float
) -> dict[str, Any]:
    """A section that allows approximate reuse of segments that requests name.

    Args:
        learnt: Checks behind the first ones, as YAML has them.
        checks: The first ones.
        recompute: Keys of ``reuse.recompute``; omitted keys are off.
    """
    again = {"boundary": 0, "fraction": 0.0, "gaps": 0} | recompute
    own = {"approximate": True, "segments": {"by": "request"}, "recompute": again}
    return {"reuse": {"use": [*checks, *learnt], **own}}


GAPS = 64
"""Default of ``gaps``: the most tokens between two stored segments that are recomputed."""

LEARNT = ("credibility", "compensate")
"""Checks that need a file from a calibration."""


def without_file(name: str, files: Mapping[str, Path | None]) -> str:
    """The first check of a variant's name whose file is not given, or the empty string."""
    parts = name.split("+")
    return next((n for n in LEARNT if n in parts and files.get(n) is None), "")


def named(
    name: str, files: Mapping[str, Path | None], checks: Sequence[Any] | None = None
) -> ReuseVariant:
    """A way to reuse by its name: parts joined by ``+``, some with ``=VALUE``.

    Args:
        name: ``nothing``, ``boundary=N``, ``fraction=X``, ``gaps[=N]``, ``compensate`` and
            ``credibility``.
        files: The files of `LEARNT` checks.
        checks: Checks before those; `CHECKS` by default.

    Raises:
        ValueError: A part is unknown, lacks its value or its file.
    """
    learnt: list[Any] = []
    recompute: dict[str, float] = {}
    for part in name.split("+"):
        word, _, value = part.partition("=")
        if word in LEARNT:
            file = files.get(word)
            if file is None:
                raise ValueError(f"{word} needs its file, --{word} FILE")
            learnt.append({word: {"model": str(file.resolve())}})
        elif word == "gaps":
            recompute["gaps"] = int(value or GAPS)
        elif word in ("boundary", "fraction"):
            recompute[word] = float(value) if word == "fraction" else int(value)
        elif word != "nothing":
            raise ValueError(f"{word!r} is not a way to reuse")
    # A correction is applied only to what is credible, so it runs last.
    learnt.sort(key=lambda check: "compensate" in check)
    return ReuseVariant(
        name, section(learnt, checks=checks or CHECKS, **recompute), headed="gaps" in recompute
    )


def agreement(answer: Sequence[int], right: Sequence[int]) -> int:
    """Tokens of two answers before the first difference."""
    return next(
        (i for i, (a, b) in enumerate(zip(answer, right, strict=False)) if a != b),
        min(len(answer), len(right)),
    )


@dataclass
class Agreement:
    """Greedy answers against those of recomputation.

    Attributes:
        before: Per answer, tokens before the first difference.
        of: Per answer, tokens compared.
    """

    before: list[int] = field(default_factory=list)
    of: list[int] = field(default_factory=list)

    def add(self, answer: Sequence[int], right: Sequence[int]) -> None:
        """Compare one more answer."""
        self.before.append(agreement(answer, right))
        self.of.append(len(right))

    @property
    def share(self) -> float:
        """Share of tokens before the first difference; NaN without answers."""
        return sum(self.before) / sum(self.of) if sum(self.of) else math.nan

    @property
    def identical(self) -> float:
        """Share of identical answers; NaN without answers."""
        same = sum(b == o for b, o in zip(self.before, self.of, strict=True))
        return same / len(self.of) if self.of else math.nan

    def plain(self) -> dict[str, Any]:
        """Convert to JSON types."""
        return {
            "answers": len(self.of),
            "tokens_before_first_difference": Spread.of(self.before).__dict__,
            "tokens_share": self.share,
            "identical": self.identical,
        }


def perplexity(logprobs: Sequence[float]) -> float:
    """Perplexity of tokens by their log-probabilities in nats; NaN without any."""
    return math.exp(-statistics.fmean(logprobs)) if logprobs else math.nan


@dataclass(frozen=True)
class ReportedReuse:
    """Reuse as an answer reports it.

    Attributes:
        any: Whether stored KV was used.
        approximate: Whether the answer is approximate.
        reused: Tokens used, without those recomputed among them.
        computed: Tokens recomputed within the run.
    """

    any: bool
    approximate: bool
    reused: int
    computed: int


def reported(answer: Answer) -> ReportedReuse:
    """Read the reuse that an answer reports."""
    fields = answer.kvplug or {}
    reused = int(fields.get("reused", 0))
    recomputed = int(fields.get("recomputed", 0))
    return ReportedReuse(reused > 0, not fields.get("exact", True), reused, recomputed)


def engine_arguments(longest: int, dtype: str) -> dict[str, Any]:
    """Arguments of an engine whose prefix cache is on.

    Args:
        longest: Tokens of the longest request, its answer included.
        dtype: Of the model.
    """
    return {
        "block_size": BLOCK,
        "dtype": dtype,
        "max_model_len": -(-(longest + 1) // BLOCK) * BLOCK,
        "enable_prefix_caching": True,
    }


@contextmanager
def engines(
    model: Path,
    sections: Mapping[str, Any],
    logs: Path,
    say: Callable[[str], None],
    **engine: Any,
) -> Iterator[dict[str, Engine]]:
    """Start engines one after the other to take turns, and stop them at the end.

    Args:
        model: Model directory.
        sections: Name to the ``kvplug`` section, None for stock vLLM.
        logs: Folder for their logs.
        say: Called with a line about each step.
        engine: Keyword arguments of ``vllm.LLM``.
    """
    from kvplug_lab.engine.trial import TrialSpec
    from kvplug_lab.engine.turns import Engine

    with ExitStack() as stack:
        found = {}
        for number, (name, own) in enumerate(sections.items()):
            say(f"starting engine: {name}")
            extra = {} if own is None else worker_extension(own)
            spec = TrialSpec(str(model), [], engine | extra, own)
            found[name] = stack.enter_context(Engine(spec, logs / f"engine-{number}.log"))
            found[name].wait()
        yield found


def worker_extension(own: Mapping[str, Any]) -> dict[str, Any]:
    """The engine argument that a section needs to recompute inside a reused run."""
    from kvplug.hosts.vllm.flags import EXTENSION
    from kvplug.reuse.settings import ReuseSettings

    stated = own.get("reuse")
    if not isinstance(stated, Mapping):
        return {}
    settings = ReuseSettings(**{key: value for key, value in stated.items() if key != "use"})
    return {"worker_extension_cls": EXTENSION} if settings.recompute.needed else {}


def turns(names: Sequence[str], turn: int) -> list[str]:
    """The order of engines in a turn: every other one backwards."""
    return list(names) if turn % 2 == 0 else list(reversed(names))


def encoder(model: Path) -> tuple[Encode, list[int]]:
    """A model's tokenizer, and the tokens that every text of it begins with."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)

    def encode(text: str) -> Sequence[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    return encode, list(tokenizer("").input_ids[:1])


class TooFew(KVPlugError, ValueError):
    """The text is too short or a size is too small; the message says which."""


def passages_of(
    encode: Encode, text: str, n: int, tokens: int, seed: int
) -> list[tuple[list[int], str]]:
    """Draw passages of a text that do not overlap and start at a line's beginning.

    Returns:
        ``n`` passages in an order that the seed gives: ``tokens`` tokens each, with their text.

    Raises:
        TooFew: The text has fewer passages.
    """
    import random

    size = 6 * tokens
    starts = list(range(len(text) // size))
    random.Random(f"{seed} stretches").shuffle(starts)
    found = []
    for start in starts:
        piece = text[start * size : (start + 1) * size]
        piece = piece[piece.find("\n") + 1 :]
        own = list(encode(piece))
        if len(own) >= tokens:
            found.append((own[:tokens], piece))
        if len(found) == n:
            return found
    raise TooFew(f"the text has {len(found)} passages of {tokens} tokens; {n} are needed")
