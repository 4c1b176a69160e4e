"""Plugins that fail before an engine runs: a refusal that names them, whatever they raise."""

from __future__ import annotations

import asyncio
import importlib.metadata
import sys
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import Field, field_validator

from kvplug import hookimpl
from kvplug.contract import EngineView, Feature, Kind, PolicyOptions, PrefixCachePolicy
from kvplug.errors import DeploymentError, PluginError
from kvplug.parser import load_deployment
from kvplug.registry import Plugins, PolicyRegistry
from kvplug_policies.prefix_cache.lru import Lru

ENGINE = EngineView(
    block_size=16, num_blocks=9, features=frozenset({Feature.PREFIX_CACHING}), host="trace"
)


def leave() -> Any:
    sys.exit("no room")


def cancel() -> Any:
    raise asyncio.CancelledError("not now")


def break_lines() -> Any:
    raise RuntimeError("a\nfile:1: b" + "x" * 10_000)


WAYS: dict[str, tuple[Callable[[], Any], str]] = {
    "exit": (leave, "SystemExit: no room"),
    "cancelled": (cancel, "CancelledError: not now"),
    "long": (break_lines, "RuntimeError: a file:1: b" + "x" * 500),
}


def deployed(policy: type[PrefixCachePolicy], **options: Any) -> str:
    """The refusal of a section with the policy."""
    plugins = Plugins(entry_points=False)

    class Plugin:
        @hookimpl
        def kvplug_register_policies(self, registry: PolicyRegistry) -> None:
            registry.add(policy)

    plugins.register(Plugin(), "own")
    section = {"prefix_cache": {"use": policy.name, **options}}
    with pytest.raises(DeploymentError) as caught:
        deployment = load_deployment(section, using=plugins)
        deployment.require_compatible(ENGINE, runs=frozenset({Kind.PREFIX_CACHE}), host="trace")
    (refusal,) = caught.value.refusals
    assert refusal.key == "kvplug.prefix_cache" and "\n" not in str(caught.value)
    assert "odd" in refusal.problem
    return refusal.problem


@pytest.mark.parametrize("way", WAYS)
def test_a_constructor(way: str) -> None:
    fail, cause = WAYS[way]

    class Odd(Lru):
        name = "odd"

        def __init__(self, options: PolicyOptions, engine: EngineView):
            fail()

    assert cause in deployed(Odd)


def test_a_constructor_that_does_not_build_its_base() -> None:
    class Odd(Lru):
        name = "odd"

        def __init__(self, options: PolicyOptions, engine: EngineView):
            self.mine = 1

    assert "does not call super().__init__(options, engine)" in deployed(Odd)


def test_a_class_that_builds_something_else() -> None:
    class Odd(Lru):
        name = "odd"

        def __new__(cls, *arguments: Any) -> Any:
            return object()

    assert "returned object" in deployed(Odd)


def test_a_policy_gets_an_engine_view_of_its_own() -> None:
    class Odd(Lru):
        name = "odd"

        def __init__(self, options: PolicyOptions, engine: EngineView):
            super().__init__(options, engine)
            object.__setattr__(engine, "block_size", 1)
            raise ValueError("its blocks are too small")

    assert "odd: its blocks are too small." in deployed(Odd)
    assert ENGINE.block_size == 16


@pytest.mark.parametrize("way", WAYS)
def test_a_default_and_a_validator_of_an_option(way: str) -> None:
    fail, cause = WAYS[way]

    class Odd(Lru):
        name = "odd"

        class Options(PolicyOptions):
            size: int = Field(default_factory=lambda: int(fail()))
            other: int = 0

            @field_validator("other")
            @classmethod
            def _other(cls, value: int) -> int:
                return int(fail())

    assert cause in deployed(Odd)
    assert cause in deployed(Odd, size=1, other=1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("hook", ["kvplug_choose_policy", "kvplug_deployment_loaded"])
def test_a_hook(hook: str, way: str) -> None:
    fail, cause = WAYS[way]

    class Plugin:
        @hookimpl
        def kvplug_choose_policy(self) -> str:
            return str(fail()) if hook == "kvplug_choose_policy" else "lru"

        @hookimpl
        def kvplug_deployment_loaded(self) -> None:
            fail()

        @hookimpl
        def kvplug_register_policies(self, registry: PolicyRegistry) -> None:
            registry.add(Lru)

    plugins = Plugins(entry_points=False)
    plugins.register(Plugin(), "own")
    with pytest.raises(DeploymentError) as caught:
        load_deployment({"prefix_cache": "auto"}, using=plugins)
    assert cause in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("way", WAYS)
def test_a_plugin_that_fails_to_load_is_left_out(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fail, cause = WAYS[way]

    class Entry:
        name = "own"

        def load(self) -> Any:
            fail()

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Entry()])
    broken = Plugins().registry.broken
    assert list(broken) == ["own"] and cause in broken["own"]


@pytest.mark.parametrize(
    ("declares", "problem"),
    [
        ({"exact": property(lambda self: True)}, "exact must be True or False"),
        ({"exact": 1}, "exact must be True or False"),
        ({"name": type("Text", (str,), {})("odd")}, "kind must be a Kind and name a str"),
        ({"name": "no name"}, "not a valid policy name"),
        ({"changes": 3}, "changes must be a str"),
        ({"supports": "everything"}, "supports must be a Set"),
        ({"requires": None}, "requires must be a Set"),
        ({"excludes": ["sequence"]}, "excludes must be a mapping"),
    ],
)
def test_a_class_that_declares_nonsense_is_not_registered(
    declares: dict[str, Any], problem: str
) -> None:
    odd = type("Odd", (Lru,), {"name": "odd", **declares})
    with pytest.raises(PluginError, match=problem):
        PolicyRegistry().add(odd)
