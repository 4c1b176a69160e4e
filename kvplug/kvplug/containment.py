"""Calls of what plugins bring: whatever they raise, return or never return, the caller goes on.

A host calls a policy through `Contained.call`. What the policy raises, ``SystemExit`` and
``asyncio.CancelledError`` among it, becomes a `PolicyFailure` with a cause of one line. A call that
is still running after its deadline is interrupted, and fails likewise.

Deadlines are watched by a thread of their own, so a call pays for a few assignments. The thread
counts its own ticks, not seconds: a process that was stopped, or a machine that stood still,
interrupts nothing. An overdue call is interrupted by an exception raised in its thread, at the next
instruction of Python; in the main thread a wait in the operating system (a sleep, a lock) is woken
for it by a signal. Code that holds the interpreter and never returns to it (a loop in C) cannot
be interrupted, nor can a wait in another thread than the main one.

An exception that a signal's handler raised, as for Ctrl-C, is no failure of the policy and passes.
"""

from __future__ import annotations

import contextlib
import ctypes
import dis
import functools
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any, NoReturn
from weakref import WeakSet

from kvplug.contract import Policy
from kvplug.counts import plain_counters
from kvplug.errors import KVPlugError
from kvplug.plain_text import label, message_of, raised_at, traceback_of, type_name

__all__ = ["ON_STEP", "ON_WORKER", "STARTING", "Contained", "ContainedPolicy", "PolicyFailure"]

logger = logging.getLogger("kvplug")

ON_STEP = 10.0
"""Seconds that a call in the scheduler may take."""

ON_WORKER = 60.0
"""Seconds that a call on a worker may take: the first may compile kernels."""

STARTING = 120.0
"""Seconds that a call at the engine's start or end may take: it may read and write files."""

TICK = 0.5
"""Seconds between two looks at the calls under way."""

WAKE = signal.SIGURG
"""Signal that wakes a wait in the main thread; without a handler the system ignores it."""


UNREADABLE = "(its text cannot be read)"
"""Stands for the message of an exception that has none."""


class PolicyFailure(KVPlugError):
    """What a plugin's code did instead of giving an answer.

    Args:
        cause: What happened, one line.
        where: Where it was raised, innermost call first, one line; empty if not known.
        problem: The cause without the type of a `ValueError`, which is how policies refuse.

    Attributes:
        cause: As given.
        where: As given.
        problem: As given.
    """

    def __init__(self, cause: str, where: str = "", problem: str = ""):
        super().__init__(cause)
        self.cause = cause
        self.where = where
        self.problem = problem or cause


class Overdue(BaseException):
    """Raised in a call that is past its deadline."""


class Contained:
    """Something of a plugin's that is called, one call at a time.

    Args:
        target: The object, a policy for one.
        deadline: Seconds after which a call is interrupted.

        name: What it is, for messages.

    Attributes:
        target: As given.
        deadline: As given; may be changed between calls.
        name: As given.
        running: Number of the call under way; 0 between calls.
        thread: Thread of the latest call.
        overdue: True once the call under way was interrupted.
        lock: Held by whoever sets or takes back an interruption.
    """

    def __init__(self, target: Any, deadline: float = ON_STEP, name: str = "a plugin"):
        self.target = target
        self.name = name
        self.deadline = deadline
        self.running = 0
        self.thread = 0
        self.overdue = False
        self.lock = threading.Lock()
        self._calls = 0
        _watch(self)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the target.

        Raises:
            PolicyFailure: It raised something, or was interrupted at its deadline.
        """
        return self.run(_called, self.target, method, arguments)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that calls the target, as `call` does; it may check the answer too.

        Raises:
            PolicyFailure: It raised something, or was interrupted at its deadline.
        """
        self.thread = threading.get_ident()
        failure = None
        self.running = self._calls = self._calls + 1
        try:
            answer = function(*arguments)
        except BaseException as error:
            failure = error
        self.running = 0
        if failure is None and not self.overdue:
            return answer
        # The interruption may be on its way still, and then arrives here.
        try:
            _disarm(self)
        except Overdue:
            self.overdue = False
        self._raise(failure)

    def _raise(self, failure: BaseException | None) -> NoReturn:
        # `isinstance` would ask the exception for its class.
        if failure is None or issubclass(type(failure), Overdue):
            failure = None
            raise PolicyFailure(f"no answer within {self.deadline:g} s")
        if issubclass(type(failure), PolicyFailure) or _of_a_signal(failure):
            raise failure
        name, message = type_name(failure), UNREADABLE
        with contextlib.suppress(PolicyFailure):
            message = self.run(_text_of, failure)
        cause = f"{name}: {message}" if message else name
        problem = message if issubclass(type(failure), ValueError) else ""
        where = raised_at(failure)
        # Its frames hold whatever the policy was given.
        failure = None
        raise PolicyFailure(cause, where, problem)


def _text_of(error: BaseException) -> str:
    """The message of an exception. One whose text raises another like itself must not be asked
    for that one's: so on until the stack ends."""
    try:
        return message_of(error)
    except BaseException as other:
        if issubclass(type(other), Overdue) or _of_a_signal(other):
            raise
        return UNREADABLE


