"""Waves of requests on an engine, one step after another; the engine is a fake."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from kvplug_lab.engine.stepped import index_of, stated, stepped, waves


class Engine:
    """Answers a request with its number of tokens, one a step."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.log: list[str] = []

    def add(self, wave: Sequence[int]) -> None:
        self.log.append(f"add {[*wave]}")
        self.left |= {f"{i}-0a1b": i + 1 for i in wave}

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def step(self) -> list[Any]:
        self.left = {name: n - 1 for name, n in self.left.items()}
        done = [name for name, n in self.left.items() if not n]
        self.left = {name: n for name, n in self.left.items() if n}
        self.log.append(f"step {len(self.left) + len(done)}")
        return [SimpleNamespace(request_id=name) for name in done]


def test_a_wave_begins_when_the_one_before_has_finished() -> None:
    engine = Engine()
    order = waves([5, 0, 5, 2])
    assert order == [[1], [3], [0, 2]]
    steps = [*stepped(engine, order, engine.add)]
    assert [index_of(output) for step in steps for output in step.outputs] == [1, 3, 0, 2]
    assert len(steps) == 2 + 4 + 3
    added = [line for line in engine.log if line.startswith("add")]
    assert added == ["add [1]", "add [3]", "add [0, 2]"]
    assert engine.log[3] == "add [3]" and engine.log[8] == "add [0, 2]"


def test_whoever_has_seen_enough_stops_between_two_steps() -> None:
    engine = Engine()
    for step in stepped(engine, waves([0, 0, 1]), engine.add):
        if step.outputs:
            break
    assert engine.log == ["add [0, 1]", "step 2"]


def test_what_kvplug_states_is_told_from_what_others_do() -> None:
    assert stated(SimpleNamespace(kv_transfer_params=None)) is None
    assert stated(SimpleNamespace(kv_transfer_params={"remote": 1})) is None
    said = {"exact": False}
    assert stated(SimpleNamespace(kv_transfer_params={"kvplug": said})) == said
