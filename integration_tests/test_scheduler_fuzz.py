"""Whatever requests come, are aborted and preempted, and whatever loads fail: nothing is answered,
stored or put into the prefix cache that is not what it is called."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scheduler_fuzz import MODES, SchedulerFuzz
from simulated_worker import Violation

from kvplug.hosts.vllm.scheduler import tiers
from kvplug.hosts.vllm.scheduler.reuse import ReuseScheduler
from kvplug.hosts.vllm.scheduler.reuse_requests import ReusingRequest
from kvplug.hosts.vllm.scheduler.tiers import TiersScheduler
from kvplug.hosts.vllm.scheduler.tiers_requests import TieredRequest
from kvplug.hosts.vllm.spec import ApproximateManager, ShorteningManager

SCHEDULERS = pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "a step ahead"])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@SCHEDULERS
@pytest.mark.parametrize("mode", MODES)
def test_hundreds_of_things(mode: str, ahead: bool, tiny: Path) -> None:
    counts: Counter[str] = Counter()
    for seed in range(2):
        fuzz = SchedulerFuzz(mode, seed, ahead, tiny, failures=0.5)
        fuzz.run(500 if "reuse" in mode or "tiers" in mode else 200)
        counts += fuzz.worker.counts
    assert counts["ended"] > 20
    if "reuse" in mode:
        assert counts["failed loads"] and counts["saved exact"]
    if "tiers" in mode:
        assert counts["failed chunk loads"] and counts["chunk loads"] and counts["chunks stored"]


def test_a_request_is_preempted_in_the_step_that_scheduled_it(tiny: Path) -> None:
    """By priority: its last block is hashed, has a slot that nobody fills, and leaves the pool."""
    SchedulerFuzz("tiers that round", 0, False, tiny, failures=0.3).run(400)


@pytest.mark.slow
@SCHEDULERS
@pytest.mark.parametrize("seed", range(100))
def test_six_thousand_things(seed: int, ahead: bool, tiny: Path) -> None:
    SchedulerFuzz([*MODES][seed % len(MODES)], seed, ahead, tiny).run(6000)


def _hashed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ApproximateManager, "hold", lambda *_: None)


def _never_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReuseScheduler, "awaits_loads", property(lambda _: False, lambda *_: None))


def _called_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReusingRequest, "describe", lambda *_: None)


def _approximate_blocks_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ApproximateManager, "set_approximate", lambda *_: None)


def _every_block_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = ShorteningManager.__mro__[1]
    monkeypatch.setattr(ShorteningManager, "cache_blocks", stock.cache_blocks)


def _loads_called_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TieredRequest, "describe", lambda *_: None)


def _tenants_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "tenant_of", lambda _: "")


def _stored_once_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    store = TiersScheduler._store
    before: dict[int, list[Any]] = {}

    def late(self: TiersScheduler) -> list[Any]:
        orders, before[id(self)] = before.get(id(self), []), store(self)
        return orders

    monkeypatch.setattr(TiersScheduler, "_store", late)


def _ended_requests_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    finished = ReuseScheduler.finished

    def keep(self: ReuseScheduler, request: Any, *given: Any) -> None:
        finished(self, request, *given)
        self.__dict__.setdefault("kept", set()).add(request.request_id)

    monkeypatch.setattr(ReuseScheduler, "finished", keep)


FAULTS: list[tuple[str, bool, Callable[[pytest.MonkeyPatch], None]]] = [
    ("reuse", False, _hashed_at_once),
    ("reuse", True, _never_waited_for),
    ("reuse", False, _called_exact),
    ("reuse", True, _called_exact),
    ("reuse", False, _approximate_blocks_hashed),
    ("windowed", True, _every_block_hashed),
    ("scoring", False, _every_block_hashed),
    ("reuse", True, _ended_requests_kept),
    ("tiers that round", False, _loads_called_exact),
    ("tiers that round", True, _approximate_blocks_hashed),
    ("tiers", False, _tenants_share),
    ("tiers", True, _stored_once_overwritten),
]


@pytest.mark.parametrize(
    ("mode", "ahead", "plant"),
    FAULTS,
    ids=[f"{plant.__name__[1:]}-{mode}-{ahead}" for mode, ahead, plant in FAULTS],
)
def test_a_fault_is_found(
    mode: str,
    ahead: bool,
    plant: Callable[[pytest.MonkeyPatch], None],
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    with pytest.raises(Violation):
        for seed in range(5):
            SchedulerFuzz(mode, seed, ahead, tiny, failures=0.5).run(600)
