"""What a policy raises, says or never returns, and what reaches its caller."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from kvplug import containment
from kvplug.containment import Contained, ContainedPolicy, PolicyFailure
from kvplug.contract import EngineView, PolicyOptions, PrefixCachePolicy
from kvplug.plain_text import CAUSE
from kvplug_policies.prefix_cache.lru import Lru

ENGINE = EngineView(block_size=16, num_blocks=4)
SOON = 0.1


@pytest.fixture(autouse=True)
def _quick_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containment, "TICK", 0.02)


def raising(error: BaseException) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise SystemExit(1)


class Echo(Exception):
    def __str__(self) -> str:
        raise Echo


class Classless(Exception):
    @property
    def __class__(self) -> Any:
        raise RuntimeError("no class")


class Endless(Exception):
    def __str__(self) -> str:
        while True:
            pass


class NamelessMeta(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise RuntimeError("no name")


class Nameless(Exception, metaclass=NamelessMeta):
    @property
    def __traceback__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no trace")


class Shouting(str):
    def __str__(self) -> str:
        raise RuntimeError("not me")

    def __len__(self) -> int:
        return -1

    def __getitem__(self, at: Any) -> str:
        raise RuntimeError("not me")


class Loud(Exception):
    def __str__(self) -> str:
        return Shouting("loud")


def recursing() -> Any:
    return recursing()


def thrown() -> Any:
    return (_ for _ in ()).throw(KeyboardInterrupt)


FAILURES: dict[str, tuple[Callable[[], Any], str]] = {
    "exception": (raising(RuntimeError("no")), "RuntimeError: no"),
    "exit": (lambda: sys.exit(3), "SystemExit: 3"),
    "interrupt": (raising(KeyboardInterrupt()), "KeyboardInterrupt"),
    "interrupt, thrown": (thrown, "KeyboardInterrupt"),
    "cancelled": (raising(asyncio.CancelledError()), "CancelledError"),
    "generator exit": (raising(GeneratorExit()), "GeneratorExit"),
    "stop": (lambda: next(iter(())), "StopIteration"),
    "memory": (lambda: bytearray(1 << 62), "MemoryError"),
    "recursion": (recursing, "RecursionError: maximum recursion depth exceeded"),
    "text that raises": (raising(Unspeakable()), "Unspeakable: (its text cannot be read)"),
    "text that raises its like": (raising(Echo()), "Echo: (its text cannot be read)"),
    "no class": (raising(Classless("x")), "Classless: x"),
    "text without end": (raising(Endless()), "Endless: (its text cannot be read)"),
    "no name": (raising(Nameless("x")), "Nameless: x"),
    "text of its own class": (raising(Loud()), "Loud: loud"),
    "forged lines": (
        raising(RuntimeError("a\nERROR 01-01 b\r\x1b[2J\u2028c\ud800\u202ed")),
        "RuntimeError: a ERROR 01-01 b [2J c d",
    ),
    "endless loop": (lambda: [None for _ in iter(int, 1)], "no answer within 0.1 s"),
    "wait": (lambda: threading.Event().wait(), "no answer within 0.1 s"),
    "sleep": (lambda: time.sleep(600), "no answer within 0.1 s"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_whatever_is_raised_is_a_failure_of_one_line(what: str) -> None:
    function, cause = FAILURES[what]
    contained = Contained(None, SOON)
    with pytest.raises(PolicyFailure) as caught:
        contained.run(function)
    assert caught.value.cause == str(caught.value) == cause
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    assert contained.run(lambda: 7) == 7, "the next call is as good as ever"


def test_a_text_of_megabytes_is_cut() -> None:
    with pytest.raises(PolicyFailure) as caught:
        Contained(None).run(raising(RuntimeError("x" * 10_000_000)))
    assert len(caught.value.cause) == len("RuntimeError: ") + CAUSE
    assert len(caught.value.where) < 2000


def test_a_failure_says_where_it_was_raised() -> None:
    with pytest.raises(PolicyFailure) as caught:
        Contained(None).run(FAILURES["exception"][0])
    assert caught.value.where.startswith(f"{__file__}:") and " in fail" in caught.value.where


def test_the_problem_of_a_value_error_is_its_message() -> None:
    """It is how a policy refuses its options; the user reads it."""
    for error, problem in ((ValueError("too few"), "too few"), (KeyError("a"), "KeyError: 'a'")):
        with pytest.raises(PolicyFailure) as caught:
            Contained(None).run(raising(error))
        assert caught.value.problem == problem


def test_a_method_that_cannot_be_looked_up_is_a_failure() -> None:
    class Odd:
        @property
        def victims(self) -> Any:
            raise SystemExit

    contained = Contained(Odd())
    with pytest.raises(PolicyFailure, match="SystemExit"):
        contained.call("victims", 1)
    with pytest.raises(PolicyFailure, match="AttributeError"):
        contained.call("nothing")


# -- deadlines -------------------------------------------------------------------------------------


def loop() -> None:
    while True:
        pass


def swallowing() -> int:
    try:
        loop()
    except BaseException:
        return 5
    return 6


def test_an_answer_after_the_deadline_is_none() -> None:
    with pytest.raises(PolicyFailure, match="no answer within"):
        Contained(None, SOON).run(swallowing)


def test_a_loop_that_goes_on_after_an_interruption_is_interrupted_again() -> None:
    def stubborn() -> None:
        for _ in range(3):
            swallowing()

    with pytest.raises(PolicyFailure, match="no answer within"):
        Contained(None, SOON).run(stubborn)


def test_a_loop_in_another_thread_is_interrupted() -> None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            Contained(None, SOON).run(loop)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert [str(error) for error in caught] == ["no answer within 0.1 s"]


def test_who_does_not_answer_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "kvplug"), pytest.raises(PolicyFailure):
        Contained(None, SOON, "kvplug plugin 'slow'").run(loop)
    deadline = time.monotonic() + 60
    while not caplog.records and time.monotonic() < deadline:
        time.sleep(0.01)
    (record,) = caplog.records
    assert record.getMessage() == (
        "kvplug plugin 'slow' has not answered for 0.1 s and is interrupted"
    )


@pytest.mark.parametrize("main", [True, False])
def test_calls_that_end_as_they_are_interrupted_leave_nothing_behind(
    main: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interruption is on its way while the call returns."""
    monkeypatch.setattr(containment, "TICK", 0.0005)
    outcomes: list[str] = []

    def run() -> None:
        draw = random.Random(0)
        contained = Contained(None, 0.001)

        def until_overdue(more: int) -> None:
            while not contained.overdue:
                pass
            for _ in range(more):
                pass

        for _ in range(60):
            with pytest.raises(PolicyFailure, match="no answer within"):
                contained.run(until_overdue, draw.choice([0, 0, 1, 10, 100]))
            assert not contained.running and not contained.overdue
            sum(range(100))
        outcomes.append("end")

    if main:
        run()
    else:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert outcomes == ["end"]


