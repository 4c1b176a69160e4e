"""Recording and replaying: what a request's end tells a policy, and what the simulator makes of a
recorded engine run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

from kvplug.contract import BlockFact, EngineView, PolicyOptions, RequestView
from kvplug.deployment import Choice
from kvplug.hosts.trace import traces
from kvplug.hosts.vllm.scheduler import queue as queue_module
from kvplug.hosts.vllm.scheduler.blocks import computed_keys
from kvplug.hosts.vllm.scheduler.kind import Answer
from kvplug.hosts.vllm.scheduler.prefix_cache import PrefixCacheScheduler
from kvplug.hosts.vllm.scheduler.queue import PolicyQueue
from kvplug.request_options import RequestOptions
from kvplug_lab import models
from kvplug_lab.engine import against_simulator as replay
from kvplug_lab.engine.trial import TrialRequest, TrialResult
from kvplug_policies.prefix_cache.lru import Lru

# -- the end of a request --------------------------------------------------------------------------


def ended(computed: int, total: int, hashes: int) -> Any:
    return SimpleNamespace(
        request_id="r",
        num_prompt_tokens=total - 3,
        num_output_tokens=3,
        num_computed_tokens=computed,
        num_tokens=total,
        block_hashes=[bytes([i]) for i in range(hashes)],
        priority=0,
        arrival_time=5.0,
    )


@pytest.mark.parametrize(
    ("computed", "total", "blocks"),
    [(63, 64, 3), (64, 65, 4), (70, 71, 4), (0, 71, 0), (40, 71, 2), (71, 71, 4), (64, 64, 3)],
)
def test_the_last_token_was_never_computed(computed: int, total: int, blocks: int) -> None:
    request = ended(computed, total, total // 16)
    assert computed_keys(request, 16, 16) == request.block_hashes[:blocks]


def test_blocks_of_several_hashes_go_by_the_last_one() -> None:
    keys = computed_keys(ended(100, 101, 101 // 8), 8, 32)
    assert keys == [bytes([3]), bytes([7]), bytes([11])]


class Curious(Lru):
    name = "curious"
    needs = frozenset({BlockFact.FINISHED})
    fails = ""

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self.ends: list[tuple[RequestView, list[bytes], int]] = []
        self.stopped = 0

    def on_finished(self, request: Any, keys: Any, num_output_tokens: int) -> None:
        if self.fails == "on_finished":
            raise RuntimeError("no")
        self.ends.append((request, keys, num_output_tokens))

    def on_stop(self) -> None:
        self.stopped += 1
        if self.fails == "on_stop":
            raise RuntimeError("no")


@pytest.fixture
def log() -> Iterator[list[logging.LogRecord]]:
    found: list[logging.LogRecord] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = found.append  # type: ignore[method-assign]
    queue_module.logger.addHandler(handler)
    yield found
    queue_module.logger.removeHandler(handler)


def curious(fails: str = "") -> tuple[Curious, PolicyQueue]:
    policy = Curious(Curious.Options(), EngineView(block_size=16))
    policy.fails = fails
    return policy, PolicyQueue(FreeKVCacheBlockQueue([KVCacheBlock(i) for i in range(4)]), policy)


def test_a_policy_that_asks_hears_of_ends(log: list[logging.LogRecord]) -> None:
    policy, queue = curious()
    queue.finished(RequestView("r", 5), [b"a"], 3)
    assert policy.ends == [(RequestView("r", 5), [b"a"], 3)]
    queue.stop()
    assert policy.stopped == 1
    assert not log


def test_one_that_fails_at_an_end_is_retired_and_still_told_of_the_stop(
    log: list[logging.LogRecord],
) -> None:
    policy, queue = curious("on_finished")
    queue.finished(RequestView("r", 5), [b"a"], 3)
    assert queue.policy is None
    queue.finished(RequestView("r", 5), [b"a"], 3)
    queue.stop()
    assert policy.stopped == 1
    assert queue.counters.errors == len(log) == 1


def test_one_that_fails_at_the_stop_is_logged(log: list[logging.LogRecord]) -> None:
    _, queue = curious("on_stop")
    queue.stop()
    assert queue.counters.errors == len(log) == 1


@pytest.mark.parametrize("asks", [True, False])
def test_ends_are_reported_only_to_a_policy_that_asks(asks: bool) -> None:
    class Asking(Curious):
        needs = Curious.needs if asks else frozenset()

    engine = EngineView(block_size=16)
    choice = Choice(Asking, Asking.Options(), "prefix_cache")
    context: Any = SimpleNamespace(
        engine=engine, deployment=SimpleNamespace(choice=lambda kind: choice)
    )
    kind = PrefixCacheScheduler(context)
    pool = BlockPool(8, enable_caching=True, hash_block_size=16)
    kind.bind(SimpleNamespace(block_pool=pool))
    request = ended(70, 71, 4)
    kind.on_new_request(request, RequestOptions(session_id="anna"))
    kind.finished(request, [], Answer())
    assert isinstance(kind.policy, Curious)
    if not asks:
        assert kind.policy.ends == []
        return
    ((view, keys, output),) = kind.policy.ends
    assert view == RequestView("r", 68, session_id="anna", arrival=5.0)
    assert keys == request.block_hashes
    assert output == 3
    assert kind.reports()[0].acted == 1
    assert kind._views == {}, "a request that ended is forgotten"


# -- in the engine ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """A model of almost no weights that reads text as the real one does."""
    return models.tiny_llama(tmp_path_factory.mktemp("small"), tokenizer=smollm2, layers=1)


def compared(model: Path, folder: Path, *policies: str) -> dict[str, replay.Compared]:
    workload = replay.conversations(model, sessions=9, turns=3, visitors=8, seed=1)
    return {
        name: replay.compare(model, workload, name, 80, trace=folder / f"{name}.npz")
        for name in policies
    }


def as_predicted(rows: dict[str, replay.Compared]) -> None:
    for row in rows.values():
        assert row.evicted > 100, "the pool does not force evictions"
        assert row.preemptions == 0
        assert row.engine_hits * 32 == row.cached_tokens > 0.1 * row.prompt_tokens
        assert abs(row.engine_rate - row.simulated_rate) <= 0.02, row
        assert row.engine_hits == row.simulated_hits, "one at a time, not one block differs"
    assert len({row.references for row in rows.values()}) == 1
    assert rows["lru"].once_hits == rows["lru"].engine_hits, "an order that leaves no gaps"


def test_the_engine_hits_what_the_simulator_predicts(small: Path, tmp_path: Path) -> None:
    rows = compared(small, tmp_path, "lru", "fifo")
    as_predicted(rows)
    assert rows["lru"].engine_hits != rows["fifo"].engine_hits, "the workload tells them apart"

    one, two = (traces.read(tmp_path / f"{name}.npz") for name in ("lru", "fifo"))
    assert one.num_requests == 9 * 3 + 8
    assert sorted(set(one.session.tolist())) == list(range(10)), "visitors name no session"
    assert one.block_size == 32
    assert (one.output_tokens == 8).all()
    full = (one.prompt_tokens + one.output_tokens - 1) // 32
    assert (one.off[1:] - one.off[:-1]).tolist() == full.tolist()
    # What was asked is the same under both policies, whatever the cache did.
    assert two.prompt_tokens.tolist() == one.prompt_tokens.tolist()
    assert two.session.tolist() == one.session.tolist()


def test_the_file_is_there_when_the_engine_of_a_process_of_its_own_has_stopped(
    run: Callable[..., TrialResult], tiny: Path, tmp_path: Path
) -> None:
    """As `kvplug record` runs it: the policy lives in vLLM's engine process."""
    path = tmp_path / "t.npz"
    first = list(range(10, 110))
    work = [TrialRequest(first, 4, 0, {"session_id": "a"}), TrialRequest([7], 4, 1, None, 0)]
    section = {"prefix_cache": {"use": "record", "path": str(path), "every": 1}}
    engine = {"max_model_len": 256, "num_gpu_blocks_override": 20}
    done = run(tiny, work, section, watched=False, **engine)
    assert [a.cached_tokens for a in done.answers] == [0, 96]
    trace = traces.read(path)
    assert trace.off.tolist() == [0, 3, 6]
    assert trace.ids.tolist() == [0, 1, 2, 0, 1, 2]
    assert trace.prompt_tokens.tolist() == [100, 105]
    assert trace.output_tokens.tolist() == [4, 4]
    assert trace.session.tolist() == [1, 0]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_real_model_hits_what_the_simulator_predicts(smollm2: Path, tmp_path: Path) -> None:
    as_predicted(compared(smollm2, tmp_path, "lru", "s3fifo"))


