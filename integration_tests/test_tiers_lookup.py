"""Asking tiers what they hold: in a thread, in their order, and nobody waits for long."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from kvplug.contract import EngineView, Tier, TierError, TierPlace, TierUsage
from kvplug.hosts.vllm.scheduler import tiers_lookup
from kvplug.hosts.vllm.scheduler.tiers_lookup import Lookups, Question
from kvplug.tiers import links

KEYS = [bytes([n]) * 32 for n in range(6)]


class Asked(Tier):
    """Holds some keys, and answers when it is let."""

    name = "asked"
    changes = "nothing"

    def __init__(self, held: Sequence[bytes], shared: bool = True, durable: bool = False):
        super().__init__(self.Options(), EngineView(16))
        self.held, self.asked = list(held), [0]
        self.shared, self.durable = shared, durable  # type: ignore[misc]
        self.fails = False
        self.gate = threading.Event()
        self.gate.set()
        self.closed = False

    def open(self, place: TierPlace) -> None:
        pass

    def put(self, items: Sequence[tuple[bytes, Any]]) -> list[str]:
        return []

    def get(self, keys: Sequence[bytes]) -> list[Any]:
        return []

    def has(self, keys: Sequence[bytes]) -> list[bool]:
        self.asked.append(len(keys))
        self.gate.wait(10)
        if self.fails:
            raise TierError("unreachable")
        return [key in self.held for key in keys]

    def remove(self, keys: Sequence[bytes]) -> None:
        pass

    def usage(self) -> TierUsage:
        return TierUsage(0, 0, 0)

    def stored(self) -> Iterator[tuple[bytes, int, float]]:
        yield from ((key, 7, 0.0) for key in self.held)
        if self.fails:
            raise OSError("torn")

    def close(self) -> None:
        self.closed = True


def answered(question: Question) -> list[str | None]:
    until = time.monotonic() + 10
    while not question.answered and time.monotonic() < until:
        time.sleep(0.001)
    assert question.answered
    return question.found


def test_each_key_is_asked_of_the_first_tier_that_may_have_it() -> None:
    first, second, own = Asked(KEYS[:2]), Asked(KEYS[1:4]), Asked(KEYS, shared=False)
    lookups = Lookups({"own": own, "a": first, "b": second}, lambda *_: None)
    assert lookups.asks
    assert answered(lookups.ask(KEYS)) == ["a", "a", "b", "b", None, None]
    assert (first.asked[-1], second.asked[-1]) == (6, 4) and own.asked == [0]
    lookups.close()
    assert first.closed and own.closed


def test_a_tier_that_cannot_answer_holds_nothing_and_is_told_of() -> None:
    broken, good = Asked(KEYS), Asked(KEYS[:1])
    broken.fails = True
    said: list[tuple[str, str]] = []
    lookups = Lookups({"a": broken, "b": good}, lambda *what: said.append(what))
    assert answered(lookups.ask(KEYS[:2])) == ["b", None]
    assert said == [("a", "unreachable")]
    lookups.close()


def test_what_nobody_waits_for_any_more_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers_lookup, "SECONDS", 0.05)
    slow = Asked(KEYS)
    slow.gate.clear()
    lookups = Lookups({"a": slow}, lambda *_: None)
    first, second = lookups.ask(KEYS), lookups.ask(KEYS)
    time.sleep(0.1)
    assert not first.answered and time.monotonic() > second.until
    slow.gate.set()
    assert answered(second) == [None] * 6
    assert len(slow.asked) == 2, "once for the first, never for the second"
    lookups.close()


def test_a_question_goes_on_as_long_as_something_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers_lookup, "FIRST_PART", 1)
    some = Asked([*KEYS[:2], KEYS[5]])
    lookups = Lookups({"a": some}, lambda *_: None)
    assert answered(lookups.ask(KEYS)) == ["a", "a", None, None, None, None]
    assert some.asked == [0, 1, 2], "what stands behind a gap is not asked about"
    lookups.close()


def test_of_a_late_answer_the_beginning_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers_lookup, "FIRST_PART", 2)
    slow = Asked(KEYS)

    def has(keys: Sequence[bytes]) -> list[bool]:
        if KEYS[2] in keys:
            slow.gate.wait(10)
        return [True] * len(keys)

    monkeypatch.setattr(slow, "has", has)
    slow.gate.clear()
    lookups = Lookups({"a": slow}, lambda *_: None)
    late = lookups.ask(KEYS)
    while not late.found:
        time.sleep(0.001)
    assert late.found == ["a", "a"] and not late.answered
    slow.gate.set()
    assert answered(late) == ["a"] * 6
    lookups.close()


def test_a_tier_that_was_late_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request would wait for it otherwise, for as long as it hangs."""
    monkeypatch.setattr(links, "FIRST_PAUSE", 0.02)
    slow, good = Asked(KEYS[:1]), Asked(KEYS)
    slow.gate.clear()
    lookups = Lookups({"a": slow, "b": good}, lambda *_: None)
    first = lookups.ask(KEYS[:2])
    while len(slow.asked) == 1:
        time.sleep(0.001)
    lookups.late()
    time.sleep(0.05)
    assert not lookups.asks, "it hangs still"
    slow.gate.set()
    answered(first)
    assert lookups.asks
    assert answered(lookups.ask(KEYS[:2])) == ["a", "b"]
    lookups.close()


