from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reuse_cases import STORED, build, candidate, refusal, request
from torch import Tensor

from kvplug.contract import LayerView
from kvplug.contract.policy import Rope
from kvplug.contract.reuse import Placement, Verdict
from kvplug_policies.reuse.position import Position

FREQUENCIES = tuple((10000.0 ** -(torch.arange(8, dtype=torch.float32) / 8)).tolist())


def layer(interleaved: bool = False, *, head: int = 16, rope: bool = True) -> LayerView:
    table = Rope(FREQUENCIES, interleaved) if rope else None
    return LayerView(0, 1, 2, 4, head, "float32", table)


def placement(shift: int, scheme: str = "rope/neox/0a", length: int = 5) -> Placement:
    verdict = Verdict(True, exact=not shift, shift=shift)
    fingerprint = candidate(position=scheme).fingerprint
    return Placement(fingerprint, 0, length, STORED.start + shift, verdict)


def rotated(x: Tensor, position: int, interleaved: bool) -> Tensor:
    """The rotation of the paper by one complex product per pair, ``x`` float64 ``[n, H, d]``."""
    p = len(FREQUENCIES)
    turned = x[..., : 2 * p]
    pairs = (
        turned.unflatten(-1, (p, 2)) if interleaved else turned.unflatten(-1, (2, p)).mT
    ).contiguous()
    angles = torch.tensor(FREQUENCIES, dtype=torch.float64) * position
    turn = torch.polar(torch.ones_like(angles), angles)
    whole = torch.view_as_real(torch.view_as_complex(pairs) * turn)
    flat = whole.flatten(-2) if interleaved else whole.mT.flatten(-2)
    return torch.cat([flat, x[..., 2 * p :]], -1)


@pytest.mark.parametrize("scheme", ["rope/neox/0a", "rope/gptj/0a", "alibi", "learned", "unknown"])
def test_the_same_position_is_exact_as_it_is(scheme: str) -> None:
    verdict = build(Position).check(candidate(position=scheme), request(position=scheme))
    assert verdict == Verdict(True)


@pytest.mark.parametrize("scheme", ["rope/neox/0a", "rope/gptj/ff"])
@pytest.mark.parametrize("start", [0, 63, 65, 400])
def test_rotary_keys_are_moved_approximately(scheme: str, start: int) -> None:
    wanted = request(position=scheme, start=start)
    verdict = build(Position).check(candidate(position=scheme), wanted)
    assert verdict == Verdict(True, exact=False, shift=start - 64)


@pytest.mark.parametrize("scheme", ["alibi", "none"])
def test_nothing_stored_knows_its_position_without_rotation(scheme: str) -> None:
    stored, wanted = candidate(position=scheme), request(position=scheme, start=7)
    assert build(Position).check(stored, wanted) == Verdict(True)
    assert build(Position, layers=[layer(rope=False)]).check(stored, wanted) == Verdict(True)
    # An engine whose layers do rotate gives the scheme the lie.
    turns = build(Position, layers=[layer()])
    assert refusal(turns.check(stored, wanted)) == "positions unknown"


@pytest.mark.parametrize(
    ("scheme", "cause"),
    [
        ("learned", "absolute positions"),
        ("unknown", "positions unknown"),
        ("rope-by-length", "rotation depends on length"),
        ("rope/neox", "positions unknown"),
        ("rope/neox/", "positions unknown"),
        ("rope/other/0a", "positions unknown"),
        ("", "positions unknown"),
    ],
)
def test_what_cannot_be_moved_is_refused_elsewhere(scheme: str, cause: str) -> None:
    verdict = build(Position).check(candidate(position=scheme), request(position=scheme, start=0))
    assert refusal(verdict) == cause


def test_rotation_by_length_is_refused_in_place_too() -> None:
    scheme = "rope-by-length"
    verdict = build(Position).check(candidate(position=scheme), request(position=scheme))
    assert refusal(verdict) == "rotation depends on length"


@pytest.mark.parametrize(("start", "ok"), [(54, True), (53, False), (74, True), (75, False)])
def test_max_shift_bounds_it_both_ways(start: int, ok: bool) -> None:
    verdict = build(Position, max_shift=10).check(candidate(), request(start=start))
    assert verdict.ok == ok and (ok or verdict.reason == "moved too far")


@pytest.mark.parametrize("bad", [{"max_shift": -1}, {"max_shift": 1.5}, {"shift": 1}])
def test_bad_options_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        build(Position, **bad)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head", [16, 24])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_moved_keys_are_those_computed_at_the_new_position(
    interleaved: bool, head: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, 4000))
    shift = data.draw(st.integers(-start, 4000).filter(bool))
    raw = torch.randn(5, 2, head, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    at = rotated(raw, start, interleaved).float()
    value = torch.randn(5, 2, head)
    kept, held = at.clone(), value.clone()
    check = build(Position, layers=[layer(interleaved, head=head)])
    where = placement(shift, f"rope/{'gptj' if interleaved else 'neox'}/0a")
    assert check.adapts(where)
    key, same = check.adapt(layer(interleaved, head=head), where, at, value)
    expected = rotated(raw, start + shift, interleaved)
    torch.testing.assert_close(key.double(), expected, rtol=0, atol=4e-6)
    assert torch.equal(key[..., 16:], at[..., 16:])
    assert torch.equal(same, held) and torch.equal(at, kept), "the stored bytes were written"


def test_there_and_back_in_bfloat16_is_within_its_rounding() -> None:
    key = torch.randn(64, 2, 16, generator=torch.Generator().manual_seed(5)).bfloat16()
    check = build(Position)
    there, _ = check.adapt(layer(), placement(3000), key, key)
    back, _ = check.adapt(layer(), placement(-3000), there, key)
    # Each way rounds once: half a unit in 2**8 of the pair's length.
    length = key.float().unflatten(-1, (2, 8)).norm(dim=-2).repeat(1, 1, 2)
    assert ((back.float() - key.float()).abs() <= length * 2**-7).all()


def test_keys_of_any_strides_are_moved_alike() -> None:
    key = torch.randn(7, 2, 16, generator=torch.Generator().manual_seed(8))
    strided = key.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert strided.stride() != key.stride()
    check = build(Position)
    one, _ = check.adapt(layer(), placement(11), key, key)
    two, _ = check.adapt(layer(), placement(11), strided, key)
    assert torch.equal(one, two) and not torch.equal(one, key)


def test_without_a_shift_nothing_is_adapted() -> None:
    key = torch.randn(5, 2, 16)
    check = build(Position)
    assert not check.adapts(placement(0))
    moved, value = check.adapt(layer(rope=False), placement(0), key, key)
    assert moved is key and value is key


@pytest.mark.parametrize(
    ("scheme", "view"),
    [
        ("rope/neox/0a", layer(rope=False)),
        ("rope/neox/0a", layer(interleaved=True)),
        ("rope/gptj/0a", layer()),
        ("alibi", layer()),
    ],
)
def test_a_layer_that_rotates_otherwise_is_no_guess(scheme: str, view: LayerView) -> None:
    key = torch.zeros(5, 2, 16)
    with pytest.raises(ValueError, match=r"the rotation of layer 0 is not (rope|alibi)"):
        build(Position).adapt(view, placement(3, scheme), key, key)
