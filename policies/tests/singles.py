"""A cache of single blocks around a policy: the setting the papers of classic policies speak of."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Sequence

from kvplug.contract import EngineView, Feature, PrefixCachePolicy, Released


class Singles:
    """Requests of one block each, served one after the other.

    Args:
        policy: Class of the policy.
        size: Blocks of the cache.
        options: Knobs of the policy.
    """

    def __init__(self, policy: type[PrefixCachePolicy], size: int, **options: object):
        engine = EngineView(16, size, features=frozenset({Feature.PREFIX_CACHING}), host="test")
        self.policy = policy(policy.Options.model_validate(options), engine)
        self.slots: dict[Hashable, int] = {}
        self.free = list(range(size))[::-1]
        self.evicted: list[Hashable] = []

    def use(self, *contents: Hashable) -> list[bool]:
        """Refer to contents one by one; whether each was a hit."""
        return [self._use(content) for content in contents]

    def _use(self, content: Hashable) -> bool:
        slot = self.slots.get(content)
        hit = slot is not None
        if slot is not None:
            self.policy.on_hit([slot])
        else:
            if not self.free:
                self._evict()
            slot = self.slots[content] = self.free.pop()
        self.policy.on_release(Released([slot], [0], [repr(content).encode()], None, [-1]))
        return hit

    def _evict(self) -> None:
        (victim,) = self.policy.victims(1)
        (content,) = (c for c, s in self.slots.items() if s == victim)
        self.policy.on_remove([victim])
        del self.slots[content]
        self.free.append(victim)
        self.evicted.append(content)

    def order(self) -> list[Hashable]:
        """Contents in the order they would go."""
        at = {slot: content for content, slot in self.slots.items()}
        return [at[slot] for slot in self.policy.victims(len(at))]


def skewed(seed: int, references: int, contents: int) -> Sequence[int]:
    """Contents asked for, few of them often; what is often asked for changes half-way."""
    choose = random.Random(seed)
    weights = [1 / (i + 1) for i in range(contents)]
    first = choose.choices(range(contents), weights, k=references // 2)
    then = choose.choices(range(contents)[::-1], weights, k=references - references // 2)
    return [*first, *then]


def evictions(cache: Singles, contents: Iterable[int]) -> list[Hashable]:
    """Evictions of a cache, in order, as contents are requested."""
    cache.use(*contents)
    return cache.evicted
