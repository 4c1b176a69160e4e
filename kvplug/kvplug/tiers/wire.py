"""The wire format: a chunk's coded tensors and all that they depend on, in one run of bytes.

A payload is a safetensors file, restricted to one way of writing it, so that a reader can check the
length and the checksum before it parses anything. Numbers are little endian.

    offset  bytes  content
    0       8      N, length of the header in bytes; N + 8 is a multiple of 64
    8       N      header: JSON, ASCII, padded with spaces
      8     27       {"__metadata__":{"kvplug":"
      35    4        version of the format, decimal digits: 0001
      39    11       ","bytes":"
      50    16       length of the whole payload, decimal digits
      66    10       ","xxh3":"
      76    32       XXH3-128 of every byte of the payload but these, hexadecimal
      108            ","key":"..." and the other facts, then the table of the tensors
    N+8            the tensors, contiguous and row-major, in the order of the table

The checksum detects damage, not forgery. Whoever can write to a tier can write valid payloads, so
the header is bounded and validated before use, and nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import torch
import xxhash
from torch import Tensor

from kvplug.contract.transfer import CorruptPayload, PlaneShape

__all__ = ["CAUSES", "ChunkHeader", "RefusedPayload", "inspect", "pack", "unpack"]

VERSION = 1

CAUSES: Final = (
    "not a chunk",
    "other version",
    "truncated",
    "trailing bytes",
    "bad checksum",
    "bad header",
    "other key",
    "other identity",
    "other codec",
    "other calibration",
    "other exactness",
    "other place",
    "other rank",
    "other planes",
)
"""Reasons to refuse a payload."""

MAX_HEADER = 1 << 20
"""Most bytes of a header."""

MAX_TENSORS = 4096
"""Most tensors of a payload."""

_ALIGNMENT = 64
_MAX_TEXT = 1024
_MAX_AXES = 8
_MAX_PLANES = 8
_MAX_NUMBER = 1 << 48

_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_PLANE_TYPES = ("bfloat16", "float16", "float32", "uint8")

_OPENING = b'{"__metadata__":{"kvplug":"'
_BEFORE_BYTES = b'","bytes":"'
_BEFORE_SUM = b'","xxh3":"'
_VERSION_AT = 8 + len(_OPENING)
_BYTES_AT = _VERSION_AT + 4 + len(_BEFORE_BYTES)
_SUM_AT = _BYTES_AT + 16 + len(_BEFORE_SUM)
_SUM_END = _SUM_AT + 32

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]{0,63}")
_DIGITS = re.compile(r"0|[1-9][0-9]{0,14}")
_KEY = re.compile(r"[0-9a-f]{64}")
_FLAG = re.compile(r"[01]")

with warnings.catch_warnings():
    # Tensors over bytes that nobody may write to: torch says so once a process, which is now.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


class RefusedPayload(CorruptPayload):
    """A payload that is not what the reader expects.

    Attributes:
        cause: One of [`CAUSES`][kvplug.tiers.wire.CAUSES].
    """

    def __init__(self, cause: str, detail: str = "") -> None:
        self.cause = cause
        self.detail = detail
        super().__init__(f"{cause}: {detail}" if detail else cause)

    def __reduce__(self) -> tuple[type[RefusedPayload], tuple[str, str]]:
        return type(self), (self.cause, self.detail)


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """All that a chunk's coded tensors depend on.

    Attributes:
        key: The chunk's key, 32 bytes.
        identity: Digest of everything that all KV of the engine depends on, hexadecimal.
        codec: Name of the codec.
        version: Version of its coded form.
        fingerprint: What coded bytes depend on beside the planes; the codec's.
        exact: True if the codec gives back the planes bit for bit.
        start: Position of the chunk's first token in its text.
        tokens: Tokens of the chunk.
        rank: Rank of the worker whose layers and heads these are.
        world: Workers of the engine.
        planes: Types and shapes of the tensors that were encoded, by name.
    """

    key: bytes
    identity: str
    codec: str
    version: int
    fingerprint: str
    exact: bool
    start: int
    tokens: int
    rank: int
    world: int
    planes: Mapping[str, PlaneShape]


_EXPECTED = (
    ("other key", "key"),
    ("other identity", "identity"),
    ("other codec", "codec"),
    ("other codec", "version"),
    ("other calibration", "fingerprint"),
    ("other exactness", "exact"),
    ("other place", "start"),
    ("other place", "tokens"),
    ("other rank", "rank"),
    ("other rank", "world"),
    ("other planes", "planes"),
)
assert {name for _, name in _EXPECTED} == {field.name for field in fields(ChunkHeader)}

_Table = list[tuple[str, str, tuple[int, ...], int]]
"""Name, type, shape and bytes of each tensor, in order."""


class _Malformed(ValueError):
    """A header that is not valid."""


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise _Malformed(what)


# -- Writing ---------------------------------------------------------------------------------------


def pack(header: ChunkHeader, coded: Mapping[str, Tensor]) -> memoryview:
    """Write a chunk in the wire format.

    Args:
        header: What the tensors depend on.
        coded: Tensors by name, on any device.

    Returns:
        The payload: read-only bytes in host memory that nothing else refers to. The same arguments
        give the same bytes.

    Raises:
        ValueError: They could not be read back: a name, a type or a number is out of bounds.
    """
    # The widest types first, so that each tensor is aligned for its own.
    ordered = sorted(coded.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    table: _Table = []
    for name, tensor in ordered:
        if tensor.dtype not in _CODES:
            raise ValueError(f"tensor {name}: {tensor.dtype} cannot be written")
        size = tensor.numel() * tensor.dtype.itemsize
        table.append((name, _CODES[tensor.dtype], tuple(tensor.shape), size))
    try:
        text = _written(header, table)
        _parsed(text, sum(size for *_, size in table))
    except (_Malformed, UnicodeError) as error:
        raise ValueError(f"chunk {header.key.hex()} cannot be written: {error}") from None
    at = 8 + len(text)
    buffer = torch.empty(at + sum(size for *_, size in table), dtype=torch.uint8)
    raw = memoryview(buffer.numpy().data).cast("B")
    raw[:8] = len(text).to_bytes(8, "little")
    raw[8:at] = text
    raw[_BYTES_AT : _BYTES_AT + 16] = b"%016d" % len(raw)
    for (*_, size), (_, tensor) in zip(table, ordered, strict=True):
        if size:
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            buffer[at : at + size].copy_(flat)
        at += size
    raw[_SUM_AT:_SUM_END] = _sum(raw)
    return raw.toreadonly()


def _sum(raw: memoryview) -> bytes:
    found = xxhash.xxh3_128(raw[:_SUM_AT])
    found.update(raw[_SUM_END:])
    return found.hexdigest().encode()


def _written(header: ChunkHeader, table: _Table) -> bytes:
    """The header as it stands in a payload, with zeros for the length and the checksum."""
    planes = ";".join(
        " ".join([name, plane.dtype, *map(str, plane.shape)])
        for name, plane in sorted(header.planes.items())
    )
    facts = {
        "key": header.key.hex(),
        "identity": header.identity,
        "codec": header.codec,
        "codec_version": str(header.version),
        "fingerprint": header.fingerprint,
        "exact": str(int(header.exact)),
        "start": str(header.start),
        "tokens": str(header.tokens),
        "rank": str(header.rank),
        "world": str(header.world),
        "planes": planes,
    }
    tensors: dict[str, Any] = {}
    at = 0
    for name, code, shape, size in table:
        tensors[name] = {"dtype": code, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    opening = b"".join(
        [_OPENING, b"%04d" % VERSION, _BEFORE_BYTES, b"0" * 16, _BEFORE_SUM, b"0" * 32, b'",']
    )
    text = opening + _json(facts)[1:]
    text += (b"," + _json(tensors)[1:]) if tensors else b"}"
    return text + b" " * (-(8 + len(text)) % _ALIGNMENT)


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")


# -- Reading ---------------------------------------------------------------------------------------


def unpack(payload: Any, expected: ChunkHeader) -> dict[str, Tensor]:
    """Read a chunk, and refuse every other.

    Args:
        payload: Bytes-like; it must not change while the tensors are in use.
        expected: What the chunk must be.

    Returns:
        The coded tensors: views of the payload, read only.

    Raises:
        RefusedPayload: It is not that chunk, whole and undamaged.
    """
    raw, found, table, at = _read(payload)
    if found != expected:
        for cause, name in _EXPECTED:
            ours, theirs = getattr(expected, name), getattr(found, name)
            if ours != theirs:
                shown = [v.hex() if isinstance(v, bytes) else v for v in (theirs, ours)]
                raise RefusedPayload(cause, f"{name} {shown[0]!r} for {shown[1]!r}")
    tensors = {}
    for name, code, shape, size in table:
        tensors[name] = _view(raw, at, _DTYPES[code], shape)
        at += size
    return tensors


def inspect(payload: Any) -> ChunkHeader:
    """Read a chunk's header; the whole payload is checked.

    Raises:
        RefusedPayload: It is no chunk, or not whole, or damaged.
    """
    return _read(payload)[1]


def _view(raw: memoryview, at: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(raw, dtype=dtype, count=count, offset=at)
    return (flat.clone() if flat.data_ptr() % dtype.itemsize else flat).view(shape)


def _read(payload: Any) -> tuple[memoryview, ChunkHeader, _Table, int]:
    """The payload, its header, its table and the offset of the first tensor."""
    raw = memoryview(payload).cast("B")
    start = bytes(raw[: _SUM_END + 2])
    if start[8:_VERSION_AT] != _OPENING[: max(0, len(start) - 8)]:
        raise RefusedPayload("not a chunk")
    if len(start) < _SUM_END + 2:
        raise RefusedPayload("truncated", f"{len(start)} bytes")
    version, length = start[_VERSION_AT : _VERSION_AT + 4], start[_BYTES_AT : _BYTES_AT + 16]
    if version != b"%04d" % VERSION:
        shown = version.decode("ascii", "backslashreplace")
        raise RefusedPayload("other version", f"{shown}, not {VERSION:04}")
    between = start[_VERSION_AT + 4 : _BYTES_AT], start[_BYTES_AT + 16 : _SUM_AT], start[_SUM_END:]
    if between != (_BEFORE_BYTES, _BEFORE_SUM, b'",') or not length.isdigit():
        raise RefusedPayload("not a chunk")
    if len(raw) != int(length):
        cause = "truncated" if len(raw) < int(length) else "trailing bytes"
        raise RefusedPayload(cause, f"{len(raw):,} bytes, not {int(length):,}")
    size = int.from_bytes(start[:8], "little")
    if size > MAX_HEADER or size + 8 > len(raw):
        raise RefusedPayload("bad header", f"{size:,} bytes is too long")
    if _sum(raw) != start[_SUM_AT:_SUM_END]:
        raise RefusedPayload("bad checksum")
    text = bytearray(raw[8 : 8 + size])
    text[_BYTES_AT - 8 : _BYTES_AT + 8] = b"0" * 16
    text[_SUM_AT - 8 : _SUM_END - 8] = b"0" * 32
    try:
        header, table = _parsed(bytes(text), len(raw) - 8 - size)
    except _Malformed as error:
        raise RefusedPayload("bad header", str(error)) from None
    return raw, header, table, 8 + size


def _parsed(text: bytes, room: int) -> tuple[ChunkHeader, _Table]:
    """Validate a header, with zeros for length and checksum, of tensors that take some bytes."""
    _need(len(text) <= MAX_HEADER, "too long")
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError):
        raise _Malformed("not valid JSON") from None
    _need(isinstance(listed, dict) and 1 <= len(listed) <= 1 + MAX_TENSORS, "too many tensors")
    facts = listed.pop("__metadata__", None)
    _need(isinstance(facts, dict), "no facts")
    table = [_tensor(name, value) for name, value in listed.items()]
    _need(sum(size for *_, size in table) == room, "the tensors do not fill the payload")
    header = ChunkHeader(
        key=bytes.fromhex(_match(facts, "key", _KEY)),
        identity=_text(facts, "identity"),
        codec=_text(facts, "codec"),
        version=_number(facts, "codec_version"),
        fingerprint=_text(facts, "fingerprint"),
        exact=_match(facts, "exact", _FLAG) == "1",
        start=_number(facts, "start"),
        tokens=_number(facts, "tokens"),
        rank=_number(facts, "rank"),
        world=_number(facts, "world"),
        planes=_planes(_text(facts, "planes")),
    )
    _need(header.rank < header.world, f"rank must be below world ({header.world})")
    # One way of writing it: no key twice, none besides, offsets without gaps, only spaces after.
    _need(_written(header, table) == text, "not written as this version writes it")
    return header, table


def _text(facts: Mapping[str, Any], name: str) -> str:
    value = facts.get(name)
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise _Malformed(f"{name} must be a text of at most {_MAX_TEXT} characters")
    return value


def _match(facts: Mapping[str, Any], name: str, form: re.Pattern[str]) -> str:
    value = _text(facts, name)
    _need(form.fullmatch(value) is not None, f"{name} is not of its form")
    return value


def _number(facts: Mapping[str, Any], name: str) -> int:
    return int(_match(facts, name, _DIGITS))


def _planes(text: str) -> dict[str, PlaneShape]:
    planes = {}
    parts = text.split(";")
    _need(0 < len(parts) <= _MAX_PLANES, "planes must be some")
    for part in parts:
        name, *rest = part.split(" ")
        _need(_NAME.fullmatch(name) is not None and bool(rest), "a plane has no valid name")
        dtype, *axes = rest
        _need(dtype in _PLANE_TYPES, "a plane has an unknown type")
        _need(
            0 < len(axes) <= _MAX_AXES and all(_DIGITS.fullmatch(axis) for axis in axes),
            "a plane has no valid shape",
        )
        planes[name] = PlaneShape(dtype, tuple(map(int, axes)))
    return planes


def _tensor(name: str, value: Any) -> tuple[str, str, tuple[int, ...], int]:
    """Validate a tensor's entry; where it lies follows from those before it."""
    _need(_NAME.fullmatch(name) is not None, "a tensor has no valid name")
    _need(isinstance(value, dict), "a tensor has no entry")
    code, shape = value.get("dtype"), value.get("shape")
    _need(isinstance(code, str) and code in _DTYPES, "a tensor has an unknown type")
    _need(
        isinstance(shape, list)
        and len(shape) <= _MAX_AXES
        and all(type(axis) is int and axis >= 0 for axis in shape)
        # Strides are counted where there are no elements, too.
        and math.prod(max(axis, 1) for axis in shape) < _MAX_NUMBER,
        "a tensor has no valid shape",
    )
    return name, code, tuple(shape), math.prod(shape) * _DTYPES[code].itemsize
