"""Sessions about to return: how long they pause, learned, and whose chunks are needed soon."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

SESSIONS = 4096
"""Sessions remembered; the one that ended longest ago goes first."""

KEYS = 1 << 17
"""Keys of chunks that all sessions together may keep; a longer text keeps its first ones."""

EARLY = 0.5
"""Part of the expected pause after which a session's return is prepared."""

LATE = 8.0
"""Expected pauses after which a session counts as not coming back."""

LEARNED = 0.3
"""Weight of a session's latest pause in what is expected of it."""

FADE = 0.98
"""What is left of the counts of returns with each that is added."""


@dataclass(slots=True)
class _Session:
    """A session: its chunks, its pauses (mean of logarithms), and its current pause.

    ``due`` and ``over`` are the times at which its return is prepared, and given up.
    """

    keys: Sequence[bytes] = ()
    pause: float | None = None
    ended: float = 0.0
    away: bool = False
    prepared: bool = False
    turn: int = 0
    over: float = field(default=math.inf)


class Sessions:
    """Tells, once for each pause, that a session is about to return.

    A session's next pause is expected to be like its own latest ones, or, after its first request,
    like all sessions'. Its return is prepared after half of that. How often sessions then did
    return says how likely it is.
    """

    def __init__(self) -> None:
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._due: list[tuple[float, int, str]] = []
        self._pause: float | None = None
        self._kept = 0
        self._returned = self._prepared = 0.0

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def probability(self) -> float:
        """Share of prepared sessions that did return; one half before any."""
        return (self._returned + 1) / (self._prepared + 2)

    def began(self, name: str, now: float) -> None:
        """Take note that a session's next request is there."""
        session = self._sessions.get(name)
        if session is None or not session.away:
            return
        pause = math.log(max(1e-3, now - session.ended))
        session.pause = _mean(session.pause, pause)
        self._pause = _mean(self._pause, pause)
        self._settle(session, came=True)
        session.away = False

    def ended(self, name: str, keys: Sequence[bytes], now: float) -> None:
        """Take note that a session's request ended, and of its text's chunks, in text order."""
        session = self._sessions.pop(name, None) or _Session()
        self._sessions[name] = session
        self._kept -= len(session.keys)
        session.keys = tuple(keys[: KEYS // 8])
        self._kept += len(session.keys)
        session.ended, session.away, session.prepared = now, True, False
        session.turn += 1
        expected = session.pause if session.pause is not None else self._pause
        if expected is not None:
            session.over = now + LATE * math.exp(expected)
            heappush(self._due, (now + EARLY * math.exp(expected), session.turn, name))
        while len(self._sessions) > SESSIONS or self._kept > KEYS:
            _, old = self._sessions.popitem(last=False)
            self._kept -= len(old.keys)
            self._settle(old, came=False)
        if len(self._due) > 4 * SESSIONS:
            self._due = [entry for entry in self._due if self._waits(entry)]
            self._due.sort()

    def due(self, now: float) -> list[Sequence[bytes]]:
        """Return the chunks of sessions that are about to return, each session once a pause."""
        found = []
        while self._due and self._due[0][0] <= now:
            entry = heappop(self._due)
            if not self._waits(entry):
                continue
            session = self._sessions[entry[2]]
            if session.prepared:
                self._settle(session, came=False)
                continue
            session.prepared = True
            self._prepared = self._prepared * FADE + 1.0
            self._returned *= FADE
            found.append(session.keys)
            heappush(self._due, (session.over, session.turn, entry[2]))
        return found

    def _waits(self, entry: tuple[float, int, str]) -> bool:
        session = self._sessions.get(entry[2])
        return session is not None and session.away and session.turn == entry[1]

    def _settle(self, session: _Session, came: bool) -> None:
        """Count what became of a session whose return was prepared."""
        if session.prepared and came:
            self._returned += 1.0
        session.prepared = False


def _mean(before: float | None, latest: float) -> float:
    return latest if before is None else before + LEARNED * (latest - before)
