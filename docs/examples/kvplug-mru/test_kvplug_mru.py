"""The policy without an engine: the laws of its kind, and the four verbs as the host calls them."""

from kvplug_mru import Mru

from kvplug.contract import Kind
from kvplug.registry import plugins
from kvplug.testing import PrefixCacheLaws, released


class TestMru(PrefixCacheLaws):
    policy = Mru

    def test_the_entry_point_registers_it(self) -> None:
        assert plugins().registry.get(Kind.PREFIX_CACHE, "mru") is Mru

    def test_the_newest_release_goes_first_and_its_tail_before_its_head(self) -> None:
        policy: Mru = self.build()
        policy.on_release(released(12, 11, 10))  # a host names the tail first
        policy.on_release(released(22, 21, 20))
        assert policy.victims(4) == [22, 21, 20, 12]

    def test_protected_blocks_go_last_the_oldest_of_them_first(self) -> None:
        policy: Mru = self.build(protect=2)
        for block in (1, 2, 3, 4):
            policy.on_release(released(block))
        assert policy.victims(2) == [2, 1]
        assert policy.victims(4) == [2, 1, 3, 4]
