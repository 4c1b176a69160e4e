from __future__ import annotations

import logging
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from kvplug.contract import BlockFact, Feature, PrefixCachePolicy, RequestView
from kvplug.registry import plugins
from kvplug.testing.prefix_cache import ENGINE, Blocks, build, life
from kvplug_policies.prefix_cache import record as module
from kvplug_policies.prefix_cache.fifo import Fifo
from kvplug_policies.prefix_cache.lru import Lru
from kvplug_policies.prefix_cache.record import Record


@pytest.fixture
def log() -> Iterator[list[logging.LogRecord]]:
    """Problems in the policy's log, whatever level vLLM gave its loggers."""
    found: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = found.append  # type: ignore[method-assign]
    module.logger.addHandler(handler)
    yield found
    module.logger.removeHandler(handler)


def record(path: Path, **options: object) -> Record:
    policy = build(Record, path=str(path), **options)
    assert isinstance(policy, Record)
    return policy


def request(n: int, session: str | None = None, prompt: int = 40) -> RequestView:
    return RequestView(str(n), prompt, session_id=session, arrival=1_700_000_000.0 + n)


def keys(*names: str) -> list[bytes]:
    """One key a block; equal names, equal content."""
    return [f"a secret {name} of thirty-two bytes or so".encode() for name in names]


