"""The wire format: what was packed is unpacked, and everything else is refused with its cause."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvplug.contract import CorruptPayload, PlaneShape
from kvplug.tiers import wire
from kvplug.tiers.wire import CAUSES, ChunkHeader, RefusedPayload, inspect, pack, unpack

PLANES = {
    "key": PlaneShape("bfloat16", (2, 16, 3, 8)),
    "value": PlaneShape("bfloat16", (2, 16, 3, 8)),
}
HEADER = ChunkHeader(
    key=bytes(range(32)),
    identity="0123456789abcdef" * 4,
    codec="raw",
    version=1,
    fingerprint="",
    exact=True,
    start=48,
    tokens=16,
    rank=0,
    world=2,
    planes=PLANES,
)
CODED = {
    "key": torch.arange(2 * 16 * 3 * 8, dtype=torch.float32).bfloat16().view(2, 16, 3, 8),
    "value": torch.arange(2 * 16 * 3 * 8, dtype=torch.float32).neg().bfloat16().view(2, 16, 3, 8),
    "escapes": torch.tensor([3, 1, 4, 1, 5], dtype=torch.uint8),
}
CHANGES: dict[str, tuple[str, Any]] = {
    "key": ("other key", bytes(32)),
    "identity": ("other identity", "another"),
    "codec": ("other codec", "lossless"),
    "version": ("other codec", 2),
    "fingerprint": ("other calibration", "abc"),
    "exact": ("other exactness", False),
    "start": ("other place", 64),
    "tokens": ("other place", 32),
    "rank": ("other rank", 1),
    "world": ("other rank", 4),
    "planes": ("other planes", {"cells": PlaneShape("uint8", (2, 16, 3, 40))}),
}


def refusal(payload: Any, expected: ChunkHeader = HEADER) -> str:
    with pytest.raises(RefusedPayload) as refused:
        unpack(payload, expected)
    assert refused.value.cause in CAUSES
    assert isinstance(refused.value, CorruptPayload)
    return refused.value.cause


def summed(payload: bytes | bytearray) -> bytes:
    """A payload with the length and the checksum that its bytes should have."""
    raw = bytearray(payload)
    raw[50:66] = b"%016d" % len(raw)
    raw[76:108] = xxhash.xxh3_128(raw[:76] + raw[108:]).hexdigest().encode()
    return bytes(raw)


def rewritten(old: str, new: str, coded: Mapping[str, torch.Tensor] | None = None) -> bytes:
    """A payload whose header says something else, with a checksum that is right."""
    payload = bytes(pack(HEADER, CODED if coded is None else coded))
    size = int.from_bytes(payload[:8], "little")
    text = payload[8 : 8 + size].decode().rstrip()
    assert old in text
    changed = text.replace(old, new, 1).encode()
    changed += b" " * (-(8 + len(changed)) % 64)
    return summed(len(changed).to_bytes(8, "little") + changed + payload[8 + size :])


# -- There and back --------------------------------------------------------------------------------


def test_what_is_packed_is_unpacked_bit_for_bit() -> None:
    payload = pack(HEADER, CODED)
    found = unpack(payload, HEADER)
    assert found.keys() == CODED.keys()
    for name, tensor in CODED.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert inspect(payload) == HEADER


@pytest.mark.parametrize("dtype", wire._DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5, 7)])
def test_every_type_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    count = torch.empty(shape).numel() * dtype.itemsize
    raw = torch.arange(count, dtype=torch.int64).to(torch.uint8).view(dtype).view(shape)
    found = unpack(pack(HEADER, {"odd": torch.ones(3, dtype=torch.uint8), "x": raw}), HEADER)["x"]
    assert (found.dtype, found.shape) == (raw.dtype, raw.shape)
    assert torch.equal(found.reshape(-1).view(torch.uint8), raw.reshape(-1).view(torch.uint8))


def test_no_tensors_and_tensors_that_are_not_contiguous() -> None:
    assert unpack(pack(HEADER, {}), HEADER) == {}
    turned = torch.arange(12).view(3, 4).t()
    assert torch.equal(unpack(pack(HEADER, {"x": turned}), HEADER)["x"], turned)


def test_the_same_chunk_has_the_same_bytes() -> None:
    backwards = dict(reversed(CODED.items()))
    planes = dict(reversed(PLANES.items()))
    assert pack(HEADER, CODED) == pack(replace(HEADER, planes=planes), backwards)


def test_safetensors_reads_it() -> None:
    payload = bytes(pack(HEADER, CODED))
    found = safetensors.torch.load(payload)
    assert found.keys() == CODED.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in CODED.items())


def test_the_layout_is_the_documented_one() -> None:
    payload = bytes(pack(HEADER, CODED))
    size = int.from_bytes(payload[:8], "little")
    assert (8 + size) % 64 == 0
    facts = json.loads(payload[8 : 8 + size])["__metadata__"]
    assert payload[8:39] == b'{"__metadata__":{"kvplug":"0001'
    assert payload[50:66] == b"%016d" % len(payload)
    assert payload[76:108].decode() == xxhash.xxh3_128(payload[:76] + payload[108:]).hexdigest()
    assert facts == {
        "kvplug": "0001",
        "bytes": f"{len(payload):016}",
        "xxh3": payload[76:108].decode(),
        "key": HEADER.key.hex(),
        "identity": HEADER.identity,
        "codec": "raw",
        "codec_version": "1",
        "fingerprint": "",
        "exact": "1",
        "start": "48",
        "tokens": "16",
        "rank": "0",
        "world": "2",
        "planes": "key bfloat16 2 16 3 8;value bfloat16 2 16 3 8",
    }


def test_tensors_are_views_and_the_payload_is_read_only() -> None:
    payload = pack(HEADER, CODED)
    assert payload.readonly and payload.format == "B"
    start = torch.frombuffer(payload, dtype=torch.uint8).data_ptr()
    for tensor in unpack(payload, HEADER).values():
        assert start < tensor.data_ptr() < start + len(payload)
        assert tensor.data_ptr() % tensor.dtype.itemsize == 0


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_a_payload_anywhere_in_memory(shift: int) -> None:
    shifted = bytearray(shift) + bytes(pack(HEADER, CODED))
    found = unpack(memoryview(shifted)[shift:], HEADER)
    assert all(torch.equal(found[name], tensor) for name, tensor in CODED.items())


@pytest.mark.parametrize(
    ("header", "coded"),
    [
        (HEADER, {"x": torch.zeros(2, dtype=torch.bool)}),
        (HEADER, {"__metadata__": torch.zeros(2)}),
        (HEADER, {"a b": torch.zeros(2)}),
        (HEADER, {f"t{i}": torch.zeros(0) for i in range(wire.MAX_TENSORS + 1)}),
        (replace(HEADER, key=bytes(31)), {}),
        (replace(HEADER, rank=2), {}),
        (replace(HEADER, start=-1), {}),
        (replace(HEADER, identity="x" * 1025), {}),
        (replace(HEADER, planes={}), {}),
        (replace(HEADER, planes={"key": PlaneShape("int64", (2,))}), {}),
        (replace(HEADER, planes={"key": PlaneShape("uint8", ())}), {}),
    ],
    ids=range(11),
)
def test_what_could_not_be_read_back_is_not_packed(
    header: ChunkHeader, coded: dict[str, Tensor]
) -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        pack(header, coded)


# -- Refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHANGES)
def test_a_chunk_that_is_another_in_one_fact_is_refused(name: str) -> None:
    cause, value = CHANGES[name]
    assert refusal(pack(HEADER, CODED), replace(HEADER, **{name: value})) == cause


def test_every_length_but_its_own_is_refused() -> None:
    payload = bytes(pack(HEADER, CODED))
    assert refusal(payload + b"\0") == "trailing bytes"
    for length in (*range(120), *range(120, len(payload), 97), len(payload) - 1):
        assert refusal(payload[:length]) == "truncated"


def test_every_flipped_byte_is_refused() -> None:
    payload = bytearray(pack(HEADER, CODED))
    size = int.from_bytes(payload[:8], "little") + 8
    for at in (*range(size), *range(size, len(payload), 31)):
        payload[at] ^= 0x10
        refusal(payload)
        payload[at] ^= 0x10
    unpack(payload, HEADER)


def test_other_files_are_no_chunks() -> None:
    plain = safetensors.torch.save({"key": torch.zeros(64, 64)})
    for payload in (b"\0" * 4096, b"\xff" * 4096, pickle.dumps(CODED), plain, b"{" * 4096):
        assert refusal(payload) == "not a chunk"
    other = bytearray(pack(HEADER, CODED))
    other[35:39] = b"0002"
    assert refusal(summed(other)) == "other version"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"rank":"0"', '"rank":"9"'),
        ('"rank":"0"', '"rank":"00"'),
        ('"rank":"0"', '"rank":"-1"'),
        ('"rank":"0"', '"rank":0'),
        ('"rank":"0"', '"rank":"0","rank":"0"'),
        ('"rank":"0"', '"rank":"0","more":"1"'),
        ('"exact":"1"', '"exact":"true"'),
        ('"exact":"1"', '"exact": "1"'),
        ('"identity":"', '"identity":"' + "x" * 1025),
        (HEADER.key.hex(), HEADER.key.hex().upper()),
        (HEADER.key.hex(), HEADER.key.hex()[2:]),
        ("bfloat16 2 16", "int64 2 16"),
        ("bfloat16 2 16", "bfloat16 2 -16"),
        ("key bfloat16 2 16 3 8;", ""),
        ("key bfloat16 2 16 3 8;", "key bfloat16 2 16 3 8;" * 9),
        ('"dtype":"BF16"', '"dtype":"BOOL"'),
        ('"dtype":"BF16"', '"dtype":"F32"'),
        ('"dtype":"BF16"', '"dtype":["BF16"]'),
        ('"shape":[2,16,3,8]', '"shape":[2,16,3,9]'),
        ('"shape":[2,16,3,8]', '"shape":[2,16,-3,-8]'),
        ('"shape":[2,16,3,8]', '"shape":[2,16,3,8.0]'),
        ('"shape":[2,16,3,8]', '"shape":[2,16,3,8,1e3]'),
        ('"shape":[2,16,3,8]', '"shape":[2,16,3,true,8]'),
        ('"shape":[2,16,3,8]', '"shape":' + "[" * 5000 + "]" * 5000),
        ('"shape":[2,16,3,8]', '"shape":[' + "9" * 5000 + "]"),
        ('"shape":[2,16,3,8]', '"shape":[281474976710656,281474976710656]'),
        ('"data_offsets":[0,1536]', '"data_offsets":[1,1537]'),
        ('"data_offsets":[0,1536]', '"data_offsets":[0,3072]'),
        ('"data_offsets":[1536,3072]', '"data_offsets":[0,1536]'),
        ('"escapes":{', '"key":{'),
        ('"escapes":{', '"../escapes":{'),
        ('"escapes":{', '"__metadata__":{'),
        ('"escapes":{', '"escapes":7,"x":{'),
    ],
    ids=range(33),
)
def test_a_hostile_header_is_refused_though_its_checksum_is_right(old: str, new: str) -> None:
    cause = refusal(rewritten(old, new))
    assert cause in ("bad header", "other planes")


@pytest.mark.parametrize("shape", [f"[0,{1 << 47},{1 << 47}]", f"[{1 << 47},{1 << 47},0]"])
def test_a_tensor_without_elements_has_a_shape_that_can_be_made(shape: str) -> None:
    empty = {"x": torch.empty(0, 3)}
    assert refusal(rewritten('"shape":[0,3]', f'"shape":{shape}', empty)) == "bad header"


def test_a_header_longer_than_allowed_is_not_parsed() -> None:
    padded = rewritten('"rank":"0"', '"rank":"0"' + " " * wire.MAX_HEADER)
    assert refusal(padded) == "bad header"
    payload = bytearray(pack(HEADER, CODED))
    for size in (2**64 - 1, len(payload), wire.MAX_HEADER + 1, 0):
        payload[:8] = size.to_bytes(8, "little")
        assert refusal(summed(payload)) == "bad header"


# -- Fuzzing ---------------------------------------------------------------------------------------

PAYLOAD = bytes(pack(HEADER, CODED))
OTHER = bytes(pack(replace(HEADER, key=bytes(32)), {"y": torch.arange(99)}))


def parsed_or_refused(payload: bytes) -> None:
    """Nothing but the chunk itself is taken, and nothing but a refusal is raised."""
    if payload == PAYLOAD:
        unpack(payload, HEADER)
        return
    try:
        found = unpack(payload, HEADER)
    except RefusedPayload as error:
        assert error.cause in CAUSES
        return
    # Its checksum was made for it: then what it says must hold.
    size = sum(t.numel() * t.dtype.itemsize for t in found.values())
    assert size + 8 + int.from_bytes(payload[:8], "little") == len(payload)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_of_any_kind_is_refused(data: st.DataObject) -> None:
    raw = bytearray(PAYLOAD)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw)))
        how = data.draw(st.sampled_from(["flip", "cut", "splice", "insert", "swap"]))
        if how == "flip" and at < len(raw):
            raw[at] ^= data.draw(st.integers(1, 255))
        elif how == "cut":
            del raw[at : at + data.draw(st.integers(1, 200))]
        elif how == "splice":
            raw = raw[:at] + OTHER[data.draw(st.integers(0, len(OTHER))) :]
        elif how == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=40))
        else:
            raw = raw[at:] + raw[:at]
    parsed_or_refused(bytes(raw))
    if len(raw) > 120:
        parsed_or_refused(summed(raw))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 400))
def test_any_header_with_a_right_checksum_raises_nothing_else(text: bytes, size: int) -> None:
    opening = PAYLOAD[8:110]
    parsed_or_refused(summed(size.to_bytes(8, "little") + opening + text))
