"""What a tier or a codec failed for, in words: whatever its exception does when it is asked."""

from __future__ import annotations

from kvplug.contract import CorruptPayload, TierError
from kvplug.plain_text import label, message_of, type_name

__all__ = ["cause_of"]


def cause_of(error: BaseException) -> tuple[str, str]:
    """Return a few words for a failure, and what it says; never raises.

    A thread that ends over an exception's own text would leave requests waiting.

    Args:
        error: What was raised.
    """
    cause, detail = type_name(error), "(its text cannot be read)"
    try:
        if isinstance(error, TierError | CorruptPayload):
            own = getattr(error, "cause", None)
            if isinstance(own, str):
                cause = label(own) or cause
        detail = message_of(error)
    except BaseException:
        return cause, detail
    return cause, detail
