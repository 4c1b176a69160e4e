from __future__ import annotations

from kvplug.counts import MAX_CAUSES, OTHER, Causes


def test_causes_are_bounded_and_the_rest_is_other() -> None:
    causes = Causes()
    for i in range(1000):
        causes.add(f"too far: {i}")
    assert len(causes) == MAX_CAUSES + 1
    assert causes[OTHER] == 1000 - MAX_CAUSES and causes.total() == 1000
    assert causes.add("too far: 3") == "too far 3", "what is known stays apart"
    assert causes["too far 3"] == 2


def test_causes_are_fit_for_labels() -> None:
    causes = Causes()
    assert causes.add("a:b\n" + "x" * 1000) == "a b " + "x" * 57 + "..."
    assert causes.add("\n") == OTHER
    causes.add_all({"c": 2, "c\n": 3})
    assert causes["c"] == 5
