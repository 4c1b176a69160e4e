"""Whole lives with every fact: what an engine does to a policy, at random, and at length.

The laws' random life tells a policy ids alone. Here requests over a growing prefix tree run side
by side, share blocks, meet content that another is still computing, store the same content twice,
lose content while it is in use, and the cache is reset now and then.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from laws import ENGINE, build, prefix_policies

from kvplug.contract import PrefixCachePolicy, Released, RequestView

every = pytest.mark.parametrize(
    "policy", [p for p in prefix_policies() if p.name != "record"], ids=lambda p: p.name
)

Content = tuple[int, ...]


@dataclass
class Pool:
    """A pool of blocks as vLLM keeps it, with a policy that decides."""

    policy: PrefixCachePolicy
    seed: int
    size: int = ENGINE.num_blocks
    holds: dict[int, Content] = field(default_factory=dict)
    users: dict[int, int] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)
    position: dict[int, int] = field(default_factory=dict)
    parent: dict[int, int] = field(default_factory=dict)
    owner: dict[int, RequestView] = field(default_factory=dict)
    running: list[tuple[RequestView, list[int]]] = field(default_factory=list)
    served: int = 0
    evicted: int = 0

    def __post_init__(self) -> None:
        self.choose = random.Random(self.seed)
        self.free = list(range(self.size))

    @property
    def candidates(self) -> set[int]:
        return {b for b in self.holds if not self.users.get(b)}

    def step(self) -> None:
        what = self.choose.random()
        if what < 0.5:
            self.admit()
        elif what < 0.96:
            self.finish()
        elif what < 0.99:
            self.lose()
        else:
            while self.running:
                self.finish()
            gone = sorted(self.candidates)
            if gone:
                self.drop(gone)
                self.policy.on_remove(gone)

    def admit(self) -> None:
        text = tuple(self.choose.randrange(2) for _ in range(self.choose.randint(1, 9)))
        path = [text[: i + 1] for i in range(len(text))]
        at = {content: block for block, content in self.holds.items()}
        found: list[int] = []
        for content in path:
            if content not in at or self.choose.random() < 0.03:
                break
            found.append(at[content])
        need = len(path) - len(found)
        room = len(self.free) + len(self.candidates - set(found))
        if need > room:
            return
        self.served += 1
        for block in found:
            self.users[block] = self.users.get(block, 0) + 1
        if found:
            self.policy.on_hit(found)
        blocks = [*found]
        if need > len(self.free):
            asked = need - len(self.free)
            before = list(self.policy.victims(asked))
            victims = list(self.policy.victims(asked))
            assert victims == before, "victims changed something"
            assert len(set(victims)) == asked and set(victims) <= self.candidates
            self.drop(victims)
            self.policy.on_remove(victims)
            self.evicted += asked
        view = RequestView(
            str(self.served),
            16 * len(path),
            session_id=self.choose.choice([None, "a", "b"]),
            arrival=float(self.served),
        )
        for content in path[len(found) :]:
            block = self.free.pop(self.choose.randrange(len(self.free)))
            self.users[block] = 1
            self.holds[block] = content
            blocks.append(block)
        for i, block in enumerate(blocks):
            self.position[block] = i
            self.parent[block] = blocks[i - 1] if i else -1
            self.owner[block] = view
        self.running.append((view, blocks))

    def finish(self) -> None:
        if not self.running:
            return
        _, blocks = self.running.pop(self.choose.randrange(len(self.running)))
        for block in blocks:
            self.users[block] -= 1
        ids = [b for b in reversed(blocks) if not self.users[b]]
        cached = [b for b in ids if b in self.holds]
        self.free += [b for b in ids if b not in self.holds]
        if cached:
            self.policy.on_release(
                Released(
                    cached,
                    [self.position[b] for b in cached],
                    [repr(self.holds[b]).encode() for b in cached],
                    self.owner[cached[0]],
                    [self.parent[b] for b in cached],
                )
            )

    def lose(self) -> None:
        """Content is gone, of a block in use or not (a load that failed)."""
        if self.holds:
            block = self.choose.choice(sorted(self.holds))
            in_use = bool(self.users.get(block))
            self.drop([block])
            if in_use:
                self.free.remove(block)
            self.policy.on_remove([block])

    def drop(self, blocks: list[int]) -> None:
        for block in blocks:
            del self.holds[block]
            self.free.append(block)


@every
@pytest.mark.parametrize("seed", range(4))
def test_a_life_without_exceptions_or_wrong_victims(
    policy: type[PrefixCachePolicy], seed: int
) -> None:
    pool = Pool(build(policy), seed)
    for _ in range(2500):
        pool.step()
    assert pool.evicted > 300
    remaining = len(pool.candidates)
    assert set(pool.policy.victims(remaining)) == pool.candidates


@every
def test_one_at_a_time_is_the_same_order(policy: type[PrefixCachePolicy]) -> None:
    for seed in range(10, 16):
        pools = [Pool(build(policy), seed) for _ in range(2)]
        for pool in pools:
            for _ in range(700):
                pool.step()
        together, apart = pools
        n = len(together.candidates)
        expected = list(together.policy.victims(n))
        found = []
        for _ in range(n):
            (victim,) = apart.policy.victims(1)
            apart.policy.on_remove([victim])
            found.append(victim)
        assert found == expected


@every
def test_removing_in_another_order_than_named_is_survived(policy: type[PrefixCachePolicy]) -> None:
    pool = Pool(build(policy), 5)
    for _ in range(600):
        pool.step()
    victims = list(pool.policy.victims(len(pool.candidates)))
    pool.policy.on_remove(victims[::-1][:5])
    assert set(pool.policy.victims(len(victims) - 5)) == set(victims[:-5])


@every
def test_state_stays_bounded(policy: type[PrefixCachePolicy]) -> None:
    """Twice the content seen leaves no more behind, once what is remembered is full."""
    import pickle

    # Smaller bounds than the defaults, so that they are reached.
    options = {"lfu": {"history": 200}, "foresight": {"memory": 200}}.get(policy.name, {})

    def size(requests: int) -> int:
        made = build(policy, **options)
        slots = ENGINE.num_blocks
        for turn in range(requests):
            first = turn * 8 % slots
            ids = list(range(first, first + 8))[::-1]
            if turn * 8 >= slots:
                ids = list(made.victims(8))
                made.on_remove(ids)
            keys = [(turn * 8 + i).to_bytes(8, "little") for i in range(8)]
            view = RequestView(str(turn), 128, session_id=str(turn), arrival=float(turn))
            made.on_release(Released(ids, [*range(7, -1, -1)], keys, view, [*ids[1:], -1]))
            made.on_hit(ids[-3:])
            made.on_release(Released(ids[-3:], [2, 1, 0], keys[-3:], view, [*ids[-2:], -1]))
        return len(pickle.dumps(made.__dict__))

    assert size(6000) < 1.25 * size(3000)
