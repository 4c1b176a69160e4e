"""`int8` outside the pool: bytes with a scale and a zero point per token and KV head."""

from __future__ import annotations

import pytest

from kvplug.testing.transfer import as_stored, check_round_trip, chunk, engine, shapes_of
from kvplug_policies.transfer.int8 import Int8Codec

CODEC = Int8Codec(Int8Codec.Options(), engine())


def test_an_element_is_off_by_half_a_step() -> None:
    planes = chunk(33)
    found = CODEC.decode(as_stored(CODEC.encode(planes, 0)), shapes_of(planes), 0)
    for name, plane in planes.items():
        right = plane.float()
        step = (right.amax(-1, keepdim=True) - right.amin(-1, keepdim=True)) / 255
        off = (found[name].float() - right).abs()
        rounding = right.abs().amax(-1, keepdim=True) / 256
        assert (off <= 0.51 * step + rounding).all()


def test_a_vector_takes_four_bytes_more_than_its_bytes() -> None:
    assert check_round_trip(CODEC, chunk(64)) == pytest.approx((32 + 4) / 64)


def test_tokens_do_not_depend_on_their_chunk() -> None:
    whole = chunk(32)
    parts = [{n: p[:, at : at + 8].contiguous() for n, p in whole.items()} for at in (0, 8, 16, 24)]
    found = CODEC.decode(as_stored(CODEC.encode(whole, 0)), shapes_of(whole), 0)
    for i, part in enumerate(parts):
        alone = CODEC.decode(as_stored(CODEC.encode(part, 8 * i)), shapes_of(part), 8 * i)
        for name in whole:
            assert (alone[name] == found[name][:, 8 * i : 8 * i + 8]).all()
