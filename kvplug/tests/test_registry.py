"""What a plugin may register, and what becomes of one that fails."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

import kvplug
from kvplug.contract import (
    Kind,
    Policy,
    PolicyOptions,
    PrefixCachePolicy,
    Released,
    SequencePolicy,
)
from kvplug.errors import PluginError
from kvplug.registry import EXTRAS, Plugins, PolicyRegistry


class Good(PrefixCachePolicy):
    name = "good"
    changes = "the order"

    def on_release(self, released: Released) -> None: ...

    def on_hit(self, ids: Sequence[int]) -> None: ...

    def on_remove(self, ids: Sequence[int]) -> None: ...

    def victims(self, n: int) -> Sequence[int]:
        return []


class Other(Good):
    name = "other"


def variant(**attributes: Any) -> type[Good]:
    return type("Variant", (Good,), {"__module__": "acme", **attributes})


@pytest.fixture
def registry() -> PolicyRegistry:
    return PolicyRegistry()


def test_policies_are_found_by_kind_and_name(registry: PolicyRegistry) -> None:
    assert registry.add(Other) is Other
    registry.add(Good)
    assert registry.get(Kind.PREFIX_CACHE, "good") is Good
    assert registry.get(Kind.SEQUENCE, "good") is None
    assert registry.names(Kind.PREFIX_CACHE) == ["good", "other"]
    assert list(registry) == [Other, Good]
    assert len(registry) == 2


def test_policies_that_need_more_options_are_not_ready(registry: PolicyRegistry) -> None:
    class Needs(PolicyOptions):
        path: str

    registry.add(Good)
    registry.add(variant(name="needs", Options=Needs))
    assert registry.names(Kind.PREFIX_CACHE) == ["good", "needs"]
    assert registry.ready(Kind.PREFIX_CACHE) == ["good"]
    assert registry.ready(Kind.PREFIX_CACHE, "path") == ["good", "needs"]
    assert registry.nearest(Kind.PREFIX_CACHE, "goood") == ["good"]
    assert registry.nearest(Kind.PREFIX_CACHE, "zzz") == []


def test_the_extra_of_a_policy_is_named_while_it_is_not_registered(
    registry: PolicyRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXTRAS, "acme", frozenset({(Kind.PREFIX_CACHE, "good")}))
    assert registry.extra(Kind.PREFIX_CACHE, "good") == "acme"
    assert registry.extra(Kind.SEQUENCE, "good") is None
    assert registry.extra(Kind.PREFIX_CACHE, "other") is None
    registry.add(Good)
    assert registry.extra(Kind.PREFIX_CACHE, "good") is None


class Half(SequencePolicy):
    name = "half"
    changes = "too little"


class Bare(Policy):
    pass


class Liar(Good):
    kind = Kind.SEQUENCE


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        (42, "?.42 is not a policy class: subclass a base class of kvplug.contract"),
        (dict, "builtins.dict is not a policy class: subclass a base class of kvplug.contract"),
        (Bare, "test_registry.Bare does not define: kind, name, exact, changes"),
        (Half, "test_registry.Half does not implement: window"),
        (
            variant(name="Bad-Name"),
            "acme.Variant: 'Bad-Name' is not a valid policy name (a-z, 0-9, _)",
        ),
        (variant(name="auto"), "acme.Variant: 'auto' is not a valid policy name (a-z, 0-9, _)"),
        (variant(name=""), "acme.Variant: '' is not a valid policy name (a-z, 0-9, _)"),
        (
            variant(Options=dict),
            "acme.Variant.Options must subclass kvplug.contract.PolicyOptions",
        ),
    ],
)
def test_what_is_no_policy_is_refused(registry: PolicyRegistry, policy: Any, sentence: str) -> None:
    with pytest.raises(PluginError) as caught:
        registry.add(policy)
    assert str(caught.value) == sentence
    assert len(registry) == 0


def test_a_kind_that_is_not_the_base_is_refused(registry: PolicyRegistry) -> None:
    with pytest.raises(
        PluginError, match="Liar has kind sequence but does not subclass SequencePolicy"
    ):
        registry.add(Liar)


def test_a_taken_name_is_refused_unless_replaced(registry: PolicyRegistry) -> None:
    registry.add(Good)
    registry.add(Good)
    usurper = variant()
    with pytest.raises(PluginError) as caught:
        registry.add(usurper)
    assert str(caught.value) == (
        "acme.Variant: prefix_cache policy 'good' is already registered by test_registry.Good; "
        "choose another name or pass replace=True"
    )
    assert registry.get(Kind.PREFIX_CACHE, "good") is Good
    registry.add(usurper, replace=True)
    assert registry.get(Kind.PREFIX_CACHE, "good") is usurper
    assert len(registry) == 1


# -- plugins -----------------------------------------------------------------------------------


class GoodPlugin:
    @kvplug.hookimpl
    def kvplug_register_policies(self, registry: PolicyRegistry) -> None:
        registry.add(Good)


class FailsHalfway:
    @kvplug.hookimpl
    def kvplug_register_policies(self, registry: PolicyRegistry) -> None:
        registry.add(Other)
        registry.add(variant(), replace=True)
        raise RuntimeError("no licence")

    @kvplug.hookimpl
    def kvplug_event(self, event: object) -> None:
        raise AssertionError("called though its registration failed")


class UnknownHook:
    @kvplug.hookimpl
    def kvplug_register_policies(self, registry: PolicyRegistry) -> None:
        registry.add(Other)

    @kvplug.hookimpl
    def kvplug_evnt(self, event: object) -> None: ...


def test_a_failed_registration_is_undone_whole() -> None:
    plugins = Plugins(entry_points=False)
    plugins.register(GoodPlugin(), "good")
    with pytest.raises(RuntimeError, match="no licence"):
        plugins.register(FailsHalfway(), "halfway")
    assert list(plugins.registry) == [Good]
    assert [name for name, _ in plugins.manager.list_name_plugin()] == ["good"]
    plugins.manager.hook.kvplug_event(event=None)
    plugins.register(UnknownHookMended(), "halfway")
    assert plugins.registry.names(Kind.PREFIX_CACHE) == ["good", "other"]


class UnknownHookMended:
    @kvplug.hookimpl
    def kvplug_register_policies(self, registry: PolicyRegistry) -> None:
        registry.add(Other)


def test_an_unknown_hook_is_refused_by_name() -> None:
    plugins = Plugins(entry_points=False)
    with pytest.raises(PluginError, match="unknown hook 'kvplug_evnt'"):
        plugins.register(UnknownHook(), "typo")
    assert len(plugins.registry) == 0
    assert plugins.manager.list_name_plugin() == []


def test_a_hook_with_an_unknown_argument_is_refused() -> None:
    class Asks:
        @kvplug.hookimpl
        def kvplug_event(self, event: object, weather: str) -> None: ...

    plugins = Plugins(entry_points=False)
    with pytest.raises(PluginError, match="weather"):
        plugins.register(Asks(), "asks")
    plugins.manager.hook.kvplug_event(event=None)
    assert plugins.manager.list_name_plugin() == []


def test_registering_a_plugin_twice_is_refused_and_changes_nothing() -> None:
    plugins, plugin = Plugins(entry_points=False), GoodPlugin()
    plugins.register(plugin, "good")
    with pytest.raises(ValueError, match="already registered"):
        plugins.register(plugin, "again")
    assert [name for name, _ in plugins.manager.list_name_plugin()] == ["good"]
    assert list(plugins.registry) == [Good]


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The entry points of the group, to fill."""
    found: list[Any] = []

    def entry_points(*, group: str) -> list[Any]:
        assert group == "kvplug"
        return found

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    yield found


