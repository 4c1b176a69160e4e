"""Prefix-cache traces: requests reduced to block ids, read with checks and never unpickled.

Three formats, told apart by what a file holds and not by its name. An ``.npz`` holds the arrays of
`Trace` under the names ``off``, ``ids``, ``t``, ``inp``, ``outp``, ``sess``, ``bs``, ``nblk``; what
``kvplug``'s recorder writes is such a file. A ``.jsonl`` is one request a line as in the release of
Mooncake (FAST'25): ``timestamp`` in milliseconds, ``input_length``, ``output_length``,
``hash_ids`` of 512 tokens each; or, with ``chat_id`` and ``parent_chat_id`` beside them, as in that
of Bailian: ``timestamp`` in seconds, ``hash_ids`` of 16 tokens each.

A request's blocks have to be as many as its prompt fills, with or without the last, partial one:
a file read with another block size than it was written with is another workload. In an ``.npz``
those of its answer may follow, and those of a request that was broken off may be fewer.
"""

from __future__ import annotations

import array
import io
import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from kvplug.errors import KVPlugError
from kvplug.regular_file import UnreadableFile, open_regular

MOONCAKE_BLOCK = 512
"""Tokens per block in Mooncake's release."""

BAILIAN_BLOCK = 16
"""Tokens per block in Bailian's release."""

MAX_FILE = 1 << 30
"""Largest file that is read, in bytes."""

MAX_BYTES = 1 << 30
"""The most bytes a trace may unpack to."""

MAX_LINE = 16 << 20
"""Longest line of a ``.jsonl``, in bytes."""

MAX_REFERENCES = 1 << 27
"""The most blocks that the requests of a ``.jsonl`` refer to."""

MAX_MEMBERS = 256
"""The most arrays in an ``.npz``."""

MAX_BLOCKS = 1 << 27
"""The largest cache that is simulated."""

_MASK = (1 << 64) - 1
_NPY: Any = np.lib.format

Ints = npt.NDArray[np.int64]


