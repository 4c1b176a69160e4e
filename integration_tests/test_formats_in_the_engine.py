"""Formats in the engine: every token must come out as the oracle says.

The oracle rounds K and V by formulas of its own inside plain transformers, so layouts, packing,
slots, kernels, chunks, the recent ring and the merge of stored and fresh tokens are all in doubt.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from format_oracle import FormatOracle, in_chunks, per_channel, per_token
from oracle import visible
from pruned_oracle import PrunedOracle, Rule, keydiff

from kvplug_lab.engine.trial import TrialRequest, TrialResult, pool_tokens
from kvplug_lab.models import tiny_llama

Run = Callable[..., TrialResult]

PLUGINS = Path(__file__).parent / "plugins"
ENGINE = {"dtype": "float32", "max_model_len": 512, "block_size": 32}
CHUNK = 64
LENGTHS = [1, 3, 150, 320]
GENERATED = 24


def section(use: str, **options: Any) -> dict[str, Any]:
    return {"format": {"use": use, **options}}


def prompts(seed: int = 0) -> list[list[int]]:
    choose = random.Random(seed)
    return [[choose.randrange(10, 300) for _ in range(n)] for n in LENGTHS]


def requests(one_by_one: bool = False) -> list[TrialRequest]:
    waves = range(len(LENGTHS)) if one_by_one else [0] * len(LENGTHS)
    return [TrialRequest(p, GENERATED, wave=w) for p, w in zip(prompts(), waves, strict=True)]


def tokens(result: TrialResult) -> list[list[int]]:
    return [a.token_ids for a in result.answers]


def report(result: TrialResult) -> dict[str, Any]:
    (found,) = [r for r in result.reports if r["kind"] == "format"]
    return found


@pytest.fixture(params=["run", "run_second"], ids=["first-runner", "second-runner"])
def either(request: pytest.FixtureRequest) -> Run:
    """Run requests on one of vLLM's model runners."""
    found: Run = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def reads_back(tiny: Path) -> FormatOracle:
    return FormatOracle(tiny)


@pytest.fixture(scope="module")
def stock(run: Run, tiny: Path) -> TrialResult:
    return run(tiny, requests(), None, max_num_batched_tokens=CHUNK, **ENGINE)


def test_plain_pages_change_nothing(run: Run, tiny: Path, stock: TrialResult) -> None:
    """K and V as they are, through the whole of kvplug's path; everybody is preempted once."""
    result = run(
        tiny,
        requests(),
        section("plain"),
        max_num_batched_tokens=CHUNK,
        reset_running_at=8,
        **ENGINE,
    )
    assert tokens(result) == tokens(stock)
    assert result.preemptions > 0
    own = report(result)
    assert own["acted"] > 0 and own["errors"] == 0
    assert own["counters"]["bytes_per_token"] == own["counters"]["stock_bytes_per_token"]


def test_codes_read_back(
    either: Run, tiny: Path, stock: TrialResult, reads_back: FormatOracle
) -> None:
    """Requests side by side in chunks, twice over: what is read does not depend on chunks, so a
    prefix hit gives the same answers. The pool holds 3.5 times what vLLM's own does in bfloat16,
    twice that in float32."""
    twice = requests() + [TrialRequest(p, GENERATED, wave=1) for p in prompts()]
    result = either(
        tiny,
        twice,
        section("int4", fit=0, rotate=False, exact_chunk=False),
        max_num_batched_tokens=CHUNK,
        **ENGINE,
    )
    expected = [reads_back.greedy(p, GENERATED, per_token(4)) for p in prompts()]
    assert tokens(result) == expected * 2
    assert tokens(stock) != expected
    assert [a.cached_tokens for a in result.answers] == [0, 0, 0, 0, 0, 0, 128, 288]
    assert pool_tokens(result.log) / pool_tokens(stock.log) >= 2 * 3.5
    reported = result.answers[0].kvplug
    assert (
        reported is not None
        and reported["exact"] is False
        and reported["format"].startswith("int4")
    )


