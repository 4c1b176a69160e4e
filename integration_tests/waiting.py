"""Waiting for the state of another process. A busy machine is late, so nothing asserts on a
moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SECONDS = 300


def wait_for(state: Callable[[], T], what: str, seconds: float = SECONDS) -> T:
    """Call until something true comes back, and return it.

    Args:
        state: What to call; an ``OSError`` (not listening yet) is as good as false.
        what: What is waited for, for the message.
        seconds: How long to wait at most.

    Raises:
        AssertionError: It did not come true in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        last: object
        try:
            last = found = state()
            if found:
                return found
        except OSError as error:
            last = error
        assert time.monotonic() < deadline, f"not in {seconds:.0f} s: {what}; last: {last!r}"
        time.sleep(0.1)
