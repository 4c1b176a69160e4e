"""Formats on vLLM's second model runner, beyond what `test_formats_in_the_engine` runs on both."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from format_oracle import FormatOracle, in_chunks, per_channel, per_token
from oracle import visible

from kvplug_lab.engine.trial import TrialRequest, TrialResult

Run = Callable[..., TrialResult]

ENGINE = {"dtype": "float32", "max_model_len": 512, "block_size": 32}
CHUNK = 64
GENERATED = 16
WINDOW = {"sequence": {"use": "sink_window", "sink": 32, "window": 64}}
LEVELS = [{"use": "int4", "fit": 0, "rotate": False}, "int8"]


def prompts(*lengths: int) -> list[list[int]]:
    choose = random.Random(2)
    return [[choose.randrange(10, 300) for _ in range(n)] for n in lengths]


def requests(asked: list[list[int]], generated: int = GENERATED) -> list[TrialRequest]:
    return [TrialRequest(p, generated) for p in asked]


def tokens(result: TrialResult) -> list[list[int]]:
    return [a.token_ids for a in result.answers]


def section(use: str, **options: Any) -> dict[str, Any]:
    return {"format": {"use": use, **options}}


@pytest.fixture(scope="module")
def reads_back(tiny: Path) -> FormatOracle:
    return FormatOracle(tiny)


def test_a_window_over_codes(run_second: Run, tiny: Path, reads_back: FormatOracle) -> None:
    asked = prompts(3, 150, 320)
    result = run_second(
        tiny,
        requests(asked),
        section("int4", fit=0, rotate=False, exact_chunk=False) | WINDOW,
        max_num_batched_tokens=CHUNK,
        **ENGINE,
    )
    expected = [
        reads_back.greedy(p, GENERATED, per_token(4), visible=lambda n: visible(n, 32, 32, 64))
        for p in asked
    ]
    assert tokens(result) == expected


@pytest.mark.parametrize(
    "how", [{"reset_running_at": 8}, {"ahead": True, "max_num_seqs": 2}], ids=["preempted", "ahead"]
)
def test_assignments_follow_requests_through_slots(
    run_second: Run, tiny: Path, reads_back: FormatOracle, how: dict[str, Any]
) -> None:
    """Everybody is preempted once, and may come back to another slot of the runner's; or requests
    wait for slots, and take them over while the scheduler is a step ahead."""
    asked = prompts(3, 40, 150, 90)
    result = run_second(
        tiny,
        requests(asked),
        section("adaptive", exact_chunk=False, levels=LEVELS, low=1e-6, high=1.0),
        max_num_batched_tokens=CHUNK,
        **how,
        **ENGINE,
    )
    assert (result.preemptions > 0) == ("reset_running_at" in how)
    assert tokens(result) == [reads_back.greedy(p, GENERATED, per_token(8)) for p in asked]
    (report,) = [r for r in result.reports if r["kind"] == "format"]
    assert report["acted"] > 0 and report["errors"] == 0


def test_recent_tokens_while_the_scheduler_is_a_step_ahead(
    run_second: Run, tiny: Path, reads_back: FormatOracle
) -> None:
    """Requests end a step after the scheduler has planned another for them, and others take over
    their slots of the runner's."""
    asked = [TrialRequest(p, 10 + i, wave=i // 3) for i, p in enumerate(prompts(*[3, 150, 70] * 2))]
    result = run_second(
        tiny,
        asked,
        section("kivi", bits=2, fit=0, rotate=False, anchor=False),
        max_num_seqs=3,
        ahead=True,
        **ENGINE,
    )
    expected = [
        reads_back.greedy(
            r.prompt,
            r.max_tokens,
            per_channel(2, 32),
            in_chunks(len(r.prompt), len(r.prompt), 32),
        )
        for r in asked
    ]
    assert tokens(result) == expected


def test_tokens_are_counted_once_per_layer(run_second: Run, tiny: Path) -> None:
    asked = prompts(3, 40)
    result = run_second(tiny, requests(asked, 5), section("int8"), **ENGINE)
    (report,) = [r for r in result.reports if r["kind"] == "format"]
    layers = 2
    # The last token of an answer is sampled and never stored, unless a step began before it ended.
    stored = layers * sum(len(p) + 4 for p in asked)
    assert stored <= report["acted"] <= stored + layers * 2 * len(asked)


@pytest.mark.parametrize(
    "own",
    [
        section("kivi", bits=2, fit=0, rotate=False, anchor=False),
        pytest.param(section("int4", fit=0, rotate=False), marks=pytest.mark.slow),
        pytest.param(section("int4", fit=0, rotate=False) | WINDOW, marks=pytest.mark.slow),
        pytest.param(section("adaptive", levels=LEVELS), marks=pytest.mark.slow),
    ],
    ids=["kivi", "int4", "sink_window-int4", "adaptive"],
)
def test_triton_attention_gives_the_first_runners_tokens(
    run: Run, run_second: Run, tiny: Path, own: Any
) -> None:
    """In the page layout that a GPU's backends and a format agree on."""
    asked = requests(prompts(3, 170), 12)
    engine = ENGINE | {"enforce_eager": True}
    mine = run_second(tiny, asked, own, backend="TRITON_ATTN", **engine)
    assert tokens(mine) == tokens(run(tiny, asked, own, **engine))


@pytest.mark.parametrize("block_size", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_the_block_size_does_not_matter(
    run_second: Run, tiny: Path, reads_back: FormatOracle, block_size: int
) -> None:
    asked = prompts(3, 100)
    result = run_second(
        tiny,
        requests(asked, 12),
        section("int8"),
        backend="TRITON_ATTN",
        max_num_batched_tokens=CHUNK,
        **ENGINE | {"block_size": block_size, "enforce_eager": True},
    )
    # Both prompts fill the first step together.
    first = CHUNK - len(asked[0])
    chunks = [in_chunks(3, CHUNK), lambda p: (0 if p < first else first) if p < 100 else p]
    expected = [
        reads_back.greedy(p, 12, per_token(8), chunk)
        for p, chunk in zip(asked, chunks, strict=True)
    ]
    assert tokens(result) == expected
