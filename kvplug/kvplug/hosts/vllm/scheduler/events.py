"""Events on their way to observers, and calls of plugin hooks that must not fail the engine."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from vllm.logger import init_logger

from kvplug.client_names import request_name
from kvplug.containment import STARTING, Contained, PolicyFailure
from kvplug.contract import Kind
from kvplug.deployment import Deployment
from kvplug.observe.events import Event, EventType
from kvplug.observe.log import EventLog
from kvplug.plain_text import LABEL, one_line
from kvplug.registry import plugins

logger = init_logger("vllm.kvplug")

MAX_HASHES = 64
"""Blocks that an event names."""


class Events:
    """Collects events of a step and delivers them after it; made only where someone observes.

    Args:
        deployment: The deployment; names the policies of events.
        log: The event log, or None.

    Attributes:
        step: Scheduler step that new events are stamped with.
        log: As given.
    """

    def __init__(self, deployment: Deployment, log: EventLog | None = None):
        self.step = 1
        self.log = log
        self._deployment = deployment
        self._events: list[Event] = []
        self._observers = plugins().callers("kvplug_event")
        self._contained: dict[str, Contained] = {}

    @property
    def active(self) -> bool:
        """True if somebody observes or a log is written."""
        return bool(self._observers) or self.log is not None

    def add(
        self,
        what: EventType,
        kind: Kind | None,
        count: int = 1,
        detail: str = "",
        *,
        request: str = "",
        blocks: Sequence[bytes] = (),
        facts: Mapping[str, Any] | None = None,
        policy: str | None = None,
    ) -> None:
        """Add an event of the current step.

        Args:
            what: Its type.
            kind: Kind of the policy it is of, or None.
            count: See `EventType`.
            detail: See `EventType`.
            request: Id of the request it happened to.
            blocks: Hashes of blocks; the first `MAX_HASHES` are named.
            facts: Further numbers and words.
            policy: Name of the policy; that of the deployment for the kind if None.
        """
        if not self.active:
            return
        if policy is None:
            choice = self._deployment.choice(kind) if kind is not None else None
            policy = choice.policy.name if choice is not None else ""
        self._events.append(
            Event(
                what,
                kind,
                policy,
                self.step,
                count,
                detail,
                request_name(request),
                tuple(bytes(one[:8]).hex() for one in blocks[:MAX_HASHES]),
                facts or {},
            )
        )

    def emit(self) -> None:
        """Deliver collected events; an observer that fails receives no more."""
        events, self._events = self._events, []
        if self.log is not None:
            self.log.put(events)
        if not self._observers:
            return
        for event in events:
            for name, caller in list(self._observers.items()):
                contained = self._contained.get(name)
                if contained is None:
                    contained = self._contained[name] = Contained(caller, name=_named(name))
                try:
                    contained.run(partial(caller, event=event))
                except PolicyFailure as failure:
                    del self._observers[name]
                    _log(name, "kvplug_event", failure)
                    logger.error("%s receives no further events", _named(name))


def call_each(callers: Mapping[str, Any], hook: str, **arguments: Any) -> list[str]:
    """Call a hook of each plugin, as the engine starts or stops; each gets arguments of its own.

    Returns:
        Names of the plugins that failed.
    """
    failed = []
    for name, caller in callers.items():
        own = copy.deepcopy(arguments)
        try:
            Contained(caller, STARTING, _named(name)).run(partial(caller, **own))
        except PolicyFailure as failure:
            _log(name, hook, failure)
            failed.append(name)
    return failed


def _named(plugin: str) -> str:
    return f"kvplug plugin {one_line(plugin, LABEL)!r}"


def _log(plugin: str, hook: str, failure: PolicyFailure) -> None:
    where = f" (at {failure.where})" if failure.where else ""
    logger.error(
        "%s failed in %s; the engine goes on: %s%s", _named(plugin), hook, failure.cause, where
    )
