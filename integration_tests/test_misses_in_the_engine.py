"""Why prompts miss, in an engine short of blocks: with vLLM's own order and with foresight."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvplug.cli import app
from kvplug.observe.events import EventType
from kvplug.observe.story import miss_table, request_story
from kvplug_lab.engine.trial import TrialRequest, TrialResult

BLOCK = 32
TEXTS, LONG = 5, 8 * BLOCK
ENGINE: dict[str, Any] = {
    "max_model_len": 512,
    "block_size": BLOCK,
    "max_num_batched_tokens": 128,
    "max_num_seqs": 4,
    "num_gpu_blocks_override": 36,
    "enable_prefix_caching": True,
    "enforce_eager": True,
    "kv_cache_metrics": True,
    "kv_cache_metrics_sample": 1.0,
}
OBSERVE = {"answers": True, "events_tokens": True}


def workload() -> list[TrialRequest]:
    """Five documents, asked about in turns, which do not fit together; and one that differs."""
    choose = random.Random(7)
    texts = [[choose.randrange(10, 250) for _ in range(LONG)] for _ in range(TEXTS)]
    found = [
        TrialRequest([*texts[i % TEXTS], 9, i % 250, *range(30)], 24, wave=i // 2)
        for i in range(3 * TEXTS)
    ]
    other = [*texts[4][:70], 5, *texts[4][71:]]
    last = found[-1].wave + 1
    again = [TrialRequest(texts[4], 4, last + 1 + i) for i in range(2)]
    return [*found, TrialRequest(other, 4, last), *again]


@pytest.mark.parametrize("section", [{}, {"prefix_cache": "foresight"}], ids=["lru", "foresight"])
def test_causes_add_up_under_pressure(
    section: dict[str, Any], run: Callable[..., TrialResult], tiny: Path, tmp_path: Path
) -> None:
    log = tmp_path / "events.jsonl"
    requests = workload()
    observe = OBSERVE | {"events": str(log)}
    result = run(tiny, requests, section | {"observe": observe}, **ENGINE)
    told = [answer.kvplug for answer in result.answers]
    totals: dict[str, int] = {}
    for request, answer, said in zip(requests, result.answers, told, strict=True):
        assert said is not None and said["exact"]
        sources, causes = said["prompt_blocks"], said["missed"]
        assert sum(sources.values()) == len(request.prompt) // BLOCK
        assert sources.get("hit", 0) == answer.cached_tokens // BLOCK
        assert sum(causes.values()) == sources.get("missed", 0)
        for cause, blocks in causes.items():
            totals[cause] = totals.get(cause, 0) + blocks
    assert totals["never_seen"] >= TEXTS * (LONG // BLOCK) and totals["evicted"] >= LONG // BLOCK
    # The last three: one text with another token in its third block, and then itself, twice.
    assert told[-3]["first_miss"] == "block 2: differs from known text at token 70"
    assert told[-3]["missed"] == {"prompt_differs": 1, "after_a_difference": 5}
    assert told[-1]["missed"] == {"last_token": 1}

    table = miss_table(log)
    assert table.ignored == 0 and table.requests == len(requests)
    assert dict(table.causes) == totals
    assert sum(table.blocks.values()) == sum(len(r.prompt) // BLOCK for r in requests)
    assert table.positions[70] == 1 and table.thrashed > 0
    done = CliRunner().invoke(app, ["explain", str(log)])
    assert done.exit_code == 0 and "missed: evicted" in done.stdout

    missed = next(i for i, said in enumerate(told) if "evicted" in said["missed"])
    story = request_story(log, _ids(log)[missed])
    assert [e.event for e in story.entries if e.event is not EventType.EVICTED] == [
        EventType.ADMITTED,
        EventType.MISSED,
        EventType.THRASHED,
        EventType.ENDED,
    ]
    by = {e.policy for e in story.evicted_by.values()}
    assert by == {section.get("prefix_cache", "")}
    # vLLM's own metrics of blocks go on beside them.
    assert result.metrics.get("vllm:kv_block_lifetime_seconds", 1)


def _ids(log: Path) -> list[str]:
    from kvplug.observe.story import _Reader

    return [e.request for e in _Reader(log) if e.event is EventType.ADMITTED]