def test_a_step_sees_its_own_tokens_as_computed(
    run: Run, tiny: Path, reads_back: FormatOracle
) -> None:
    result = run(
        tiny,
        requests(one_by_one=True),
        section("int4", fit=0, rotate=False),
        max_num_batched_tokens=CHUNK,
        **ENGINE,
    )
    expected = [
        reads_back.greedy(p, GENERATED, per_token(4), in_chunks(len(p), CHUNK)) for p in prompts()
    ]
    assert tokens(result) == expected
    assert expected != [reads_back.greedy(p, GENERATED, per_token(4)) for p in prompts()]


def test_open_groups_are_seen_as_computed(
    either: Run, tiny: Path, stock: TrialResult, reads_back: FormatOracle
) -> None:
    """Chunks end inside groups, so the exact tokens of an open group come from the ring."""
    chunk = 75
    result = either(
        tiny,
        requests(one_by_one=True),
        section("kivi", bits=2, fit=0, rotate=False, anchor=False),
        max_num_batched_tokens=chunk,
        **ENGINE,
    )
    expected = [
        reads_back.greedy(p, GENERATED, per_channel(2, 32), in_chunks(len(p), chunk, 32))
        for p in prompts()
    ]
    assert tokens(result) == expected
    assert pool_tokens(result.log) / pool_tokens(stock.log) >= 2 * 5


def test_requests_side_by_side_keep_their_own_recent_tokens(
    either: Run, tiny: Path, reads_back: FormatOracle
) -> None:
    """All prompts fit one step, then all answer together; a slot is used again by a later request.
    Half of the later ones begin with a prefix hit, in the middle of nobody's group."""
    later = [TrialRequest(p, GENERATED, wave=1) for p in [*prompts(), *prompts(seed=1)]]
    result = either(
        tiny,
        requests() + later,
        section("kivi", bits=2, fit=0, rotate=False, anchor=False),
        max_num_batched_tokens=1024,
        **ENGINE,
    )

    def expected(prompt: list[int], cached: int) -> list[int]:
        def start(position: int) -> int:
            if position < len(prompt):
                return 0 if position < cached else cached
            return position // 32 * 32

        return reads_back.greedy(prompt, GENERATED, per_channel(2, 32), start)

    asked = prompts() * 2 + prompts(seed=1)
    cached = [a.cached_tokens for a in result.answers]
    assert cached == [0] * 4 + [0, 0, 128, 288] + [0] * 4
    assert tokens(result) == [expected(p, n) for p, n in zip(asked, cached, strict=True)]


def test_with_a_scoring_policy(run: Run, tiny: Path) -> None:
    """Compaction moves codes and scales together: the oracle forgets among rounded tokens."""

    class Rounding(PrunedOracle):
        def _attend(self, module, query, key, value, *args, **kwargs):
            k, v = per_token(8)(key[0], value[0])
            return super()._attend(module, query, k[None], v[None], *args, **kwargs)

    budget = {"budget": 128, "sink": 4, "recent": 16, "interval": 32}
    result = run(
        tiny,
        requests(),
        section("int8", exact_chunk=False) | {"sequence": {"use": "keydiff", **budget}},
        max_num_batched_tokens=CHUNK,
        **ENGINE,
    )
    rules = [Rule(kept=128, interval=32, sink=4, recent=16)]
    forgetful = Rounding(tiny)
    assert tokens(result) == [forgetful.greedy(p, GENERATED, keydiff, rules) for p in prompts()]
    assert result.classes["managers"] == ["PrunedManager"]


def test_with_a_window(either: Run, tiny: Path, reads_back: FormatOracle) -> None:
    """Keys per channel and a positional policy: blocks go whole, so groups stay whole."""
    result = either(
        tiny,
        requests(one_by_one=True),
        section("kivi", bits=4, fit=0, rotate=False, anchor=False)
        | {"sequence": {"use": "sink_window", "sink": 32, "window": 64}},
        max_num_batched_tokens=512,
        **ENGINE,
    )

    # Prompts are split into rows of one block, each a step of its own to its queries.
    def starts(prompt: int) -> Callable[[int], int]:
        first = (32 + 64 + 32) // 32 * 32

        def start(position: int) -> int:
            if position < min(first, prompt):
                return 0
            return position // 32 * 32

        return start

    expected = [
        reads_back.greedy(
            p,
            GENERATED,
            per_channel(4, 32),
            starts(len(p)),
            lambda n: visible(n, 32, 32, 64),
        )
        for p in prompts()
    ]
    assert tokens(result) == expected


