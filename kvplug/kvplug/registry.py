"""The plugins of a process, and the policies they register by kind and name."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import logging
import re
from collections.abc import Iterator, Mapping, Set

import pluggy

from kvplug import hookspecs
from kvplug.containment import STARTING, Contained, PolicyFailure
from kvplug.contract import BASES, Kind, Policy, PolicyOptions
from kvplug.errors import PluginError
from kvplug.near_names import near, suggestion

logger = logging.getLogger("kvplug")

ENTRY_POINT_GROUP = "kvplug"
EXTRAS: dict[str, frozenset[tuple[Kind, str]]] = {
    "attention-memo": frozenset({(Kind.ATTENTION, "memo")}),
    "kvpress": frozenset({(Kind.SEQUENCE, "kvpress")}),
    "reuse-learned": frozenset({(Kind.REUSE, "credibility"), (Kind.REUSE, "compensate")}),
}
"""Policies that come with an extra of kvplug, by extra; not installed with kvplug alone."""

NAME = re.compile(r"[a-z][a-z0-9_]*")


class PolicyRegistry:
    """Policies by kind and name, in order of registration.

    Attributes:
        broken: Plugins that failed to load, name to cause. Reported with the refusal of an
            unknown policy, and by ``kvplug doctor``.
    """

    def __init__(self) -> None:
        self._policies: dict[tuple[Kind, str], type[Policy]] = {}
        self.broken: dict[str, str] = {}

    def add(self, policy: type[Policy], *, replace: bool = False) -> type[Policy]:
        """Register a policy class; returns it, so it can be used as a decorator.

        Args:
            policy: A concrete subclass of a kind's base class.
            replace: Allow taking over a name that is registered already.

        Raises:
            PluginError: The class is not a policy, incomplete or badly named, or the name is taken.
        """
        where = f"{getattr(policy, '__module__', '?')}.{getattr(policy, '__qualname__', policy)}"
        if not (inspect.isclass(policy) and issubclass(policy, Policy)):
            raise PluginError(
                f"{where} is not a policy class: subclass a base class of kvplug.contract"
            )
        missing = [a for a in ("kind", "name", "exact", "changes") if not hasattr(policy, a)]
        if missing:
            raise PluginError(f"{where} does not define: {', '.join(missing)}")
        base = BASES[policy.kind]
        if not issubclass(policy, base):
            raise PluginError(
                f"{where} has kind {policy.kind} but does not subclass {base.__name__}"
            )
        if abstract := getattr(policy, "__abstractmethods__", None):
            raise PluginError(f"{where} does not implement: {', '.join(sorted(abstract))}")
        if type(policy.name) is not str or not isinstance(policy.kind, Kind):
            raise PluginError(f"{where}: kind must be a Kind and name a str, both fixed")
        if not NAME.fullmatch(policy.name) or policy.name == "auto":
            raise PluginError(f"{where}: {policy.name!r} is not a valid policy name (a-z, 0-9, _)")
        if not isinstance(policy.exact, bool):
            raise PluginError(f"{where}.exact must be True or False, got {policy.exact!r}")
        for name, of in (("changes", str), ("supports", Set), ("requires", Set)):
            if not isinstance(getattr(policy, name), of):
                raise PluginError(f"{where}.{name} must be a {of.__name__}")
        if not isinstance(policy.excludes, Mapping):
            raise PluginError(f"{where}.excludes must be a mapping of policies to reasons")
        if not issubclass(policy.Options, PolicyOptions):
            raise PluginError(f"{where}.Options must subclass kvplug.contract.PolicyOptions")
        taken = self._policies.get((policy.kind, policy.name))
        if taken is not None and taken is not policy and not replace:
            raise PluginError(
                f"{where}: {policy.kind} policy {policy.name!r} is already registered by "
                f"{taken.__module__}.{taken.__qualname__}; choose another name or pass replace=True"
            )
        self._policies[policy.kind, policy.name] = policy
        return policy

    def get(self, kind: Kind, name: str) -> type[Policy] | None:
        """Return the policy class registered under a name, or None."""
        return self._policies.get((kind, name))

    def names(self, kind: Kind) -> list[str]:
        """List the names registered for a kind, sorted."""
        return sorted(n for k, n in self._policies if k is kind)

    def ready(self, kind: Kind, *given: str) -> list[str]:
        """List the names of policies that need no options but those ``given``, sorted."""
        return [
            name
            for name in self.names(kind)
            if not any(
                info.is_required() and option not in given
                for option, info in self._policies[kind, name].Options.model_fields.items()
            )
        ]

    def nearest(self, kind: Kind, name: str) -> list[str]:
        """List registered names similar to ``name``, most similar first."""
        return near(name, self.names(kind), 3, cutoff=0.5)

    def choose(self, kind: Kind, name: str) -> str:
        """The fix for a name that is not registered: the extra that brings it, or similar names;
        then all names."""
        extra, names = self.extra(kind, name), ", ".join(self.names(kind))
        first = suggestion(*self.nearest(kind, name))
        if extra is not None:
            first = f"pip install 'kvplug[{extra}]'. Otherwise "
        return first + (
            f"choose from {names}" if names else f"install a plugin with {kind} policies"
        )

    def extra(self, kind: Kind, name: str) -> str | None:
        """Name the extra of kvplug that brings a policy that is not registered, or None."""
        if (kind, name) in self._policies:
            return None
        return next((extra for extra, found in EXTRAS.items() if (kind, name) in found), None)

    def __iter__(self) -> Iterator[type[Policy]]:
        return iter(self._policies.values())

    def __len__(self) -> int:
        return len(self._policies)


class Plugins:
    """The loaded plugins of a process: pluggy's manager and the policies they registered."""

    def __init__(self, *, entry_points: bool = True) -> None:
        self.manager = pluggy.PluginManager("kvplug")
        self.manager.add_hookspecs(hookspecs)
        self.registry = PolicyRegistry()
        if entry_points:
            for entry in sorted(
                importlib.metadata.entry_points(group=ENTRY_POINT_GROUP),
                key=lambda e: (e.name != "builtin", e.name),
            ):
                self._load(entry)

    def _load(self, entry: importlib.metadata.EntryPoint) -> None:
        contained = Contained(entry, STARTING, f"kvplug plugin {entry.name!r}")
        try:
            contained.run(self._register_entry, entry)
        except PolicyFailure as failure:
            self.registry.broken[entry.name] = failure.cause
            logger.warning("kvplug plugin %r could not be loaded: %s", entry.name, failure.cause)

    def _register_entry(self, entry: importlib.metadata.EntryPoint) -> None:
        self.register(entry.load(), entry.name)

    def register(self, plugin: object, name: str | None = None) -> None:
        """Register a plugin and its policies; a failure leaves nothing registered.

        Raises:
            PluginError: The plugin implements an unknown hook or registers an invalid policy.
        """
        before = dict(self.registry._policies)
        known = self.manager.is_registered(plugin)
        try:
            self.manager.register(plugin, name)
            self.manager.check_pending()
            impl = [
                i
                for i in self.manager.hook.kvplug_register_policies.get_hookimpls()
                if i.plugin is plugin
            ]
            if impl:
                impl[0].function(registry=self.registry)
        except BaseException as error:
            self.registry._policies = before
            if not known and self.manager.is_registered(plugin):
                self.manager.unregister(plugin)
            if isinstance(error, pluggy.PluginValidationError):
                raise PluginError(str(error)) from error
            raise

    def callers(self, hook: str) -> dict[str, pluggy.HookCaller]:
        """Return one caller per plugin that implements a hook, so that failures stay apart."""
        registered = self.manager.get_plugins()
        return {
            str(self.manager.get_name(impl.plugin)): self.manager.subset_hook_caller(
                hook, registered - {impl.plugin}
            )
            for impl in getattr(self.manager.hook, hook).get_hookimpls()
        }


@functools.cache
def plugins() -> Plugins:
    """Return the plugins of this process, loaded on first use."""
    return Plugins()
