from __future__ import annotations

import pytest
import torch

from kvplug.contract import EngineView
from kvplug.testing.format import Case, Pool, Shape, vectors, view
from kvplug_policies.format.fp8 import Fp8

SHAPE = Shape(64, 6, 2, 16)


@pytest.mark.parametrize(("head_size", "size"), [(64, 132), (96, 196), (128, 260), (256, 516)])
def test_a_token_takes_its_codes_and_two_scales(head_size: int, size: int) -> None:
    layer = view(Shape(head_size, 6, 2, 16))
    policy = Fp8(Fp8.Options(), EngineView(16, layers=(layer,)))
    assert policy.layout(layer).bytes_per_token_head == size


def test_an_element_is_off_by_a_sixteenth_of_itself_at_most() -> None:
    pool = Pool(Case(Fp8), SHAPE)
    key, value = vectors(SHAPE, 40, seed=1)
    # Magnitudes from the largest down to where e4m3 has no more exponents.
    key = key.sign() * torch.logspace(-3, 0, 64) * 7
    pool.store({0: (key, value)})
    for found, right in zip(pool.read(0), (key, value), strict=True):
        scale = right.abs().amax(-1, keepdim=True) / 448
        assert ((found - right).abs() <= right.abs() / 16 * 1.01 + scale / 512).all()


def test_small_elements_beside_a_large_one_survive_better_than_in_integers() -> None:
    from kvplug_policies.format.int8 import Int8

    key, value = vectors(SHAPE, 16, seed=2)
    key[..., 5] = 3000.0
    rest = torch.arange(64) != 5
    off = {}
    for policy in (Fp8, Int8):
        pool = Pool(Case(policy), SHAPE)
        pool.store({0: (key, value)})
        off[policy] = float((pool.read(0)[0] - key)[..., rest].norm())
    assert off[Fp8] < off[Int8] / 5
