from __future__ import annotations

import pytest

from kvplug.contract import EngineView
from kvplug.testing.format import Case, Pool, Shape, vectors, view
from kvplug_policies.format.int4 import Int4

SHAPE = Shape(64, 6, 2, 16)


def size(head_size: int, **options: object) -> int:
    layer = view(Shape(head_size, 6, 2, 16))
    policy = Int4(Int4.Options.model_validate(options), EngineView(16, layers=(layer,)))
    return policy.layout(layer).bytes_per_token_head


def test_a_token_takes_its_codes_two_scales_and_two_zeros() -> None:
    assert [size(n) for n in (64, 96, 128, 256)] == [72, 104, 136, 264]
    assert 64 * 4 / size(64) >= 3.5
    assert 128 * 4 / size(128) >= 3.7
    assert size(64, group=32) == 80


@pytest.mark.parametrize("group", [0, 16, 32])
def test_an_element_is_off_by_half_a_step_at_most(group: int) -> None:
    pool = Pool(Case(Int4, {"group": group, "rotate": False}), SHAPE)
    key, value = vectors(SHAPE, 40, seed=1)
    key[..., 7] += 30
    pool.store({0: (key, value)})
    for found, right in zip(pool.read(0), (key, value), strict=True):
        grouped = right.reshape(*right.shape[:2], -1, group or 64)
        spread = grouped.amax(-1, keepdim=True) - grouped.amin(-1, keepdim=True)
        off = (found.reshape(grouped.shape) - grouped).abs()
        # Scale and zero point are rounded to float16.
        rounding = grouped.abs().amax(-1, keepdim=True) * 2**-10
        assert (off <= spread / 15 / 2 * 1.001 + rounding).all()


def test_fitting_lowers_the_error() -> None:
    key, value = vectors(SHAPE, 40, seed=1)
    errors = []
    for fit in (0, 2):
        pool = Pool(Case(Int4, {"fit": fit}), SHAPE)
        pool.store({0: (key, value)})
        errors.append(float((pool.read(0)[0] - key).square().mean()))
    assert errors[1] < 0.97 * errors[0]


def test_one_large_channel_costs_the_others_little_behind_the_rotation() -> None:
    key, value = vectors(SHAPE, 40, seed=1)
    key[..., 7] += 30
    rest, off = [c for c in range(64) if c != 7], {}
    for rotate in (False, True):
        pool = Pool(Case(Int4, {"rotate": rotate}), SHAPE)
        pool.store({0: (key, value)})
        off[rotate] = float((pool.read(0)[0] - key)[..., rest].square().mean())
    assert off[True] < off[False] / 4


def test_a_group_that_does_not_divide_the_head_is_refused() -> None:
    with pytest.raises(ValueError, match="groups of 48 channels do not divide a head of 64") as why:
        size(64, group=48)
    assert str(why.value).endswith("choose 0 (the whole head), 8, 16, 32")


def test_a_constant_vector_comes_back_as_it_is() -> None:
    pool = Pool(Case(Int4, {"rotate": False}), SHAPE)
    key, value = vectors(SHAPE, 4, seed=2)
    key[:], value[:] = 1.5, 0.0
    pool.store({0: (key, value)})
    found = pool.read(0)
    assert (found[0] == 1.5).all() and (found[1] == 0).all()


def test_layers_have_bits_of_their_own() -> None:
    policy = Int4(
        Int4.Options.model_validate({"layers": {"0-1": 8, "-1": 2}}),
        EngineView(16, layers=tuple(view(SHAPE, index) for index in range(4))),
    )
    layouts = [policy.layout(view(SHAPE, index)) for index in range(4)]
    assert [layout.key_bits for layout in layouts] == [8, 8, 4, 2]
    assert [layout.bytes_per_token_head for layout in layouts] == [136, 136, 72, 40]


def test_the_first_range_that_holds_a_layer_counts() -> None:
    options = Int4.Options.model_validate({"layers": {"0": 8, "0-3": 2}})
    policy = Int4(options, EngineView(16))
    assert [policy.layout(view(SHAPE, index)).key_bits for index in (0, 1)] == [8, 2]


def test_a_head_of_an_odd_size_is_refused_by_its_layer() -> None:
    with pytest.raises(
        ValueError, match=r"layer 1 \(head size 65\): 65 elements of 4 bits do not fill"
    ):
        Int4(Int4.Options(), EngineView(16, layers=(view(Shape(65, 6, 2, 16), 1),)))
