"""The laws of `kvplug.testing` for the reuse checks that ship."""

from __future__ import annotations

from kvplug.contract import Kind
from kvplug.testing import ReuseLaws, each
from kvplug_policies.builtin import BUILTIN

CHECKS = [p for p in BUILTIN if p.kind is Kind.REUSE]
globals().update(each(ReuseLaws, [(p.name, {"policy": p}) for p in CHECKS]))


def test_there_are_checks() -> None:
    assert {"structure", "position", "mask"} <= {p.name for p in CHECKS}
