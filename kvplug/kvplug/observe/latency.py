"""Times to the first token and per output token: quantiles of now, and of a baseline.

Times are counted in buckets whose bounds grow by `GROWTH`, so a quantile is off by at most half of
that, memory does not depend on the traffic, and windows are added up. Prompts of similar length are
compared with each other: classes by their tokens.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvplug.errors import KVPlugError
from kvplug.regular_file import UnreadableFile, read_regular

GROWTH = 1.04
"""Ratio of a bucket's upper bound to its lower one."""

LEAST, MOST = 1e-5, 1e5
"""Seconds that are told apart; what is outside counts as the nearest."""

BUCKETS = math.ceil(math.log(MOST / LEAST) / math.log(GROWTH))

PERCENTILES = (50, 99)

LIMITS = (512, 4096, 32768)
"""Prompt tokens below which a class ends."""

CLASSES = ("all", "0-511", "512-4095", "4096-32767", "32768-")
"""Classes of prompts: all of them, and by their tokens."""

TTFT, TPOT = "ttft", "tpot"
NOW, BASELINE = "now", "baseline"

SLICES = 6
"""Parts of the window of now: the oldest leaves it as a new one begins."""

FILE_BYTES = 1 << 20
"""Most bytes of a baseline's file."""

Counts = npt.NDArray[np.int64]


class Quantile(NamedTuple):
    """A quantile of one window.

    Attributes:
        measure: `TTFT` or `TPOT`.
        window: `NOW` or `BASELINE`.
        prompt: One of `CLASSES`.
        percentile: One of `PERCENTILES`.
        seconds: The quantile; NaN where nothing was counted.
    """

    measure: str
    window: str
    prompt: str
    percentile: int
    seconds: float


class UnusableBaseline(KVPlugError, ValueError):
    """The file of a baseline cannot be used; the message names it and says what to do.

    Attributes:
        problem: What is wrong.
        fix: What to do.
    """

    exit_code = 2

    def __init__(self, problem: str, fix: str):
        super().__init__(f"{problem}. Fix: {fix}")
        self.problem = problem
        self.fix = fix


def bucket_of(seconds: float) -> int:
    """Index of the bucket that a time is counted in."""
    if not seconds > LEAST:
        return 0
    return min(BUCKETS - 1, int(math.log(seconds / LEAST) / math.log(GROWTH)))


def quantile(counts: Counts, percentile: float) -> float:
    """A percentile of what was counted, in seconds; NaN where nothing was.

    It is the geometric middle of the bucket of the value with that rank (the nearest rank).
    """
    total = int(counts.sum())
    if not total:
        return math.nan
    rank = max(1, math.ceil(percentile / 100 * total))
    bucket = int(np.searchsorted(np.cumsum(counts), rank))
    return float(LEAST * GROWTH ** (bucket + 0.5))


