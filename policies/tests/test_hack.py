from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvplug.contract import EngineView
from kvplug.testing.format import Case, Pool, Shape, queries, relative, vectors, view
from kvplug_kernels.coding import unpack
from kvplug_policies.format.hack import Hack
from kvplug_policies.format.int4 import Int4

SHAPE = Shape(64, 6, 2, 16)


def size(head_size: int, **options: object) -> int:
    layer = view(Shape(head_size, 6, 2, 16))
    policy = Hack(Hack.Options.model_validate(options), EngineView(16, layers=(layer,)))
    return policy.layout(layer).bytes_per_token_head


def test_a_token_takes_codes_scales_zeros_and_key_sums() -> None:
    assert [size(64, bits=bits) for bits in (2, 4, 8)] == [44, 76, 140]
    assert 64 * 4 / size(64, bits=2) >= 5
    assert 128 * 4 / size(128, bits=2) >= 6
    assert 128 * 4 / size(128, bits=2, group=64) >= 6


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [0, 16])
def test_the_sums_beside_the_keys_are_those_of_their_codes(bits: int, group: int) -> None:
    pool = Pool(Case(Hack, {"bits": bits, "group": group}), SHAPE)
    page = pool.policy.coded(pool.layer)  # type: ignore[attr-defined]
    codes = unpack(page.plane(pool.pages, "key_codes"), bits, 64).int()
    sums = page.plane(pool.pages, "key_sum").contiguous().view(torch.int16).int()
    assert torch.equal(codes.reshape(*codes.shape[:-1], -1, group or 64).sum(-1), sums)
    assert sums.any()


@pytest.mark.parametrize(("bits", "most"), [(4, 0.03), (8, 0.03)])
@pytest.mark.parametrize("group", [0, 32])
def test_products_of_codes_are_products_of_what_they_stand_for(
    bits: int, most: float, group: int
) -> None:
    """Queries and probabilities have 8 bits; nothing else is lost against reading back."""
    pool = Pool(Case(Hack, {"bits": bits, "group": group}), SHAPE)
    key, value = vectors(SHAPE, 200, seed=1)
    query = queries(SHAPE, 200, seed=2)
    pool.store({0: (key[:190], value[:190])})
    for exact in (True, False):
        out, expected = pool.step({0: (key[190:193], value[190:193])}, query[:3], exact)
        assert relative(out, expected) < most


def test_queries_of_few_steps_lose_nothing() -> None:
    """Queries that 8 bits hold, and one stored token, whose probability is 1."""
    pool = Pool(Case(Hack, {"exact_chunk": False}), SHAPE)
    key, value = vectors(SHAPE, 1, seed=3)
    query = torch.randint(0, 256, (1, 6, 64), generator=torch.Generator().manual_seed(4)).float()
    query[..., 0], query[..., 1] = 0, 255
    out, expected = pool.step({0: (key, value)}, query / 64, False)
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)


def test_codes_are_those_of_int4() -> None:
    key, value = vectors(SHAPE, 40, seed=5)
    found = []
    for policy, options in ((Hack, {"rotate": False}), (Int4, {"fit": 2, "rotate": False})):
        pool = Pool(Case(policy, options), SHAPE)
        pool.store({0: (key, value)})
        found.append(pool.read(0))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_rotating_makes_coarse_codes_bearable() -> None:
    """Large channels take all levels of a head, unless they are spread first."""
    key, value = vectors(SHAPE, 64, seed=8)
    key[..., ::16] *= 8
    errors = []
    for rotate in (False, True):
        pool = Pool(Case(Hack, {"bits": 2, "rotate": rotate}), SHAPE)
        pool.store({0: (key, value)})
        errors.append(float((pool.read(0)[0] - key).square().mean() / key.square().mean()))
    assert errors[1] < 0.15 < 0.2 < errors[0], errors


def test_an_empty_history_is_nothing() -> None:
    pool = Pool(Case(Hack), SHAPE)
    key, value = vectors(SHAPE, 5, seed=6)
    query = queries(SHAPE, 5, seed=7)
    write, attend = pool.batch({0: (key, value)}, query, True)
    pool.policy.write(pool.layer, write, pool.pages)
    out = torch.full_like(query, torch.nan)
    pool.policy.attend(pool.layer, replace(attend, max_seq_len=5), pool.pages, out)
    torch.testing.assert_close(out, pool.expected(attend), atol=1e-5, rtol=1e-5)


def test_fitting_lowers_the_error() -> None:
    key, value = vectors(SHAPE, 60, seed=11)
    errors = []
    for fit in (0, 2):
        pool = Pool(Case(Hack, {"bits": 2, "fit": fit}), SHAPE)
        pool.store({0: (key, value)})
        errors.append(float((pool.read(0)[0] - key).square().mean()))
    assert errors[1] < 0.97 * errors[0]
