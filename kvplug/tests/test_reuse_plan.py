"""Plans of reuse: one contiguous run from the engine's own hit, and what is computed inside it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplug.contract import Fingerprint, Verdict
from kvplug.reuse.catalog import CatalogEntry, SegmentState
from kvplug.reuse.chain import ChainResult
from kvplug.reuse.index import Match
from kvplug.reuse.plan import Planner, ReusePlan, deviating
from kvplug.reuse.settings import Recompute

PRINT = Fingerprint(
    model="m",
    tokenizer="t",
    lora="",
    dtype="float32",
    format="",
    position="none",
    geometry=(1, 1, 1),
    tenant="",
    mask="causal",
    start=0,
    length=1,
    context=b"",
    tokens=b"",
    created=0.0,
    request_id="r",
)

Found = tuple[CatalogEntry, Match]


def stored(
    name: str,
    start: int,
    length: int,
    *,
    at: int | None = None,
    state: SegmentState = SegmentState.MEMORY,
) -> Found:
    """A segment computed at a position, that stands at another in the text."""
    tokens = np.zeros(length, dtype=np.int32)
    print_ = replace(PRINT, start=start, length=length)
    segment = CatalogEntry(name, print_, tokens, tokens[:0], length, state)
    return segment, Match(name, start if at is None else at, length)


def judge(segment: CatalogEntry, match: Match) -> ChainResult:
    """Exact where it was computed; refused by name."""
    if segment.id.startswith("bad"):
        return ChainResult(Verdict(False, "bad", exact=False), {"one": 1.0}, "one")
    shift = match.start - segment.fingerprint.start
    return ChainResult(Verdict(True, exact=shift == 0, shift=shift), {"one": 1.0})


def plan(
    n: int, begin: int, found: list[Found], can_compute: bool = True, **recompute: float
) -> ReusePlan:
    settings = Recompute.model_validate({"gaps": 0} | recompute)
    return Planner(settings, can_compute).plan(n, begin, found, judge)


def told(made: ReusePlan) -> list[tuple[str, int, int, int]]:
    return [(p.segment.id, p.offset, p.start, p.end) for p in made.pieces]


def test_pieces_follow_one_another_and_the_last_token_is_left() -> None:
    found = [stored("a", 0, 40), stored("b", 40, 60), stored("c", 10, 50, at=100)]
    made = plan(150, 32, found)
    assert told(made) == [("a", 32, 32, 40), ("b", 0, 40, 100), ("c", 0, 100, 149)]
    assert (made.begin, made.end, made.length) == (32, 149, 117)
    assert made.approximate_from == 100
    assert made.approximate_spans == [(100, 149)]
    assert made.costs_us == {"one": 3.0}


def test_a_run_ends_at_a_gap_that_cannot_be_computed() -> None:
    found = [stored("a", 0, 40), stored("b", 50, 60)]
    assert plan(200, 0, found).end == 40
    assert plan(200, 0, found, gaps=9).end == 40
    assert plan(200, 0, found, can_compute=False, gaps=64).end == 40
    made = plan(200, 0, found, gaps=10)
    assert (made.end, made.spans, made.recomputed) == (110, [(40, 50)], 10)
    assert made.approximate_from is None, "what is computed after exact KV is exact"


def test_boundaries_touching_a_gap_are_one_span() -> None:
    found = [stored("a", 0, 40), stored("b", 0, 60, at=45), stored("c", 0, 50, at=105)]
    made = plan(300, 0, found, gaps=16, boundary=8)
    assert made.spans == [(40, 53), (105, 113)]
    assert made.recomputed == 21
    assert made.approximate_from == 53


def test_a_fraction_counts_what_is_recomputed_anyway() -> None:
    made = plan(300, 0, [stored("a", 7, 100, at=0)], boundary=8, fraction=0.2)
    assert (made.recomputed, made.deviating) == (20, 12)
    assert deviating([(0, 100)], [(0, 50)], 0.2) == 0


def test_too_much_to_compute_ends_the_run_where_it_was_worth_it() -> None:
    found = [stored("a", 0, 40), stored("b", 100, 20), stored("c", 180, 200)]
    made = plan(500, 0, found, gaps=64, max_fraction=0.3)
    # 60 of 120 would be computed for b, and 120 of 380 for c.
    assert told(made) == [("a", 0, 0, 40)]
    assert made.spans == []
    assert plan(500, 0, found, gaps=64, max_fraction=0.4).end == 380


def test_a_joined_span_is_cut_with_the_run() -> None:
    """b is taken, c behind it is not: the span before c goes with it."""
    found = [stored("a", 0, 64), stored("b", 1, 40, at=64), stored("c", 1, 17, at=104)]
    made = plan(400, 0, found, boundary=17, max_fraction=0.5)
    assert made.end == 104
    assert made.spans == [(64, 81)]


def test_the_exact_one_wins_and_the_refused_are_counted() -> None:
    found = [
        stored("bad", 40, 60),
        stored("far", 300, 60, at=40),
        stored("here", 40, 30),
        stored("a", 0, 40),
    ]
    made = plan(200, 0, found)
    assert told(made) == [("a", 0, 0, 40), ("here", 0, 40, 70), ("far", 30, 70, 100)]
    assert made.refused == {"bad": 1}


@pytest.mark.parametrize("state", [SegmentState.SAVING, SegmentState.DISK, SegmentState.FETCHING])
def test_what_is_not_there_yet_is_named_and_not_used(state: SegmentState) -> None:
    made = plan(200, 0, [stored("a", 0, 40), stored("b", 40, 60, state=state)])
    assert told(made) == [("a", 0, 0, 40)]
    assert made.waiting == ["b"]


def test_a_few_tokens_are_not_worth_a_run() -> None:
    assert plan(200, 32, [stored("a", 0, 47)]).length == 0
    made = plan(200, 32, [stored("a", 0, 48)])
    assert (made.length, made.pieces[0].offset) == (16, 32)


@given(st.data())
def test_any_plan_is_one_run_of_disjoint_parts(data: st.DataObject) -> None:
    draw = data.draw
    n = draw(st.integers(2, 400))
    begin = draw(st.integers(0, n - 1))
    found = [
        stored(f"s{i}", draw(st.integers(0, 300)), length, at=draw(st.integers(0, n - 1)))
        for i, length in enumerate(draw(st.lists(st.integers(1, 120), max_size=8)))
    ]
    made = plan(
        n,
        begin,
        found,
        gaps=draw(st.integers(0, 40)),
        boundary=draw(st.integers(0, 40)),
        max_fraction=draw(st.floats(0, 1)),
    )
    assert begin <= made.end <= n - 1 or made.length == 0
    covered = np.zeros(n, dtype=int)
    for piece in made.pieces:
        assert 0 <= piece.offset < piece.offset + piece.length <= piece.segment.fingerprint.length
        covered[piece.start : piece.end] += 1
    assert covered.max(initial=0) <= 1
    before = begin
    for a, b in made.spans:
        assert before <= a < b <= made.end
        before = b
        covered[a:b] = 1
    assert covered[begin : made.end].all(), "every token of the run is loaded or computed"
    assert not covered[made.end :].any()
