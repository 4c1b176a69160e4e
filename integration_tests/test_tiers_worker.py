"""Loads on a worker whose copies into pages take their time, as they do on an accelerator."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvplug.contract import EngineView, Kind, Leaving, TierPlace, TierUsage, TierView
from kvplug.counts import Causes
from kvplug.errors import DeploymentError
from kvplug.hosts.vllm.messages import ChunkLoad, StepDirectives, StepReport, TiersDirectives
from kvplug.hosts.vllm.scheduler.tiers import TiersCounters, TiersScheduler, _by_tier
from kvplug.hosts.vllm.worker.tier_copy import Transfer
from kvplug.hosts.vllm.worker.tiers import TiersWorker
from kvplug.parser import load_deployment
from kvplug.tiers.hierarchy import Hierarchy, TierBook
from kvplug.tiers.queued import ChunkRef, Fetched
from kvplug_policies.lifecycle.everything import Everything
from kvplug_policies.tiers.host import HostMemory

KEYS = tuple(bytes([n]) * 32 for n in range(4))


class Slow(Transfer):
    done = False

    def ready(self) -> bool:
        return self.done


class Copier:
    """Takes as many chunks as a test says, each time it is asked."""

    def __init__(self, *counts: int):
        self.counts, self.made = list(counts), []

    def begin_step(self) -> None:
        pass

    def begin_write(self, chunks: Any, planes: Any) -> Slow:
        assert len(chunks) == len(planes)
        transfer = Slow(min(self.counts.pop(0) if self.counts else 0, len(chunks)))
        if transfer.count:
            self.made.append(transfer)
        return transfer


class Line:
    """A tier's queues: what is held there, and what was read."""

    waiting = 0

    def __init__(self) -> None:
        self.held, self.read = 0, []

    def fetch(self, chunks: Any, token: int, wanted: Any) -> None:
        self.token, self.chunks = token, chunks

    def answer(self, first: int, last: int, failed: str = "") -> None:
        chunks: list[ChunkRef] = self.chunks[first:last]
        planes: list[Any] = [None if failed else {"key": torch.zeros(1)} for _ in chunks]
        causes = dict.fromkeys([one.key for one in chunks], failed) if failed else {}
        held = 0 if failed else 100 * len(chunks)
        self.held += held
        self.read.append(Fetched("host", self.token, chunks, planes, causes, held=held))

    def outcomes(self) -> list[Fetched]:
        found, self.read = self.read, []
        return found

    def taken(self, fetched: Fetched) -> None:
        self.held -= fetched.held


def worker(copier: Copier) -> tuple[TiersWorker, Line]:
    deployment = load_deployment({"tiers": [{"host": {"size": "8MiB"}}]})
    made, line = TiersWorker(deployment, None, ("test", "tiers")), Line()
    made._copier, made._chunk, made.tiers = copier, 16, {"host": line}  # type: ignore[assignment]
    blocks = np.arange(len(KEYS), dtype=np.int64)
    load = ChunkLoad("r", 1, 0, KEYS, ("host",) * len(KEYS), blocks, 60.0)
    made.begin(StepDirectives(tiers=TiersDirectives(loads=[load])))
    return made, line


def step(made: TiersWorker, generation: int = 0) -> dict[int, str]:
    """A step; causes of loads that failed in it, empty for those that were made."""
    made.begin(StepDirectives(tiers=TiersDirectives(generation=generation)))
    report = StepReport()
    made.report(report)
    found = report.tiers
    return {} if found is None else {**dict.fromkeys(found.loaded, ""), **found.unloaded}


def test_what_waits_for_staging_memory_is_held_until_it_was_written() -> None:
    """Nothing is taken at first, then a part, then the rest: a reader may go on after that."""
    copier = Copier(0, 3, 0, 1)
    made, line = worker(copier)
    line.answer(0, 4)
    assert step(made) == {} and line.held == 400
    for _ in range(3):
        step(made)
    assert sum(one.count for one in copier.made) == 4
    for one in copier.made:
        one.done = True
    assert step(made) == {1: ""}
    assert line.held == 0


