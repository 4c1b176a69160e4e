"""Windows of times: their quantiles, what leaves them, and baselines that outlive an engine."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from kvplug.observe.latency import (
    BASELINE,
    BUCKETS,
    CLASSES,
    GROWTH,
    NOW,
    TPOT,
    TTFT,
    LatencyWindows,
    UnusableBaseline,
    bucket_of,
    quantile,
)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def found(
    windows: LatencyWindows, window: str = NOW, prompt: str = "all", measure: str = TTFT
) -> list[float]:
    return [
        q.seconds
        for q in windows.quantiles()
        if (q.measure, q.window, q.prompt) == (measure, window, prompt)
    ]


def close(seconds: float) -> object:
    return pytest.approx(seconds, rel=GROWTH - 1)


@pytest.mark.parametrize("spread", [0.3, 1.5])
def test_quantiles_are_numpys_within_half_a_bucket(spread: float) -> None:
    times = np.random.default_rng(5).lognormal(-2, spread, 4000)
    windows = LatencyWindows(0, 60.0)
    for one in times:
        windows.add(TTFT, 100, float(one))
    right = [np.percentile(times, p, method="inverted_cdf") for p in (50, 99)]
    assert found(windows) == pytest.approx(right, rel=GROWTH**0.5 - 1 + 1e-9)


def test_times_beyond_the_buckets_count_as_the_nearest() -> None:
    assert bucket_of(0.0) == bucket_of(-1.0) == bucket_of(1e-9) == 0
    assert bucket_of(1e9) == BUCKETS - 1
    assert bucket_of(1.0) < bucket_of(GROWTH * 1.001)
    counts = np.zeros(BUCKETS, np.int64)
    assert math.isnan(quantile(counts, 50))
    windows = LatencyWindows(1, 60.0)
    assert not windows.add(TTFT, 1, math.nan) and not windows.add(TTFT, 1, math.inf)
    assert all(count == 0 for _, _, count in windows.requests())


def test_the_window_of_now_forgets_and_the_baseline_does_not() -> None:
    clock = Clock()
    windows = LatencyWindows(100, 60.0, clock=clock)
    full = [windows.add(TTFT, 100, 0.1) for _ in range(100)]
    assert full == [False] * 99 + [True]
    for _ in range(100):
        windows.add(TTFT, 100, 0.4)
    assert found(windows)[1] == close(0.4)
    assert found(windows, BASELINE) == [close(0.1), close(0.1)]
    clock.now += 60.0
    windows.add(TTFT, 100, 0.8)
    assert found(windows)[0] == close(0.8), "what came a minute ago has left"
    clock.now += 300.0
    assert all(math.isnan(one) for one in found(windows))
    assert found(windows, BASELINE) == [close(0.1), close(0.1)]


def test_prompts_are_compared_with_those_of_their_length() -> None:
    windows = LatencyWindows(2, 60.0)
    lengths = {511: 0.1, 512: 1.0, 4095: 1.0, 4096: 4.0, 32767: 4.0, 32768: 9.0, 10**6: 9.0}
    for tokens, seconds in lengths.items():
        windows.add(TTFT, tokens, seconds)
    medians = [found(windows, NOW, prompt)[0] for prompt in CLASSES[1:]]
    assert medians == [close(0.1), close(1.0), close(4.0), close(9.0)]
    # The first class has one request, and two make a baseline.
    full = [not math.isnan(found(windows, BASELINE, prompt)[0]) for prompt in CLASSES]
    assert full == [True, False, True, True, True]
    assert all(math.isnan(one) for one in found(windows, NOW, "all", TPOT))


def recorded() -> LatencyWindows:
    windows = LatencyWindows(3, 60.0, "m")
    for seconds in (0.1, 0.2, 0.3):
        windows.add(TTFT, 5000, seconds)
        windows.add(TPOT, 5000, seconds / 10)
    return windows


def test_a_baseline_outlives_the_engine(tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    later = LatencyWindows(3, 60.0, "m")
    assert not later.load(file)
    file.write_text(recorded().dump(), encoding="utf-8")
    assert later.load(file)
    for measure in (TTFT, TPOT):
        for prompt in ("all", "4096-32767"):
            want = found(recorded(), BASELINE, prompt, measure)
            assert found(later, BASELINE, prompt, measure) == want
    # What the file has is not counted further; what it lacks is.
    assert [later.add(TTFT, 5000, 9.0) for _ in range(9)] == [False] * 9
    assert [later.add(TTFT, 5, 9.0) for _ in range(3)] == [False, False, True]
    assert found(later, BASELINE)[1] == close(0.3)
    assert found(later, BASELINE, "0-511")[0] == close(9.0)


@pytest.mark.parametrize(
    "path, value",
    [
        ((), []),
        (("kvplug_baseline",), 2),
        (("model",), "another"),
        (("growth",), 1.5),
        (("more",), 1),
        (("ttft", "everything"), {"requests": 1, "counts": {"1": 1}}),
        (("ttft", "all", "requests"), 4),
        (("ttft", "all", "requests"), 0),
        (("ttft", "all", "counts"), {"1": 3, "-1": 0}),
        (("ttft", "all", "counts"), {"99999": 3}),
        (("ttft", "all", "counts"), {"9" * 5000: 3}),
        (("ttft", "all", "counts"), {"1": 4, "2": -1}),
        (("ttft", "all", "counts"), {"1": 3.0}),
        (("tpot",), None),
    ],
)
def test_a_file_that_is_no_baseline_of_this_engine_is_refused(
    tmp_path: Path, path: tuple[str, ...], value: object
) -> None:
    data = json.loads(recorded().dump())
    if path:
        at = data
        for part in path[:-1]:
            at = at[part]
        at[path[-1]] = value
    else:
        data = value
    file = tmp_path / "baseline.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    windows = LatencyWindows(3, 60.0, "m")
    with pytest.raises(UnusableBaseline) as refused:
        windows.load(file)
    assert str(file) in str(refused.value) and "Fix:" in str(refused.value)


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableBaseline, match="is a folder"):
        LatencyWindows(3, 60.0).load(tmp_path)