class TraceError(KVPlugError):
    """A trace that cannot be read; the message names the file and what is wrong with it."""

    exit_code = 2

    def __init__(self, path: Path | str, problem: str):
        self.path = str(path)
        self.problem = problem
        super().__init__(f"{path}: {problem}")

    def __reduce__(self) -> tuple[type[TraceError], tuple[str, str]]:
        return type(self), (self.path, self.problem)


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in the order they were served. R requests refer to N blocks in all.

    Attributes:
        name: The file's name without its ending.
        off: (R+1,) int64; request r owns ``ids[off[r]:off[r+1]]``.
        ids: (N,) int64, each in ``[0, num_distinct)``, in prompt order. An id identifies a block's
            tokens and all before them, as a vLLM block hash does.
        arrival: (R,) float64, seconds.
        prompt_tokens: (R,) int64.
        output_tokens: (R,) int64.
        session: (R,) int64; 0 throughout where the source names none.
        block_size: Tokens per block.
        num_distinct: Distinct blocks the trace declares; percentages of capacity are of these.
    """

    name: str
    off: Ints
    ids: Ints
    arrival: npt.NDArray[np.float64]
    prompt_tokens: Ints
    output_tokens: Ints
    session: Ints
    block_size: int
    num_distinct: int

    @property
    def num_requests(self) -> int:
        return len(self.off) - 1

    @property
    def num_references(self) -> int:
        return len(self.ids)

    @property
    def names_sessions(self) -> bool:
        """True if the source names sessions."""
        return bool((self.session != 0).any())

    def positions(self) -> Ints:
        """(N,) index of each reference in its request."""
        lengths = np.diff(self.off)
        return np.arange(len(self.ids)) - np.repeat(self.off[:-1], lengths)

    def capacity(self, text: str) -> int:
        """Parse a capacity: ``"100"`` (blocks) or ``"2.5%"`` (of the distinct blocks, rounded).

        Raises:
            ValueError: It is neither, or out of range.
        """
        stripped = text.strip()
        try:
            if stripped.endswith("%"):
                blocks = round(self.num_distinct * float(stripped[:-1]) / 100)
            else:
                blocks = int(stripped)
        except (ValueError, OverflowError):
            raise ValueError(
                f"{text!r} is not a capacity: use a number of blocks (200) or a percentage of the "
                "trace's distinct blocks (2.5%)"
            ) from None
        if not 1 <= blocks <= MAX_BLOCKS:
            raise ValueError(
                f"capacity {text!r} is {blocks} blocks of {self.name}; use 1 to {MAX_BLOCKS:,}"
            )
        return blocks


def read(path: Path, block_size: int | None = None) -> Trace:
    """Read a trace file as what it holds.

    Args:
        path: An ``.npz`` or a ``.jsonl``.
        block_size: Tokens per block of a ``.jsonl``, by default those of its format; an ``.npz``
            states its own.

    Raises:
        TraceError: The file does not exist, is no regular file, is in none of the formats, or
            contradicts itself.
    """
    try:
        with open_regular(path, MAX_FILE) as file:
            start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
            file.seek(0)
            if start.startswith(b"PK"):
                return _read_npz(path, file)
            if start.startswith((b"{", b"[")) or (not start and path.suffix == ".jsonl"):
                return _read_jsonl(path, file, block_size)
    except UnreadableFile as error:
        raise TraceError(path, error.problem) from error
    except OSError as error:
        raise TraceError(path, f"cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise TraceError(path, "takes more memory to read than there is") from error
    raise TraceError(path, "is no trace: neither an .npz nor a .jsonl of Mooncake's or Bailian's")


def write(path: Path, trace: Trace) -> None:
    """Write a trace as ``.npz``, in the dtypes of the published ones."""
    with path.open("wb") as file:
        np.savez_compressed(
            file,
            off=trace.off,
            ids=trace.ids.astype(np.int32),
            t=trace.arrival,
            inp=trace.prompt_tokens,
            outp=trace.output_tokens,
            sess=trace.session.astype(np.int32),
            bs=np.int64(trace.block_size),
            nblk=np.int64(trace.num_distinct),
        )


# -- npz -------------------------------------------------------------------------------------------

SHAPES = {
    "off": ("(R+1,)", "integers"),
    "ids": ("(N,)", "integers"),
    "t": ("(R,)", "numbers"),
    "inp": ("(R,)", "integers"),
    "outp": ("(R,)", "integers"),
    "sess": ("(R,)", "integers"),
    "bs": ("()", "integers"),
    "nblk": ("()", "integers"),
}


def _read_npz(path: Path, file: BinaryIO) -> Trace:
    arrays = _arrays(path, file)
    off, ids = arrays["off"], arrays["ids"]
    requests = len(off) - 1
    if requests < 1:
        raise TraceError(path, "off has fewer than 2 entries: it has no requests")
    for name in ("t", "inp", "outp", "sess"):
        if len(arrays[name]) != requests:
            raise TraceError(
                path,
                f"{name} has {len(arrays[name])} entries, but off has {requests} requests",
            )
    trace = _checked(
        path,
        off=off,
        ids=ids,
        arrival=arrays["t"],
        prompt_tokens=arrays["inp"],
        output_tokens=arrays["outp"],
        session=arrays["sess"],
        block_size=int(arrays["bs"]),
        num_distinct=int(arrays["nblk"]),
    )
    size, tokens = trace.block_size, trace.prompt_tokens + trace.output_tokens
    beyond = np.diff(trace.off) > tokens // size + (tokens % size > 0)
    if beyond.any():
        at = int(np.argmax(beyond))
        raise TraceError(
            path,
            f"request {at} has {trace.off[at + 1] - trace.off[at]} blocks of {size} tokens, and "
            f"{tokens[at]} tokens of prompt and answer fill fewer",
        )
    return trace


def _arrays(path: Path, file: BinaryIO) -> dict[str, npt.NDArray[Any]]:
    try:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
            if len(members) > MAX_MEMBERS:
                raise TraceError(path, f"holds {len(members):,} arrays; at most {MAX_MEMBERS}")
            size = sum(info.file_size for info in members.values())
            if size > MAX_BYTES:
                raise TraceError(path, f"unpacks to {size:,} bytes; at most {MAX_BYTES:,} are read")
            missing = [name for name in SHAPES if f"{name}.npy" not in members]
            if missing:
                raise TraceError(path, f"lacks the arrays {', '.join(missing)}")
            arrays = {name: _array(archive, members[f"{name}.npy"]) for name in SHAPES}
    except (TraceError, OSError):
        raise
    except (Exception, MemoryError) as error:
        raise TraceError(path, f"is not a readable .npz: {error}") from error
    for name, (shape, what) in SHAPES.items():
        array = arrays[name]
        if array.ndim != shape.count(","):
            raise TraceError(path, f"{name} has shape {array.shape}, expected {shape}")
        if array.dtype.kind not in ("iuf" if what == "numbers" else "iu"):
            raise TraceError(path, f"{name} has dtype {array.dtype}, expected {what}")
        arrays[name] = array.astype(np.float64 if what == "numbers" else np.int64)
    return arrays


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> npt.NDArray[Any]:
    """An array whose header states no more than its file holds: numpy allocates what it states."""
    with archive.open(member) as packed:
        raw = packed.read(member.file_size)
    data = io.BytesIO(raw)
    version = _NPY.read_magic(data)
    header = {
        (1, 0): _NPY.read_array_header_1_0,
        (2, 0): _NPY.read_array_header_2_0,
    }.get(version)
    if header is None:
        raise ValueError(f"{member.filename} is in version {version} of the format")
    shape, _, dtype = header(data)
    if dtype.hasobject:
        raise ValueError(f"{member.filename} holds Python objects")
    if math.prod(shape) * dtype.itemsize != len(raw) - data.tell():
        raise ValueError(f"{member.filename} states the shape {shape} of other data")
    data.seek(0)
    found: npt.NDArray[Any] = _NPY.read_array(data, allow_pickle=False)
    return found


# -- jsonl -----------------------------------------------------------------------------------------


class _Row(NamedTuple):
    seconds: float
    prompt: int
    output: int
    hashes: list[int]
    chat: tuple[int, int] | None


def _read_jsonl(path: Path, file: BinaryIO, block_size: int | None) -> Trace:
    lengths: list[int] = []
    ids = array.array("Q")
    rows: list[tuple[float, int, int]] = []
    sessions = _Sessions()
    bailian: bool | None = None
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        where = f"{path}:{number}"
        if len(line) > MAX_LINE:
            raise TraceError(where, f"is longer than {MAX_LINE >> 20} MiB")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise TraceError(where, f"is not JSON: {error}") from error
        found = _request(row)
        if isinstance(found, str):
            raise TraceError(where, found)
        if bailian is None:
            bailian = found.chat is not None
            block_size = block_size or (BAILIAN_BLOCK if bailian else MOONCAKE_BLOCK)
        if bailian != (found.chat is not None):
            raise TraceError(where, "chat_id and parent_chat_id stand in some of the lines only")
        assert block_size is not None
        if problem := _contradiction(found, block_size):
            raise TraceError(where, problem)
        rows.append((found.seconds, found.prompt, found.output))
        sessions.add(found.chat)
        lengths.append(len(found.hashes))
        try:
            # A hash may be signed or unsigned; as bits, both are the same 64.
            ids.extend(h & _MASK if -(1 << 63) <= h < 0 else h for h in found.hashes)
        except OverflowError:
            raise TraceError(where, "hash_ids must fit in 64 bits") from None
        if len(ids) > MAX_REFERENCES:
            raise TraceError(where, f"refers to more than {MAX_REFERENCES:,} blocks so far")
    if not rows:
        raise TraceError(path, "has no requests")
    assert block_size is not None
    distinct, dense = np.unique(np.frombuffer(ids, dtype=np.uint64), return_inverse=True)
    return _checked(
        path,
        off=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        ids=dense.astype(np.int64),
        arrival=np.array([r[0] for r in rows], dtype=np.float64),
        prompt_tokens=np.array([r[1] for r in rows], dtype=np.int64),
        output_tokens=np.array([r[2] for r in rows], dtype=np.int64),
        session=np.array(sessions.of_rows, dtype=np.int64),
        block_size=block_size,
        num_distinct=len(distinct),
    )


class _Sessions:
    """Numbers the conversations that chats and their parents make; 0 for requests of none."""

    def __init__(self) -> None:
        self.of_rows: list[int] = []
        self._of_chats: dict[int, int] = {}

    def add(self, chat: tuple[int, int] | None) -> None:
        if chat is None:
            self.of_rows.append(0)
            return
        own, parent = chat
        session = self._of_chats.get(parent, len(self._of_chats) + 1)
        self._of_chats[own] = session
        self.of_rows.append(session)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that stands twice, a reader would keep the last value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return found


def _request(row: object) -> _Row | str:
    """One line's fields, or what is wrong with it."""
    if not isinstance(row, dict):
        return "is not a JSON object"
    time, prompt, output = (row.get(k) for k in ("timestamp", "input_length", "output_length"))
    hashes = row.get("hash_ids")
    if "parent_chat_id" in row and "chat_id" not in row:
        return "chat_id is missing beside parent_chat_id"
    chat = (row["chat_id"], row.get("parent_chat_id", -1)) if "chat_id" in row else None
    unit = "milliseconds" if chat is None else "seconds"
    if isinstance(time, bool) or not isinstance(time, int | float) or not abs(time) <= 1e18:
        return f"timestamp is not a number ({unit})"
    for name, value in (("input_length", prompt), ("output_length", output)):
        if type(value) is not int or not 0 <= value < 1 << 63:
            return f"{name} is not a number of tokens"
    if not isinstance(hashes, list) or not all(type(h) is int for h in hashes):
        return "hash_ids is not a list of integers"
    if chat is not None and not all(type(c) is int for c in chat):
        return "chat_id and parent_chat_id are not integers"
    assert isinstance(prompt, int) and isinstance(output, int)
    return _Row(time / 1000 if chat is None else float(time), prompt, output, hashes, chat)


