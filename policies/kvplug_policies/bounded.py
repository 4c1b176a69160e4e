"""Calls of a server's client that end in time, whatever the server does."""

from __future__ import annotations

import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvplug.contract import TierError

__all__ = ["Bounded", "require_package"]


def require_package(module: str, extra: str) -> None:
    """Refuse a tier whose client is not installed.

    Raises:
        ValueError: It is not; the message says how to install it.
    """
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise ValueError(
            f"its client, the Python package {module}, is not installed: "
            f"pip install 'kvplug[{extra}]'"
        )


class _Call:
    def __init__(self, function: Callable[..., Any], arguments: Sequence[Any]):
        self.function = function
        self.arguments = arguments
        self.done = threading.Event()
        self.answer: Any = None
        self.error: BaseException | None = None

    def result(self, seconds: float) -> Any:
        if not self.done.wait(max(0.0, seconds)):
            raise TierError("too slow")
        if self.error is not None:
            raise self.error
        return self.answer


class Bounded:
    """Threads that call a client, so that whoever waits for an answer need not wait for ever.

    A call that is given up goes on in its thread until the client returns. While all threads are
    taken by such calls, further ones fail as too slow.

    Args:
        name: Name of the threads.
        threads: Most calls at once.
        timeout: Seconds that a caller waits.
    """

    def __init__(self, name: str, threads: int, timeout: float):
        self.timeout = timeout
        self._closed = False
        self._free = threading.Semaphore(threads)
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"kvplug {name}", daemon=True)
            for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function, and return its answer.

        Raises:
            TierError: ``too slow``; or what the function raised.
        """
        (answer,) = self.run_all([(function, *arguments)])
        if isinstance(answer, TierError):
            raise answer
        return answer

    def run_all(self, calls: Iterable[Sequence[Any]]) -> list[Any]:
        """Call functions side by side, all within the time of one call.

        Args:
            calls: A function and its arguments, each.

        Returns:
            Their answers, in order; a `TierError` in place of one that raised it or was too slow.
        """
        if self._closed:
            return [TierError("closed") for _ in calls]
        end = time.monotonic() + self.timeout
        started: list[_Call | TierError] = []
        for function, *arguments in calls:
            if not self._free.acquire(timeout=max(0.0, end - time.monotonic())):
                started.append(TierError("too slow", f"no answer within {self.timeout:g} s"))
                continue
            call = _Call(function, arguments)
            started.append(call)
            self._calls.put(call)
        return [self._answer(one, end) for one in started]

    def _answer(self, one: _Call | TierError, end: float) -> Any:
        if isinstance(one, TierError):
            return one
        try:
            return one.result(end - time.monotonic())
        except TierError as error:
            detail = str(error).removeprefix(error.cause).lstrip(": ")
            if error.cause == "too slow" and not detail:
                return TierError("too slow", f"no answer within {self.timeout:g} s")
            return error

    def close(self) -> None:
        """End the threads once their calls return. Idempotent."""
        if not self._closed:
            self._closed = True
            for _ in self._threads:
                self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call.answer = call.function(*call.arguments)
            except BaseException as error:
                call.error = error
            self._free.release()
            call.done.set()
            # What it was given and what it answered is not this thread's to keep.
            del call