# -- signals ---------------------------------------------------------------------------------------


def own_handler(number: int, frame: FrameType | None) -> None:
    raise SystemExit("stopped by a signal")


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "handler", "raised"),
    [
        (signal.SIGINT, signal.default_int_handler, KeyboardInterrupt),
        (signal.SIGTERM, own_handler, SystemExit),
    ],
)
@pytest.mark.parametrize("busy", [True, False])
@pytest.mark.usefixtures("handlers")
def test_a_real_signal_passes(
    number: signal.Signals, handler: Any, raised: type[BaseException], busy: bool
) -> None:
    signal.signal(number, handler)
    contained = Contained(None, 60)
    threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
    with pytest.raises(raised):
        contained.run(loop if busy else lambda: time.sleep(30))
    assert contained.run(lambda: 1) == 1


# -- counters --------------------------------------------------------------------------------------


def counting(counters: Callable[[], Any]) -> ContainedPolicy:
    class Counting(Lru):
        name = "counting"

        def counters(self) -> Any:
            return counters()

    return ContainedPolicy(Counting(Lru.Options(), ENGINE))


class Growing(dict[str, float]):
    def items(self) -> Any:
        for i in iter(int, 1):
            yield f"n{i}", 1.0


class Changing(dict[str, float]):
    def items(self) -> Any:
        for key, value in super().items():
            self[key + "+"] = 1.0
            yield key, value


