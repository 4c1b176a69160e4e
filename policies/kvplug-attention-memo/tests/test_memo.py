from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kvplug_attention_memo.memory import AttentionMemo, Gather, Memoized, MemoOptions, attend_part

HEADS, KV_HEADS, SIZE = 6, 2, 16
SCALE = SIZE**-0.5


class Texts:
    """Rows of random K and V, padded with what must not be looked at."""

    def __init__(self, rows: int, tokens: int, seed: int = 0):
        rng = torch.Generator().manual_seed(seed)
        shape = (rows, KV_HEADS, tokens, SIZE)
        self.key, self.value = torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)
        self.read: list[tuple[int, int, int]] = []

    def gather(
        self, rows: Sequence[int], starts: Sequence[int], ends: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        self.read += list(zip(rows, starts, ends, strict=True))
        widest = max(b - a for a, b in zip(starts, ends, strict=True)) + 2
        found = []
        for held in (self.key, self.value):
            out = torch.full((len(rows), KV_HEADS, widest, SIZE), float("nan"))
            for i, (row, start, end) in enumerate(zip(rows, starts, ends, strict=True)):
                out[i, :, : end - start] = held[row, :, start:end]
            found.append(out)
        return found[0], found[1]

    def full(self, query: Tensor, lens: Sequence[int]) -> Tensor:
        """Attention by torch's own function."""
        out = []
        for i, n in enumerate(lens):
            one = torch.nn.functional.scaled_dot_product_attention(
                query[i][None, :, None].double(),
                self.key[i][None, :, :n].double(),
                self.value[i][None, :, :n].double(),
                enable_gqa=True,
            )
            out.append(one[0, :, 0])
        return torch.stack(out).float()


def memory(align: int = 1, slots: int = 8, **options: Any) -> AttentionMemo:
    memo = MemoOptions(**{"near": 16, **options})
    return AttentionMemo(memo, HEADS, KV_HEADS, SIZE, SCALE, align=align, slots=slots)


def smooth(steps: int, rows: int, drift: float, seed: int = 1) -> list[Tensor]:
    """Queries of which each is the one before and a little more."""
    rng = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, HEADS, SIZE, generator=rng)
    found = [query]
    for _ in range(steps - 1):
        query = query + drift * torch.randn(rows, HEADS, SIZE, generator=rng)
        found.append(query)
    return found


def run(
    memo: AttentionMemo, texts: Texts, queries: list[Tensor], first: list[int], **more: Any
) -> list[Memoized]:
    rows = len(first)
    return [
        memo.attend(query, range(rows), [0] * rows, [n + t for n in first], texts.gather, **more)
        for t, query in enumerate(queries)
    ]


@pytest.mark.parametrize(
    "options", [{"cosine": 1.0}, {"every": 1, "cosine": 0.01}], ids=["cosine 1", "every 1"]
)
@pytest.mark.parametrize("align", [1, 8])
def test_strict_settings_are_full_attention(options: dict[str, Any], align: int) -> None:
    texts = Texts(3, 80)
    queries = smooth(12, 3, 1e-4)
    first = [60, 17, 5]
    for t, got in enumerate(run(memory(align, **options), texts, queries, first)):
        want = texts.full(queries[t], [n + t for n in first])
        torch.testing.assert_close(got.out, want, rtol=1e-5, atol=1e-6)
        assert got.skipped == 0


def test_the_same_query_reuses_and_stays_exact() -> None:
    """Even at a bound of 1: the far part is that of this very query."""
    texts, memo = Texts(2, 80), memory(cosine=1.0, every=8)
    queries = smooth(1, 2, 0.0) * 20
    results = run(memo, texts, queries, [50, 60])
    for t, got in enumerate(results):
        want = texts.full(queries[t], [50 + t, 60 + t])
        torch.testing.assert_close(got.out, want, rtol=1e-5, atol=1e-6)
    # Remembered at 0, 8 and 16; reused at the seven steps after each.
    assert [got.skipped for got in results] == [0, *[2] * 7, 0, *[2] * 7, 0, *[2] * 3]
    assert all(got.rows == 2 for got in results)


