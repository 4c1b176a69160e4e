"""Every prefix-cache policy inside vLLM's own BlockPool: none fails, none names a wrong block."""

from __future__ import annotations

import pytest
from test_queue import ENGINE, Driver, check, policy_pool

from kvplug.contract import PrefixCachePolicy
from kvplug.registry import plugins
from kvplug_policies.builtin import BUILTIN


@pytest.mark.parametrize(
    "policy",
    [p for p in BUILTIN if issubclass(p, PrefixCachePolicy) and p.name != "record"],
    ids=lambda p: p.name,
)
@pytest.mark.parametrize("seed", range(3))
def test_a_policy_serves_without_a_failure(policy: type[PrefixCachePolicy], seed: int) -> None:
    assert policy in plugins().registry
    pool = policy_pool(policy(policy.Options(), ENGINE))
    driver = Driver(pool, seed, evicts=True)
    for step in range(3000):
        driver.step()
        if step % 50 == 0:
            check(pool)
    counters = pool.free_block_queue.counters
    assert counters.errors == 0
    assert counters.evicted > 300 and counters.hits > 300
