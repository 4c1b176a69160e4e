"""Every hook a plugin may implement.

Hooks register and observe. On the engine's step the host calls methods of the chosen policy
objects, never a hook: a pluggy call costs about 2 us, a method 0.06 us.

A plugin is a module (or object) with functions marked ``@kvplug.hookimpl``, named by an entry
point in the group ``kvplug``. Built-in policies come in the same way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from kvplug.contract import EngineView, Kind, PolicyReport
    from kvplug.deployment import Deployment
    from kvplug.observe.events import Event
    from kvplug.registry import PolicyRegistry

hookspec = pluggy.HookspecMarker("kvplug")


@hookspec
def kvplug_register_policies(registry: PolicyRegistry) -> None:
    """Add policies: ``registry.add(MyPolicy)``. Called once per process, before anything runs."""


@hookspec(firstresult=True)
def kvplug_choose_policy(kind: Kind, engine: EngineView) -> str | None:
    """Name the policy of a kind that the deployment leaves open with ``use: auto``.

    Inside the engine, ``engine`` is the full view of its config, but for ``num_blocks``, which is
    not known yet; in ``kvplug check`` it holds what the flags of the file say. ``None`` leaves the
    choice to the next plugin; if no plugin chooses, the deployment is refused.
    """


@hookspec
def kvplug_deployment_loaded(deployment: Deployment) -> None:
    """Inspect a parsed deployment; raise ValueError to refuse it, with the message users read.

    Every policy in it exists and its options are valid. Every process that needs the deployment
    parses it, so this may be called several times.
    """


@hookspec
def kvplug_engine_started(engine: EngineView) -> None:
    """Called when the policies are bound, before the first request is scheduled.

    ``engine`` is the full view, ``num_blocks`` included. An exception is logged and stops nothing.
    """


@hookspec
def kvplug_event(event: Event) -> None:
    """Observe an event; see `EventType` for all of them.

    Called in the scheduler after the step, once per event. Evictions that made room for one request
    are one event. A plugin that raises receives no further events of that engine.
    """


@hookspec
def kvplug_engine_stopping(reports: list[PolicyReport]) -> None:
    """Called when the engine stops, with one report per active policy."""
