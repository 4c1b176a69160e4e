"""`int4` outside the pool: half-bytes with a scale per channel over a run of tokens."""

from __future__ import annotations

import pytest
import torch

from kvplug.testing.transfer import as_stored, check_round_trip, chunk, engine, shapes_of
from kvplug_policies.transfer.int4 import LEAST_TOKENS, Int4Codec


def build(group: int = 32) -> Int4Codec:
    return Int4Codec(Int4Codec.Options(group=group), engine())


def test_a_channel_takes_four_bytes_more_a_group() -> None:
    assert check_round_trip(build(), chunk(32)) == pytest.approx((16 + 4) / 64)
    assert check_round_trip(build(), chunk(128)) == pytest.approx((64 + 16) / 256)
    assert check_round_trip(build(64), chunk(128)) == pytest.approx((64 + 8) / 256)


@pytest.mark.parametrize(
    ("tokens", "groups"), [(1, 0), (7, 0), (8, 1), (33, 1), (63, 1), (64, 2), (100, 3)]
)
def test_groups_are_nearly_equal(tokens: int, groups: int) -> None:
    codec = build()
    assert codec.groups(tokens) == groups
    shape = (3, groups, 2, 32) if groups else (3, tokens, 2)
    assert codec.encode(chunk(tokens), 0)["key.scale"].shape == shape
    assert LEAST_TOKENS == 8


def test_an_element_is_off_by_half_a_step_of_its_channel() -> None:
    codec, planes = build(), chunk(32)
    found = codec.decode(as_stored(codec.encode(planes, 0)), shapes_of(planes), 0)
    for name, plane in planes.items():
        right = plane.float()
        step = (right.amax(1, keepdim=True) - right.amin(1, keepdim=True)) / 15
        off = (found[name].float() - right).abs()
        assert (off <= 0.51 * step + right.abs().amax(1, keepdim=True) / 128).all()


def test_a_channel_of_large_numbers_spoils_no_other() -> None:
    codec, planes = build(), chunk(32)
    loud = {name: plane.clone() for name, plane in planes.items()}
    loud["key"][..., 5] *= 1000
    shapes = shapes_of(planes)
    quiet = codec.decode(as_stored(codec.encode(planes, 0)), shapes, 0)["key"]
    beside = codec.decode(as_stored(codec.encode(loud, 0)), shapes, 0)["key"]
    others = torch.arange(32) != 5
    assert torch.equal(quiet[..., others], beside[..., others])


def test_the_group_is_in_the_fingerprint() -> None:
    assert build().fingerprint() != build(64).fingerprint()
