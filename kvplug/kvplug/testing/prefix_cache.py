"""Laws of prefix-cache policies, and pools of blocks to check them with.

Two lives: one at random that tells a policy ids alone, and one of requests over a growing prefix
tree with every fact. There requests run side by side, share blocks, meet content that another is
still computing, store the same content twice, lose content while it is in use, and the cache is
reset now and then.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from kvplug.contract import PrefixCachePolicy, Released, RequestView
from kvplug.registry import plugins
from kvplug.testing.laws import ENGINE, PolicyLaws, law

SIZES = (2, 4, 64)
"""Blocks of the pools that laws go through, smallest first: the first to fail is shown."""


def prefix_policies() -> list[type[PrefixCachePolicy]]:
    """Every registered prefix-cache policy, third parties' included."""
    return [p for p in plugins().registry if issubclass(p, PrefixCachePolicy)]


def build(policy: type[PrefixCachePolicy], **options: object) -> PrefixCachePolicy:
    """Make a policy for an engine of 64 blocks."""
    return policy(policy.Options.model_validate(options), ENGINE)


def released(*ids: int, request: RequestView | None = None) -> Released:
    """A release of blocks of one text, its last block first, with every fact.

    Args:
        ids: Block ids, the last block of the text first.
        request: The request that releases them.
    """
    return Released(
        list(ids),
        list(range(len(ids) - 1, -1, -1)),
        [b.to_bytes(8, "little") for b in ids],
        request or RequestView("r0", 16 * len(ids)),
        [*ids[1:], -1],
    )


class Blocks:
    """The truth a policy must agree with: which blocks are candidates, which are in use.

    Attributes:
        candidates: Blocks that may be evicted.
        pinned: Blocks that requests use.
        history: What happened, as calls.
    """

    def __init__(self, policy: PrefixCachePolicy):
        self.policy = policy
        self.candidates: set[int] = set()
        self.pinned: set[int] = set()
        self.history: list[str] = []

    def release(self, *ids: int) -> None:
        """Make blocks candidates."""
        self.history.append(f"on_release({list(ids)})")
        self.policy.on_release(Released(list(ids)))
        self.candidates.update(ids)
        self.pinned.difference_update(ids)

    def hit(self, *ids: int) -> None:
        """Let a request use blocks."""
        self.history.append(f"on_hit({list(ids)})")
        self.policy.on_hit(list(ids))
        self.candidates.difference_update(ids)
        self.pinned.update(ids)

    def evict(self, n: int) -> list[int]:
        """Evict the policy's choice of ``n`` blocks."""
        victims = list(self.policy.victims(n))
        self.history.append(f"evict({n}) -> {victims}")
        self.policy.on_remove(victims)
        self.candidates.difference_update(victims)
        return victims

    def forget(self, *ids: int) -> None:
        """Let the content of blocks be gone."""
        self.history.append(f"on_remove({list(ids)})")
        self.policy.on_remove(list(ids))
        self.candidates.difference_update(ids)
        self.pinned.difference_update(ids)

    def __str__(self) -> str:
        shown = self.history[-12:]
        left_out = len(self.history) - len(shown)
        before = [f"... {left_out} calls before"] if left_out else []
        return "; ".join([*before, *shown, f"candidates {sorted(self.candidates)}"])


def life(blocks: Blocks, steps: int, seed: int, size: int = 64) -> Iterator[None]:
    """A random life of ``size`` blocks; yields after every event."""
    choose = random.Random(seed)
    for _ in range(steps):
        absent = sorted(set(range(size)) - blocks.candidates - blocks.pinned)
        event = choose.randrange(5)
        if event == 0 and absent:
            blocks.release(*choose.sample(absent, min(len(absent), choose.randint(1, 6))))
        elif event == 1 and blocks.candidates:
            blocks.hit(choose.choice(sorted(blocks.candidates)))
        elif event == 2 and blocks.pinned:
            some = choose.sample(sorted(blocks.pinned), choose.randint(1, len(blocks.pinned)))
            blocks.release(*some)
        elif event == 3 and blocks.candidates:
            blocks.evict(choose.randint(1, min(4, len(blocks.candidates))))
        elif event == 4 and choose.random() < 0.2:
            known = sorted(blocks.candidates | blocks.pinned)
            if known:
                blocks.forget(choose.choice(known))
        yield


Content = tuple[int, ...]


@dataclass
class Pool:
    """A pool of blocks as vLLM keeps it, with a policy that decides.

    Attributes:
        policy: The policy.
        seed: Of everything that happens.
        size: Blocks.
    """

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
        """Blocks with content that no request uses."""
        return {b for b in self.holds if not self.users.get(b)}

    def step(self) -> None:
        """Let one thing happen."""
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
        """A request comes, uses what is cached and takes blocks for the rest."""
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
            assert victims == before, (
                f"victims({asked}) gave {before}, then {victims}: it changed something"
            )
            assert len(set(victims)) == asked and set(victims) <= self.candidates, (
                f"victims({asked}) gave {victims}; candidates are {sorted(self.candidates)}"
            )
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
        """A request ends and releases its blocks."""
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
        """Blocks lose their content."""
        for block in blocks:
            del self.holds[block]
            self.free.append(block)


