"""Events on their way to observers, and calls of plugin hooks that must not fail the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.logger import init_logger

from kvplug.contract import Kind
from kvplug.deployment import Deployment
from kvplug.observe.events import Event, EventType
from kvplug.registry import plugins

logger = init_logger("vllm.kvplug")


class Events:
    """Collects events of a step and delivers them after it; made only where someone observes.

    Args:
        deployment: The deployment; names the policies of events.

    Attributes:
        step: Scheduler step that new events are stamped with.
    """

    def __init__(self, deployment: Deployment):
        self.step = 1
        self._deployment = deployment
        self._events: list[Event] = []
        self._observers = plugins().callers("kvplug_event")

    def add(self, what: EventType, kind: Kind | None, count: int = 1, detail: str = "") -> None:
        """Add an event of the current step."""
        if not self._observers:
            return
        choice = self._deployment.choice(kind) if kind is not None else None
        name = choice.policy.name if choice is not None else ""
        self._events.append(Event(what, kind, name, self.step, count, detail))

    def emit(self) -> None:
        """Deliver collected events; an observer that fails receives no more."""
        events, self._events = self._events, []
        for event in events:
            for name in call_each(self._observers, "kvplug_event", event=event):
                del self._observers[name]
                logger.error("kvplug plugin %r receives no further events", name)


def call_each(callers: Mapping[str, Any], hook: str, **arguments: Any) -> list[str]:
    """Call a hook of each plugin; returns the names of those that failed."""
    failed = []
    for name, caller in callers.items():
        try:
            caller(**arguments)
        except Exception:
            logger.exception("kvplug plugin %r failed in %s; the engine goes on", name, hook)
            failed.append(name)
    return failed
