"""The simulator with tiers, and ``kvplug simulate --tiers``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tracegen import conversations
from typer.testing import CliRunner

from kvplug.cli import app
from kvplug.contract import EngineView, LifecyclePolicy, PrefixCachePolicy
from kvplug.hosts.trace import traces
from kvplug.hosts.trace.simulator import PolicyFailed, Replay
from kvplug.hosts.trace.tiers import SimulatedModel, SimulatedTier, TierReplay, TierResult
from kvplug.hosts.trace.traces import Trace
from kvplug_policies.lifecycle.everything import Everything
from kvplug_policies.lifecycle.ladder import Ladder
from kvplug_policies.prefix_cache.foresight import Foresight
from kvplug_policies.prefix_cache.lru import Lru

MODEL = SimulatedModel(bytes_per_token=1000, prefill=1000.0, quadratic=1e6)


def made(requests: list[list[int]], gap: float = 1.0) -> Trace:
    """A trace of requests given as block ids, blocks of 16 tokens."""
    lengths = np.array([len(r) for r in requests])
    return Trace(
        "made",
        np.concatenate([[0], np.cumsum(lengths)]),
        np.array([b for r in requests for b in r]),
        np.arange(len(requests), dtype=np.float64) * gap,
        lengths * 16,
        np.zeros(len(requests), np.int64),
        np.zeros(len(requests), np.int64),
        16,
        1 + max(max(r) for r in requests),
    )


def lru(engine: EngineView) -> PrefixCachePolicy:
    return Lru(Lru.Options.model_validate({}), engine)


def everything(engine: EngineView) -> LifecyclePolicy:
    return Everything(Everything.Options.model_validate({}), engine)


def replayed(
    trace: Trace,
    pool: int,
    *tiers: SimulatedTier,
    lifecycle: Callable[[EngineView], LifecyclePolicy] = everything,
    order: Callable[[EngineView], PrefixCachePolicy] = lru,
    eager: bool = False,
) -> TierResult:
    replay = TierReplay(trace, MODEL)
    return replay.run_tiers(lru(replay.engine(pool)), pool, tiers, order, lifecycle, eager)


def test_without_tiers_the_pool_is_the_one_of_the_simulator() -> None:
    trace = conversations(4, requests=200)
    alone = Replay(trace).run(lru(Replay(trace).engine(20)), 20)
    found = replayed(trace, 20)
    assert found.pool_hits == found.hits == alone.hits
    assert found.stored == found.written_bytes == found.read_bytes == 0


def test_what_left_the_pool_is_loaded_and_times_are_those_of_the_line() -> None:
    trace = made([[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]])
    tier = SimulatedTier("host", 100, bandwidth=1e6, latency=0.01)
    found = replayed(trace, 4, tier)
    # Of the third request the last token is computed; its four chunks of 16,000 bytes are loaded.
    assert found.tier_hits == {"host": 4} and found.pool_hits == 0
    assert found.stored == 8 and found.useless == 4
    assert found.read_bytes == 4 * 16_000 and found.written_bytes == 8 * 16_000
    assert found.computed_tokens == 64 + 64 + 1
    computing = MODEL.seconds(0, 64)
    assert found.ttft == pytest.approx([computing, computing, 0.074 + MODEL.seconds(63, 1)])


def test_a_line_slower_than_prefill_is_left_alone_once_it_was_measured() -> None:
    trace = made([[4 * (i % 3) + b for b in range(4)] for i in range(30)])
    slow = SimulatedTier("s3", 100, bandwidth=1e4, latency=0.0)
    found = replayed(trace, 4, slow)
    assert found.tier_hits["s3"] == 4, "the first load is what measures the line"
    assert found.passed == 4 * 26
    fast = replayed(trace, 4, SimulatedTier("host", 100, bandwidth=1e9, latency=0.0))
    assert fast.passed == 0 and fast.tier_hits["host"] == 4 * 27
    assert fast.mean_ttft < found.mean_ttft


def test_a_gap_in_a_text_ends_what_is_loaded() -> None:
    # The last used leaves a tier last, so the tail of the first text is what it gave up.
    trace = made([[0, 1, 2, 3], [4, 5], [0, 1, 2, 3]])
    whole = replayed(trace, 4, SimulatedTier("host", 40, bandwidth=1e9))
    part = replayed(trace, 4, SimulatedTier("host", 1, bandwidth=1e9))
    assert whole.tier_hits["host"] > 0
    assert part.hits < whole.hits


def test_a_full_tier_hands_down_and_the_lower_one_serves() -> None:
    trace = made([[4 * (i % 4) + b for b in range(4)] for i in range(20)])
    host = SimulatedTier("host", 5, bandwidth=1e9)
    both = replayed(trace, 4, host, SimulatedTier("disk", 50, bandwidth=1e9))
    assert both.hits == 4 * 16 and both.tier_hits["disk"] > 0 and both.moved > 0
    assert replayed(trace, 4, host).hits < both.hits


def test_eager_stores_what_is_computed_and_as_much_again() -> None:
    trace = made([[4 * i + b for b in range(4)] for i in range(10)])
    eager = replayed(trace, 100, SimulatedTier("host", 100), eager=True)
    assert eager.stored == eager.useless == 40
    late = replayed(trace, 100, SimulatedTier("host", 100))
    assert late.stored == 0, "nothing left the pool"


def test_a_coded_tier_writes_and_reads_less() -> None:
    trace = made([[4 * (i % 3) + b for b in range(4)] for i in range(30)])
    coded = replayed(trace, 4, SimulatedTier("host", 100, bandwidth=1e9, size=0.25))
    plain = replayed(trace, 4, SimulatedTier("host", 100, bandwidth=1e9))
    assert coded.hits == plain.hits > 0
    assert 4 * coded.read_bytes == plain.read_bytes


def test_a_policy_that_fails_ends_the_replay() -> None:
    class Failing(Everything):
        def plan(self, pressure: object) -> list[Any]:
            raise RuntimeError("broken")

    trace = made([[0, 1], [2, 3], [0, 1]])
    with pytest.raises(PolicyFailed, match="lifecycle_errors"):
        replayed(
            trace,
            2,
            SimulatedTier("host", 9),
            lifecycle=lambda e: Failing(Failing.Options.model_validate({}), e),
        )


def test_orders_that_ask_for_more_than_ids_are_told() -> None:
    found = replayed(
        conversations(4, requests=200),
        20,
        SimulatedTier("host", 60, bandwidth=1e9),
        order=lambda e: Foresight(Foresight.Options.model_validate({}), e),
        lifecycle=lambda e: Ladder(Ladder.Options.model_validate({}), e),
    )
    assert found.tier_hits["host"] > 0


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "made.npz"
    traces.write(path, conversations(4, requests=100))
    return path


def run(*arguments: object) -> Any:
    words = ["simulate", *(str(a) for a in arguments)]
    return CliRunner().invoke(app, words, catch_exceptions=False)


def test_rows_are_those_of_every_combination(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    result = run(
        *(trace, "--capacity", "10", "--json", out, "--gbit", "1,100"),
        *("--tiers", "host:size=20", "--tiers", "host:size=20,disk:size=50%:gbit=10:latency=0.01"),
        *("--lifecycle", "eager,ladder:least=0.1", "--order", "lru,arc"),
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())
    assert len(rows) == 1 + 2 * 2 * 2 * 2
    assert rows[0]["lifecycle"] == "none" and rows[0]["stored"] == 0
    kinds = {(r["tiers"], r["gbit"], r["lifecycle"], r["order"]) for r in rows[1:]}
    assert len(kinds) == 16 and {r["lifecycle"] for r in rows[1:]} == {"eager", "ladder:least=0.1"}
    assert all(r["hit_rate"] >= rows[0]["hit_rate"] for r in rows)
    assert "times are simulated" in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tiers", "host"), "size is missing"),
        (("--tiers", "host:size=0"), "use 1 to"),
        (("--tiers", "host:size=5%:speed=3"), "speed is unknown"),
        (("--tiers", "host:size=5%:gbit=fast"), "must be a number above 0"),
        (("--tiers", "host:size=5%,host:size=6%"), "different names"),
        (("--tiers", "host:size=5%", "--gbit", "0"), "numbers of Gbit/s"),
        (("--tiers", "host:size=5%", "--lifecycle", "snowball"), "snowball"),
        (("--tiers", "host:size=5%", "--order", "snowball"), "snowball"),
        (("--tiers", "host:size=5%", "--lifecycle", ","), "must not be empty"),
        (("--tiers", "host:size=5%", "--plot", "x.svg"), "--plot"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_one_message(
    trace: Path, words: tuple[str, ...], said: str
) -> None:
    result = run(trace, *words)
    assert result.exit_code == 2 and said in result.stderr
    assert result.stdout == ""