def entry(name: str, plugin: object) -> Any:
    def load() -> object:
        if isinstance(plugin, Exception):
            raise plugin
        return plugin

    return SimpleNamespace(name=name, load=load)


def test_a_broken_plugin_is_recorded_and_the_others_load(
    entries: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    entries += [
        entry("absent", ModuleNotFoundError("No module named 'acme'")),
        entry("halfway", FailsHalfway()),
        entry("typo", UnknownHook()),
        entry("works", GoodPlugin()),
    ]
    plugins = Plugins()
    assert list(plugins.registry) == [Good]
    assert plugins.registry.broken["absent"] == "ModuleNotFoundError: No module named 'acme'"
    assert plugins.registry.broken["halfway"] == "RuntimeError: no licence"
    assert "kvplug_evnt" in plugins.registry.broken["typo"]
    assert "\n" not in plugins.registry.broken["typo"]
    assert sorted(plugins.registry.broken) == ["absent", "halfway", "typo"]
    assert "kvplug plugin 'absent' could not be loaded" in caplog.text


def test_the_builtin_plugin_loads_first_so_others_may_replace_its_policies(
    entries: list[Any],
) -> None:
    usurper = variant()

    class Replaces:
        @kvplug.hookimpl
        def kvplug_register_policies(self, registry: PolicyRegistry) -> None:
            registry.add(usurper, replace=True)

    entries += [entry("acme", Replaces()), entry("builtin", GoodPlugin())]
    registry = Plugins().registry
    assert registry.get(Kind.PREFIX_CACHE, "good") is usurper
    assert registry.broken == {}


def test_the_installed_builtin_plugin_is_no_exception() -> None:
    (builtin,) = importlib.metadata.entry_points(group="kvplug", name="builtin")
    plugins = Plugins()
    assert "builtin" not in plugins.registry.broken
    assert plugins.manager.get_plugin("builtin") is builtin.load()


def test_each_plugin_is_called_on_its_own() -> None:
    heard: list[str] = []

    class Listener:
        def __init__(self, name: str):
            self.name = name

        @kvplug.hookimpl
        def kvplug_engine_stopping(self) -> None:
            heard.append(self.name)

    loaded = Plugins(entry_points=False)
    for name in ("a", "b"):
        loaded.register(Listener(name), name)
    callers = loaded.callers("kvplug_engine_stopping")
    assert set(callers) == {"a", "b"}
    callers["b"](reports=[])
    assert heard == ["b"]
    assert loaded.callers("kvplug_event") == {}