class _Class(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    requests: int = Field(ge=1, le=1 << 40)
    counts: dict[str, int] = Field(max_length=BUCKETS)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    kvplug_baseline: int = Field(ge=1, le=1)
    growth: float
    model: str
    ttft: dict[str, _Class] = Field(max_length=len(CLASSES))
    tpot: dict[str, _Class] = Field(max_length=len(CLASSES))


@dataclass
class _Now:
    """Counts of the last minutes, in slices."""

    slices: deque[tuple[int, Counts]] = field(default_factory=lambda: deque(maxlen=SLICES))

    def add(self, number: int, bucket: int) -> None:
        if not self.slices or self.slices[-1][0] != number:
            self.slices.append((number, np.zeros(BUCKETS, np.int64)))
        self.slices[-1][1][bucket] += 1

    def counts(self, number: int) -> Counts:
        found = np.zeros(BUCKETS, np.int64)
        for of, counts in self.slices:
            if of > number - SLICES:
                found += counts
        return found


class LatencyWindows:
    """Counts times of requests in the window of now and, until it is full, in the baseline.

    The scheduler's thread uses it alone. Memory: `SLICES` + 1 arrays of `BUCKETS` numbers for each
    of two measures and `CLASSES`, 0.33 MB.

    Args:
        baseline: Requests of a class that make its baseline; 0 for none.
        seconds: Length of the window of now.
        model: Name of the model, kept with a baseline.
        clock: Seconds; only differences matter.

    Attributes:
        model: As given.
        added: Times counted so far.
    """

    def __init__(
        self,
        baseline: int,
        seconds: float,
        model: str = "",
        clock: Callable[[], float] = time.monotonic,
    ):
        self.model = model
        self.added = 0
        self._wanted = baseline
        self._slice = seconds / SLICES
        self._clock = clock
        keys = [(m, c) for m in (TTFT, TPOT) for c in CLASSES]
        self._now = {key: _Now() for key in keys}
        self._baseline = {key: np.zeros(BUCKETS, np.int64) for key in keys}
        self._counted = dict.fromkeys(keys, 0)
        self._frozen: set[tuple[str, str]] = set()

    def add(self, measure: str, prompt_tokens: int, seconds: float) -> bool:
        """Count a time of a request; returns True if that makes a baseline full."""
        if not math.isfinite(seconds):
            return False
        number, bucket = int(self._clock() / self._slice), bucket_of(seconds)
        self.added += 1
        full = False
        for prompt in ("all", CLASSES[1 + bisect_left(LIMITS, prompt_tokens + 1)]):
            key = measure, prompt
            self._now[key].add(number, bucket)
            if key in self._frozen or self._counted[key] >= self._wanted:
                continue
            self._baseline[key][bucket] += 1
            self._counted[key] += 1
            if self._counted[key] == self._wanted:
                self._frozen.add(key)
                full = True
        return full

    def requests(self) -> Iterator[tuple[str, str, int]]:
        """Window, class and number of first tokens counted in it; a baseline's once it is full."""
        number = int(self._clock() / self._slice)
        for prompt in CLASSES:
            key = TTFT, prompt
            yield NOW, prompt, int(self._now[key].counts(number).sum())
            yield BASELINE, prompt, self._counted[key] if key in self._frozen else 0

    def quantiles(self) -> Iterator[Quantile]:
        """Every quantile of every window. A baseline has them once it is full."""
        number = int(self._clock() / self._slice)
        for (measure, prompt), now in self._now.items():
            counts = now.counts(number)
            for percentile in PERCENTILES:
                found = quantile(counts, percentile)
                yield Quantile(measure, NOW, prompt, percentile, found)
            for percentile in PERCENTILES:
                found = math.nan
                if (measure, prompt) in self._frozen:
                    found = quantile(self._baseline[measure, prompt], percentile)
                yield Quantile(measure, BASELINE, prompt, percentile, found)

    # -- a baseline that outlives the engine -----------------------------------------------------

    def dump(self) -> str:
        """The full baselines, as JSON."""
        parts: dict[str, dict[str, _Class]] = {TTFT: {}, TPOT: {}}
        for measure, prompt in sorted(self._frozen):
            counts = self._baseline[measure, prompt]
            some = {str(i): int(counts[i]) for i in np.flatnonzero(counts)}
            parts[measure][prompt] = _Class(requests=int(counts.sum()), counts=some)
        made = _File(
            kvplug_baseline=1,
            growth=GROWTH,
            model=self.model,
            ttft=parts[TTFT],
            tpot=parts[TPOT],
        )
        return made.model_dump_json()

    def load(self, path: str | Path) -> bool:
        """Take the baselines that a file has; what it lacks is counted as it would be without.

        Returns:
            False if there is no such file.

        Raises:
            UnusableBaseline: It cannot be read, is no baseline, or is another model's.
        """
        if not Path(path).exists():
            return False
        fix = f"remove {path}, and a new baseline is recorded there."
        try:
            found = _File.model_validate_json(read_regular(path, FILE_BYTES))
        except UnreadableFile as error:
            raise UnusableBaseline(f"the baseline {error}", fix) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise UnusableBaseline(
                f"{path} is no baseline: {where}: {first['msg']}", fix
            ) from error
        if found.model != self.model or found.growth != GROWTH:
            raise UnusableBaseline(
                f"the baseline {path} was recorded for {found.model!r}, and the engine runs "
                f"{self.model!r}",
                f"name another file, or {fix}",
            )
        for measure, classes in ((TTFT, found.ttft), (TPOT, found.tpot)):
            for prompt, one in classes.items():
                self._take(path, fix, measure, prompt, one)
        return True

    def _take(self, path: str | Path, fix: str, measure: str, prompt: str, one: _Class) -> None:
        key = measure, prompt
        counts = np.zeros(BUCKETS, np.int64)
        right = prompt in CLASSES
        for name, count in one.counts.items():
            index = int(name) if name.isascii() and name.isdecimal() and len(name) < 6 else -1
            right &= 0 <= index < BUCKETS and 0 < count <= one.requests
            if not right:
                break
            counts[index] = count
        if not right or int(counts.sum()) != one.requests:
            raise UnusableBaseline(f"{path} is no baseline: its counts do not agree", fix)
        self._baseline[key] = counts
        self._counted[key] = one.requests
        self._frozen.add(key)
