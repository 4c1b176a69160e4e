"""`kvtc`: components of K and V over all layers and heads."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transforms import fitted, transform_file

from kvplug.contract import CorruptPayload, EngineView, Feature
from kvplug.testing.transfer import as_stored, check_round_trip, chunk, engine, same_bits, shapes_of
from kvplug_policies.calibration import BadCalibration
from kvplug_policies.transfer.kvtc import (
    BANDS,
    Kvtc,
    _packed,
    _unpacked,
    band_of,
    largest,
    quantize,
)
from kvplug_policies.transform import allocate, load, rotate


def build(view: EngineView | None = None, **options: object) -> Kvtc:
    given = {"transform": transform_file(), **options}
    return Kvtc(Kvtc.Options.model_validate(given), view or engine())


@pytest.mark.parametrize("ratio", [2.5, 4.0, 8.0])
def test_the_bytes_are_about_what_was_asked_for(ratio: float) -> None:
    """Frames and whole bits cost some; a transform of few components has the most of them."""
    found = 1 / check_round_trip(build(ratio=ratio), chunk(256), start=64)
    assert 0.85 * ratio < found < 1.25 * ratio


def test_fewer_bytes_cost_more_error() -> None:
    planes = chunk(256)
    errors = []
    for ratio in (2.5, 4.0, 8.0):
        codec = build(ratio=ratio)
        found = codec.decode(as_stored(codec.encode(planes, 64)), shapes_of(planes), 64)
        errors.append(float((found["value"].float() - planes["value"].float()).square().mean()))
    assert errors == sorted(errors) and errors[2] > 4 * errors[0] > 0


def test_the_first_tokens_of_a_text_come_back_to_the_bit() -> None:
    planes, shapes = chunk(16), shapes_of(chunk(16))
    codec = build(sinks=6)
    for start, kept in ((0, 6), (4, 2), (16, 0)):
        found = codec.decode(as_stored(codec.encode(planes, start)), shapes, start)
        for name in planes:
            assert same_bits(found[name][:, :kept], planes[name][:, :kept])
            assert not same_bits(found[name][:, kept:], planes[name][:, kept:])


def test_keys_are_rotated_back_before_they_are_coded() -> None:
    """The same key at another position has the same components."""
    rope = engine().layers[0].rope
    assert rope is not None
    still = chunk(16, torch.float32)["key"]
    codec = build()
    parts = [
        codec.cut("key", rotate(still, start, rope.frequencies, False), start)
        for start in (64, 4000)
    ]
    side = codec._sides["key"]
    codes = [
        np.concatenate([_unpacked(b, p, 16, side.counts[b]) for b in range(len(BANDS) + 1)], 1)
        for p in parts
    ]
    # What lies between two codes may fall to either side.
    assert (codes[0] != codes[1]).mean() < 0.02


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_undone(interleaved: bool) -> None:
    keys = torch.randn(2, 9, 3, 8, generator=torch.Generator().manual_seed(0))
    rope = (1.0, 0.5, 0.01)
    there = rotate(keys, 1000, rope, interleaved)
    assert torch.equal(there[..., 6:], keys[..., 6:]) and not torch.equal(there, keys)
    torch.testing.assert_close(rotate(there, 1000, rope, interleaved, back=True), keys)
    first = (0, 1) if interleaved else (0, 3)
    angle = torch.atan2(there[0, 0, 0, first[1]], there[0, 0, 0, first[0]]) - torch.atan2(
        keys[0, 0, 0, first[1]], keys[0, 0, 0, first[0]]
    )
    assert float(torch.cos(angle)) == pytest.approx(np.cos(1000.0), abs=1e-4)


def test_the_allocation_is_the_best_there_is() -> None:
    random = np.random.default_rng(4)
    for _ in range(20):
        rates = random.integers(1, 9, (4, 3)).astype(float)
        losses = random.random((4, 4))
        budget = float(random.integers(0, 24))
        found = allocate(rates, losses, budget)
        every = itertools.product(range(4), repeat=4)
        spent = np.concatenate([rates, np.zeros((4, 1))], 1)
        fits = [c for c in every if sum(spent[g, s] for g, s in enumerate(c)) <= budget]
        best = min(sum(losses[g, s] for g, s in enumerate(c)) for c in fits)
        assert sum(spent[g, s] for g, s in enumerate(found)) <= budget
        assert sum(losses[g, s] for g, s in enumerate(found)) == pytest.approx(best)


def test_codes_of_every_band_come_back() -> None:
    random = np.random.default_rng(1)
    for band in range(len(BANDS) + 1):
        most = int(largest(np.array([band]))[0])
        for shape in ((1, 1), (3, 7), (5, 0), (16, 33)):
            codes = random.integers(-most, most + 1, shape).astype(np.int16)
            parts = _packed(band, codes)
            assert (_unpacked(band, parts, *shape) == codes).all()
            if codes.size and band < len(BANDS):
                full = {f"band{band}": torch.full_like(parts[f"band{band}"], 255)}
                full = {n: torch.full((-(-codes.size // BANDS[band][2]),), 255) for n in full}
                with pytest.raises(CorruptPayload):
                    _unpacked(band, {n: t.to(torch.uint8) for n, t in full.items()}, *shape)


def test_codes_round_and_stop_at_the_largest() -> None:
    z = torch.tensor([[0.0, 0.59, 0.61, -0.61, 1.59, 1.61, -500.0]])
    codes = quantize(z, torch.ones(7), torch.full((7,), 127.0))
    assert codes.tolist() == [[0, 0, 1, -1, 1, 2, -127]]
    assert band_of(np.array([0.1, 0.5, 1.0, 3.0, 5.0, 10.0, 100.0])).tolist() == list(range(7))


def test_another_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    fitted("fingerprint of another").save(file)
    served = replace(engine(), model="fingerprint of this")
    with pytest.raises(BadCalibration, match="made for another model"):
        build(served, transform=str(file))
    narrow = replace(engine(), layers=tuple(replace(v, num_kv_heads=1) for v in engine().layers))
    with pytest.raises(BadCalibration, match="without tensor or pipeline parallelism"):
        build(narrow)
    assert Feature.TENSOR_PARALLEL not in Kvtc.supports


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    good = Path(transform_file())
    data = good.read_bytes()
    bad = tmp_path / "bad.safetensors"
    with pytest.raises(BadCalibration, match="kvplug calibrate transfer --output"):
        load(bad)
    for damaged in (b"", data[:1000], data[:-1], data + b"x", b"\xff" * 4096):
        bad.write_bytes(damaged)
        with pytest.raises(BadCalibration, match="kvplug calibrate transfer"):
            load(bad)
    flipped = bytearray(data)
    flipped[-5] ^= 1
    bad.write_bytes(flipped)
    with pytest.raises(BadCalibration, match="its checksum does not match"):
        load(bad)
    save_file(load_file(good), bad, metadata={"format": "another"})
    with pytest.raises(BadCalibration, match="is not a transform"):
        load(bad)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("key.basis", torch.zeros(5, 16, dtype=torch.float16)),
        ("key.steps", torch.zeros(3)),
        ("value.weight", torch.zeros(3, 2, 32)),
        ("value.loss", torch.full((12, 17), float("nan"))),
        ("value.mean", torch.zeros(3, 2, 32, dtype=torch.float64)),
        ("key.more", torch.zeros(1)),
    ],
)
def test_tensors_that_cannot_be_are_refused(name: str, wrong: torch.Tensor, tmp_path: Path) -> None:
    """With a checksum that matches: what a program wrote that is not this one."""
    made = fitted()
    file = tmp_path / "wrong.safetensors"
    replace(made, tensors={**made.tensors, name: wrong}).save(file)
    with pytest.raises(BadCalibration, match="tensors of other shapes"):
        load(file)


def test_a_check_without_the_model_needs_no_file() -> None:
    codec = build(EngineView(16), transform="/nowhere/transform.safetensors")
    assert codec.fingerprint().endswith("sinks=4")


def test_what_the_bytes_depend_on_is_in_the_fingerprint() -> None:
    found = {build().fingerprint(), build(ratio=4).fingerprint(), build(sinks=0).fingerprint()}
    assert len(found) == 3
