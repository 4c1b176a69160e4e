"""Prefix-cache traces: requests reduced to block ids, read with checks and never unpickled.

Two formats. An ``.npz`` holds the arrays of `Trace` under the names ``off``, ``ids``, ``t``,
``inp``, ``outp``, ``sess``, ``bs``, ``nblk``; what ``kvplug``'s recorder writes is such a file. A
``.jsonl`` is one request a line as in the release of Mooncake (FAST'25): ``timestamp`` in
milliseconds, ``input_length``, ``output_length``, ``hash_ids``.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvplug.errors import KVPlugError

MOONCAKE_BLOCK = 512
"""Tokens per block in Mooncake's release."""

MAX_BYTES = 8 << 30
"""The most bytes a trace may unpack to."""

MAX_BLOCKS = 1 << 27
"""The largest cache that is simulated."""

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


def read(path: Path, block_size: int = MOONCAKE_BLOCK) -> Trace:
    """Read a trace file by its ending.

    Args:
        path: An ``.npz`` or a ``.jsonl``.
        block_size: Tokens per block of a ``.jsonl``; an ``.npz`` states its own.

    Raises:
        TraceError: The file does not exist, or is in neither format.
    """
    if not path.is_file():
        raise TraceError(path, "no such file")
    try:
        if path.suffix == ".npz":
            return _read_npz(path)
        if path.suffix == ".jsonl":
            return _read_jsonl(path, block_size)
    except OSError as error:
        raise TraceError(path, f"cannot be read: {error.strerror or error}") from error
    raise TraceError(path, "a trace is an .npz or a .jsonl (Mooncake) file")


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


def _read_npz(path: Path) -> Trace:
    arrays = _arrays(path)
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
    return _checked(
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


def _arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(info.file_size for info in archive.infolist())
        if size > MAX_BYTES:
            raise TraceError(path, f"unpacks to {size:,} bytes; at most {MAX_BYTES:,} are read")
        with np.load(path, allow_pickle=False) as stored:
            missing = [name for name in SHAPES if name not in stored.files]
            if missing:
                raise TraceError(path, f"lacks the arrays {', '.join(missing)}")
            arrays = {name: np.asarray(stored[name]) for name in SHAPES}
    except (TraceError, OSError):
        raise
    except Exception as error:
        raise TraceError(path, f"is not a readable .npz: {error}") from error
    for name, (shape, what) in SHAPES.items():
        array = arrays[name]
        if array.ndim != shape.count(","):
            raise TraceError(path, f"{name} has shape {array.shape}, expected {shape}")
        if array.dtype.kind not in ("iuf" if what == "numbers" else "iu"):
            raise TraceError(path, f"{name} has dtype {array.dtype}, expected {what}")
        arrays[name] = array.astype(np.float64 if what == "numbers" else np.int64)
    return arrays


# -- jsonl -----------------------------------------------------------------------------------------


def _read_jsonl(path: Path, block_size: int) -> Trace:
    lengths: list[int] = []
    ids: list[int] = []
    rows: list[tuple[float, int, int]] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TraceError(f"{path}:{number}", f"is not JSON: {error}") from error
            found = _request(row)
            if isinstance(found, str):
                raise TraceError(f"{path}:{number}", found)
            milliseconds, prompt, output, hashes = found
            rows.append((milliseconds / 1000, prompt, output))
            lengths.append(len(hashes))
            ids += hashes
    if not rows:
        raise TraceError(path, "has no requests")
    try:
        distinct, dense = np.unique(np.array(ids, dtype=np.int64), return_inverse=True)
    except OverflowError:
        raise TraceError(path, "hash_ids must fit in 64 bits") from None
    return _checked(
        path,
        off=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        ids=dense.astype(np.int64),
        arrival=np.array([r[0] for r in rows], dtype=np.float64),
        prompt_tokens=np.array([r[1] for r in rows], dtype=np.int64),
        output_tokens=np.array([r[2] for r in rows], dtype=np.int64),
        session=np.zeros(len(rows), dtype=np.int64),
        block_size=block_size,
        num_distinct=len(distinct),
    )


def _request(row: object) -> tuple[float, int, int, list[int]] | str:
    """One line's fields, or what is wrong with it."""
    if not isinstance(row, dict):
        return "is not a JSON object"
    time, prompt, output = (row.get(k) for k in ("timestamp", "input_length", "output_length"))
    hashes = row.get("hash_ids")
    if isinstance(time, bool) or not isinstance(time, int | float) or not abs(time) <= 1e18:
        return "timestamp is not a number (milliseconds)"
    for name, value in (("input_length", prompt), ("output_length", output)):
        if type(value) is not int or not 0 <= value < 1 << 63:
            return f"{name} is not a number of tokens"
    if not isinstance(hashes, list) or not all(type(h) is int for h in hashes):
        return "hash_ids is not a list of integers"
    assert isinstance(prompt, int) and isinstance(output, int)
    return float(time), prompt, output, hashes


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
