"""Every hook a plugin may implement.

Hooks register and observe. On the engine's step the host calls methods of the policy objects
that were chosen, never a hook: a pluggy call costs about 2 us, a method 0.06 us.

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

    ``engine`` says what is known where it is called: the whole config inside the engine, the flags
    of the file in ``kvplug check``. ``None`` leaves the choice to the next plugin; if none chooses,
    the deployment is refused.
    """


@hookspec
def kvplug_deployment_loaded(deployment: Deployment) -> None:
    """A deployment was parsed and every policy in it exists. Raise ValueError to refuse it.

    Every process that needs the deployment parses it, so this may be called several times.
    """


@hookspec
def kvplug_engine_started(engine: EngineView) -> None:
    """The engine is up, the policies are bound and no request has been scheduled yet."""


@hookspec
def kvplug_event(event: Event) -> None:
    """Something happened: evicted, freed, refused, fallen back. In batches, at most once a step."""


@hookspec
def kvplug_engine_stopping(reports: list[PolicyReport]) -> None:
    """The engine stops; ``reports`` is what each active policy did."""