def _contradiction(row: _Row, block_size: int) -> str | None:
    """Why a request's blocks are not those of its prompt, or None."""
    blocks = len(row.hashes)
    if row.prompt // block_size <= blocks <= -(-row.prompt // block_size):
        return None
    return (
        f"input_length is {row.prompt} tokens, which do not make {blocks} blocks of {block_size}: "
        "pass the block size that the trace was written with (--block-size)"
    )


# -- what holds for both ---------------------------------------------------------------------------


def _checked(path: Path, **fields: Any) -> Trace:
    trace = Trace(name=path.stem, **fields)
    off, ids = trace.off, trace.ids
    if off[0] != 0 or off[-1] != len(ids) or (np.diff(off) < 0).any():
        raise TraceError(path, f"off must rise from 0 to the {len(ids)} entries of ids")
    if trace.block_size < 1:
        raise TraceError(path, f"bs must be at least 1 token per block, not {trace.block_size}")
    if len(ids) == 0:
        raise TraceError(path, "no request references a block")
    if trace.num_distinct < 1 or ids.min() < 0 or ids.max() >= trace.num_distinct:
        raise TraceError(
            path,
            f"ids run from {ids.min()} to {ids.max()}, outside the {trace.num_distinct} distinct "
            "blocks it declares",
        )
    if trace.num_distinct > len(ids):
        raise TraceError(
            path, f"nblk is {trace.num_distinct} distinct blocks, for {len(ids)} references"
        )
    if not np.isfinite(trace.arrival).all():
        raise TraceError(path, "arrival times must be finite")
    if (trace.prompt_tokens < 0).any() or (trace.output_tokens < 0).any():
        raise TraceError(path, "numbers of tokens must not be negative")
    owner = np.repeat(np.arange(trace.num_requests), np.diff(off))
    order = np.lexsort((ids, owner))
    twice = (np.diff(ids[order]) == 0) & (np.diff(owner[order]) == 0)
    if twice.any():
        at = order[:-1][twice][0]
        raise TraceError(
            path,
            f"request {owner[at]} names block {ids[at]} twice, but an id identifies a block and "
            "all before it",
        )
    return trace
