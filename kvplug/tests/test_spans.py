"""Evicted tokens in host memory: what is stored, what is found again, and what is left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvplug.hosts.spans import SPAN, SpanStore, Tokens

CPU = torch.device("cpu")


def tokens(positions: list[list[int]], *, size: int = 4, totals: bool = True) -> Tokens:
    """Tokens whose every number tells head, position and what it is."""
    where = torch.tensor(positions, dtype=torch.int32)
    head = torch.arange(where.shape[0])[:, None, None]
    base = where[..., None] * 100.0 + head * 10 + torch.arange(size)
    return Tokens(base, -base, where, where.float() / 8 if totals else None)


def line(start: int, end: int, heads: int = 2, **more: bool) -> Tokens:
    return tokens([list(range(start, end))] * heads, **more)


def stored(store: SpanStore) -> list[list[int]]:
    return store.tokens.positions.tolist() if store.tokens is not None else []


def check_whole(found: Tokens, *, size: int = 4) -> None:
    """Keys, values and totals are those of the positions."""
    expected = tokens(found.positions.tolist(), size=size, totals=found.totals is not None)
    assert torch.equal(found.keys, expected.keys)
    assert torch.equal(found.values, expected.values)
    assert found.positions.dtype == torch.int32
    if found.totals is not None and expected.totals is not None:
        assert torch.equal(found.totals, expected.totals)


# -- storing ---------------------------------------------------------------------------------------


def test_an_empty_store_holds_and_finds_nothing() -> None:
    store = SpanStore(64)
    assert len(store) == store.nbytes == 0
    assert store.needed(torch.ones(1, 2, 4), torch.zeros(2, 3, 4), 1000) is None


def test_spans_are_neighbours_in_the_text_whatever_the_order_they_came_in() -> None:
    store = SpanStore(64)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0)).tolist()
    store.put(tokens([order, order[::-1]]))
    assert stored(store) == [list(range(32))] * 2
    assert store.tokens is not None
    check_whole(store.tokens)
    assert len(store) == 32
    assert store.nbytes == 2 * 2 * 32 * 4 * 4


def test_what_came_later_is_stored_after() -> None:
    store = SpanStore(64)
    store.put(line(32, 48))
    store.put(line(0, 16))
    assert stored(store) == [[*range(32, 48), *range(16)]] * 2


def test_a_remainder_is_dropped_from_the_oldest_text() -> None:
    store = SpanStore(64)
    store.put(line(0, 37))
    assert stored(store) == [list(range(5, 37))] * 2


@pytest.mark.parametrize("few", [0, 1, SPAN - 1])
def test_less_than_a_span_is_not_stored(few: int) -> None:
    store = SpanStore(64)
    store.put(line(0, few))
    assert len(store) == 0
    assert store.needed(torch.ones(1, 2, 4), torch.zeros(2, 3, 4), 1000) is None
    store.put(line(few, few + SPAN))
    assert stored(store) == [list(range(few, few + SPAN))] * 2
    store.put(line(100, 100 + few))
    assert len(store) == SPAN


@pytest.mark.parametrize(("limit", "kept"), [(48, 48), (63, 48), (16, 16), (15, 0), (0, 0)])
def test_the_longest_stored_go_first(limit: int, kept: int) -> None:
    store = SpanStore(limit)
    arrivals = [(200, 232), (0, 16), (100, 116), (300, 332)]
    for start, end in arrivals:
        store.put(line(start, end))
        assert len(store) <= limit
    came = [p for start, end in arrivals for p in range(start, end)]
    assert stored(store) == [came[len(came) - kept :]] * 2
    if store.tokens is not None:
        check_whole(store.tokens)


def test_stored_tokens_are_copies() -> None:
    store = SpanStore(64)
    own = line(0, 32)
    store.put(own)
    own.keys.zero_()
    own.values.zero_()
    own.positions.zero_()
    assert own.totals is not None
    own.totals.zero_()
    assert store.tokens is not None
    assert stored(store) == [list(range(32))] * 2
    check_whole(store.tokens)


def test_totals_are_carried_where_all_have_them() -> None:
    store = SpanStore(64)
    store.put(line(0, 16))
    assert store.tokens is not None
    assert store.tokens.totals is not None
    store.put(line(16, 32))
    assert store.tokens.totals is not None
    assert torch.equal(store.tokens.totals, store.tokens.positions / 8)
    bare = SpanStore(64)
    bare.put(line(0, 16, totals=False))
    bare.put(line(16, 32, totals=False))
    assert bare.tokens is not None
    assert bare.tokens.totals is None


# -- bounds ----------------------------------------------------------------------------------------


def logits(queries: Tensor, keys: Tensor) -> Tensor:
    """``[kv_heads, queries of the group, tokens]`` in float64, head by head."""
    heads, group = keys.shape[0], queries.shape[1] // keys.shape[0]
    return torch.stack(
        [
            (queries[:, h * group : (h + 1) * group].double() @ keys[h].double().T).flatten(0, 1)
            for h in range(heads)
        ]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_a_span_is_found_if_any_of_its_tokens_beats_the_median_kept_one(
    seed: int, dtype: torch.dtype
) -> None:
    """The bound is an upper bound of every token's logit, so no such span is missed."""
    rng = torch.Generator().manual_seed(seed)
    heads, group, size, n = 2, 3, 8, 7 * SPAN
    keys = torch.randn(heads, n, size, generator=rng).to(dtype)
    kept = (2 * torch.randn(heads, 21, size, generator=rng)).to(dtype)
    queries = torch.randn(4, heads * group, size, generator=rng).to(dtype)
    where = torch.arange(n, dtype=torch.int32).expand(heads, n).contiguous()
    store = SpanStore(n)
    store.put(Tokens(keys, keys, where, None))
    best = logits(queries, keys).amax(1).view(heads, -1, SPAN).amax(2)
    reached = logits(queries, kept).amax(1).median(1).values
    due = best > reached[:, None] + 1e-4
    assert due.any()
    assert not due.all()
    taken = store.needed(queries, kept, n)
    assert taken is not None
    found, needed = taken
    for h in range(heads):
        named = set(found.positions[h, needed[h]].tolist())
        for span in due[h].nonzero()[:, 0].tolist():
            assert set(range(span * SPAN, (span + 1) * SPAN)) <= named


