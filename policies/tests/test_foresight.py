from __future__ import annotations

import random

import numpy as np
import pytest
from workloads import WORKLOADS, documents, trace

from kvplug.contract import EngineView, Feature, Released, RequestView
from kvplug.hosts.trace.simulator import Replay
from kvplug.hosts.trace.traces import Trace
from kvplug.testing.prefix_cache import Blocks, build
from kvplug_policies.prefix_cache.foresight import Foresight, boundaries
from kvplug_policies.prefix_cache.lru import Lru


class Texts:
    """A cache of texts, made of named parts of one block each, around the policy.

    Args:
        size: Blocks of the cache.
        facts: Report requests, keys, parents and ends of requests.
        options: Knobs of the policy.
    """

    def __init__(self, size: int, facts: bool = True, **options: object):
        engine = EngineView(16, size, features=frozenset({Feature.PREFIX_CACHING}), host="test")
        self.policy = Foresight(Foresight.Options.model_validate(options), engine)
        self.facts = facts
        self.slots: dict[tuple[str, ...], int] = {}
        self.free = list(range(size))[::-1]
        self.count = 0

    def serve(
        self, text: str, at: float, session: str | None = None, output: int = 50, priority: int = 0
    ) -> int:
        """Serve a text of parts divided by spaces; blocks hit."""
        parts = text.split()
        names = [tuple(parts[: i + 1]) for i in range(len(parts))]
        hit = 0
        while hit < len(names) and names[hit] in self.slots:
            hit += 1
        held = [name for name in names if name in self.slots]
        self.policy.on_hit([self.slots[name] for name in held])
        lacking = len(names) - len(held) - len(self.free)
        if lacking > 0:
            victims = self.policy.victims(lacking)
            self.policy.on_remove(victims)
            gone = set(victims)
            self.slots = {k: v for k, v in self.slots.items() if v not in gone}
            self.free += victims
        for name in names:
            if name not in self.slots:
                self.slots[name] = self.free.pop()
        self.count += 1
        request = RequestView(str(self.count), 16 * len(names), priority, session, at)
        keys = [" ".join(name).encode() for name in names]
        ids = [self.slots[name] for name in reversed(names)]
        if self.facts:
            self.policy.on_finished(request, keys, output)
            self.policy.on_release(Released(ids, None, keys[::-1], request, [*ids[1:], -1]))
        else:
            self.policy.on_release(Released(ids))
        return hit

    def order(self) -> list[str]:
        """Texts of the cached blocks, first victim first, by their last part."""
        last = {slot: name[-1] for name, slot in self.slots.items()}
        return [last[slot] for slot in self.policy.victims(len(last))]

    def worth(self, text: str) -> float:
        """Worth of the last block of a cached text."""
        self.policy._appraise()
        run = self.policy._run_of[self.slots[tuple(text.split())]]
        assert run is not None
        return run.worth

    def wait(self, until: float) -> None:
        self.policy._pass_time(RequestView("clock", 16, arrival=until))


def test_with_nothing_learned_it_is_lru_among_leaves() -> None:
    cache = Texts(16)
    cache.serve("a1 a2 a3", at=0)
    cache.serve("b1 b2", at=10)
    cache.serve("a1 c2", at=100)
    order = cache.order()
    assert order[:2] == ["a3", "a2"]
    assert order.index("b1") < order.index("c2") < order.index("a1")


def test_a_parent_never_goes_before_its_child() -> None:
    cache, choose = Texts(40), random.Random(5)
    for i in range(400):
        depth = choose.randint(1, 6)
        cache.serve(" ".join(f"{d}.{choose.randint(0, 2)}" for d in range(depth)), at=float(i))
    place = {slot: i for i, slot in enumerate(cache.policy.victims(len(cache.slots)))}
    assert len(place) == len(cache.slots)
    for name, slot in cache.slots.items():
        if len(name) > 1:
            assert place[slot] < place[cache.slots[name[:-1]]]


def test_what_is_learned_not_to_come_back_passes_the_cache_by() -> None:
    cache = Texts(40)
    for i in range(600):
        # Documents read once, of 8 blocks; chats of 2 blocks that come back after 5 others.
        cache.serve(" ".join(f"doc{i}.{b}" for b in range(8)), at=3.0 * i, output=300)
        cache.serve(f"chat{i} q{i}", at=3.0 * i + 1, output=20)
        if i >= 5:
            cache.serve(f"chat{i - 5} q{i - 5} r{i - 5}", at=3.0 * i + 2, output=20)
    cache.serve("chatX qX", at=1801, output=20)
    cache.serve(" ".join(f"docX.{b}" for b in range(8)), at=1802, output=300)
    order = cache.order()
    assert order.index("docX.7") < order.index("qX")
    assert order[0].startswith("doc")