def test_a_conversation_goes_on_from_what_was_answered(
    run: Callable[..., TrialResult], tiny: Path
) -> None:
    first, second = list(range(10, 60)), list(range(60, 90))
    work = [TrialRequest(first, 5, 0), TrialRequest(second, 5, 1, {"session_id": "a"}, 0)]
    work.append(TrialRequest([], 5, 2, None, 1))
    result = run(tiny, work, {"prefix_cache": "lru"}, max_model_len=256, num_gpu_blocks_override=9)
    assert [a.prompt_tokens for a in result.answers] == [50, 50 + 5 + 30, 50 + 5 + 30 + 5]
    # The last block of the second prompt is not full before the answer.
    assert [a.cached_tokens for a in result.answers] == [0, 32, 64]


def test_a_pool_too_small_is_refused(smollm2: Path) -> None:
    work = replay.Workload([TrialRequest([1], 8)], 1000, 2, "")
    with pytest.raises(replay.WorkloadError, match="give it at least 64"):
        replay.compare(smollm2, work, "lru", 63)


# -- workloads -------------------------------------------------------------------------------------


def test_conversations_are_what_they_say(smollm2: Path) -> None:
    work = replay.conversations(smollm2, sessions=5, turns=3, visitors=4, concurrency=2, seed=3)
    again = replay.conversations(smollm2, sessions=5, turns=3, visitors=4, concurrency=2, seed=3)
    assert work == again
    assert len(work.requests) == 5 * 3 + 4
    waves: dict[int, list[TrialRequest]] = {}
    for i, request in enumerate(work.requests):
        waves.setdefault(request.wave, []).append(request)
        if request.after is not None:
            before = work.requests[request.after]
            assert request.after < i
            assert before.wave < request.wave
            assert before.kvplug == request.kvplug
    assert max(len(wave) for wave in waves.values()) == 2
    named = [r.kvplug["session_id"] for r in work.requests if r.kvplug is not None]
    assert {named.count(name) for name in named} == {3}
    openings = [r.prompt for r in work.requests if r.after is None]
    assert len(openings) == 5 + 4
    shared = next(i for i, some in enumerate(zip(*openings, strict=False)) if len(set(some)) > 1)
    assert shared >= 64, "they share a system prompt"
    assert "prompts of" in work.says


