"""Stock vLLM's evictions, recorded as it runs, are kvplug's LRU's, decision for decision.

Run as a script, this file is the driver: it runs a workload in its own process and writes down
every call on the free block queue.
"""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

from kvplug.contract import EngineView, PrefixCachePolicy
from kvplug.hosts.vllm.scheduler.queue import HitCollector, PolicyQueue
from kvplug_lab.engine.trial import TrialRequest, TrialResult, TrialSpec, run_trial
from kvplug_policies.prefix_cache.fifo import Fifo
from kvplug_policies.prefix_cache.lru import Lru

BLOCK = 32
POOL = 40
FAMILIES, WAVES, PER_WAVE = 4, 22, 4
ENGINE = {
    "dtype": "float32",
    "block_size": BLOCK,
    "max_model_len": 640,
    "max_num_batched_tokens": 512,
    "num_gpu_blocks_override": POOL + 1,
}

# -- recording -------------------------------------------------------------------------------------

TAKES = ("popleft", "popleft_n")
VERBS = (*TAKES, "append", "append_n", "prepend_n", "remove")


@dataclass
class Call:
    """One call on the queue: the blocks that came or went, each with its content, if it has any."""

    verb: str
    blocks: list[tuple[int, str | None]]

    @property
    def ids(self) -> list[int]:
        return [block for block, _ in self.blocks]


@dataclass
class Recording:
    """The free blocks at the start, in order, and every call since."""

    free: list[int]
    calls: list[Call]

    @classmethod
    def read(cls, path: Path) -> Recording:
        data = json.loads(path.read_text(encoding="utf-8"))
        calls = [Call(verb, [(i, key) for i, key in blocks]) for verb, blocks in data["calls"]]
        return cls(data["free"], calls)

    def evicted(self) -> list[tuple[int, str]]:
        """Blocks handed out with content, which is lost then."""
        return [(i, key) for c in self.calls if c.verb in TAKES for i, key in c.blocks if key]


def recording(base: type[FreeKVCacheBlockQueue], calls: list[Any]) -> type[FreeKVCacheBlockQueue]:
    """A subclass of a queue that adds every call from outside to ``calls``."""
    inside = False

    def record(verb: str) -> Any:
        plain = getattr(base, verb)

        @functools.wraps(plain)
        def call(self: Any, what: Any = None) -> Any:
            nonlocal inside
            if inside:  # the queue calls itself
                return plain(self, what)
            inside = True
            try:
                result = plain(self) if verb == "popleft" else plain(self, what)
            finally:
                inside = False
            blocks = result if verb in TAKES else what
            blocks = blocks if isinstance(blocks, list) else [blocks]
            if blocks:
                keys = [b.block_hash.hex() if b.block_hash is not None else None for b in blocks]
                ids = [b.block_id for b in blocks]
                calls.append((verb, list(zip(ids, keys, strict=True))))
            return result

        return call

    return type(f"Recording{base.__name__}", (base,), {verb: record(verb) for verb in VERBS})


def main() -> None:
    """``SPEC.json RESULT.json RECORDING.json``."""
    spec, result, recorded = map(Path, sys.argv[1:4])
    calls: list[Any] = []
    free: list[int] = []

    def prepare(llm: Any) -> None:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        queue = scheduler.kv_cache_manager.block_pool.free_block_queue
        free.extend(b.block_id for b in queue.get_all_free_blocks())
        queue.__class__ = recording(type(queue), calls)

    done = run_trial(TrialSpec.from_json(spec.read_text()), lambda _: None, prepare=prepare)
    result.write_text(done.to_json(), encoding="utf-8")
    recorded.write_text(json.dumps({"free": free, "calls": calls}), encoding="utf-8")


def requests() -> list[TrialRequest]:
    """Waves of prompts of 2 to 13 blocks: a family's common start, cut anywhere, and a rest."""
    choose = random.Random(3)

    def some(n: int) -> list[int]:
        return [choose.randrange(10, 300) for _ in range(n)]

    starts = [some(10 * BLOCK) for _ in range(FAMILIES)]
    return [
        TrialRequest(
            choose.choice(starts)[: choose.randrange(BLOCK, 10 * BLOCK)]
            + some(choose.randrange(BLOCK, 3 * BLOCK)),
            choose.randrange(4, 20),
            wave,
        )
        for wave in range(WAVES)
        for _ in range(PER_WAVE)
    ]


@pytest.fixture(scope="module")
def runs(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[TrialResult, Recording]]]:
    """The workload on stock vLLM, no plugin loaded, and on ``prefix_cache: lru``."""
    folder = tmp_path_factory.mktemp("recorded")
    # Contents are told apart by hash; the seed makes hashes the same in both processes.
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONHASHSEED": "0"}
    environment.pop("TRITON_INTERPRET", None)

    def run(name: str, section: Any, **more: str) -> tuple[TrialResult, Recording]:
        spec, result, recorded = (folder / f"{name}-{n}.json" for n in ("spec", "result", "calls"))
        text = TrialSpec(str(tiny), requests(), ENGINE, section).to_json()
        spec.write_text(text, encoding="utf-8")
        with (folder / f"{name}.log").open("w") as log:
            subprocess.run(
                [sys.executable, __file__, str(spec), str(result), str(recorded)],
                env=environment | more,
                stdout=log,
                stderr=log,
                check=True,
            )
        return TrialResult.from_json(result.read_text()), Recording.read(recorded)

    return {
        "stock": run("stock", None, VLLM_PLUGINS=""),
        "lru": run("lru", {"prefix_cache": "lru"}),
    }