def test_the_bound_takes_each_element_at_its_extreme() -> None:
    """Two keys of a span that each miss the query in one element: their box does not."""
    keys = torch.zeros(1, SPAN, 2)
    keys[0, 0] = torch.tensor([3.0, 2.0])
    keys[0, 1] = torch.tensor([-1.0, -4.0])
    where = torch.arange(SPAN, dtype=torch.int32)[None]
    query = torch.tensor([[[1.0, -1.0]]])
    for logit, found in ((6.9, True), (7.0, False)):
        store = SpanStore(SPAN)
        store.put(Tokens(keys, keys, where, None))
        kept = torch.tensor([[[logit, 0.0]]])
        assert (store.needed(query, kept, 100) is not None) is found, "3 - (-4) is the bound"
        assert len(store) == (0 if found else SPAN)


# -- finding ---------------------------------------------------------------------------------------


def store_of(levels: list[list[float]], *, totals: bool = False) -> SpanStore:
    """Spans whose keys are one level all over, ``[kv_heads, spans]``."""
    level = torch.tensor(levels).repeat_interleave(SPAN, 1)
    heads, n = level.shape
    where = torch.arange(n, dtype=torch.int32).expand(heads, n).contiguous()
    store = SpanStore(n)
    keys = level[..., None].expand(heads, n, 2).contiguous()
    store.put(Tokens(keys, keys + 0.5, where, where.float() if totals else None))
    return store


def kept_at(*levels: float) -> Tensor:
    """Kept keys of which the median, per head, is that level."""
    return torch.tensor([[[x - 5, 0.0], [x, 0.0], [x + 50, 0.0]] for x in levels])


def query(heads: int) -> Tensor:
    return torch.tensor([[[1.0, 0.0]]]).expand(1, heads, 2)


