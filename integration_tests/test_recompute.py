"""Recomputation inside a reused run: how spans are grouped, and which tokens deviate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvplug.hosts.vllm.worker.recompute import batches, with_deviating


def test_a_long_span_is_split_and_short_ones_share_a_forward() -> None:
    assert batches([(0, 100), (120, 130)], 48, 8) == [
        [(0, 48)],
        [(48, 96)],
        [(96, 100), (120, 130)],
    ]
    assert batches([(0, 1), (2, 3), (4, 5)], 48, 2) == [[(0, 1), (2, 3)], [(4, 5)]]
    assert batches([], 48, 8) == []


@given(st.lists(st.integers(1, 60), max_size=12), st.integers(1, 50), st.integers(1, 4))
def test_every_token_is_in_one_forward_in_order(widths: list[int], most: int, rows: int) -> None:
    spans, at = [], 0
    for width in widths:
        spans.append((at, at + width))
        at += width + 1
    made = batches(spans, most, rows)
    assert all(sum(b - a for a, b in one) <= most and len(one) <= rows for one in made)
    flat = [i for one in made for a, b in one for i in range(a, b)]
    assert flat == [i for a, b in spans for i in range(a, b)]


def test_the_most_deviating_join_what_is_recomputed_anyway() -> None:
    deviation = torch.tensor([9.0, 1, 8, 2, 7, 3, 6, 4, 5, 0])
    # Positions 10 to 19; 10 and 11 are recomputed anyway, 14 and 15 are exact.
    approximate, spans = [(10, 14), (16, 20)], [(2, 5), (10, 12), (25, 30)]
    assert with_deviating(deviation, 10, approximate, spans, 0.5) == [
        (2, 5),
        (10, 13),
        (16, 17),
        (25, 30),
    ]
    assert with_deviating(deviation, 10, approximate, spans, 0.0) == [(2, 5), (10, 12), (25, 30)]


@pytest.mark.parametrize("fraction", [0.1, 0.3, 1.0])
def test_a_fraction_is_of_the_approximate_tokens(fraction: float) -> None:
    deviation = torch.rand(100, generator=torch.Generator().manual_seed(1))
    found = with_deviating(deviation, 0, [(0, 40), (60, 100)], [(0, 4)], fraction)
    assert sum(b - a for a, b in found) == max(4, round(80 * fraction))
