"""Files of stored segments: one per segment and rank, written atomically.

    offset  bytes  content
    0       8      magic: 89 4B 56 53 0D 0A 1A 0A
    8       4      version, 1
    12      4      length of the header in bytes, N
    16      16     XXH3-128 of the first 16 bytes and the header
    32      N      header: JSON, UTF-8
    32+N    size   the planes, contiguous and row-major, in the header's order
    end-16  16     XXH3-128 of the header's checksum and the planes

Numbers are little endian; the header holds token ids as base64 of little-endian int32. The
checksums detect damage, not forgery: whoever can write to the folder can write valid files, so
every header is validated before use, and nothing is ever unpickled.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from kvplug.contract.reuse import Fingerprint
from kvplug.errors import KVPlugError

__all__ = [
    "CAUSES",
    "BadSegment",
    "Plane",
    "SegmentHeader",
    "digest",
    "file_bytes",
    "file_name",
    "parse_name",
    "read_header",
    "read_segment",
    "segment_id",
    "write_segment",
]

MAGIC = b"\x89KVS\r\n\x1a\n"
VERSION = 1
SUFFIX = ".kvseg"

_START = struct.Struct("<8sII")
_SUM = 16
_BLOCK = 4096
"""Bytes in which file systems give out room."""
_FACTS = 2048
"""Most bytes of a header beside the fingerprint's texts, the session and the token ids."""
_MAX_HEADER = 64 << 20
_MAX_PAYLOAD = 1 << 40
_MAX_TEXT = 4096
_MAX_MEASURES = 64
_MAX_PLANES = 16
_MAX_AXES = 8
_MAX_RANKS = 1 << 16

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "uint8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ID = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"([0-9a-f]{32})\.([0-9]{1,5})-([0-9]{1,5})\.kvseg")
_PLANE = re.compile(r"[a-z][a-z0-9_]{0,31}")

CAUSES = (
    "not a segment file",
    "other version",
    "truncated",
    "bad checksum",
    "bad header",
    "other rank",
    "other geometry",
    "missing",
    "no memory",
    "unreadable",
)
"""Reasons to refuse a file."""


class BadSegment(KVPlugError):
    """A segment file that cannot be used.

    Attributes:
        path: The file.
        cause: One of [`CAUSES`][kvplug.reuse.file.CAUSES].
    """

    def __init__(self, path: Path | str, cause: str, detail: str = "") -> None:
        self.path = Path(path)
        self.cause = cause
        self.detail = detail
        # A name may hold anything, a line break too.
        shown = str(path).encode("unicode_escape").decode()
        super().__init__(f"{shown}: {cause}{f': {detail}' if detail else ''}")

    def __reduce__(self) -> tuple[type[BadSegment], tuple[str, str, str]]:
        return type(self), (str(self.path), self.cause, self.detail)


