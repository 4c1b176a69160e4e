"""The distance of next-token distributions of which the likeliest tokens are known."""

from __future__ import annotations

import numpy as np
import pytest

from kvplug.shadow.divergence import Likeliest, divergence, total_variation


def likeliest(p: np.ndarray, k: int) -> Likeliest:
    order = np.argsort(-p)[:k]
    return Likeliest(tuple(order.tolist()), tuple(np.log(p[order]).tolist()))


def drawn(rng: np.random.Generator, vocab: int = 40) -> np.ndarray:
    p: np.ndarray = np.exp(3 * rng.standard_normal(vocab))
    return p / p.sum()


def test_all_tokens_known_it_is_the_distance() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        p, q = drawn(rng), drawn(rng)
        found = total_variation(likeliest(p, 40), likeliest(q, 40))
        assert found == pytest.approx(0.5 * np.abs(p - q).sum())


def test_some_tokens_known_it_is_a_lower_bound_and_near() -> None:
    rng = np.random.default_rng(1)
    missed = []
    for _ in range(200):
        p = drawn(rng)
        q = p * np.exp(0.3 * rng.standard_normal(len(p)))
        q /= q.sum()
        true = 0.5 * np.abs(p - q).sum()
        found = total_variation(likeliest(p, 16), likeliest(q, 16))
        assert 0 <= found <= true + 1e-9
        missed.append(true - found)
    assert np.mean(missed) < 0.01


def test_the_same_tokens_have_none_and_others_all() -> None:
    one = Likeliest((1, 2), (np.log(0.6), np.log(0.4)))
    assert total_variation(one, one) == 0
    assert total_variation(one, Likeliest((3, 4), one.logprobs)) == pytest.approx(1)
    rng = np.random.default_rng(2)
    p, q = likeliest(drawn(rng), 8), likeliest(drawn(rng), 8)
    assert total_variation(p, q) == total_variation(q, p)


def test_an_answer_has_the_mean_of_the_positions_that_both_have() -> None:
    same, other = Likeliest((1,), (0.0,)), Likeliest((2,), (0.0,))
    assert divergence([same, same, same], [same, other]) == 0.5
    with pytest.raises(ValueError, match="no position"):
        divergence([], [same])


@pytest.mark.parametrize("bad", [Likeliest((), ()), Likeliest((1,), (float("nan"),))])
def test_what_is_no_distribution_is_refused(bad: Likeliest) -> None:
    with pytest.raises(ValueError, match="log-probabilities"):
        total_variation(bad, Likeliest((1,), (0.0,)))
