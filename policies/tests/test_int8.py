from __future__ import annotations

import pytest

from kvplug.contract import EngineView
from kvplug.testing.format import Case, Pool, Shape, vectors, view
from kvplug_policies.format.int8 import Int8

SHAPE = Shape(64, 6, 2, 16)


def size(head_size: int, **options: object) -> int:
    layer = view(Shape(head_size, 6, 2, 16))
    policy = Int8(Int8.Options.model_validate(options), EngineView(16, layers=(layer,)))
    return policy.layout(layer).bytes_per_token_head


@pytest.mark.parametrize(("head_size", "bytes_"), [(64, 136), (96, 200), (128, 264), (256, 520)])
def test_a_token_takes_its_codes_two_scales_and_two_zeros(head_size: int, bytes_: int) -> None:
    assert size(head_size) == bytes_
    assert size(head_size, group=32) == 2 * head_size + 8 * head_size // 32


@pytest.mark.parametrize("group", [0, 16, 32])
def test_an_element_is_off_by_half_a_step_at_most(group: int) -> None:
    pool = Pool(Case(Int8, {"group": group}), SHAPE)
    key, value = vectors(SHAPE, 40, seed=1)
    key[..., 7] += 30
    pool.store({0: (key, value)})
    for found, right in zip(pool.read(0), (key, value), strict=True):
        grouped = right.reshape(*right.shape[:2], -1, group or 64)
        spread = grouped.amax(-1, keepdim=True) - grouped.amin(-1, keepdim=True)
        off = (found.reshape(grouped.shape) - grouped).abs()
        # Scale and zero point are rounded to float16.
        rounding = grouped.abs().amax(-1, keepdim=True) * 2**-10
        assert (off <= spread / 255 / 2 * 1.001 + rounding).all()


def test_a_group_that_does_not_divide_the_head_is_refused() -> None:
    with pytest.raises(ValueError, match="groups of 48 channels do not divide a head of 64") as why:
        size(64, group=48)
    assert str(why.value).endswith("choose 0 (the whole head), 8, 16, 32")


def test_a_constant_vector_comes_back_as_it_is() -> None:
    pool = Pool(Case(Int8), SHAPE)
    key, value = vectors(SHAPE, 4, seed=2)
    key[:], value[:] = 1.5, 0.0
    pool.store({0: (key, value)})
    found = pool.read(0)
    assert (found[0] == 1.5).all() and (found[1] == 0).all()