def load(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def requests(trace: dict[str, Any]) -> list[list[int]]:
    off, ids = trace["off"].tolist(), trace["ids"].tolist()
    return [ids[a:b] for a, b in pairwise(off)]


# -- who decides -----------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [Lru, Fifo])
@pytest.mark.parametrize("seed", range(3))
def test_the_policy_inside_decides(
    tmp_path: Path, inner: type[PrefixCachePolicy], seed: int
) -> None:
    ours, theirs = Blocks(record(tmp_path / "t.npz", of=inner.name)), Blocks(build(inner))
    for _ in zip(life(ours, 500, seed), life(theirs, 500, seed), strict=True):
        n = len(theirs.candidates)
        assert ours.candidates == theirs.candidates
        assert list(ours.policy.victims(n)) == list(theirs.policy.victims(n))


class Curious(Lru):
    """Asks for every fact, and reports what it received."""

    name = "curious"
    needs = frozenset(BlockFact)

    class Options(Lru.Options):
        size: int = 3

    def __init__(self, options: Any, engine: Any):
        super().__init__(options, engine)
        self.ends: list[tuple[str, int]] = []
        self.stopped = 0

    def on_finished(self, request: Any, keys: Any, num_output_tokens: int) -> None:
        self.ends.append((request.request_id, len(keys)))

    def on_stop(self) -> None:
        self.stopped += 1

    def counters(self) -> dict[str, float]:
        return {"ends": len(self.ends)}


@pytest.fixture
def curious(monkeypatch: pytest.MonkeyPatch) -> None:
    held = plugins().registry._policies
    monkeypatch.setitem(held, (Curious.kind, Curious.name), Curious)


def test_what_the_policy_inside_asks_for_is_asked_for(tmp_path: Path, curious: None) -> None:
    policy = record(tmp_path / "t.npz", of={"use": "curious", "size": 9})
    assert Record.needs == record(tmp_path / "t.npz").needs == {BlockFact.FINISHED}
    assert policy.needs == frozenset(BlockFact)
    inner = policy.inner
    assert isinstance(inner, Curious)
    assert inner.options.model_dump() == {"size": 9}
    policy.on_finished(request(1), keys("a", "b"), 2)
    policy.on_stop()
    assert inner.ends == [("1", 2)]
    assert inner.stopped == 1
    assert policy.counters()["ends"] == 1


def test_one_that_does_not_ask_is_not_told(tmp_path: Path, curious: None) -> None:
    policy = record(tmp_path / "t.npz", of="curious")
    policy.inner.needs = frozenset()
    policy._asks_inner = False
    policy.on_finished(request(1), keys("a"), 2)
    assert policy.inner.ends == []  # type: ignore[attr-defined]


# -- the file --------------------------------------------------------------------------------------


def test_the_arrays(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    policy = record(path)
    policy.on_finished(request(1, "anna", prompt=33), keys("a", "ab"), 7)
    policy.on_finished(request(4, None, prompt=5), [], 1)
    policy.on_finished(request(3, "bert", prompt=50), keys("a", "ac", "acd"), 9)
    policy.on_finished(request(5, "anna", prompt=60), keys("a", "ab", "abe"), 8)
    assert not path.exists()
    policy.on_stop()
    trace = load(path)
    # In order of arrival; ids are numbered as requests ended.
    assert requests(trace) == [[0, 1], [0, 2, 3], [], [0, 1, 4]]
    assert trace["t"].tolist() == [0.0, 2.0, 3.0, 4.0]
    assert trace["inp"].tolist() == [33, 50, 5, 60]
    assert trace["outp"].tolist() == [7, 9, 1, 8]
    assert trace["sess"].tolist() == [1, 2, 0, 1]
    assert int(trace["bs"]) == ENGINE.block_size
    assert int(trace["nblk"]) == 5
    dtypes = {name: array.dtype.str for name, array in trace.items()}
    assert dtypes == {
        "off": "<i8",
        "ids": "<i4",
        "t": "<f8",
        "inp": "<i8",
        "outp": "<i8",
        "sess": "<i4",
        "bs": "<i8",
        "nblk": "<i8",
    }
    assert policy.counters() == {
        "recorded_requests": 4,
        "recorded_blocks": 8,
        "distinct_blocks": 5,
        "skipped_requests": 0,
        "trace_writes": 1,
        "failed_writes": 0,
    }


def test_the_simulator_reads_it(tmp_path: Path) -> None:
    traces = pytest.importorskip("kvplug.hosts.trace.traces")
    policy = record(tmp_path / "t.npz")
    for n in range(20):
        policy.on_finished(request(n, f"s{n % 3}"), keys("system", f"doc {n % 3}", f"q {n}"), 4)
    policy.on_stop()
    trace = traces.read(tmp_path / "t.npz")
    assert trace.num_requests == 20
    assert trace.num_distinct == 1 + 3 + 20
    assert trace.names_sessions


def test_nothing_that_a_user_said_is_in_the_file(tmp_path: Path) -> None:
    """Two runs over the same traffic write the same bytes: no key of either run is in them."""
    files = []
    for run in ("one", "two"):
        policy = record(tmp_path / f"{run}.npz")
        policy.on_finished(request(1, "a secret session"), keys("a", "b"), 7)
        policy.on_stop()
        files.append(load(tmp_path / f"{run}.npz"))
        content = (tmp_path / f"{run}.npz").read_bytes()
        assert b"secret" not in content
        assert np.float64(request(1).arrival).tobytes() not in content
    one, two = files
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_what_stays_in_memory_is_hashed_under_a_key_of_its_own(tmp_path: Path) -> None:
    one, two = (record(tmp_path / "t.npz") for _ in range(2))
    for policy in (one, two):
        policy.on_finished(request(1, "a secret session"), keys("a", "b"), 7)
    held = [set(p._trace._number) | set(p._trace._sessions) for p in (one, two)]
    assert len(held[0]) == len(held[1]) == 3
    assert not held[0] & held[1]
    assert not any(b"secret" in digest for digest in held[0] | held[1])


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def test_it_is_written_while_requests_end_and_is_always_whole(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    policy = record(path)
    policy._writer._pause = policy._writer._every = 0.001
    for n in range(3000):
        policy.on_finished(request(n), keys("a", f"{n // 2}"), 1)
        if n % 500 == 499:
            # On a busy machine a writer may come to its turn once in all of this.
            eventually(lambda n=n: policy.counters()["trace_writes"] > n // 1500)  # type: ignore[misc]
            trace = load(path)
            requests_so_far = requests(trace)
            assert len(requests_so_far) == len(trace["t"])
            assert requests_so_far == [[0, r // 2 + 1] for r in range(len(trace["t"]))]
            assert int(trace["nblk"]) == max(trace["ids"]) + 1
    eventually(lambda: len(load(path)["t"]) == 3000)
    assert policy.counters()["trace_writes"] > 1
    policy.on_stop()
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"], "nothing is left beside it"


def test_nothing_new_nothing_written(tmp_path: Path) -> None:
    policy = record(tmp_path / "t.npz")
    policy.on_finished(request(1), keys("a"), 1)
    policy._writer._write()
    policy._writer._write()
    policy.on_stop()
    assert policy.counters()["trace_writes"] == 1


def test_the_engine_does_not_wait_for_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, gate = threading.Event(), threading.Event()
    policy = record(tmp_path / "t.npz")
    policy._writer._pause = policy._writer._every = 0.001
    plain = policy._writer._replace

    def slow(arrays: Any) -> None:
        begun.set()
        assert gate.wait(300)
        plain(arrays)

    monkeypatch.setattr(policy._writer, "_replace", slow)
    policy.on_finished(request(0), keys("a"), 1)
    assert begun.wait(300)
    for n in range(1, 50):
        policy.on_finished(request(n), keys(str(n)), 1)
    assert policy.counters()["trace_writes"] == 0
    gate.set()
    policy.on_stop()
    assert len(load(tmp_path / "t.npz")["t"]) == 50


def test_a_snapshot_taken_between_two_steps_of_an_addition_is_whole(tmp_path: Path) -> None:
    policy = record(tmp_path / "t.npz")
    policy.on_finished(request(1), keys("a", "b"), 1)
    trace = policy._trace
    trace.ids.extend([7, 8, 9])
    trace._arrival.append(5.0)
    policy.on_stop()
    written = load(tmp_path / "t.npz")
    assert requests(written) == [[0, 1]]
    assert written["t"].tolist() == [0.0]
    assert int(written["nblk"]) == 2


def test_a_file_that_exists_is_kept(tmp_path: Path, log: list[logging.LogRecord]) -> None:
    path = tmp_path / "t.npz"
    path.write_bytes(b"of an earlier run")
    for expected in ("t-1.npz", "t-2.npz"):
        policy = record(path)
        policy.on_finished(request(1), keys("a"), 1)
        policy.on_stop()
        assert len(load(tmp_path / expected)["t"]) == 1
    assert path.read_bytes() == b"of an earlier run"


def test_the_file_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    policy = record(tmp_path / "t.npz")
    policy.on_finished(request(1), keys("a"), 1)
    policy.on_stop()
    assert (tmp_path / "t.npz").stat().st_mode == plain.stat().st_mode


def test_no_request_no_file(tmp_path: Path) -> None:
    record(tmp_path / "t.npz").on_stop()
    assert not list(tmp_path.iterdir())


# -- what goes wrong -------------------------------------------------------------------------------


def test_a_file_that_cannot_be_written_is_counted_and_said_once(
    tmp_path: Path, log: list[logging.LogRecord]
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    policy = record(folder / "t.npz")
    folder.rmdir()
    policy._writer._pause = policy._writer._every = 0.001
    for n in range(5):
        policy.on_finished(request(n), keys(str(n)), 1)
    eventually(lambda: policy.counters()["failed_writes"] > 3)
    assert [r.levelname for r in log] == ["ERROR"]
    assert "t.npz" in log[0].getMessage()
    folder.mkdir()
    policy.on_stop()
    assert len(load(folder / "t.npz")["t"]) == 5, "it is tried again"


def test_a_write_that_fails_half_way_leaves_the_last_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.npz"
    policy = record(path)
    policy.on_finished(request(1), keys("a"), 1)
    policy._writer._write()

    def full(file: Any, **arrays: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.np, "savez", full)
    policy.on_finished(request(2), keys("b"), 1)
    policy.on_stop()
    assert policy.counters()["failed_writes"] == 1
    assert len(load(path)["t"]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]


def test_a_request_that_cannot_be_recorded_costs_nothing_else(
    tmp_path: Path, log: list[logging.LogRecord]
) -> None:
    policy = record(tmp_path / "t.npz")
    policy.on_finished(request(1), keys("a"), 1)
    policy.on_finished(request(2), [b"new", "no bytes"], 1)  # type: ignore[list-item]
    policy.on_finished(RequestView("3", 5, arrival=None), keys("new"), 1)  # type: ignore[arg-type]
    policy.on_finished(request(4), keys("a", "b"), 1)
    policy.on_stop()
    trace = load(tmp_path / "t.npz")
    assert requests(trace) == [[0], [0, 1]]
    assert int(trace["nblk"]) == 2
    assert policy.counters()["skipped_requests"] == 2
    assert [r.levelname for r in log] == ["ERROR"], "logged once"


def test_memory_is_bounded_and_the_trace_has_no_holes(
    tmp_path: Path, log: list[logging.LogRecord]
) -> None:
    policy = record(tmp_path / "t.npz", memory=1)
    n = 0
    while not policy.counters()["skipped_requests"]:
        policy.on_finished(request(n), keys(*(f"{n} {i}" for i in range(50))), 1)
        n += 1
    recorded = int(policy.counters()["recorded_requests"])
    assert recorded == n - 1 == (1 << 20) // (36 + 204 * 50)
    assert policy._trace.size() <= 1 << 20
    policy.on_finished(request(n), [], 1)
    policy.on_finished(request(n + 1), keys("0 0"), 1)
    assert policy.counters()["recorded_requests"] == recorded, "not even one that would fit"
    assert policy.counters()["skipped_requests"] == 3
    assert [r.levelname for r in log] == ["WARNING"]
    policy.on_stop()
    assert len(load(tmp_path / "t.npz")["t"]) == recorded


def test_the_memory_it_states_is_the_memory_it_takes(tmp_path: Path) -> None:
    policy = record(tmp_path / "t.npz")
    names = [[f"{n} {i}".encode() for i in range(40)] for n in range(1000)]
    tracemalloc.start()
    for n, some in enumerate(names):
        policy.on_finished(RequestView("r", 5), some, 1)
        policy.on_finished(RequestView("r", 5), some[: n % 40], 1)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.5 < taken / policy._trace.size() < 1.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "/nowhere/at/all/t.npz"}, "the folder /nowhere/at/all does not exist"),
        ({"path": "/proc/t.npz"}, "path /proc/t.npz: the folder cannot be written to"),
        ({"of": "lruu"}, "of: there is no policy 'lruu'; use lru"),
        ({"of": "record"}, "of: record cannot wrap itself; use "),
        ({"of": {"use": "record"}}, "of: record cannot wrap itself; use "),
        ({"of": {"size": 1}}, "of does not name a policy"),
        ({"of": {"use": "lru", "size": 1}}, "of.size: Extra inputs are not permitted (lru)"),
    ],
)
def test_refused_at_start(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        build(Record, **options)
    assert message in str(refused.value)
    assert not isinstance(refused.value, ValidationError)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "t.npz").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        record(tmp_path / "t.npz")


@pytest.mark.parametrize("options", [{"path": "t.json"}, {"every": 0}, {"memory": 0}, {"to": "x"}])
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Record.Options.model_validate(options)


def test_what_the_policy_inside_cannot_live_with_is_refused(
    tmp_path: Path, curious: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Curious, "supports", frozenset({Feature.LORA}))
    with pytest.raises(ValueError, match="curious does not support prefix caching"):
        record(tmp_path / "t.npz", of="curious")