@pytest.fixture(scope="module")
def recorded(runs: dict[str, tuple[TrialResult, Recording]]) -> Recording:
    return runs["stock"][1]


# -- replaying -------------------------------------------------------------------------------------


@dataclass
class Replay:
    """What a `PolicyQueue` did with a recording's calls.

    Attributes:
        same: Allocations that gave the recorded blocks.
        other: Allocations that gave others; the replay ends at the first.
        queue: The queue in the end.
    """

    same: int
    other: int
    queue: PolicyQueue


def replay(recording: Recording, policy: PrefixCachePolicy) -> Replay:
    """Make the calls anew, as the pool makes them, with the contents of the recording."""
    blocks = {i: KVCacheBlock(i) for i in recording.free}
    stock = FreeKVCacheBlockQueue([blocks[i] for i in recording.free])
    queue = PolicyQueue(stock, policy)
    collector = HitCollector(queue, None)
    same = 0
    for call in recording.calls:
        if call.verb in TAKES:
            got = queue.popleft_n(len(call.ids))
            if [b.block_id for b in got] != call.ids:
                return Replay(same, 1, queue)
            same += 1
            for block, (_, key) in zip(got, call.blocks, strict=True):
                assert (block.block_hash.hex() if block.block_hash is not None else None) == key
                collector.on_block_evicted(block)
                block.reset_hash()
                collector.on_block_allocated(block)
            continue
        named = [blocks[i] for i in call.ids]
        if call.verb == "remove":
            queue.remove(named[0])
            collector.on_block_accessed(named[0])
            continue
        for block, (_, key) in zip(named, call.blocks, strict=True):
            if block.block_hash is None and key is not None:
                block.set_block_hash(bytes.fromhex(key), num_tokens=BLOCK)
        getattr(queue, call.verb)(named)
    return Replay(same, 0, queue)


VIEW = EngineView(block_size=BLOCK, num_blocks=POOL)


def build(policy: type[PrefixCachePolicy]) -> PrefixCachePolicy:
    return policy(policy.Options(), VIEW)


# -- tests -----------------------------------------------------------------------------------------


def test_the_recording_is_of_stock_and_holds_what_it_should(
    runs: dict[str, tuple[TrialResult, Recording]],
) -> None:
    result, recorded = runs["stock"]
    assert result.classes["queue"] == ["RecordingFreeKVCacheBlockQueue"]
    assert result.classes["attention"] == [
        "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl"
    ]
    assert sorted(recorded.free) == list(range(1, POOL + 1))
    verbs = Counter(call.verb for call in recorded.calls)
    assert set(verbs) == {"popleft_n", "append_n", "prepend_n", "remove"}
    assert min(verbs.values()) > 50
    assert len(recorded.evicted()) > 300
    assert sum(a.cached_tokens for a in result.answers) > 2_000


def test_lru_decides_as_stock_decided_at_every_allocation(recorded: Recording) -> None:
    ours = replay(recorded, build(Lru))
    assert ours.other == 0
    assert ours.same == sum(call.verb in TAKES for call in recorded.calls)
    counters = ours.queue.counters
    assert counters.evicted == len(recorded.evicted())
    assert counters.reordered == 0
    assert counters.errors == 0
    assert counters.hits == sum(call.verb == "remove" for call in recorded.calls)


def test_another_order_parts_from_the_recording(recorded: Recording) -> None:
    """The replay can tell: where hits make a difference, FIFO decides otherwise."""
    theirs = replay(recorded, build(Fifo))
    assert theirs.other == 1
    assert theirs.queue.counters.reordered > 0


@pytest.mark.parametrize("answers", [0, 1, 40])
def test_after_a_failure_the_decisions_are_stocks(recorded: Recording, answers: int) -> None:
    class Fails(Lru):
        left = answers

        def victims(self, n: int) -> list[int]:
            if self.left == 0:
                raise RuntimeError("no more answers")
            self.left -= 1
            return super().victims(n)

    ours = replay(recorded, build(Fails))
    assert ours.other == 0
    assert ours.queue.policy is None
    assert ours.queue.counters.errors == 1
    assert ours.queue.counters.evicted < len(recorded.evicted())


def test_the_engine_with_lru_makes_the_recorded_calls(
    runs: dict[str, tuple[TrialResult, Recording]],
) -> None:
    """Every call, every block, every content: not one differs between the two engines."""
    (stock, theirs), (lru, ours) = runs["stock"], runs["lru"]
    assert lru.classes["queue"] == ["RecordingPolicyQueue"]
    assert ours.free == theirs.free
    assert ours.evicted() == theirs.evicted()
    assert ours.calls == theirs.calls
    assert [a.token_ids for a in lru.answers] == [a.token_ids for a in stock.answers]
    assert [a.cached_tokens for a in lru.answers] == [a.cached_tokens for a in stock.answers]
    (report,) = lru.reports
    assert report["counters"]["evicted"] == len(ours.evicted())
    assert report["counters"]["reordered"] == 0
    assert report["errors"] == 0


if __name__ == "__main__":
    main()
