"""`fp8` outside the pool: e4m3 with a scale per token and KV head."""

from __future__ import annotations

import pytest
import torch

from kvplug.testing.transfer import as_stored, check_round_trip, chunk, engine, shapes_of
from kvplug_policies.transfer.fp8 import Fp8Codec


def build(**options: bool) -> Fp8Codec:
    return Fp8Codec(Fp8Codec.Options(**options), engine())


def test_an_element_is_off_by_a_sixteenth_of_itself() -> None:
    codec, planes = build(), chunk(33)
    found = codec.decode(as_stored(codec.encode(planes, 0)), shapes_of(planes), 0)
    for name, plane in planes.items():
        right = plane.float()
        largest = right.abs().amax(-1, keepdim=True)
        off = (found[name].float() - right).abs()
        # Half a step of e4m3, that of the scale's rounding, and of bfloat16.
        assert (off <= right.abs() * (1 / 16 + 1 / 128) + largest * 1e-5).all()
        assert float((off / right.abs()).mean()) > 0.01


def test_bytes_are_half_and_huffman_codes_fewer() -> None:
    planes = chunk(64)
    plain, squeezed = (check_round_trip(build(entropy=on), planes) for on in (False, True))
    assert plain == pytest.approx(0.5 + 1 / 32)
    assert squeezed < 0.95 * plain


def test_what_entropy_changes_is_in_the_fingerprint() -> None:
    assert build().fingerprint() != build(entropy=True).fingerprint()


def test_what_is_not_a_number_comes_back_as_zero() -> None:
    codec, planes = build(), chunk(8)
    planes["key"][0, 3, 1, :2] = torch.tensor([float("nan"), float("inf")])
    found = codec.decode(as_stored(codec.encode(planes, 0)), shapes_of(planes), 0)
    assert found["key"][0, 3, 1, :2].tolist() == [0, 0]
    assert found["key"].isfinite().all()