def test_a_tier_that_failed_is_left_alone_for_a_while() -> None:
    broken, good = Asked(KEYS), Asked(KEYS)
    broken.fails = True
    lookups = Lookups({"a": broken, "b": good}, lambda *_: None)
    for _ in range(3):
        assert answered(lookups.ask(KEYS[:2])) == ["b", "b"]
    assert broken.asked == [0, 2] and lookups.asks
    lookups.close()


def test_what_durable_tiers_held_is_listed_in_parts() -> None:
    kept, torn = Asked(KEYS, shared=False, durable=True), Asked(KEYS[:1], False, True)
    torn.fails = True
    said: list[tuple[str, str]] = []
    lookups = Lookups({"a": kept, "b": torn}, lambda *what: said.append(what))
    assert not lookups.asks
    found: list[tuple[str, bytes, int]] = []
    until = time.monotonic() + 10
    while len(found) < 7 and time.monotonic() < until:
        part = lookups.listed(2)
        assert len(part) <= 2
        found += part
    lookups.close()
    assert found == [("a", key, 7) for key in KEYS] + [("b", KEYS[0], 7)]
    assert said == [("b", "OSError")]


class Causeless(TierError):
    """Cannot say its cause."""

    def __init__(self) -> None:
        OSError.__init__(self)

    @property
    def cause(self) -> str:  # type: ignore[override]
        raise self


@pytest.mark.parametrize("answer", [Causeless(), SystemExit(1), itertools.repeat(True), [True], 7])
def test_whatever_a_tier_answers_each_question_is_answered(answer: Any) -> None:
    def has(keys: Sequence[bytes]) -> Any:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    wrong, good = Asked(KEYS), Asked(KEYS)
    wrong.has = has  # type: ignore[method-assign]
    said: list[tuple[str, str]] = []
    lookups = Lookups({"a": wrong, "b": good}, lambda *what: said.append(what))
    assert answered(lookups.ask(KEYS[:2])) == ["b", "b"]
    assert [name for name, _ in said] == ["a"]
    assert answered(lookups.ask(KEYS[:2])) == ["b", "b"]
    lookups.close()


@pytest.mark.parametrize(
    "wrong", [(b"short", 7, 0.0), ("text", 7, 0.0), (KEYS[1], 7.0, 0.0), (KEYS[1],), None]
)
def test_of_what_a_tier_lists_only_chunks_of_some_bytes_enter_the_books(wrong: Any) -> None:
    kept = Asked(KEYS, shared=False, durable=True)
    listed = [(KEYS[0], 7, 0.0), (KEYS[2], -7, 0.0), (KEYS[3], 0, 0.0), wrong, (KEYS[4], 7, 0.0)]
    kept.stored = lambda: iter(listed)  # type: ignore[method-assign]
    said: list[tuple[str, str]] = []
    lookups = Lookups({"a": kept}, lambda *what: said.append(what))
    until = time.monotonic() + 10
    while not said and time.monotonic() < until:
        time.sleep(0.001)
    assert lookups.listed() == [("a", KEYS[0], 7)] and len(said) == 1
    lookups.close()
