"""Presses of kvpress in vLLM's engine: they answer as the policies of the same scores do."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pruned_oracle import PrunedOracle, Rule, keydiff
from test_failing_policy import environment

from kvplug_lab.engine.trial import TrialRequest, TrialResult

Run = Callable[..., TrialResult]

GENERATED = 40
RULE = Rule(kept=128, interval=32, sink=4, recent=16)
SHAPE = {"budget": 128, "interval": 32, "sink": 4, "recent": 16}


def pressed(press: str, **options: Any) -> dict[str, Any]:
    return {"sequence": {"use": "kvpress", "press": press, **options}}


def sequence_report(result: TrialResult) -> dict[str, Any]:
    (found,) = [r for r in result.reports if r["kind"] == "sequence"]
    return found


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_press_of_ones_own_gives_the_tokens_of_the_oracle(
    run: Run, tiny: Path, sign: float
) -> None:
    """And the opposite score does not, on the prompts beyond the budget."""
    choose = random.Random(0)
    prompts = [[choose.randrange(10, 300) for _ in range(n)] for n in (3, 320, 701)]
    section = pressed("kvplug_test_presses.KeyDifference", arguments={"sign": sign}, **SHAPE)
    result = run(
        tiny,
        [TrialRequest(p, GENERATED) for p in prompts],
        section,
        dtype="float32",
        max_model_len=1024,
        env=environment(),
    )
    oracle = PrunedOracle(tiny)
    same = [
        answer.token_ids == oracle.greedy(prompt, GENERATED, keydiff, (RULE,))
        for answer, prompt in zip(result.answers, prompts, strict=True)
    ]
    assert same == [True, sign < 0, sign < 0]
    report = sequence_report(result)
    assert report["acted"] > 0 and report["errors"] == 0


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("kvpress"), reason="kvpress is not installed")
@pytest.mark.parametrize(
    ("press", "arguments", "policy"),
    [
        ("KnormPress", {}, {"use": "knorm"}),
        ("KeyDiffPress", {}, {"use": "keydiff"}),
        ("TOVAPress", {}, {"use": "tova"}),
        ("SnapKVPress", {"window_size": 32}, {"use": "snapkv", "kernel": 5, "pooling": "mean"}),
    ],
)
def test_presses_of_kvpress_answer_as_the_policies_of_their_scores(
    run: Run,
    smollm2: Path,
    passages: Callable[..., list[str]],
    press: str,
    arguments: dict[str, Any],
    policy: dict[str, Any],
) -> None:
    """On real text, with evictions after the prompt and while tokens are generated."""
    shape = {"budget": 256, "interval": 64, "sink": 4, "recent": 32}
    requests = [TrialRequest(passages(1, n, seed=n)[0], 160) for n in (300, 520, 700)]
    engine = {"dtype": "float32", "max_model_len": 2048, "max_num_batched_tokens": 512}
    theirs = run(
        smollm2, requests, pressed(f"kvpress.{press}", arguments=arguments, **shape), **engine
    )
    ours = run(smollm2, requests, {"sequence": policy | shape}, **engine)
    assert [a.token_ids for a in theirs.answers] == [a.token_ids for a in ours.answers]
    counted = [sequence_report(result)["counters"]["evictions"] for result in (theirs, ours)]
    assert counted[0] == counted[1] == 9