def test_a_conversation_is_worth_more_when_its_turn_is_due() -> None:
    cache, choose = Texts(2000), random.Random(6)
    events: list[tuple[float, str]] = []
    for chat in range(400):
        start, text = chat * 9.0, f"s{chat}"
        for turn in range(4):
            text += f" {chat}.{turn}"
            events.append((start + turn * choose.uniform(55, 65), text))
    for at, text in sorted(events):
        cache.serve(text, at)
    end = max(events)[0] + 1
    cache.serve("sX X.0", at=end)
    fresh = cache.worth("sX X.0")
    cache.wait(end + 50)
    due = cache.worth("sX X.0")
    cache.wait(end + 400)
    over = cache.worth("sX X.0")
    assert due > 1.3 * fresh
    assert over < fresh / 2


def test_the_next_turn_is_known_by_its_text_and_by_its_session() -> None:
    cache = Texts(64)
    cache.serve("a b", at=0)
    cache.serve("a b c", at=30)
    cache.serve("a b c d", at=70)
    memory = cache.policy._memory
    assert memory[b"a b c d"].text.turn == 2
    cache.serve("x", at=80, session="one")
    cache.serve("y", at=95, session="one")
    assert memory[b"y"].text.turn == 0
    rows = cache.policy._model._rows
    pause, asked = 7, 8
    assert rows[memory[b"x"].thing][pause] == 0
    assert rows[memory[b"y"].thing][pause] > 0
    assert rows[memory[b"x"].thing][asked] == 0
    assert rows[memory[b"y"].thing][asked] > 0


def test_uses_outlive_eviction() -> None:
    cache = Texts(4)
    for at in range(6):
        cache.serve("hot", at=10.0 * at)
        cache.serve(f"{at}.0 {at}.1 {at}.2 {at}.3", at=10.0 * at + 5)
    assert ("hot",) not in cache.slots
    assert cache.policy._memory[b"hot"].uses == 6


def test_priority_and_output_are_distinguished() -> None:
    cache = Texts(16)
    cache.serve("a", at=0, output=10)
    cache.serve("b", at=1, output=400)
    cache.serve("c", at=2, output=10, priority=3)
    rows = [
        tuple(cache.policy._model._rows[cache.policy._memory[k].thing]) for k in (b"a", b"b", b"c")
    ]
    assert len(set(rows)) == 3


def test_state_is_bounded() -> None:
    cache, choose = Texts(64, memory=300), random.Random(7)
    for i in range(6000):
        session = f"user{choose.randint(0, 10**6)}"
        cache.serve(f"sys d{choose.randint(0, 30)} u{i} v{i}", at=0.2 * i, session=session)
    policy = cache.policy
    assert len(policy._memory) <= 300
    alive = {id(run) for run in policy._memory.values()} | {
        id(run) for run in policy._run_of if run is not None
    }
    assert sum(map(len, policy._ages)) <= len(alive) + 300 + 1024
    assert policy._model.num_things <= len(alive)
    assert len(policy._heap) <= 4 * len(policy._holding) + 1024 + 64
    assert len(policy._run_of) <= 64


def test_the_table_of_sessions_is_bounded() -> None:
    cache = Texts(8, memory=800)
    for i in range(300):
        cache.serve(f"t{i}", at=float(i), session=str(i))
    assert list(cache.policy._sessions) == [str(i) for i in range(200, 300)]


def test_without_any_facts_it_still_orders_by_age() -> None:
    cache = Texts(8, facts=False)
    cache.serve("a1 a2", at=0)
    cache.serve("b1 b2", at=0)
    cache.serve("a1 a2", at=0)
    assert cache.order() == ["b2", "b1", "a2", "a1"]
    for i in range(500):
        cache.serve(f"x{i} y{i}", at=0)
    assert len(cache.policy._memory) <= 8


def test_a_preempted_request_is_taken_as_it_comes() -> None:
    cache = Texts(8)
    cache.serve("a b", at=5)
    policy = cache.policy
    policy.on_release(Released([6, 5], None, [b"p q", b"p"], None, [5, -1]))
    policy.on_hit([5, 6])
    policy.on_release(Released([6, 5], None, [b"p q", b"p"], None, [5, -1]))
    assert set(policy.victims(4)) == {5, 6, *cache.slots.values()}
    assert policy._memory[b"p q"].uses == 2


def test_blocks_whose_children_are_in_use_go_last_of_all() -> None:
    policy = build(Foresight)
    policy.on_release(Released([3, 2, 1], None, None, None, [2, 1, -1]))
    policy.on_release(Released([9]))
    policy.on_hit([3])
    assert policy.victims(3) == [9, 2, 1]


def test_parents_that_make_no_tree_leave_no_block_behind() -> None:
    policy = build(Foresight)
    policy.on_release(Released([1, 2, 3], None, None, None, [2, 3, 1]))
    policy.on_release(Released([4], None, None, None, [4]))
    assert sorted(policy.victims(4)) == [1, 2, 3, 4]


