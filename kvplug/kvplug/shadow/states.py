"""States of the shadow's control, and what becomes of watched answers."""

from __future__ import annotations

from enum import StrEnum


class ShadowState(StrEnum):
    """How much may be approximated.

    Attributes:
        FULL: What the deployment says.
        CAUTIOUS: A share of the requests, each of which is answered again.
        EXACT: Nothing.
    """

    FULL = "full"
    CAUTIOUS = "cautious"
    EXACT = "exact"


class ShadowResult(StrEnum):
    """What became of a watched answer.

    Attributes:
        COMPARED: It was answered again and compared.
        EXACT: It had not been approximated after all.
        SHORT: It has fewer than two tokens that could be compared.
        INEXACT: The shadow could not be exact, e.g. because the pool has no room for all of it.
        STOPPED: Traffic stopped its shadow several times.
        LOST: No server answered it again.
        FAILED: The shadow did not answer what it was given.
    """

    COMPARED = "compared"
    EXACT = "exact"
    SHORT = "short"
    INEXACT = "inexact"
    STOPPED = "stopped"
    LOST = "lost"
    FAILED = "failed"