COUNTERS: dict[str, tuple[Callable[[], Any], dict[str, float]]] = {
    "plain": (lambda: {"a": 1, "b": 2.5}, {"a": 1.0, "b": 2.5}),
    "colon": (lambda: {"hits: warm": 3}, {"hits warm": 3.0}),
    "lines": (lambda: {"a\nb\x00\ud800": 1}, {"a b": 1.0}),
    "odd": (
        lambda: {
            **{"a": float("inf"), "b": float("nan"), "c": -1, "d": "many", "e": None},
            **{"f": 10**400, "g": b"1", "h": [1], "ok": True, 5: 2, (1,): 1},
        },
        {"ok": 1.0, "5": 2.0},
    ),
    "text": (lambda: {"a": "1"}, {}),
    "two of one name": (lambda: {"a:b": 1, "a b": 2}, {"a b": 1.0}),
    "no mapping": (lambda: 3, {}),
    "raises": (raising(RuntimeError("nothing was counted")), {}),
    "exits": (lambda: sys.exit(1), {}),
    "changes while it is read": (lambda: Changing(a=1.0), {}),
    "without end": (Growing, {"n0": 1.0}),
}


@pytest.mark.parametrize("what", COUNTERS)
def test_counters_are_finite_numbers_by_plain_names(what: str) -> None:
    given, expected = COUNTERS[what]
    assert counting(given).counters() == expected


def test_names_are_short_and_few() -> None:
    many = counting(lambda: {"x" * 10_000: 1.0} | {f"n{i}": 1.0 for i in range(1000)})
    found = many.counters()
    assert len(found) == 64 and all(len(name) <= 64 for name in found)


def test_names_that_change_from_call_to_call_do_not_pile_up() -> None:
    calls = iter(range(10_000))
    policy = counting(lambda: {f"n{next(calls)}": 1.0 for _ in range(10)})
    seen = {name for _ in range(50) for name in policy.counters()}
    assert len(seen) == 64


def test_a_policy_that_fails_to_count_is_not_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[int] = []

    def fail() -> Any:
        asked.append(1)
        raise RuntimeError("nothing was counted")

    policy = counting(fail)
    assert [policy.counters() for _ in range(3)] == [{}, {}, {}]
    assert len(asked) == 1
    assert sum("nothing was counted" in r.getMessage() for r in caplog.records) == 1


# -- what it declares ------------------------------------------------------------------------------


def test_what_a_policy_declares_is_read_once() -> None:
    class Flips(Lru):
        name = "flips"

        def __init__(self, options: PolicyOptions, engine: EngineView):
            super().__init__(options, engine)
            self.reads = 0

        @property
        def exact(self) -> bool:  # type: ignore[override]
            self.reads += 1
            return self.reads > 1

    policy = Flips(Lru.Options(), ENGINE)
    assert [ContainedPolicy(policy).exact for _ in range(1)] == [False]


@pytest.mark.parametrize("exact", [1, "yes", None])
def test_nothing_but_true_is_exact(exact: Any) -> None:
    odd: type[PrefixCachePolicy] = type("Odd", (Lru,), {"name": "odd", "exact": exact})
    assert not ContainedPolicy(odd(Lru.Options(), ENGINE)).exact


def test_a_policy_that_cannot_say_what_it_is_has_its_class_name() -> None:
    class Mute(Lru):
        @property
        def name(self) -> str:  # type: ignore[override]
            raise SystemExit

    contained = ContainedPolicy(Mute(Lru.Options(), ENGINE))
    assert (contained.policy_name, contained.exact) == ("Mute", False)
