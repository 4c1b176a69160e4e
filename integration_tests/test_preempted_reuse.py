"""A request that was preempted after it had answered from stored KV says so, whatever it finds when
it begins again; the scheduler's half alone, without an engine."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvplug.hosts.vllm.scheduler.kind import Answer
from kvplug_lab.engine.alone import LoneScheduler

SECTION = {
    "reuse": {
        "use": ["structure", "position", "mask"],
        "approximate": True,
        "segments": {"by": "request", "min_tokens": 16},
    },
}


class Blocks:
    """What vLLM says of a request's blocks."""

    def get_block_ids(self) -> tuple[list[int]]:
        return ([0, 1, 2, 3],)


@pytest.fixture(scope="module")
def scheduler(tiny: Path) -> LoneScheduler:
    return LoneScheduler(tiny, SECTION, 512)


@pytest.mark.parametrize(("answered", "exact"), [(True, False), (False, True)])
def test_an_answer_from_foreign_tokens_is_not_exact(
    scheduler: LoneScheduler, answered: bool, exact: bool
) -> None:
    choose = random.Random(int(answered))
    head, document, tail = ([choose.randrange(10, 300) for _ in range(n)] for n in (40, 64, 9))
    scheduler.store(np.array(head, np.int32), np.array(document, np.int32), {})
    asked = {"reuse": "approximate", "segments": [64]}
    request: Any
    request, _ = scheduler.request(document + tail, asked)
    plan, _ = scheduler.plan(request, 0)
    assert plan.approximate_from == 0
    reuse = scheduler.reuse
    reuse.allocated(request, Blocks(), plan.length)
    if answered:
        request.append_output_token_ids(7)
    reuse.catalog.invalidate()
    reuse.matched(request, 0)
    reuse.allocated(request, Blocks(), 0)
    answer = Answer(refused={})
    reuse.finished(request, [], answer)
    assert answer.exact is exact
