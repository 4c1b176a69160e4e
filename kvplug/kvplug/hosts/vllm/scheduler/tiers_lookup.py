"""What tiers hold that the books do not know: asked of them in a thread, with a deadline."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from queue import SimpleQueue

from kvplug.contract import Tier
from kvplug.tiers.causes import cause_of
from kvplug.tiers.hierarchy import ENTRIES
from kvplug.tiers.keys import KEY_BYTES
from kvplug.tiers.links import Health

SECONDS = 1.0
"""Seconds that a request waits for an answer; after that it computes what is not known."""

LISTING_SECONDS = 5.0
"""Seconds after a start that requests wait for what durable tiers held already."""

MOST = 8192
"""Chunks asked about for one request."""

FIRST_PART = 64
"""Chunks that a question begins with. Each further part is twice as large, and the first chunk that
no tier has ends it: what stands behind a gap is of no use. So a miss costs little, and of a long
text on a slow tier the beginning is known in time."""


@dataclass
class Question:
    """Chunks that some tiers are asked about.

    Attributes:
        keys: Their keys.
        until: Monotonic time after which nobody waits for the answer.
        found: Name of the first tier that has each, as far as that is known; None for no tier.
        answered: True once all tiers have answered, or failed to.
    """

    keys: Sequence[bytes]
    until: float
    found: list[str | None] = field(default_factory=list)
    answered: bool = False


class Lookups:
    """Asks tiers which chunks they have, and what durable ones held when they were opened.

    Args:
        tiers: Tiers by name, open, fastest first.
        failed: Called with a tier's name and a cause, in the thread.
    """

    def __init__(self, tiers: dict[str, Tier], failed: Callable[[str, str], None]):
        self._tiers = tiers
        self._asked = {n: t for n, t in tiers.items() if t.shared}
        self._failed = failed
        self._health = {name: Health() for name in self._asked}
        self._asking = ""
        self._questions: SimpleQueue[Question | None] = SimpleQueue()
        self._listed: SimpleQueue[tuple[str, bytes, int]] = SimpleQueue()
        self._stopping = False
        self._threads: list[threading.Thread] = []
        self._listing = any(t.durable and not t.shared for t in tiers.values())
        self._list_until = time.monotonic() + LISTING_SECONDS
        if self._asked:
            self._start(self._answer)
        if self._listing:
            self._start(self._list)

    def _start(self, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run, name="kvplug tiers", daemon=True)
        self._threads.append(thread)
        thread.start()

    @property
    def asks(self) -> bool:
        """True if there are tiers that hold what the books do not know, and that answer: one that
        failed or was late is left alone for a while, so that requests do not wait for it again and
        again."""
        now = time.monotonic()
        stuck = self._health.get(self._asking)
        if stuck is not None and stuck.failures:
            return False
        return any(not one.down(now) for one in self._health.values())

    @property
    def lists(self) -> bool:
        """True while requests should wait for what durable tiers held when they were opened."""
        return self._listing and time.monotonic() < self._list_until

    def late(self) -> None:
        """Take note that a question was not answered in time."""
        if (health := self._health.get(self._asking)) is not None:
            health.failed(time.monotonic())

    def ask(self, keys: Sequence[bytes]) -> Question:
        """Ask for chunks of one text."""
        question = Question(keys[:MOST], time.monotonic() + SECONDS)
        self._questions.put(question)
        return question

    def listed(self, most: int = 1 << 20) -> list[tuple[str, bytes, int]]:
        """Take tier, key and bytes of chunks that durable tiers held when they were opened."""
        found: list[tuple[str, bytes, int]] = []
        while len(found) < most and not self._listed.empty():
            found.append(self._listed.get())
        return found

    def close(self) -> None:
        """Stop, and close the tiers."""
        self._stopping = True
        self._questions.put(None)
        for thread in self._threads:
            thread.join(2.0)
        if not any(thread.is_alive() for thread in self._threads):
            for tier in self._tiers.values():
                with contextlib.suppress(Exception):
                    tier.close()

    def _answer(self) -> None:
        while (question := self._questions.get()) is not None:
            if self._stopping:
                return
            first, size = 0, FIRST_PART
            # Somebody who waits no longer need not be answered.
            while first < len(question.keys) and time.monotonic() < question.until:
                part = self._holders(question.keys[first : first + size], question.until)
                question.found = question.found + part
                if None in part:
                    break
                first, size = first + size, 2 * size
            unknown = len(question.keys) - len(question.found)
            question.found = question.found + [None] * unknown
            question.answered = True

    def _holders(self, keys: Sequence[bytes], until: float) -> list[str | None]:
        """First tier that has each key."""
        found: list[str | None] = [None] * len(keys)
        for name, tier in self._asked.items():
            if self._health[name].down(time.monotonic()):
                continue
            self._asking = name
            left = [i for i, one in enumerate(found) if one is None]
            try:
                asked = tier.has([keys[i] for i in left]) if left else []
                has = [bool(one) for one in islice(asked, len(left) + 1)]
                if len(has) != len(left):
                    raise TypeError(f"has() answered {len(has)} of {len(left)}")
                for i, here in zip(left, has, strict=True):
                    if here:
                        found[i] = name
                if time.monotonic() < until:
                    self._health[name].worked()
            except BaseException as error:
                self._health[name].failed(time.monotonic())
                self._failed(name, cause_of(error)[0])
            finally:
                self._asking = ""
        return found

    def _list(self) -> None:
        for name, tier in self._tiers.items():
            if not tier.durable or tier.shared:
                continue
            try:
                for key, size, _ in islice(tier.stored(), ENTRIES):
                    if self._stopping:
                        return
                    # The books count its bytes.
                    if type(key) is not bytes or len(key) != KEY_BYTES or type(size) is not int:
                        raise TypeError("stored() must yield keys and whole bytes")
                    if size > 0:
                        self._listed.put((name, key, size))
            except BaseException as error:
                self._failed(name, cause_of(error)[0])
        self._listing = False