@pytest.mark.parametrize("seed", range(6))
def test_one_at_a_time_is_the_same_order_on_random_trees(seed: int) -> None:
    def grown() -> Blocks:
        blocks, choose = Blocks(build(Foresight)), random.Random(seed)
        parent = {i: choose.randint(-1, i - 1) if i else -1 for i in range(60)}
        for step in range(150):
            path = [choose.randrange(60)]
            while parent[path[-1]] >= 0:
                path.append(parent[path[-1]])
            if not blocks.pinned.isdisjoint(path):
                continue
            blocks.hit(*[b for b in path if b in blocks.candidates])
            if choose.random() < 0.1:
                continue
            request = RequestView(str(step), 16 * len(path), 0, None, float(step) * 3)
            keys = [str(b).encode() for b in path]
            blocks.policy.on_finished(request, keys[::-1], choose.randint(0, 200))
            blocks.policy.on_release(Released(path, None, keys, request, [*path[1:], -1]))
            blocks.candidates.update(path)
            blocks.pinned.difference_update(path)
            if choose.random() < 0.4:
                blocks.evict(choose.randint(1, len(blocks.candidates)))
        return blocks

    together, apart = grown(), grown()
    n = len(together.candidates)
    assert together.candidates == apart.candidates
    assert list(together.policy.victims(n // 2)) == list(together.policy.victims(n))[: n // 2]
    assert together.evict(n) == [apart.evict(1)[0] for _ in range(n)]


def test_texts_are_cut_finer_near_the_end_of_what_was_known() -> None:
    assert boundaries(40, 20) == [0, 5, 13, 17, 19, 20, 21, 23, 27, 35, 39, 40]
    assert boundaries(1, 0) == [0, 1]
    assert boundaries(3, 3) == [0, 2, 3]


def conversations(seed: int) -> Trace:
    """Chats with a think time of about a minute, among documents that are read once."""
    choose = random.Random(seed)
    events: list[tuple[float, list[tuple[int, ...]], int]] = []
    for chat in range(250):
        start, text = choose.uniform(0, 3000), [(0,), (0, 1)]
        for turn in range(choose.randint(1, 8)):
            text = text + [(1, chat, turn, b) for b in range(choose.randint(2, 5))]
            events.append((start, list(text), 60))
            start += choose.gauss(60, 10)
    for document in range(800):
        text = [(0,), (0, 1)] + [(2, document, b) for b in range(12)]
        events.append((choose.uniform(0, 3500), text, 200))
    events.sort(key=lambda event: event[0])
    number: dict[tuple[int, ...], int] = {}
    ids = [number.setdefault(b, len(number)) for _, text, _ in events for b in text]
    lengths = [len(text) for _, text, _ in events]
    return Trace(
        name="conversations",
        off=np.cumsum([0, *lengths]),
        ids=np.array(ids),
        arrival=np.array([at for at, _, _ in events]),
        prompt_tokens=np.array(lengths) * 16,
        output_tokens=np.array([output for _, _, output in events]),
        session=np.zeros(len(events), dtype=np.int64),
        block_size=16,
        num_distinct=len(number),
    )


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("capacity", [150, 400])
def test_conversations_among_documents_hit_more_than_with_lru(seed: int, capacity: int) -> None:
    replay = Replay(conversations(seed))
    lru, ours = (
        replay.run(policy(policy.Options(), replay.engine(capacity)), capacity).hit_rate
        for policy in (Lru, Foresight)
    )
    assert ours > lru + 0.05


def gain(replay: Replay, part: float) -> float:
    """Hit rate above that of LRU."""
    capacity = round(replay.trace.num_distinct * part)
    lru, ours = (
        replay.run(policy(policy.Options(), replay.engine(capacity)), capacity).hit_rate
        for policy in (Lru, Foresight)
    )
    return ours - lru


@pytest.mark.parametrize("name", sorted(set(WORKLOADS) - {"documents_even"}))
@pytest.mark.parametrize("part", [0.02, 0.1])
def test_on_no_workload_does_it_hit_half_a_point_less_than_lru(name: str, part: float) -> None:
    assert gain(Replay(WORKLOADS[name](name, 0.2)), part) > -0.005


@pytest.mark.parametrize("part", [0.02, 0.1])
def test_where_all_are_as_likely_to_come_back_it_is_as_good_as_lru(part: float) -> None:
    # Any order is as good as any other here; one draw differs by a point either way, so the mean.
    draws = [documents(seed, 600, 4, 700, 0) for seed in range(8)]
    gains = [gain(Replay(trace("even", draw, 64, False)), part) for draw in draws]
    assert np.mean(gains) > -0.005