@pytest.mark.parametrize("how", ["a reset", "a part that is not there"])
def test_a_load_ends_once_nothing_is_on_its_way_into_its_blocks(how: str) -> None:
    """vLLM gives the blocks to others as soon as it is told."""
    copier = Copier(2)
    made, line = worker(copier)
    line.answer(0, 2)
    step(made)
    cause = "reset"
    if how != "a reset":
        cause = "not there"
        line.answer(2, 4, cause)
    generation = int(how == "a reset")
    assert step(made, generation) == {} and made.received() == (set(), set())
    copier.made[0].done = True
    assert step(made, generation) == {1: cause}
    assert made.received() == ({"r"}, {"r"})
    assert line.held == 0


def unspeakable(*_: Any) -> Any:
    raise SystemExit("no words")


@pytest.mark.parametrize("answer", [unspeakable, lambda *_: None])
def test_a_tier_that_cannot_be_described_is_refused_by_name(
    answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = load_deployment({"tiers": [{"host": {"size": "8MiB"}}]})
    (one,) = deployment.tiers
    monkeypatch.setattr(HostMemory, "described", answer)
    made = TiersWorker(deployment, None, ("test", "tiers"))
    with pytest.raises(DeploymentError) as refused:
        made._open(one, EngineView(16), TierPlace("0" * 64, 0, 1))
    (refusal,) = refused.value.refusals
    assert refusal.key == one.tier.key and "host" in refusal.problem


@pytest.mark.parametrize("capacity", [-1, float("inf"), "8MiB", None])
def test_a_tier_of_no_size_is_refused_by_name(
    capacity: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = load_deployment({"tiers": [{"host": {"size": "8MiB"}}]})
    (one,) = deployment.tiers
    monkeypatch.setattr(HostMemory, "usage", lambda _: TierUsage(0, 0, capacity))
    context = SimpleNamespace(deployment=deployment, engine=EngineView(16))
    scheduler: Any = SimpleNamespace(context=context, chunk_bytes=100)
    with pytest.raises(DeploymentError) as refused:
        TiersScheduler._book(scheduler, one, one.tier.build(EngineView(16)))
    (refusal,) = refused.value.refusals
    assert refusal.key == one.tier.key and "host" in refusal.problem


def test_counters_are_those_of_the_tier_that_they_name_in_full() -> None:
    books = {"host_chunks": 1.0, "host_2_chunks": 2.0, "host_2_useful": 3.0, "asked": 4.0}
    found, rest = _by_tier(books, ["host", "host_2"])
    assert found == {"host": {"chunks": 1.0}, "host_2": {"chunks": 2.0, "useful": 3.0}}
    assert rest == {"asked": 4.0}


def reported(lifecycle: Any) -> Any:
    """The report of a lifecycle policy over one tier."""
    deployment = load_deployment({"tiers": [{"host": {"size": "1MiB"}}]})
    (one,) = deployment.tiers
    order: Any = one.order.build(EngineView(16))
    books = Hierarchy([TierBook("host", 1 << 20, True, False, False, order)], lifecycle)
    key = bytes(32)
    books.leaving([Leaving(key, 0, 16)], 100)
    books.put("host", key, 100)
    books.plan(0, TierView("pool"))
    kind: Any = SimpleNamespace(
        context=SimpleNamespace(deployment=deployment),
        hierarchy=books,
        counters=TiersCounters(),
        errors=0,
        refused=Causes(),
        kind=Kind.TIERS,
        lifecycle=lifecycle,
    )
    return TiersScheduler.reports(kind)[-1]


class Counting(Everything):
    """Counts what it was asked, and more."""

    name = "counting"

    def counters(self) -> dict[str, float]:
        return {"asked": 7.0, "a:b\n": 1, "none": float("nan"), "below": -1.0}


class Failing(Counting):
    def plan(self, pressure: Any) -> Any:
        raise SystemExit


def test_a_lifecycle_policy_reports_what_it_counts_until_it_is_retired() -> None:
    report = reported(Counting(Counting.Options(), EngineView(16)))
    assert report.own == {"asked": 7.0, "a b": 1.0} and not report.retired
    assert report.counters["asked"] == 7.0 and "declined" not in report.own
    report = reported(Failing(Failing.Options(), EngineView(16)))
    assert report.own == {} and report.retired and report.errors == 1