@dataclass(frozen=True, slots=True)
class Plane:
    """One tensor of a segment.

    Attributes:
        name: ``key``, ``value`` or ``cells``.
        dtype: ``bfloat16``, ``float16``, ``float32`` or ``uint8``.
        shape: Shape of the tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True, eq=False)
class SegmentHeader:
    """The header of a segment file.

    Attributes:
        id: 32 hexadecimal digits.
        fingerprint: What its KV depends on.
        token_ids: Its token ids, ``[length]`` int32.
        context_ids: All token ids before it, ``[start]`` int32.
        planes: The tensors, in the order of the file.
        rank: Tensor-parallel rank of the worker whose heads these are.
        world: Number of workers.
        size: Bytes of the planes.
        session: Session that keeps it, or the empty string.
    """

    id: str
    fingerprint: Fingerprint
    token_ids: NDArray[np.int32]
    context_ids: NDArray[np.int32]
    planes: tuple[Plane, ...]
    rank: int
    world: int
    size: int
    session: str = ""

    @classmethod
    def of(
        cls,
        segment: str,
        fingerprint: Fingerprint,
        token_ids: NDArray[np.int32],
        context_ids: NDArray[np.int32],
        planes: Mapping[str, Tensor],
        rank: int = 0,
        world: int = 1,
        session: str = "",
    ) -> SegmentHeader:
        """Describe tensors in a header.

        Raises:
            ValueError: A tensor's dtype cannot be stored.
        """
        listed = []
        for name, tensor in planes.items():
            if tensor.dtype not in _NAMES:
                raise ValueError(f"plane {name}: {tensor.dtype} cannot be stored")
            listed.append(Plane(name, _NAMES[tensor.dtype], tuple(tensor.shape)))
        size = sum(plane.size for plane in listed)
        return cls(
            segment,
            fingerprint,
            np.ascontiguousarray(token_ids, np.int32),
            np.ascontiguousarray(context_ids, np.int32),
            tuple(listed),
            rank,
            world,
            size,
            session,
        )


def digest(ids: NDArray[np.int32]) -> bytes:
    """Hash token ids for a fingerprint: 16-byte BLAKE2b of little-endian int32."""
    return hashlib.blake2b(_packed(ids), digest_size=16).digest()


def segment_id(fingerprint: Fingerprint) -> str:
    """Derive a segment's id from its fingerprint: 32 hexadecimal digits.

    Every field counts, the texts by their digests, except ``created``, ``request_id``,
    ``ancestry`` and ``measures``.
    """
    free = {"created", "request_id", "ancestry", "measures"}
    facts = {
        f.name: _plain(getattr(fingerprint, f.name))
        for f in fields(fingerprint)
        if f.name not in free
    }
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_name(segment: str, rank: int, world: int) -> str:
    """Return the name of a segment's file in the folder.

    Raises:
        ValueError: The id is not 32 hexadecimal digits, or the rank is not below world.
    """
    if not _ID.fullmatch(segment):
        raise ValueError(f"{segment!r} is not a segment id")
    if not 0 <= rank < world:
        raise ValueError(f"rank must be below world ({world}), got {rank}")
    return f"{segment}.{rank}-{world}{SUFFIX}"


def on_blocks(size: int) -> int:
    """Round a file's bytes up to what it takes of a file system."""
    return -(-size // _BLOCK) * _BLOCK


def file_bytes(fingerprint: Fingerprint, session: str, planes: int, world: int) -> int:
    """Bytes of a segment's files on the file system, before they are written; never too few.

    Args:
        fingerprint: The segment's.
        session: Session that keeps it, or the empty string.
        planes: Bytes of its planes, on all ranks together.
        world: Number of ranks.
    """
    facts = {f.name: _plain(getattr(fingerprint, f.name)) for f in fields(fingerprint)}
    texts = len(json.dumps([facts, session]))
    ids = sum(4 * -(-4 * n // 3) for n in (fingerprint.length, fingerprint.start))
    return world * on_blocks(-(-planes // world) + texts + ids + _FACTS)


def parse_name(name: str) -> tuple[str, int, int] | None:
    """Return id, rank and world from a segment file's name; None for any other name."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    segment, rank, world = found[1], int(found[2]), int(found[3])
    if rank >= world or file_name(segment, rank, world) != name:
        return None
    return segment, rank, world


def _packed(ids: NDArray[np.int32]) -> bytes:
    return np.ascontiguousarray(ids, "<i4").tobytes()


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(name): float(number) for name, number in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """View the memory of a contiguous CPU tensor as bytes, without copying."""
    flat: NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
    return flat


# -- Writing ---------------------------------------------------------------------------------------


def _encode(header: SegmentHeader) -> bytes:
    facts = {
        "id": header.id,
        "fingerprint": {
            f.name: _plain(getattr(header.fingerprint, f.name)) for f in fields(header.fingerprint)
        },
        "token_ids": base64.b64encode(_packed(header.token_ids)).decode(),
        "context_ids": base64.b64encode(_packed(header.context_ids)).decode(),
        "planes": [[plane.name, plane.dtype, list(plane.shape)] for plane in header.planes],
        "rank": header.rank,
        "world": header.world,
        "size": header.size,
        "session": header.session,
    }
    return json.dumps(facts, separators=(",", ":")).encode()


def write_segment(path: Path | str, header: SegmentHeader, planes: Mapping[str, Tensor]) -> int:
    """Write a segment's file, under a temporary name first so that no reader sees a part of it.

    Args:
        path: The file; its folder exists.
        header: Describes the segment.
        planes: The tensors that the header lists, by name.

    Returns:
        Bytes of the file.

    Raises:
        ValueError: The header does not describe the tensors, or could not be read back.
        OSError: The file cannot be written; the partial file is removed.
    """
    path = Path(path)
    made = SegmentHeader.of(
        header.id, header.fingerprint, header.token_ids, header.context_ids, planes
    )
    if (made.planes, made.size) != (header.planes, header.size):
        raise ValueError(
            f"header of {header.id} lists {header.planes}, but the planes are {made.planes}"
        )
    text = _encode(header)
    try:
        _decode(text)
    except (_Malformed, RecursionError) as error:
        raise ValueError(f"header of {header.id} cannot be stored: {error}") from None
    start = _START.pack(MAGIC, VERSION, len(text))
    head_sum = xxhash.xxh3_128(start + text).digest()
    body = xxhash.xxh3_128(head_sum)
    passing = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    # It holds users' text: readable by its owner only.
    handle = os.open(passing, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(start + head_sum + text)
            for plane in header.planes:
                raw = _bytes(planes[plane.name].detach().cpu().contiguous())
                body.update(raw.data)
                file.write(raw.data)
            file.write(body.digest())
            file.flush()
            size = file.tell()
            os.fsync(file.fileno())
        passing.replace(path)
    except BaseException:
        passing.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    return size


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# -- Reading ---------------------------------------------------------------------------------------


class _Malformed(ValueError):
    """A header that is not valid."""


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise _Malformed(what)


def _text(facts: Mapping[str, Any], key: str) -> str:
    value = facts.get(key)
    _need(
        isinstance(value, str) and len(value) <= _MAX_TEXT,
        f"{key} must be a string of at most {_MAX_TEXT} characters",
    )
    assert isinstance(value, str)
    return value


def _integer(facts: Mapping[str, Any], key: str, most: int) -> int:
    value = facts.get(key)
    # A bool is an int in Python; in JSON it is not.
    _need(type(value) is int and 0 <= value <= most, f"{key} must be an integer from 0 to {most}")
    assert isinstance(value, int)
    return value


def _hash(facts: Mapping[str, Any], key: str) -> bytes:
    value = _text(facts, key)
    _need(_ID.fullmatch(value) is not None, f"{key} must be 32 hexadecimal digits")
    return bytes.fromhex(value)


def _ids(facts: Mapping[str, Any], key: str) -> NDArray[np.int32]:
    value = facts.get(key)
    _need(isinstance(value, str), f"{key} must be a string")
    assert isinstance(value, str)
    try:
        raw = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise _Malformed(f"{key} is not valid base64") from None
    _need(len(raw) % 4 == 0, f"{key} must hold 32-bit integers")
    return np.frombuffer(raw, "<i4").astype(np.int32)


def _object(value: Any, keys: frozenset[str], what: str) -> dict[str, Any]:
    _need(
        isinstance(value, dict) and value.keys() == keys, f"{what} has missing or unexpected keys"
    )
    assert isinstance(value, dict)
    return value


_FINGERPRINT_KEYS = frozenset(f.name for f in fields(Fingerprint))
_HEADER_KEYS = frozenset(f.name for f in fields(SegmentHeader))


def _fingerprint(value: Any) -> Fingerprint:
    facts = _object(value, _FINGERPRINT_KEYS, "fingerprint")
    geometry = facts["geometry"]
    _need(
        isinstance(geometry, list)
        and len(geometry) == 3
        and all(type(part) is int and 0 < part < 1 << 24 for part in geometry),
        "geometry must be three positive integers",
    )
    created = facts["created"]
    _need(
        type(created) in (int, float) and abs(created) < 1e18, "created must be a time in seconds"
    )
    measures = facts["measures"]
    _need(
        isinstance(measures, dict)
        and len(measures) <= _MAX_MEASURES
        and all(len(name) <= 64 and type(number) is float for name, number in measures.items()),
        "measures must map names to numbers",
    )
    strings = ("model", "tokenizer", "lora", "dtype", "format", "position", "tenant", "mask")
    return Fingerprint(
        **{name: _text(facts, name) for name in strings},
        geometry=(geometry[0], geometry[1], geometry[2]),
        start=_integer(facts, "start", 1 << 31),
        length=_integer(facts, "length", 1 << 31),
        context=_hash(facts, "context"),
        tokens=_hash(facts, "tokens"),
        created=float(created),
        request_id=_text(facts, "request_id"),
        ancestry=_integer(facts, "ancestry", 1 << 31),
        measures=measures,
    )


def _plane(value: Any) -> Plane:
    _need(
        isinstance(value, list) and len(value) == 3,
        "a plane must be a list of name, dtype and shape",
    )
    name, dtype, shape = value
    _need(
        isinstance(name, str) and _PLANE.fullmatch(name) is not None, "a plane has an invalid name"
    )
    _need(isinstance(dtype, str) and dtype in _DTYPES, "a plane has an unknown dtype")
    _need(
        isinstance(shape, list)
        and 0 < len(shape) <= _MAX_AXES
        and all(type(axis) is int and 0 < axis < 1 << 31 for axis in shape),
        "a plane's shape must be positive integers",
    )
    return Plane(name, dtype, tuple(shape))


def _need_geometry(header: SegmentHeader) -> None:
    """The planes must be those of a segment with the fingerprint, on one of its ranks."""
    fingerprint, planes = header.fingerprint, header.planes
    layers, heads, head_size = fingerprint.geometry
    if fingerprint.format:
        # How wide a cell is, and how many heads share one, only the format knows.
        _need(
            [plane.name for plane in planes] == ["cells"]
            and planes[0].dtype == "uint8"
            and len(planes[0].shape) == 4
            and planes[0].shape[:2] == (layers, fingerprint.length),
            "the planes do not match the geometry",
        )
        return
    shape = (layers, fingerprint.length, max(1, heads // header.world), head_size)
    _need(
        [plane.name for plane in planes] == ["key", "value"]
        and all((p.dtype, p.shape) == (fingerprint.dtype, shape) for p in planes),
        "the planes do not match the geometry",
    )


def _decode(text: bytes) -> SegmentHeader:
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        raise _Malformed("not valid JSON") from None
    facts = _object(facts, _HEADER_KEYS, "header")
    _need(_ID.fullmatch(_text(facts, "id")) is not None, "id must be 32 hexadecimal digits")
    listed = facts["planes"]
    _need(
        isinstance(listed, list) and 0 < len(listed) <= _MAX_PLANES,
        "planes must be a non-empty list",
    )
    planes = tuple(_plane(plane) for plane in listed)
    _need(len({plane.name for plane in planes}) == len(planes), "plane names must be unique")
    size = _integer(facts, "size", _MAX_PAYLOAD)
    _need(sum(plane.size for plane in planes) == size, "size does not match the planes")
    world = _integer(facts, "world", _MAX_RANKS)
    rank = _integer(facts, "rank", _MAX_RANKS)
    _need(rank < world, f"rank must be below world ({world})")
    fingerprint = _fingerprint(facts["fingerprint"])
    token_ids, context_ids = _ids(facts, "token_ids"), _ids(facts, "context_ids")
    _need(len(token_ids) == fingerprint.length > 0, "length does not match token_ids")
    _need(len(context_ids) == fingerprint.start, "start does not match the length of context_ids")
    _need(digest(token_ids) == fingerprint.tokens, "tokens does not match the hash of token_ids")
    _need(
        digest(context_ids) == fingerprint.context, "context does not match the hash of context_ids"
    )
    return SegmentHeader(
        facts["id"],
        fingerprint,
        token_ids,
        context_ids,
        planes,
        rank,
        world,
        size,
        _text(facts, "session"),
    )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BufferedReader, int]]:
    """Open a regular file, never a link, a pipe or a device; yields it and its length."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BadSegment(path, "missing") from None
    except OSError as error:
        if path.is_symlink():
            raise BadSegment(path, "not a segment file", "a symbolic link") from None
        raise BadSegment(path, "unreadable", error.strerror or str(error)) from None
    facts = os.fstat(handle)
    if not stat.S_ISREG(facts.st_mode):
        os.close(handle)
        raise BadSegment(path, "not a segment file", "not a regular file")
    with os.fdopen(handle, "rb") as file:
        try:
            yield file, facts.st_size
        except OSError as error:
            raise BadSegment(path, "unreadable", error.strerror or str(error)) from None


def _head(path: Path, file: BufferedReader, length: int) -> tuple[SegmentHeader, bytes]:
    """Read the header and its checksum; the file is left at the first plane."""
    start = file.read(_START.size + _SUM)
    if not start.startswith(MAGIC[: len(start)]):
        raise BadSegment(path, "not a segment file")
    if len(start) < _START.size + _SUM:
        raise BadSegment(path, "truncated", "ends before its header")
    _, version, size = _START.unpack_from(start)
    if version != VERSION:
        raise BadSegment(path, "other version", f"{version}, not {VERSION}")
    if size > _MAX_HEADER:
        raise BadSegment(path, "bad header", f"{size} bytes is too long")
    if size > length - len(start):
        raise BadSegment(path, "truncated", "ends in its header")
    text = file.read(size)
    head_sum = start[_START.size :]
    if xxhash.xxh3_128(start[: _START.size] + text).digest() != head_sum:
        raise BadSegment(path, "bad checksum", "of the header")
    try:
        header = _decode(text)
        _need_geometry(header)
    except _Malformed as error:
        raise BadSegment(path, "bad header", str(error)) from None
    whole = len(start) + size + header.size + _SUM
    if length < whole:
        raise BadSegment(path, "truncated", f"{length} of {whole} bytes")
    if length > whole:
        raise BadSegment(
            path, "bad header", f"the file is {length - whole} bytes longer than the header says"
        )
    return header, head_sum


def read_header(path: Path | str) -> SegmentHeader:
    """Read a file's header, and check the file's length; its planes are not read.

    Raises:
        BadSegment: The file cannot be used; the cause says why.
    """
    path = Path(path)
    with _opened(path) as (file, length):
        return _head(path, file, length)[0]


def read_segment(path: Path | str) -> tuple[SegmentHeader, dict[str, Tensor]]:
    """Read a segment's file and verify its checksums.

    Returns:
        The header, and the CPU tensors by name.

    Raises:
        BadSegment: The file cannot be used; the cause says why.
    """
    path = Path(path)
    with _opened(path) as (file, length):
        header, head_sum = _head(path, file, length)
        body = xxhash.xxh3_128(head_sum)
        planes = {}
        for plane in header.planes:
            try:
                tensor = torch.empty(plane.shape, dtype=_DTYPES[plane.dtype])
            except (MemoryError, RuntimeError):
                raise BadSegment(path, "no memory", f"for {plane.size} bytes") from None
            raw = _bytes(tensor)
            if file.readinto(raw.data) != plane.size:
                raise BadSegment(path, "truncated", "ends in its planes")
            body.update(raw.data)
            planes[plane.name] = tensor
        if body.digest() != file.read(_SUM):
            raise BadSegment(path, "bad checksum", "of the planes")
    return header, planes
