"""Laws of every prefix-cache policy, and a cache to check them with."""

from __future__ import annotations

import random
from collections.abc import Iterator

from kvplug.contract import EngineView, Feature, PrefixCachePolicy, Released
from kvplug.registry import plugins

ENGINE = EngineView(
    block_size=16, num_blocks=64, features=frozenset({Feature.PREFIX_CACHING}), host="test"
)


def prefix_policies() -> list[type[PrefixCachePolicy]]:
    """Every registered prefix-cache policy, third parties' included."""
    return [p for p in plugins().registry if issubclass(p, PrefixCachePolicy)]


def build(policy: type[PrefixCachePolicy], **options: object) -> PrefixCachePolicy:
    return policy(policy.Options.model_validate(options), ENGINE)


class Blocks:
    """The truth a policy must agree with: which blocks are candidates, which are in use."""

    def __init__(self, policy: PrefixCachePolicy):
        self.policy = policy
        self.candidates: set[int] = set()
        self.pinned: set[int] = set()

    def release(self, *ids: int) -> None:
        self.policy.on_release(Released(list(ids)))
        self.candidates.update(ids)
        self.pinned.difference_update(ids)

    def hit(self, *ids: int) -> None:
        self.policy.on_hit(list(ids))
        self.candidates.difference_update(ids)
        self.pinned.update(ids)

    def evict(self, n: int) -> list[int]:
        victims = list(self.policy.victims(n))
        self.policy.on_remove(victims)
        self.candidates.difference_update(victims)
        return victims

    def forget(self, *ids: int) -> None:
        self.policy.on_remove(list(ids))
        self.candidates.difference_update(ids)
        self.pinned.difference_update(ids)


def life(blocks: Blocks, steps: int, seed: int) -> Iterator[None]:
    """A random life of 64 blocks; yields after every event."""
    choose = random.Random(seed)
    for _ in range(steps):
        absent = sorted(set(range(64)) - blocks.candidates - blocks.pinned)
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
