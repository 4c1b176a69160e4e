"""The laws of `kvplug.testing` for every registered prefix-cache policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvplug.testing import PrefixCacheLaws, each
from kvplug.testing.prefix_cache import prefix_policies

BOUNDS = {"lfu": {"history": 200}, "foresight": {"memory": 200}}
"""Smaller bounds than the defaults, so that they are reached."""

FACTS = [name for name in vars(PrefixCacheLaws) if name.startswith(("test_a_life", "test_remov"))]


def cases() -> Iterator[tuple[str, Mapping[str, Any]]]:
    for policy in prefix_policies():
        attributes = {"policy": policy, "bounds": BOUNDS.get(policy.name, {})}
        if policy.name == "record":
            # It orders as the policy that it records, and writes down every text that it sees.
            attributes |= dict.fromkeys([*FACTS, "test_state_stays_bounded"])
        yield policy.name, attributes


globals().update(each(PrefixCacheLaws, cases()))
