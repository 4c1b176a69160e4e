"""The benchmark at scale, at a small one: that it measures what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvplug.contract import BlockFact, Kind, Released
from kvplug.registry import plugins
from kvplug_lab.engine.scale import KEY_BYTES, REQUEST, measure, measure_named

BLOCKS, OPERATIONS = 320, 6400


class Counted:
    """A FIFO that counts the blocks it is told of, and checks that they can be so."""

    def __init__(self) -> None:
        self.released: list[Released] = []
        self.queue: list[int] = []
        self.told = {"release": 0, "hit": 0, "evict": 0}

    def release(self, released: Released) -> None:
        assert not set(released.ids) & set(self.queue)
        self.told["release"] += len(released.ids)
        self.released.append(released)
        self.queue += released.ids

    def hit(self, ids: Sequence[int]) -> None:
        assert set(ids) <= set(self.queue) and len(set(ids)) == len(ids)
        self.told["hit"] += len(ids)
        self.queue = [b for b in self.queue if b not in ids]

    def evict(self, n: int) -> Sequence[int]:
        self.told["evict"] += n
        gone, self.queue = self.queue[:n], self.queue[n:]
        return gone


def test_the_load_is_what_it_says() -> None:
    cache = Counted()
    found = measure(lambda: cache, frozenset(BlockFact), BLOCKS, OPERATIONS)
    assert found["operations"] == sum(cache.told.values()) == OPERATIONS
    assert cache.told["release"] == BLOCKS + cache.told["hit"] + cache.told["evict"]
    assert min(cache.told.values()) > 1000
    assert len(cache.queue) == BLOCKS
    for released in cache.released:
        assert len(released.ids) == REQUEST
        assert released.positions == list(range(REQUEST - 1, -1, -1))
        assert released.keys is not None and len(released.keys[0]) == KEY_BYTES
        assert released.parents == [*released.ids[1:], -1]
        assert released.request is not None and released.request.session_id is not None
    fresh = [k for r in cache.released for k in r.keys or ()]
    assert len(set(fresh)) == BLOCKS + cache.told["evict"], "evicted slots get new content"


def test_facts_that_were_not_asked_for_are_not_made() -> None:
    cache = Counted()
    measure(lambda: cache, frozenset(), BLOCKS, OPERATIONS)
    assert all(r == Released(r.ids) for r in cache.released)


@pytest.mark.parametrize(
    "name", [n for n in plugins().registry.names(Kind.PREFIX_CACHE) if n != "record"]
)
def test_every_policy_can_be_measured(name: str) -> None:
    found = measure_named(name, BLOCKS, OPERATIONS)
    assert found["operations"] == OPERATIONS and found["operations_per_second"] > 0


def test_each_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "scale.json"
    command = [sys.executable, "-m", "kvplug_lab.engine.scale", "--policy", "lru,none"]
    command += ["--blocks", "640", "--operations", "6400", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text("utf-8"))
    assert found["blocks"] == 640
    assert list(found["policies"]) == ["vLLM's queue", "lru", "none"]
    assert set(found["policies"]["lru"]) == {
        "operations",
        "seconds",
        "operations_per_second",
        "bytes_per_block",
    }
    assert isinstance(found["policies"]["none"], str), "what fails is said, and the rest goes on"
    assert "lru" in done.stdout and "not measured" in done.stdout