class PrefixCacheLaws(PolicyLaws):
    """Laws of every prefix-cache policy.

    Attributes:
        bounds: Options under which what it remembers is full after 3000 requests of 8 blocks.
    """

    policy: ClassVar[type[PrefixCachePolicy]]
    bounds: ClassVar[Mapping[str, Any]] = {}

    @law("PrefixCachePolicy.victims", "Choose the ``n`` candidates to evict")
    def test_victims_are_distinct_candidates(self) -> None:
        for size in SIZES:
            for seed in range(5):
                blocks = Blocks(self.build())
                for _ in life(blocks, 600, seed, size):
                    n = len(blocks.candidates)
                    for asked in sorted({0, min(1, n), n // 2, n}):
                        victims = list(blocks.policy.victims(asked))
                        good = len(victims) == len(set(victims)) == asked
                        assert good and set(victims) <= blocks.candidates, (
                            f"victims({asked}) gave {victims} after {blocks} (seed {seed})"
                        )

    @law("PrefixCachePolicy.victims", "Changes nothing.")
    def test_victims_changes_nothing(self) -> None:
        for size in SIZES:
            blocks = Blocks(self.build())
            for _ in life(blocks, 400, 9, size):
                n = len(blocks.candidates)
                first = list(blocks.policy.victims(n))
                for asked in (1, n // 3, n):
                    if asked <= n:
                        again = list(blocks.policy.victims(asked))
                        assert again == first[:asked], (
                            f"victims({n}) gave {first}, then victims({asked}) {again}, "
                            f"after {blocks}"
                        )
                again = list(blocks.policy.victims(n))
                assert again == first, f"{first} became {again} by asking, after {blocks}"

    @law("PrefixCachePolicy.victims", "first victim first")
    def test_asking_for_one_at_a_time_gives_the_same_order(self) -> None:
        for size in SIZES:
            together, apart = Blocks(self.build()), Blocks(self.build())
            for blocks in (together, apart):
                for _ in life(blocks, 300, 4, size):
                    pass
            n, before = len(together.candidates), str(together)
            found = [apart.evict(1)[0] for _ in range(n)]
            expected = together.evict(n)
            assert found == expected, f"{n} at once: {expected}, one by one: {found}; {before}"

    @law("PrefixCachePolicy.on_remove", "Ids may be unknown to the policy.")
    def test_unknown_blocks_may_be_hit_and_removed(self) -> None:
        blocks = Blocks(self.build())
        blocks.policy.on_hit([3])
        blocks.policy.on_remove([3, 4])
        blocks.release(1, 2)
        found = blocks.evict(2)
        assert set(found) == {1, 2}, f"on_hit([3]); on_remove([3, 4]); {blocks}"

    @law("PrefixCachePolicy.on_remove", "Forget blocks whose content is gone.")
    def test_content_that_comes_back_starts_anew(self) -> None:
        blocks = Blocks(self.build())
        blocks.release(1, 2, 3)
        blocks.forget(2)
        blocks.release(2)
        assert set(blocks.evict(3)) == {1, 2, 3}, str(blocks)
        assert list(blocks.policy.victims(0)) == [], f"victims(0) after {blocks}"

    @law("PrefixCachePolicy", "takes it out of the candidates\n    while requests use it")
    def test_a_life_with_every_fact(self) -> None:
        for seed in range(4):
            pool = Pool(self.build(), seed)
            for _ in range(2500):
                pool.step()
            remaining = len(pool.candidates)
            found = set(pool.policy.victims(remaining))
            assert pool.evicted > 300 and found == pool.candidates, (
                f"after {pool.evicted} evictions victims({remaining}) gave {sorted(found)}; "
                f"candidates are {sorted(pool.candidates)} (seed {seed})"
            )

    @law("PrefixCachePolicy.victims", "The host evicts exactly the blocks\n        returned")
    def test_a_life_with_every_fact_has_one_order(self) -> None:
        for seed in range(10, 16):
            pools = [Pool(self.build(), seed) for _ in range(2)]
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
            assert found == expected, f"{expected} at once, {found} one by one (seed {seed})"

    @law("PrefixCachePolicy.on_remove", "Forget blocks whose content is gone.")
    def test_removing_in_another_order_than_named_is_survived(self) -> None:
        pool = Pool(self.build(), 5)
        for _ in range(600):
            pool.step()
        victims = list(pool.policy.victims(len(pool.candidates)))
        pool.policy.on_remove(victims[::-1][:5])
        found = set(pool.policy.victims(len(victims) - 5))
        assert found == set(victims[:-5]), f"{sorted(found)} are left of {victims}"

    @law("PrefixCachePolicy", "its\n    content is gone")
    def test_state_stays_bounded(self) -> None:
        """Twice the content seen leaves no more behind, once what is remembered is full."""

        def size(requests: int) -> int:
            made: PrefixCachePolicy = self.build(**self.bounds)
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

        short, long = size(3000), size(6000)
        assert long < 1.25 * short, (
            f"after 3000 requests it holds {short} bytes, after 6000 {long}: what it remembers "
            "of evicted blocks needs a bound"
        )