def spans(found: Tokens) -> list[list[int]]:
    starts = found.positions[:, ::SPAN]
    step = torch.arange(SPAN, dtype=torch.int32)
    assert torch.equal(found.positions, (starts[..., None] + step).flatten(1))
    return (starts // SPAN).tolist()


def test_what_is_needed_is_taken_out_and_the_rest_stays() -> None:
    store = store_of([[1.0, 9, 2, 8, 3]], totals=True)
    whole = store.tokens
    assert whole is not None
    taken = store.needed(query(1), kept_at(7.0), 1000)
    assert taken is not None
    found, needed = taken
    assert spans(found) == [[1, 3]]
    assert needed.dtype == torch.bool
    assert needed.tolist() == [[True] * 2 * SPAN]
    index = found.positions.long()
    assert torch.equal(found.keys[0], whole.keys[0, index[0]])
    assert torch.equal(found.values[0], whole.values[0, index[0]])
    assert found.totals is not None
    assert torch.equal(found.totals, found.positions.float())
    assert store.tokens is not None
    assert spans(store.tokens) == [[0, 2, 4]]
    assert torch.equal(store.tokens.keys[0, ::SPAN, 0], torch.tensor([1.0, 2, 3]))
    assert store.needed(query(1), kept_at(7.0), 1000) is None, "taken out once"
    again = store.needed(query(1), kept_at(2.5), 1000)
    assert again is not None
    assert spans(again[0]) == [[4]], "summaries follow what is left"


def test_nothing_needed_is_none_and_changes_nothing() -> None:
    store = store_of([[1.0, 2], [3, 4]])
    assert store.needed(query(2), kept_at(2.0, 4.0), 1000) is None, "reaching is not exceeding"
    assert len(store) == 2 * SPAN
    assert store.needed(query(2), kept_at(0.0, 0.0), SPAN - 1) is None, "no room for a span"
    assert len(store) == 2 * SPAN


def test_the_strongest_are_taken_where_there_is_no_room_for_all() -> None:
    store = store_of([[5.0, 9, 6, 8, 7]])
    taken = store.needed(query(1), kept_at(0.0), 2 * SPAN + 3)
    assert taken is not None
    assert sorted(spans(taken[0])[0]) == [1, 3]
    assert store.tokens is not None
    assert spans(store.tokens) == [[0, 2, 4]]


def test_heads_take_equally_many_and_say_which_they_need() -> None:
    store = store_of([[9.0, 1, 8, 2], [1, 2, 3, 9]])
    taken = store.needed(query(2), kept_at(5.0, 5.0), 1000)
    assert taken is not None
    found, needed = taken
    first, second = spans(found)
    assert set(first) == {0, 2}
    assert set(second) == {3, 2}
    assert needed[0].all()
    want = [span == 3 for span in second for _ in range(SPAN)]
    assert needed[1].tolist() == want
    assert store.tokens is not None
    assert spans(store.tokens) == [[1, 3], [0, 1]]


def test_a_head_that_needs_none_takes_as_many_as_the_others() -> None:
    store = store_of([[9.0, 1], [1, 2]])
    taken = store.needed(query(2), kept_at(5.0, 5.0), 1000)
    assert taken is not None
    assert taken[1].any(1).tolist() == [True, False]
    assert taken[0].positions.shape == (2, SPAN)


def test_a_store_that_gives_everything_starts_over() -> None:
    store = store_of([[9.0, 8]])
    taken = store.needed(query(1), kept_at(0.0), 1000)
    assert taken is not None
    assert len(store) == store.nbytes == 0
    assert store.needed(query(1), kept_at(-9.0), 1000) is None
    store.put(taken[0])
    assert stored(store) == [list(range(2 * SPAN))]
    assert store.needed(query(1), kept_at(0.0), 1000) is not None


def test_any_query_of_the_group_can_need_a_span_of_its_head_only() -> None:
    """Four query heads, two to a KV head."""
    store = store_of([[4.0], [4.0]])
    queries = torch.zeros(3, 4, 2)
    queries[1, 2, 0] = 1.0
    taken = store.needed(queries, kept_at(3.0, 3.0), 1000)
    assert taken is not None
    assert taken[1].any(1).tolist() == [False, True]


# -- tokens ----------------------------------------------------------------------------------------


def test_tokens_are_taken_joined_and_moved_whole() -> None:
    own = line(0, 8)
    index = torch.tensor([[3, 1], [7, 0]])
    part = own.take(index)
    assert part.positions.tolist() == [[3, 1], [7, 0]]
    check_whole(part)
    joined = Tokens.cat([part, line(20, 22)])
    assert joined.positions.tolist() == [[3, 1, 20, 21], [7, 0, 20, 21]]
    check_whole(joined)
    check_whole(joined.to(CPU))
    assert Tokens.cat([part, line(20, 22, totals=False)]).totals is None
    assert line(0, 2, totals=False).to(CPU).totals is None
