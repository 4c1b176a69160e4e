"""Text that others made, as one bounded line: what plugins say goes into logs and labels."""

from __future__ import annotations

import re
from types import TracebackType

__all__ = [
    "CAUSE",
    "LABEL",
    "label",
    "message_of",
    "one_line",
    "raised_at",
    "traceback_of",
    "type_name",
    "without_logins",
]

CAUSE = 600
"""Longest message of an exception, in characters."""

LABEL = 64
"""Longest name of a counter or cause of a refusal, in characters."""

_FRAMES = 6

_LOGIN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s'\"]*@")


def one_line(text: str, limit: int) -> str:
    """Return a text as one line of printable characters.

    Line breaks, control characters, lone surrogates and marks that change the direction of writing
    become spaces; runs of spaces become one.

    Args:
        text: The text; a subclass of ``str`` is read as the ``str`` it holds.
        limit: Most characters; a longer text ends with ``...``.
    """
    plain = str.__getitem__(text, slice(0, 2 * limit))
    plain = "".join(c if c.isprintable() else " " for c in plain)
    plain = " ".join(plain.split())
    if len(plain) > limit or str.__len__(text) > 2 * limit:
        return plain[: max(0, limit - 3)] + "..."
    return plain


def without_logins(text: str) -> str:
    """Return a text with ``***`` for the user and the password of every URL in it."""
    return _LOGIN.sub(r"\1***@", text)


def label(text: str) -> str:
    """Return a text as the name of a counter: one line, without colons, of `LABEL` characters."""
    return one_line(str.replace(str.__getitem__(text, slice(0, 4 * LABEL)), ":", " "), LABEL)


def message_of(error: BaseException) -> str:
    """Return the message of an exception, as one line.

    Calls the exception's own ``__str__``, which may raise anything.
    """
    return one_line(str(error), CAUSE)


def traceback_of(error: BaseException) -> TracebackType | None:
    """Return an exception's traceback, without asking its class."""
    found: TracebackType | None = BaseException.__dict__["__traceback__"].__get__(error)
    return found


def raised_at(error: BaseException) -> str:
    """Return where an exception was raised, innermost call first, as one line.

    Reads neither source files nor anything of the exception's own class.
    """
    frames: list[str] = []
    first: TracebackType | None = traceback_of(error)
    # The outermost frame is the one that caught it.
    trace = first.tb_next if first is not None else None
    while trace is not None:
        code = trace.tb_frame.f_code
        place = f"{one_line(code.co_filename, 200)}:{trace.tb_lineno}"
        frames.append(f"{place} in {one_line(code.co_name, LABEL)}")
        # A recursion has thousands.
        del frames[:-_FRAMES]
        trace = trace.tb_next
    return " < ".join(reversed(frames))


def type_name(thing: object) -> str:
    """Return the name of a thing's class as one line, without asking the class."""
    name: str = type.__dict__["__name__"].__get__(type(thing))
    return one_line(name, LABEL)