def test_a_trace_becomes_prompts_with_its_structure(smollm2: Path, tmp_path: Path) -> None:
    import numpy as np

    ids = [[0, 1, 2], [0, 1, 3, 4], [5], [0, 1, 3, 4]]
    trace = traces.Trace(
        name="t",
        off=np.cumsum([0, *map(len, ids)]),
        ids=np.array([i for some in ids for i in some]),
        arrival=np.arange(4.0),
        prompt_tokens=np.array([48, 60, 10, 33]),  # the last one's fourth block was an answer
        output_tokens=np.array([1, 1, 1, 31]),
        session=np.zeros(4, dtype=np.int64),
        block_size=16,
        num_distinct=6,
    )
    work = replay.from_trace(trace, smollm2, block_size=32, longest=4096)
    prompts = [r.prompt for r in work.requests]
    assert [len(p) for p in prompts] == [3 * 32 + 1, 4 * 32 + 1, 33, 3 * 32 + 1]

    def common(a: Any, b: Any) -> int:
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))

    assert common(prompts[0], prompts[1]) // 32 == 2
    assert common(prompts[0], prompts[2]) // 32 == 0
    assert common(prompts[1], prompts[3]) // 32 == 3
    assert [r.wave for r in work.requests] == [0, 1, 2, 3]
    short = replay.from_trace(trace, smollm2, block_size=32, longest=100, requests=2, concurrency=2)
    assert [len(r.prompt) for r in short.requests] == [97, 97]
    assert [r.wave for r in short.requests] == [0, 0]
    assert short.longest == 97 + 8