def _called(target: Any, method: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(target, method)(*arguments)


class ContainedPolicy(Contained):
    """A policy object, contained.

    What it declares is read once: what it declares later changes nothing.

    Args:
        policy: The policy.
        deadline: Seconds after which a call is interrupted.
        log: Takes what is said about its failures.

    Attributes:
        kind: The policy's kind.
        policy_name: The policy's name.
        exact: The policy's ``exact``.
    """

    target: Policy

    def __init__(self, policy: Policy, deadline: float = ON_STEP, log: logging.Logger = logger):
        super().__init__(policy, deadline)
        self._log = log
        self.kind, self.policy_name, self.exact = "", type_name(policy), False
        with contextlib.suppress(PolicyFailure):
            self.kind, self.policy_name, self.exact = self.run(self._declared)
        self.name = f"{self.kind} policy {self.policy_name!r}"
        self._names: set[str] = set()
        self._no_counters = False
        self._left_out = False

    def _declared(self) -> tuple[str, str, bool]:
        policy: Any = self.target
        kind, name = getattr(policy, "kind", ""), getattr(policy, "name", "")
        exact = getattr(policy, "exact", False) is True
        return label(kind), label(name) or type_name(policy), exact

    def counters(self) -> dict[str, float]:
        """Return the policy's own counters, as `plain_counters` takes them; none any more once it
        failed to give them."""
        if self._no_counters:
            return {}
        try:
            found, left_out = self.run(self._counters)
        except PolicyFailure as failure:
            self._no_counters = True
            self.log("failed in counters(); they are left out", failure)
            return {}
        if left_out and not self._left_out:
            self._left_out = True
            self.warn(f"counters left out: {left_out}")
        counters: dict[str, float] = found
        return counters

    def _counters(self) -> tuple[dict[str, float], str]:
        return plain_counters(self.target.counters(), self._names)

    def warn(self, what: str) -> None:
        """Log something that is put right without the policy's help."""
        self._log.warning("%s: %s", self.name, what)

    def log(self, what: str, failure: PolicyFailure) -> None:
        """Log a failure: what the policy failed in and what happens now, the cause, and where it
        was raised."""
        where = f" (at {failure.where})" if failure.where else ""
        self._log.error("%s %s: %s%s", self.name, what, failure.cause, where)


# -- deadlines -------------------------------------------------------------------------------------

_watched: WeakSet[Contained] = WeakSet()
_watcher: threading.Thread | None = None
_starting = threading.Lock()


def _watch(contained: Contained) -> None:
    """Watch the deadlines of something contained, in a thread that is started on first use."""
    global _watcher
    with _starting:
        _watched.add(contained)
        if _watcher is None or not _watcher.is_alive():
            _watcher = threading.Thread(target=_look, name="kvplug deadlines", daemon=True)
            _watcher.start()
            if threading.current_thread() is threading.main_thread():
                _listen()


def _listen() -> None:
    if signal.getsignal(WAKE) in (signal.SIG_DFL, signal.SIG_IGN):
        signal.signal(WAKE, _woken)


def _woken(number: int, frame: FrameType | None) -> None:
    """Do nothing: that a handler runs is what ends a wait."""


def _look() -> None:
    """Interrupt calls that are seen at too many ticks."""
    seen: dict[int, tuple[int, int]] = {}
    while True:
        time.sleep(TICK)
        with _starting:
            watched = list(_watched)
        under_way: dict[int, tuple[int, int]] = {}
        for contained in watched:
            call = contained.running
            if not call:
                continue
            before, ticks = seen.get(id(contained), (call, 0))
            ticks = ticks + 1 if before == call else 1
            under_way[id(contained)] = call, ticks
            if ticks * TICK > contained.deadline:
                _interrupt(contained, call)
        seen = under_way
        watched.clear()


def _interrupt(contained: Contained, call: int) -> None:
    first = not contained.overdue
    with contained.lock:
        # Before it is looked at: a call that ends now sees it, and waits for the lock.
        contained.overdue = True
        if contained.running != call:
            contained.overdue = False
            return
        _raise_in(contained.thread, Overdue)
    if contained.thread == threading.main_thread().ident:
        signal.pthread_kill(contained.thread, WAKE)
    if first:
        logger.error(
            "%s has not answered for %g s and is interrupted", contained.name, contained.deadline
        )


def _disarm(contained: Contained) -> None:
    """Take back an interruption that has not arrived yet."""
    with contained.lock:
        if contained.overdue:
            _raise_in(contained.thread, None)
        contained.overdue = False


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise an exception at the next instruction of a thread; None takes one back."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(error) if error is not None else None
    )


# -- signals ---------------------------------------------------------------------------------------

_RAISED = frozenset({"RAISE_VARARGS", "RERAISE", "RETURN_GENERATOR", "YIELD_VALUE"})
"""Instructions that raise what Python code gave them; a signal arrives at others."""


def _of_a_signal(error: BaseException) -> bool:
    """True if a signal's handler raised an exception, in whatever code it came upon."""
    if threading.current_thread() is not threading.main_thread():
        return False
    handlers = set(_handlers())
    trace = last = traceback_of(error)
    while trace is not None:
        if trace.tb_frame.f_code in handlers:
            return True
        last, trace = trace, trace.tb_next
    # Python's own handler of Ctrl-C leaves no frame.
    if type(error) is not KeyboardInterrupt or last is None:
        return False
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return False
    instruction = dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]]
    return instruction not in _RAISED


def _handlers() -> Iterator[CodeType]:
    """The code of every signal handler that is a Python function."""
    for number in signal.valid_signals():
        handler: Any = signal.getsignal(number)
        while isinstance(handler, functools.partial):
            handler = handler.func
        handler = getattr(handler, "__func__", handler)
        code = getattr(handler, "__code__", None)
        if isinstance(code, CodeType) and handler is not _woken:
            yield code
