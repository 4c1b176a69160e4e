"""A calibration file is whole, unedited and of this model, or it is refused in one sentence."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calibrated import activations, build, view, write_calibration

from kvplug import KVPlugError
from kvplug_policies import calibration
from kvplug_policies.calibration import BadCalibration, Calibration, load, projection
from kvplug_policies.format.lowrank import LowRank

ENGINE = view(layers=2, width=16)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    seen = {layer.index: activations(layer, 600) for layer in ENGINE.layers}
    return Path(write_calibration(tmp_path / "c.safetensors", ENGINE, seen))


def test_what_was_written_is_read(file: Path) -> None:
    found = load(file)
    assert (found.model, found.fingerprint, found.tokens) == ("tiny", ENGINE.model, 600)
    assert found.geometry[1] == calibration.Geometry(2, 6, 16)
    query, key, value = activations(ENGINE.layers[1], 600)
    torch.testing.assert_close(found.of(1, "key_mean"), key.mean(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        found.of(1, "value_range"), (value - value.mean(1, keepdim=True)).abs().amax(1)
    )
    assert found.of(1, "key_sample").shape == (512, 2, 16)
    assert torch.equal(found.of(1, "key_sample"), key.transpose(0, 1)[:512].half())
    moment = torch.einsum("hrnd,hrne->hde", *[query.view(2, 3, 600, 16)] * 2) / 1800
    torch.testing.assert_close(found.of(1, "query_moment"), moment, atol=1e-4, rtol=1e-4)
    assert found.checksum == load(file).checksum
    with pytest.raises(ValueError, match="has no key_meen of layer 1"):
        found.of(1, "key_meen")


def parts(data: bytes) -> tuple[dict[str, object], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict[str, object], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def edited(key: str, value: str | None) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        header, body = parts(data)
        metadata = header["__metadata__"]
        assert isinstance(metadata, dict)
        if value is None:
            del metadata[key]
        else:
            assert metadata[key] != value
            metadata[key] = value
        return joined(header, body)

    return edit


def renamed(data: bytes) -> bytes:
    header, body = parts(data)
    one, two = "layers.0.key_mean", "layers.1.key_mean"
    header[one], header[two] = header[two], header[one]
    return joined(header, body)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d[:-1], "truncated or not a safetensors file"),
        (lambda d: d[: len(d) // 2], "truncated or not a safetensors file"),
        (lambda d: d[:100], "truncated or not a safetensors file"),
        (lambda d: b"", "truncated or not a safetensors file"),
        (lambda d: d + b"\0", "truncated or not a safetensors file"),
        (lambda d: pickle.dumps({"a": 1}), "truncated or not a safetensors file"),
        (lambda d: b"\xff" * 8 + d[8:], "truncated or not a safetensors file"),
        (lambda d: d[:-5] + bytes([d[-5] ^ 1]) + d[-4:], "edited or damaged"),
        (renamed, "edited or damaged"),
        (edited("fingerprint", "0" * 32), "edited or damaged"),
        (edited("tokens", "9"), "edited or damaged"),
        (edited("checksum", None), "edited or damaged"),
        (edited("model", None), "edited or damaged"),
        (edited("format", "other"), "is not a calibration file"),
        (edited("format", None), "is not a calibration file"),
        (edited("version", "1"), "has version '1', this release reads 2"),
    ],
)
def test_a_damaged_file_is_refused_by_name(
    file: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message) as refused:
        build(LowRank, ENGINE, calibration=str(file))
    message = str(refused.value)
    assert str(file) in message
    assert "\n" not in message
    assert "kvplug calibrate" in message


def test_every_byte_counts(file: Path) -> None:
    """Whatever byte is changed, the file is refused, or nothing of it is read."""
    data = file.read_bytes()
    source = torch.Generator().manual_seed(0)
    for at in torch.randint(0, len(data), (60,), generator=source).tolist():
        file.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        with pytest.raises(ValueError, match=r"calibration"):
            load(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.safetensors cannot be read \(No such file"):
        load(tmp_path / "none.safetensors")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "short").write_bytes(b"1234567")
    (tmp_path / "long").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    for name, told in {
        ".": "is a folder, not a regular file",
        "pipe": "is a named pipe, not a regular file",
        "zero": "is a device, not a regular file",
        "short": "is truncated or not a safetensors file",
        "long": "is truncated or not a safetensors file",
        "a\0b": "cannot be read",
    }.items():
        with pytest.raises(BadCalibration, match=told) as caught:
            load(f"{tmp_path}/{name}")
        assert isinstance(caught.value, KVPlugError)


def test_a_deployment_can_be_checked_before_its_calibration_is_made(tmp_path: Path) -> None:
    somewhere = replace(ENGINE, layers=())
    missing = str(tmp_path / "none.safetensors")
    assert build(LowRank, somewhere, calibration=missing)
    (tmp_path / "none.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="not a safetensors file"):
        build(LowRank, somewhere, calibration=missing)


def test_a_calibration_of_another_model_is_refused(file: Path) -> None:
    other = replace(ENGINE, model="f" * 32)
    with pytest.raises(
        ValueError, match=r"was made for another model \(tiny, fingerprint 0123456789ab"
    ):
        build(LowRank, other, calibration=str(file))
    assert build(LowRank, replace(ENGINE, model=""), calibration=str(file), rank=8)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (view(layers=3), "has no layer 2"),
        (view(layers=2, kv_heads=4), "has 6 query heads and 2 KV heads of 16, and the engine's"),
        (view(layers=2, width=32), "KV heads of 16, and the engine's has 6 query heads"),
        (view(layers=2, readers=1), "has 6 query heads and 2 KV heads of 16"),
    ],
)
def test_another_geometry_is_refused(file: Path, engine: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(LowRank, engine, calibration=str(file))  # type: ignore[arg-type]


def test_a_file_that_changed_is_read_again(file: Path) -> None:
    first = load(file).checksum
    seen = {layer.index: activations(layer, 600, seed=4) for layer in ENGINE.layers}
    write_calibration(file, ENGINE, seen)
    assert load(file).checksum != first


def test_saving_what_was_read_gives_the_same(file: Path, tmp_path: Path) -> None:
    found: Calibration = load(file)
    assert found.save(tmp_path / "again.safetensors") == found.checksum
    assert load(tmp_path / "again.safetensors").checksum == found.checksum


def test_the_projection_loses_least() -> None:
    """No other pair of maps of the same rank has a smaller weighted loss."""
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(2, 12, 12, generator=random, dtype=torch.float64)
    moment, weight = mix @ mix.mT
    encode, decode, energy = projection(moment, weight)
    eye = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(decode @ encode.mT, eye, atol=1e-4, rtol=1e-4)
    assert bool((energy[1:] <= energy[:-1]).all())

    def loss(enc: torch.Tensor, dec: torch.Tensor) -> float:
        rest = eye - dec @ enc.mT
        return float((weight * (rest @ moment @ rest.mT)).sum())

    best = loss(encode[:, :4], decode[:, :4])
    assert best == pytest.approx(float(energy[4:].sum()), rel=0.02)
    assert float(energy.sum()) == pytest.approx(float((weight * moment).sum()), rel=0.02)
    basis, _, _ = projection(moment)
    assert best < loss(basis[:, :4], basis[:, :4])
    for _ in range(20):
        step = 0.05 * torch.randn(2, 12, 4, generator=random, dtype=torch.float64)
        assert loss(encode[:, :4] + step[0], decode[:, :4] + step[1]) > best * 0.99
