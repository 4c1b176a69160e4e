from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from kvplug.contract import EngineView, LayerView
from kvplug.testing.format import Case, Pool, Shape, relative, vectors, view
from kvplug_kernels.coding import quantize_codebook
from kvplug_policies.format.int4 import Int4
from kvplug_policies.format.rotated import Rotated, gaussian_levels
from kvplug_policies.rotation import hadamard_matrix

SHAPE = Shape(64, 6, 2, 16)


def size(head_size: int, **options: object) -> int:
    layer = view(Shape(head_size, 6, 2, 16))
    policy = Rotated(Rotated.Options.model_validate(options), EngineView(16, layers=(layer,)))
    return policy.layout(layer).bytes_per_token_head


def test_a_token_takes_its_codes_and_two_scales() -> None:
    assert [size(64, bits=bits) for bits in (2, 3, 4)] == [36, 52, 68]
    assert [size(128, bits=bits) for bits in (2, 3, 4)] == [68, 100, 132]
    assert 64 * 4 / size(64, bits=2) >= 5
    assert 128 * 4 / size(128, bits=2) >= 6
    assert size(64, key_bits=4, value_bits=2) == 52


def normal(low: float, high: float) -> tuple[float, float]:
    """Weight and mean of a unit Gaussian between two bounds, by the trapezoid rule."""
    n = 20_000
    low, high = max(low, -9.0), min(high, 9.0)
    step = (high - low) / n
    at = [low + i * step for i in range(n + 1)]
    density = [math.exp(-x * x / 2) * (0.5 if i in (0, n) else 1) for i, x in enumerate(at)]
    weight = sum(density)
    return weight * step, sum(d * x for d, x in zip(density, at, strict=True)) / weight


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_levels_are_the_means_between_their_bounds(bits: int) -> None:
    levels = gaussian_levels(bits)
    assert len(levels) == 2**bits
    assert list(levels) == sorted(levels)
    assert levels == tuple(-x for x in reversed(levels))
    bounds = [-math.inf, *((a + b) / 2 for a, b in itertools.pairwise(levels)), math.inf]
    for level, low, high in zip(levels, bounds, bounds[1:], strict=False):
        assert level == pytest.approx(normal(low, high)[1], abs=1e-5)


@pytest.mark.parametrize(("bits", "error"), [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_the_error_of_the_levels_is_the_one_that_max_published(bits: int, error: float) -> None:
    """Max, Quantizing for minimum distortion, 1960, table I."""
    levels = torch.tensor(gaussian_levels(bits))
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(1))
    nearest = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
    assert float((x - nearest).square().mean()) == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize("n", [16, 20, 64, 80, 96, 112, 128, 160, 192, 256, 576])
def test_hadamard_matrices_are_orthogonal_and_of_ones(n: int) -> None:
    h = hadamard_matrix(n)
    assert torch.equal(h @ h.T, n * torch.eye(n))
    assert (h.abs() == 1).all()


def test_a_head_that_cannot_be_rotated_is_refused() -> None:
    for head_size, why in ((8, "at least 16"), (50, "no Hadamard matrix of order 50")):
        with pytest.raises(ValueError, match=why):
            size(head_size)
    with pytest.raises(ValueError, match="do not fill whole bytes"):
        size(20, bits=3)


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("back", [False, True])
def test_rotating_keeps_products_and_can_be_undone(head_size: int, back: bool) -> None:
    shape = Shape(head_size, 6, 2, 16)
    policy = Rotated(Rotated.Options(), EngineView(16, layers=(view(shape),)))
    x, y = vectors(shape, 9, seed=3)
    turned, other = policy._rotation.turn(x, back), policy._rotation.turn(y, back)
    torch.testing.assert_close((turned * other).sum(-1), (x * y).sum(-1), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(policy._rotation.turn(turned, not back), x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head_size", [64, 96, 128])
def test_a_channel_that_is_large_is_spread_over_all(head_size: int) -> None:
    """With one element a hundred times the others, integer codes of the head lose the others."""
    shape = Shape(head_size, 6, 2, 32)
    key, value = vectors(shape, 32, seed=4)
    key[..., 3] *= 100
    off = {}
    for policy in (Rotated, Int4):
        pool = Pool(Case(policy), shape)
        pool.store({0: (key, value)})
        off[policy] = relative(pool.read(0)[0], key)
    assert off[Rotated] < 0.12
    policy = Rotated(Rotated.Options(), EngineView(32, layers=(view(shape),)))
    turned = policy._rotation.turn(key)
    peak = turned.abs().amax(-1) / turned.square().mean(-1).sqrt()
    assert float(peak.max()) < 4.5


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_fitted_scale_beats_the_stored_norm(bits: int) -> None:
    """TurboQuant stores the norm; the same two bytes hold the least-squares scale here."""
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(5))
    levels = torch.tensor(gaussian_levels(bits))
    codes, scale = quantize_codebook(x, levels)
    norm = x.square().mean(-1, keepdim=True).sqrt().half()

    def off(by: Tensor) -> float:
        return float((levels[codes.int()] * by.float() - x).square().mean())

    assert off(scale) < 0.995 * off(norm)
    for _ in range(20):
        nudge = 1 + random.Random(bits).uniform(-0.02, 0.02)
        assert off(scale) <= off(scale.float() * nudge)


def read_error(**options: Any) -> float:
    key, value = vectors(SHAPE, 60, seed=11)
    pool = Pool(Case(Rotated, options), SHAPE)
    pool.store({0: (key, value)})
    return float((pool.read(0)[0] - key).square().mean())


@pytest.mark.parametrize("levels", ["gaussian", "uniform"])
def test_fitting_lowers_the_error(levels: str) -> None:
    assert read_error(levels=levels, fit=2) < 0.99 * read_error(levels=levels, fit=0)


def test_uniform_levels_pay_for_a_zero_point() -> None:
    layer = LayerView(0, 1, 3, 9, 64, "bfloat16")
    sizes = [
        Rotated(Rotated.Options(levels=levels), EngineView(block_size=32))
        .layout(layer)
        .bytes_per_token_head
        for levels in ("gaussian", "uniform")
    ]
    assert sizes == [68, 72]
    assert read_error(levels="uniform") < read_error(levels="gaussian")
