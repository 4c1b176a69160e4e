"""Every built-in policy has its code, its tests, its deployment and its page under one name."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvplug.contract import EngineView, Kind, Policy, PolicyOptions
from kvplug.hosts.vllm.flags import read_config
from kvplug_policies.builtin import BUILTIN

ROOT = Path(__file__).resolve().parents[2]
EVERY = pytest.mark.parametrize("policy", BUILTIN, ids=lambda p: f"{p.kind}-{p.name}")
OUTSIDE = {Kind.TIERS, Kind.TRANSFER, Kind.LIFECYCLE}
"""Kinds of KV outside the pool, which a deployment names together."""


def stem(policy: type[Policy]) -> str:
    """Its name, behind its kind's where a policy of an earlier kind has the name."""
    earlier = list(Kind)[: list(Kind).index(policy.kind)]
    taken = any(p.name == policy.name and p.kind in earlier for p in BUILTIN)
    return f"{policy.kind}_{policy.name}" if taken else policy.name


def deployment_of(policy: type[Policy]) -> Path:
    return ROOT / "configs/cpu" / f"{stem(policy)}.yaml"


@EVERY
@pytest.mark.parametrize(
    "place",
    [
        "policies/kvplug_policies/{kind}/{name}.py",
        "policies/tests/test_{stem}.py",
        "configs/cpu/{stem}.yaml",
        "docs/policies/{stem}.md",
    ],
)
def test_the_stem_is_there(policy: type[Policy], place: str) -> None:
    if policy.kind in OUTSIDE and place.startswith("configs/"):
        return  # One line of a deployment of tiers.
    path = ROOT / place.format(kind=policy.kind, name=policy.name, stem=stem(policy))
    assert path.is_file(), f"{policy.name} lacks {path.relative_to(ROOT)}"


@EVERY
def test_the_class_lives_under_its_stem(policy: type[Policy]) -> None:
    assert policy.__module__ == f"kvplug_policies.{policy.kind}.{policy.name}"


@EVERY
def test_the_deployment_uses_the_policy(policy: type[Policy]) -> None:
    if policy.kind in OUTSIDE and not deployment_of(policy).exists():
        return
    deployment = read_config(deployment_of(policy)).deployment
    chosen = [choice.policy for choice in deployment.all()]
    if policy.kind is Kind.REUSE:  # one of a chain
        assert policy in chosen and {p.kind for p in chosen} == {Kind.REUSE}
    elif policy.kind in OUTSIDE:
        assert policy in chosen and {p.kind for p in chosen} <= OUTSIDE
    else:
        assert chosen == [policy]


@EVERY
def test_a_policy_with_options_types_them(policy: type[Policy]) -> None:
    for cls in policy.__mro__:
        if cls.__module__.startswith("kvplug_policies.") and "Options" in vars(cls):
            assert cls.__annotations__.get("options") == "Options", cls


@EVERY
def test_options_of_another_policy_are_refused(policy: type[Policy]) -> None:
    if policy.Options is Policy.Options:
        return  # It has none.
    with pytest.raises(TypeError, match=f"{policy.__name__} takes .*Options, got PolicyOptions"):
        policy(PolicyOptions(), EngineView(block_size=16))


def test_no_policy_file_is_left_unregistered() -> None:
    files = (ROOT / "policies" / "kvplug_policies").glob("*/*.py")
    found = {(f.parent.name, f.stem) for f in files if f.stem != "__init__"}
    assert found == {(str(p.kind), p.name) for p in BUILTIN}