def test_smooth_queries_skip_with_a_small_error() -> None:
    texts, memo = Texts(3, 200), memory(cosine=0.99, every=16)
    queries = smooth(40, 3, 0.02)
    results = run(memo, texts, queries, [100, 120, 90], audit=True)
    skipped = sum(got.skipped for got in results)
    assert skipped > 0.3 * sum(got.rows for got in results)
    errors = torch.cat([got.errors for got in results if got.errors is not None])
    assert len(errors) == skipped
    assert 0 < errors.max() < 0.15
    for t, got in enumerate(results):
        want = texts.full(queries[t], [100 + t, 120 + t, 90 + t])
        off = (got.out - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
        assert off.max() < 0.15
        if not got.skipped:
            assert off.max() < 1e-5


def test_the_audit_is_the_distance_from_full_attention() -> None:
    texts, memo = Texts(1, 100), memory(cosine=0.9)
    queries = smooth(3, 1, 0.05)
    results = run(memo, texts, queries, [80], audit=True)
    assert [got.skipped for got in results] == [0, 1, 1]
    for t in (1, 2):
        want, errors = texts.full(queries[t], [80 + t]), results[t].errors
        assert errors is not None
        off = (results[t].out - want).norm() / want.norm()
        assert errors[0].item() == pytest.approx(off.item(), rel=1e-3)


def test_far_tokens_are_not_read_again() -> None:
    texts, memo = Texts(1, 120), memory(align=8, cosine=0.5, every=100)
    for t, query in enumerate(smooth(1, 1, 0.0) * 30):
        texts.read.clear()
        memo.attend(query, [0], [0], [83 + t], texts.gather)
        # (83 - 16) // 8 * 8: fixed when remembered, whatever grows older.
        assert texts.read == ([(0, 64, 83), (0, 0, 64)] if t == 0 else [(0, 64, 83 + t)])


def test_one_head_that_differs_is_enough() -> None:
    texts, memo = Texts(1, 100), memory(cosine=0.99)
    query = smooth(1, 1, 0.0)[0]
    memo.attend(query, [0], [0], [80], texts.gather)
    other = query.clone()
    other[0, 4] = -other[0, 4]
    assert memo.attend(other, [0], [0], [81], texts.gather).skipped == 0
    longer = other.clone()
    longer[0, 2] *= 1.5
    assert memo.attend(longer, [0], [0], [82], texts.gather).skipped == 0
    assert memo.attend(longer, [0], [0], [83], texts.gather).skipped == 1


def test_rows_decide_for_themselves() -> None:
    texts, memo = Texts(2, 100), memory(cosine=0.99)
    query = smooth(1, 2, 0.0)[0]
    memo.attend(query, [0, 1], [0, 0], [80, 70], texts.gather)
    query = torch.stack([query[0], -query[1]])
    got = memo.attend(query, [0, 1], [0, 0], [81, 71], texts.gather)
    assert (got.rows, got.skipped) == (2, 1)
    torch.testing.assert_close(got.out, texts.full(query, [81, 71]), rtol=1e-5, atol=1e-6)


def test_slots_do_not_leak() -> None:
    """Another request in the slot, the same query, the next length: nothing old is used."""
    one, other, memo = Texts(1, 100, seed=1), Texts(1, 100, seed=2), memory(cosine=0.5)
    query = smooth(1, 1, 0.0)[0]
    memo.attend(query, [3], [10], [80], one.gather)
    got = memo.attend(query, [3], [11], [81], other.gather)
    assert got.skipped == 0 and len(memo) == 1
    torch.testing.assert_close(got.out, other.full(query, [81]), rtol=1e-5, atol=1e-6)
    assert memo.attend(query, [3], [10], [82], one.gather).skipped == 0


def test_a_text_that_starts_over_is_another() -> None:
    texts, memo = Texts(1, 100), memory(cosine=0.5)
    query = smooth(1, 1, 0.0)[0]
    memo.attend(query, [0], [0], [80], texts.gather)
    assert memo.attend(query, [0], [0], [80], texts.gather).skipped == 0
    assert memo.attend(query, [0], [0], [40], texts.gather).skipped == 0
    texts.key.neg_()
    got = memo.attend(query, [0], [0], [30], texts.gather)
    torch.testing.assert_close(got.out, texts.full(query, [30]), rtol=1e-5, atol=1e-6)


def test_released_slots_and_bounded_memory() -> None:
    texts, memo = Texts(1, 100), memory(cosine=0.5, slots=4)
    query = smooth(1, 1, 0.0)[0]
    for slot in range(50):
        memo.attend(query, [slot], [slot], [80], texts.gather)
        assert len(memo) <= 4
    assert memo._query.shape[0] == 4
    # The four latest are there, the others forgotten.
    assert memo.attend(query, [46], [46], [81], texts.gather).skipped == 1
    assert memo.attend(query, [45], [45], [81], texts.gather).skipped == 0
    memo.release(46)
    memo.release(46)
    assert memo.attend(query, [46], [46], [82], texts.gather).skipped == 0
    memo.clear()
    assert len(memo) == 0
    many = Texts(9, 60)
    wide = query.expand(9, -1, -1)
    got = memo.attend(wide, range(9), [0] * 9, [50] * 9, many.gather)
    torch.testing.assert_close(got.out, many.full(wide, [50] * 9), rtol=1e-5, atol=1e-6)
    assert len(memo) == 4


def test_short_texts_have_nothing_far() -> None:
    texts, memo = Texts(2, 20), memory()
    query = smooth(1, 2, 0.0)[0]
    got = memo.attend(query, [0, 1], [0, 0], [1, 16], texts.gather, audit=True)
    assert (got.rows, got.skipped, len(memo)) == (0, 0, 0)
    torch.testing.assert_close(got.out, texts.full(query, [1, 16]), rtol=1e-5, atol=1e-6)
    assert memo.attend(query[:0], [], [], [], texts.gather).out.shape == (0, HEADS, SIZE)


def test_what_is_not_finite_falls_back_to_full_attention() -> None:
    texts, memo = Texts(1, 100), memory(cosine=0.5)
    query = smooth(1, 1, 0.0)[0]
    memo.attend(query, [0], [0], [80], texts.gather)
    memo._out.fill_(float("nan"))
    got = memo.attend(query, [0], [0], [81], texts.gather)
    assert (got.rows, got.skipped, len(memo)) == (1, 0, 0)
    torch.testing.assert_close(got.out, texts.full(query, [81]), rtol=1e-5, atol=1e-6)
    memo.attend(query, [0], [0], [82], texts.gather)
    bad = query.clone()
    bad[0, 1, 0] = float("nan")
    got = memo.attend(bad, [0], [0], [83], texts.gather)
    assert got.skipped == 0
    assert got.out[0, 1].isnan().all() and got.out[0, 0].isfinite().all()
    assert memo.attend(query, [0], [0], [84], texts.gather).skipped == 0


def test_softcap() -> None:
    texts = Texts(1, 80)
    memo = AttentionMemo(MemoOptions(near=16), HEADS, KV_HEADS, SIZE, 2.0, softcap=3.0)
    query = smooth(1, 1, 0.0)[0]
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1)[0] for x in (texts.key, texts.value))
    logits = 3 * torch.tanh((query[0][:, None] @ key.mT)[:, 0, :70] * 2.0 / 3)
    want = (logits.softmax(-1)[:, None] @ value[:, :70])[:, 0]
    got = memo.attend(query, [0], [0], [70], texts.gather).out[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_part_of_nothing() -> None:
    gather: Gather = Texts(2, 10).gather
    key, value = gather([0, 1], [0, 0], [4, 4])
    query = smooth(1, 2, 0.0)[0]
    out, lse = attend_part(query, key, value, torch.tensor([0, 4]), SCALE)
    assert out[0].eq(0).all() and lse[0].isneginf().all()
    assert out[1].isfinite().all() and lse[1].isfinite().all()