def test_layers_of_different_bytes(run: Run, tiny: Path, reads_back: FormatOracle) -> None:
    """Two formats in one model: each layer's pages are as large as its own format asks."""
    result = run(
        tiny,
        requests(),
        section(
            "mixed",
            exact_chunk=False,
            default={"use": "int4", "fit": 0, "rotate": False},
            layers={"1": "int8"},
        ),
        max_num_batched_tokens=CHUNK,
        **ENGINE,
    )
    stored = [per_token(4), per_token(8)]
    assert tokens(result) == [reads_back.greedy(p, GENERATED, stored) for p in prompts()]
    heads, block = 2, 32
    assert result.block_bytes == heads * block * ((32 + 32 + 8) + (64 + 64 + 8))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_split_over_ranks(run: Run, tmp_path: Path, parallel: str) -> None:
    model = tiny_llama(tmp_path / "model", layers=4)
    own = {"enforce_eager": False} if parallel.startswith("pipeline") else {}
    result = run(
        model,
        requests(),
        section("int4", fit=0, rotate=False, exact_chunk=False),
        watched=False,
        env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        distributed_executor_backend="mp",
        max_num_batched_tokens=CHUNK,
        **{parallel: 2},
        **own,
        **ENGINE,
    )
    reads = FormatOracle(model)
    assert tokens(result) == [reads.greedy(p, GENERATED, per_token(4)) for p in prompts()]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(PLUGINS), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path}


def test_a_format_that_cannot_attend_is_read_back(run: Run, tiny: Path, stock: TrialResult) -> None:
    result = run(
        tiny,
        requests(),
        section("fails_to_attend"),
        env=environment(),
        max_num_batched_tokens=CHUNK,
        **ENGINE,
    )
    assert tokens(result) == tokens(stock)
    assert report(result)["errors"] > 0
    log = result.log  # type: ignore[attr-defined]
    assert log.count("format policy 'fails_to_attend' failed in attend") == 1


def test_a_format_that_cannot_store_fails_requests_and_not_the_engine(
    run: Run, tiny: Path, stock: TrialResult
) -> None:
    """It fails for a while; requests that come later are answered right."""
    work = [TrialRequest(p, GENERATED, wave=i) for i, p in enumerate(prompts()[2:] * 2)]
    result = run(
        tiny,
        work,
        section("fails_to_write", after=12, times=2),
        env=environment(),
        max_num_batched_tokens=512,
        **ENGINE,
    )
    found = tokens(result)
    assert len(found[0]) < GENERATED, "its tokens could not be stored"
    assert found[1:] == [tokens(stock)[3], *tokens(stock)[2:]]
    assert report(result)["errors"] == 2


def test_requests_are_stored_by_what_was_measured(
    either: Run, tiny: Path, reads_back: FormatOracle, tmp_path: Path
) -> None:
    """Bounds that no error reaches make every later request cheaper. Requests of one level share
    blocks, those of different levels do not."""
    log = tmp_path / "decisions.jsonl"
    prompt = prompts()[3]
    result = either(
        tiny,
        [TrialRequest(prompt, GENERATED, wave=wave) for wave in range(4)],
        section(
            "adaptive",
            exact_chunk=False,
            levels=[{"use": "int4", "fit": 0, "rotate": False}, "int8"],
            low=0.9,
            high=0.95,
            sample_layers=2,
            sample_every=1,
            patience=40,
            log=str(log),
        ),
        **ENGINE,
    )
    formats = [a.kvplug["format"].split(":")[0] for a in result.answers if a.kvplug]
    assert formats[0] == "adaptive/int8" and formats[-2:] == ["adaptive/int4"] * 2
    first = formats.index("adaptive/int4")
    cached = [a.cached_tokens for a in result.answers]
    assert cached == [0 if i in (0, first) else 320 // 32 * 32 - 32 for i in range(4)]
    expected = {
        name: reads_back.greedy(prompt, GENERATED, per_token(bits))
        for name, bits in (("adaptive/int4", 4), ("adaptive/int8", 8))
    }
    assert tokens(result) == [expected[name] for name in formats]
    (decision,) = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert (decision["from"], decision["to"]) == ("int8", "int4")
    assert "adaptive: new requests are stored as int4 instead of int8" in result.log  # type: ignore[attr-defined]
    assert report(result)["counters"]["decisions"] == 1
