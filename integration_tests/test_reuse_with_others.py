"""Reuse beside other features: two ranks, a format, the guard and its breaker."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import test_reuse_in_the_engine as case
from reuse_oracle import ReuseOracle
from typer.testing import CliRunner

from kvplug.cli import app
from kvplug.hosts.vllm.flags import GUARD
from kvplug_lab import models
from kvplug_lab.engine.trial import TrialRequest, TrialResult

Run = Callable[..., TrialResult]

ASK = {"segments": case.LENGTHS}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.tiny_llama(tmp_path_factory.mktemp("deep"), layers=6, seed=2)


@pytest.fixture(scope="module")
def oracle(deep: Path) -> ReuseOracle:
    return ReuseOracle(deep)


@pytest.fixture(scope="module")
def foreign(oracle: ReuseOracle) -> list[int]:
    """The answer with B and A from elsewhere and the gap between them computed."""
    loaded = [
        (case.AT_B, oracle.rerotated(oracle.stored(case.S, case.B), case.AT_B - len(case.S))),
        (case.AT_A, oracle.rerotated(oracle.stored(case.S, case.A), case.AT_A - len(case.S))),
    ]
    return oracle.greedy(case.WHOLE, loaded, [(194, 204)], case.N)


def test_two_ranks_keep_their_own_heads(
    run: Run, deep: Path, foreign: list[int], tmp_path: Path
) -> None:
    work = [*case.learning(), TrialRequest(case.WHOLE, case.N, 3, case.ASKS | ASK)]
    section = case.section(recompute={"gaps": 64}, store={"directory": str(tmp_path)})
    result = run(
        deep,
        work,
        section,
        watched=False,
        env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        tensor_parallel_size=2,
        **case.ENGINE,
    )
    assert result.answers[3].token_ids == foreign
    assert result.answers[3].kvplug["reused"] == 168
    names = [path.name for path in tmp_path.glob("*.kvseg")]
    assert {name.split(".")[1] for name in names} == {"0-2", "1-2"}
    assert len(names) == 2 * len({name.split(".")[0] for name in names})


def test_bytes_of_a_format_are_stored_and_come_back_as_they_were(run: Run, deep: Path) -> None:
    """Exact reuse under int8 changes nothing; a shifted run is decoded, re-rotated and encoded."""
    chain = {"use": case.CHAIN, "approximate": True}
    chain["segments"] = {"by": "request", "min_tokens": 16}
    section = {"format": "int8", "reuse": chain | {"recompute": {"gaps": 64}}}
    work = [
        *case.learning(),
        TrialRequest(case.S + case.A + case.Q, case.N, 3, {"segments": [40, 70]}),
        TrialRequest(case.S + case.A + case.Q, case.N, 4, {"reuse": "off"}),
        TrialRequest(case.WHOLE, case.N, 5, case.ASKS | ASK),
    ]
    engine = case.ENGINE | {"enable_prefix_caching": False}
    result = run(deep, work, section, **engine)
    stored, computed, shifted = result.answers[3:]
    assert stored.kvplug["exact"] is False, "int8 itself is not exact"
    assert stored.kvplug["reused"] == 110
    assert stored.token_ids == computed.token_ids
    # Q, which the request before left with its answer, stands later here too.
    assert shifted.kvplug["shifted"] == 160 + len(case.Q) - 1
    assert [r["errors"] for r in result.reports] == [0, 0, 0, 0]


def test_a_drifting_answer_is_recorded_and_opens_the_breaker(
    run: Run, deep: Path, tmp_path: Path
) -> None:
    asks = case.ASKS | ASK
    section = case.section(recompute={"gaps": 64}) | {
        "guard": {
            "max_entropy_drift": 0.001,
            "max_logprob_drift": 0.001,
            "history": 1,
            "breaker": {"threshold": 1},
            "records": str(tmp_path),
        }
    }
    other = case.WHOLE[:-20] + case.text(20)
    work = [
        *case.learning(),
        # What exact answers over these segments look like.
        TrialRequest(other, case.N, 3, ASK | {"reuse": "off"}, salt="x"),
        TrialRequest(case.WHOLE, case.N, 4, asks),
        TrialRequest(case.WHOLE, case.N, 5, asks),
    ]
    # The tenant's own exact history counts, nobody else's.
    unknown = run(deep, work, section, logits_processors=[GUARD], **case.ENGINE)
    assert unknown.reports[0]["counters"]["drifted"] == 0
    work[3].salt = None
    result = run(
        deep,
        work,
        section,
        logits_processors=[GUARD],
        **case.ENGINE | {"enable_prefix_caching": False},
    )
    drifted, refused = result.answers[4:]
    assert drifted.kvplug["exact"] is False
    assert drifted.kvplug["drift"]["entropy"] > 0.001
    assert refused.kvplug["exact"]
    assert refused.kvplug["not_reused"]["breaker open"] > 0
    (record,) = tmp_path.glob("*.json")
    recorded = json.loads(record.read_text())
    assert recorded["prompt_ids"] == case.WHOLE
    assert [p["length"] for p in recorded["pieces"]][-2:] == [90, 70]
    assert recorded["computed"] == [[194, 204]]
    figures = tmp_path / "figures"
    arguments = ["reuse", "explain", str(record), "--model", str(deep), "--json", str(figures)]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert figures.exists()
