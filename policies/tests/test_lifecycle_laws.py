"""The laws of `kvplug.testing` for every registered lifecycle policy."""

from __future__ import annotations

from kvplug.contract import LifecyclePolicy
from kvplug.registry import plugins
from kvplug.testing import LifecycleLaws, each

POLICIES = [p for p in plugins().registry if issubclass(p, LifecyclePolicy)]
globals().update(each(LifecycleLaws, [(p.name, {"policy": p}) for p in POLICIES]))


def test_there_are_lifecycle_policies() -> None:
    assert {"everything", "ladder", "watermarks"} <= {p.name for p in POLICIES}
