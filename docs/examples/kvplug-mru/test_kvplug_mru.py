"""The policy without an engine: the four verbs, called as the host calls them."""

from kvplug_mru import Mru

from kvplug.contract import EngineView, Kind, Released
from kvplug.registry import plugins


def make(**options: int) -> Mru:
    return Mru(Mru.Options(**options), EngineView(block_size=16))


def test_the_entry_point_registers_it() -> None:
    assert plugins().registry.get(Kind.PREFIX_CACHE, "mru") is Mru


def test_the_newest_release_goes_first_and_its_tail_before_its_head() -> None:
    policy = make()
    policy.on_release(Released([12, 11, 10]))  # a host names the tail first
    policy.on_release(Released([22, 21, 20]))
    assert policy.victims(4) == [22, 21, 20, 12]
    assert policy.victims(4) == [22, 21, 20, 12], "victims() changes nothing"


def test_used_and_evicted_blocks_are_no_candidates() -> None:
    policy = make()
    policy.on_release(Released([3, 2, 1]))
    policy.on_hit([2])
    policy.on_remove([3, 99])
    assert policy.victims(1) == [1]
    policy.on_release(Released([2]))
    assert policy.victims(2) == [2, 1]


def test_protected_blocks_go_last_the_oldest_of_them_first() -> None:
    policy = make(protect=2)
    policy.on_release(Released([1]))
    policy.on_release(Released([2]))
    policy.on_release(Released([3]))
    policy.on_release(Released([4]))
    assert policy.victims(2) == [2, 1]
    assert policy.victims(4) == [2, 1, 3, 4]
