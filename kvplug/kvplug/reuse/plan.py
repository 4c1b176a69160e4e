"""Plans which stored tokens a request reuses, and what is recomputed between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvplug.contract.reuse import Verdict
from kvplug.reuse.catalog import CatalogEntry, SegmentState
from kvplug.reuse.chain import ChainResult
from kvplug.reuse.index import Match
from kvplug.reuse.settings import Recompute

Judge = Callable[[CatalogEntry, Match], ChainResult]
"""Runs the chain of checks on a segment matched in the text."""

Span = tuple[int, int]

SHORTEST = 16
"""Fewest tokens that are worth reusing."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of a stored segment, and where they go.

    Attributes:
        segment: The segment.
        offset: First token of the segment that is used.
        length: Tokens used.
        start: Position in the request of the first of them.
        verdict: Of the chain of checks.
    """

    segment: CatalogEntry
    offset: int
    length: int
    start: int
    verdict: Verdict

    @property
    def end(self) -> int:
        """Position after the last token used."""
        return self.start + self.length


@dataclass(slots=True)
class ReusePlan:
    """One contiguous run of a request's tokens that need not be prefilled.

    Attributes:
        begin: Its first token.
        end: The token after its last; equal to ``begin`` where nothing is reused.
        pieces: What is loaded, in order.
        spans: What is recomputed within the run, ascending and disjoint; inside a piece or between
            two.
        deviating: Tokens of approximate pieces, in no span, that are recomputed as well; the worker
            finds out which.
        waiting: Ids of segments that are being saved or fetched, or are on disk only; the run is
            planned again once they are in memory.
        refused: Segments that were refused, by cause.
        costs_us: Microseconds each check took, by its name.
    """

    begin: int
    end: int
    pieces: list[Piece] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    deviating: int = 0
    waiting: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    costs_us: Counter[str] = field(default_factory=Counter)

    @property
    def length(self) -> int:
        """Tokens of the run."""
        return self.end - self.begin

    @property
    def recomputed(self) -> int:
        """Tokens of the run that are recomputed."""
        return sum(b - a for a, b in self.spans) + self.deviating

    @property
    def approximate_from(self) -> int | None:
        """First token whose KV is approximate, or None."""
        for start, end in self.approximate_spans:
            at = _first_outside(start, end, self.spans)
            if at < end:
                return at
        return None

    @property
    def approximate_spans(self) -> list[Span]:
        """Spans of the approximate pieces, in order."""
        return [(p.start, p.end) for p in self.pieces if not p.verdict.exact]


def _first_outside(start: int, end: int, spans: Sequence[Span]) -> int:
    """The first position from ``start`` that is in no span; may be ``end`` or later."""
    at = start
    for a, b in spans:
        if a <= at < b:
            at = b
    return at


class Planner:
    """Plans the run of stored tokens that follows the engine's own prefix-cache hit.

    Args:
        recompute: What may be recomputed inside a run.
        can_compute: The worker can compute inside a run at all.
    """

    def __init__(self, recompute: Recompute, can_compute: bool):
        self.boundary = recompute.boundary if can_compute else 0
        self.gaps = recompute.gaps if can_compute else 0
        self.fraction = recompute.fraction if can_compute else 0.0
        self.max_fraction = recompute.max_fraction

    def plan(
        self,
        num_tokens: int,
        begin: int,
        matches: Sequence[tuple[CatalogEntry, Match]],
        judge: Judge,
    ) -> ReusePlan:
        """Plan the run that starts at the engine's own hit.

        Args:
            num_tokens: Tokens of the request; the last one is always left to the engine.
            begin: Tokens the engine found in its prefix cache.
            matches: Stored segments found in the text, from `Catalog.match`.
            judge: The chain of checks.
        """
        limit = num_tokens - 1
        plan = ReusePlan(begin, begin)
        walk = _Walk(plan, matches, judge, limit)
        at, end, computed = begin, begin, 0
        taken: list[Piece] = []
        spans: list[Span] = []
        kept = (0, 0)
        while at < limit:
            piece = walk.covering(at)
            gap = 0
            if piece is None:
                piece = walk.following(at, self.gaps)
                if piece is None:
                    break
                gap = piece.start - at
                spans.append((at, piece.start))
            recomputed = 0
            if self.boundary and not piece.verdict.exact and piece.offset == 0:
                recomputed = min(self.boundary, piece.length)
                _add(spans, (piece.start, piece.start + recomputed))
            computed += gap + recomputed
            taken.append(piece)
            at = piece.end
            if computed <= self.max_fraction * (at - begin) and recomputed < piece.length:
                end, kept = at, (len(taken), len(spans))
        # A span merged with a later one may extend beyond what is kept.
        plan.pieces = taken[: kept[0]]
        plan.spans = [(a, min(b, end)) for a, b in spans[: kept[1]] if a < end]
        plan.end = end if end - begin >= SHORTEST else begin
        if plan.end == begin:
            plan.pieces, plan.spans = [], []
        plan.deviating = deviating(plan.approximate_spans, plan.spans, self.fraction)
        return plan


def deviating(approximate: Sequence[Span], spans: Sequence[Span], fraction: float) -> int:
    """Count the deviating tokens to recompute, in addition to those in spans.

    Args:
        approximate: Spans of the approximate pieces.
        spans: What is recomputed anyway.
        fraction: Fraction of the tokens in ``approximate`` to compute, those in spans included.
    """
    within = sum(max(0, min(b, d) - max(a, c)) for a, b in approximate for c, d in spans)
    return max(0, round(fraction * sum(b - a for a, b in approximate)) - within)


def _add(spans: list[Span], span: Span) -> None:
    """Append a span, merged with the last one where they touch."""
    if spans and spans[-1][1] >= span[0]:
        spans[-1] = (spans[-1][0], max(spans[-1][1], span[1]))
    else:
        spans.append(span)


class _Walk:
    """Looks up what can be used at a position; each segment is judged once per position."""

    def __init__(
        self,
        plan: ReusePlan,
        matches: Sequence[tuple[CatalogEntry, Match]],
        judge: Judge,
        limit: int,
    ):
        self._plan = plan
        self._matches = [(s, m) for s, m in matches if m.start < limit]
        self._judge = judge
        self._limit = limit
        self._found: dict[tuple[str, int], Verdict | None] = {}

    def covering(self, at: int) -> Piece | None:
        """The best piece that contains the token at a position."""
        here = [(s, m) for s, m in self._matches if m.start <= at < m.start + m.length]
        return self._best(at, here)

    def following(self, at: int, max_gap: int) -> Piece | None:
        """The nearest piece that begins up to ``max_gap`` tokens after a position."""
        for start in sorted({m.start for _, m in self._matches if at < m.start <= at + max_gap}):
            found = self._best(start, [(s, m) for s, m in self._matches if m.start == start])
            if found is not None:
                return found
        return None

    def _best(self, at: int, here: list[tuple[CatalogEntry, Match]]) -> Piece | None:
        found: list[Piece] = []
        # Computed in place first, then longest, then exactly computed ones.
        order = sorted(
            here,
            key=lambda one: (
                one[0].fingerprint.start != one[1].start,
                -(one[1].start + one[1].length),
                one[0].fingerprint.ancestry,
            ),
        )
        for segment, match in order:
            verdict = self._verdict(segment, match)
            if verdict is None:
                continue
            end = min(match.start + match.length, self._limit)
            piece = Piece(segment, at - match.start, end - at, at, verdict)
            if verdict.exact:
                return piece
            found.append(piece)
        return max(found, key=lambda p: (p.length, p.verdict.confidence or 0.0), default=None)

    def _verdict(self, segment: CatalogEntry, match: Match) -> Verdict | None:
        key = (segment.id, match.start)
        if key not in self._found:
            self._found[key] = self._asked(segment, match)
        return self._found[key]

    def _asked(self, segment: CatalogEntry, match: Match) -> Verdict | None:
        result = self._judge(segment, match)
        self._plan.costs_us.update(result.costs_us)
        if not result.verdict.ok:
            self._plan.refused[result.verdict.reason] += 1
            return None
        if segment.state is not SegmentState.MEMORY:
            self._plan.waiting.append(segment.id)
            return None
        return result.verdict
