"""The laws of `kvplug.testing` for every registered sequence policy."""

from __future__ import annotations

from kvplug.contract import Kind, SequencePolicy
from kvplug.registry import plugins
from kvplug.testing import ScoringLaws, WindowLaws, each
from kvplug.testing.sequence import scoring_policies

# What cannot be made without an option of its own has a class of its own beside its tests.
READY = plugins().registry.ready(Kind.SEQUENCE, "budget")
SCORING = [(p.name, {"policy": p}) for p in scoring_policies() if p.name in READY]
globals().update(each(ScoringLaws, SCORING))

RULES = [
    p for p in plugins().registry if issubclass(p, SequencePolicy) and p not in scoring_policies()
]
globals().update(each(WindowLaws, [(p.name, {"policy": p}) for p in RULES]))


def test_there_are_both_families() -> None:
    assert len(SCORING) >= 12
    assert RULES
