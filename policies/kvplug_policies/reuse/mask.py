"""Compares the attention masks under which segments were computed and would be used.

A template says what each token of a segment could see: ``causal`` everything before it,
``window:N`` the N latest tokens with itself, and ``+bidirectional:A-B,C-D`` adds that the tokens A
to B (both included, counted from the segment's first) see each other. Two templates agree on a run
when every pair of a query in it and a key at or before it is seen under both or neither.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from kvplug.contract import Candidate, ReuseCheck, ReuseRequest, Verdict

TEMPLATE = re.compile(
    r"(?:causal|window:(?P<window>[1-9]\d{0,9}))"
    r"(?:\+bidirectional:(?P<spans>-?\d{1,9}-\d{1,9}(?:,\d{1,9}-\d{1,9})*))?",
    re.ASCII,
)
SPAN = re.compile(r"(-?\d+)-(\d+)", re.ASCII)


@dataclass(frozen=True)
class Template:
    """A parsed mask template.

    Attributes:
        window: Tokens a query sees with itself; None for all before it.
        spans: First and last token of each bidirectional span, in order. The first may begin
            before the segment.
    """

    window: int | None = None
    spans: tuple[tuple[int, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Template | None:
        """Parse a template; None if ``text`` is not one."""
        found = TEMPLATE.fullmatch(text)
        if found is None:
            return None
        spans = tuple((int(a), int(b)) for a, b in SPAN.findall(found["spans"] or ""))
        if any(a > b for a, b in spans):
            return None
        if any(one[1] >= two[0] for one, two in itertools.pairwise(spans)):
            return None
        return cls(int(found["window"]) if found["window"] else None, spans)

    def cuts(self, start: int, length: int) -> bool:
        """True if a run that starts at position ``start`` has tokens that do not see its first."""
        return self.window is not None and start + length > self.window

    def within(self, length: int) -> tuple[tuple[int, int], ...] | None:
        """The spans in the first ``length`` tokens, or None if one extends beyond them."""
        kept = tuple(span for span in self.spans if span[0] < length and span[1] >= 0)
        return None if any(a < 0 or b >= length for a, b in kept) else kept


class Mask(ReuseCheck):
    """Refuses KV whose tokens attended to other tokens than they would here."""

    name = "mask"
    changes = "refuses stored KV computed under a different attention mask"

    def check(self, candidate: Candidate, request: ReuseRequest) -> Verdict:
        stored, wanted = candidate.fingerprint, request.fingerprint
        if stored.mask == wanted.mask == "causal":
            return Verdict(True)
        cause = _disagreement(stored.mask, wanted.mask, stored.start, wanted.start, wanted.length)
        return Verdict(False, cause, exact=False) if cause else Verdict(True)


def _disagreement(stored: str, wanted: str, before: int, start: int, length: int) -> str:
    """Return the cause if two templates differ on the first ``length`` tokens, or nothing.

    Args:
        stored: The template under which it was computed, at position ``before``.
        wanted: The one under which it would be used, at position ``start``.
        before: See ``stored``.
        start: See ``wanted``.
        length: Tokens used.
    """
    had, has = Template.parse(stored), Template.parse(wanted)
    if had is None or has is None:
        return "mask unknown"
    if had.window != has.window and (had.cuts(before, length) or has.cuts(start, length)):
        return "window cuts its context"
    spans = had.within(length), has.within(length)
    if None in spans:
        return "span cut"
    return "" if spans[0] == spans[1] else "other mask"
