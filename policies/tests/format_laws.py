"""Laws of every format, and a small host to check them with."""

from __future__ import annotations

import atexit
import functools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from calibrated import MODEL, write_calibration
from torch import Tensor

from kvplug.contract import (
    AttendBatch,
    EngineView,
    FormatPolicy,
    LayerView,
    Recent,
    WriteBatch,
)
from kvplug.hosts import dense
from kvplug.registry import plugins
from kvplug_policies.coded import CodedFormat

NUM_LAYERS = 4


@dataclass(frozen=True)
class Shape:
    """A layer and its pages."""

    head_size: int
    heads: int
    kv_heads: int
    block: int

    def __str__(self) -> str:
        return f"{self.head_size}x{self.heads}of{self.kv_heads}in{self.block}"


SHAPES = (
    Shape(64, 9, 3, 16),
    Shape(64, 4, 4, 32),
    Shape(96, 6, 1, 64),
    Shape(128, 8, 2, 128),
    Shape(256, 4, 2, 32),
)


@dataclass(frozen=True)
class Case:
    """A format with options.

    Attributes:
        policy: Its class.
        options: Its options.
        tolerance: Error allowed of attention over what is stored, relative; wider where products
            are integers.
    """

    policy: type[FormatPolicy]
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 2e-4

    def __str__(self) -> str:
        suffix = "-".join(f"{name}{value}" for name, value in self.options.items())
        return f"{self.policy.name}{'-' if suffix else ''}{suffix}".replace(" ", "")


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "int8": [{}, {"group": 32}],
    "int4": [{}, {"group": 16}, {"layers": {"1": 3}}],
    "kivi": [{}, {"bits": 4}, {"group": 16, "value_group": 32}],
    "rotated": [{}, {"bits": 3}, {"bits": 2}, {"key_bits": 4, "value_bits": 2}],
    "hack": [{}, {"bits": 2}, {"bits": 8}, {"bits": 2, "group": 32}],
    "lowrank": [{"bits": 8}, {"bits": 4}],
    "merge_heads": [{"max_error": 1.0}, {"max_error": 1.0, "bits": 4}],
    "residual": [{}, {"outliers": 8}, {"format": "kivi", "options": {"group": 16}}],
    "mixed": [{"default": "int8", "layers": {"1": {"use": "kivi", "group": 16}}}, {}],
}
"""Options that the laws are held against; the defaults where a format is not named."""

CALIBRATED = ("lowrank", "merge_heads", "residual")

ERRORS = {"adaptive": (0.14, 0.14), "merge_heads": (1.5, 1.5)}
"""Errors of formats whose bits do not say them: levels may change, and Gaussian heads that have
nothing in common are merged all the same."""

INTEGER_TOLERANCE = 0.04
"""Of queries and probabilities in 8 bits."""


def cases() -> Iterator[Case]:
    """Every registered format, third parties' included."""
    for policy in plugins().registry:
        if issubclass(policy, FormatPolicy):
            integer = getattr(policy, "integer", False) or policy.name == "adaptive"
            for options in OPTIONS.get(policy.name, [{}]):
                yield Case(policy, options, tolerance=INTEGER_TOLERANCE if integer else 2e-4)


def pairs() -> Iterator[tuple[Case, Shape]]:
    """Cases and shapes: a format's first options on every shape that its groups of tokens fill, the
    others on two each."""
    seen: set[str] = set()
    for i, case in enumerate(cases()):
        group = int(case.options.get("group", 32)) if case.policy.name == "kivi" else 1
        shapes = [s for s in SHAPES if s.block % group == 0]
        if case.policy.name == "merge_heads":
            shapes = [s for s in shapes if s.kv_heads > 1]
        if case.policy.name in seen or case.policy.name in CALIBRATED:
            shapes = [shapes[i % len(shapes)], shapes[(i + 2) % len(shapes)]]
        seen.add(case.policy.name)
        yield from ((case, shape) for shape in shapes)


@functools.cache
def calibration(shape: Shape) -> str:
    """A calibration file for layers of the shape, of vectors like those of the laws."""
    folder = tempfile.TemporaryDirectory(prefix="kvplug-laws-")
    atexit.register(folder.cleanup)
    seen = {}
    for index in range(NUM_LAYERS):
        key, value = (x.transpose(0, 1) for x in vectors(shape, 640, seed=100 + index))
        query = queries(shape, 640, seed=200 + index).transpose(0, 1)
        seen[index] = (query, key, value)
    layers = tuple(view(shape, index) for index in range(NUM_LAYERS))
    engine = EngineView(shape.block, layers=layers, model=MODEL)
    return write_calibration(Path(folder.name) / "laws.safetensors", engine, seen)


class Pool:
    """A host: pages of one layer, block tables, and the latest tokens of each request.

    Pages begin full of another text's keys and values, as blocks that were used before are.

    Args:
        case: The format.
        shape: The layer.
        layer: Index of the layer.
        blocks: Blocks of the pool; enough for the laws if 0.
        seed: Of the order in which blocks are given out.
        exact_chunk: The option, where it is not the default.
        dtype: Of keys and values.
    """

    def __init__(
        self,
        case: Case,
        shape: Shape,
        *,
        layer: int = 1,
        blocks: int = 0,
        seed: int = 0,
        exact_chunk: bool | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.shape = shape
        blocks = blocks or (24 if shape.block <= 32 else 10)
        options = dict(case.options)
        if case.policy.name in CALIBRATED:
            options["calibration"] = calibration(shape)
        if case.policy.name == "lowrank":
            options["rank"] = shape.head_size
        if exact_chunk is not None:
            options["exact_chunk"] = exact_chunk
        name = str(dtype).removeprefix("torch.")
        views = tuple(view(shape, index, name) for index in range(NUM_LAYERS))
        self.layer = views[layer]
        engine = EngineView(shape.block, blocks, layers=views, host="test", model=MODEL)
        self.policy = case.policy(case.policy.Options.model_validate(options), engine)
        self.layout = self.policy.layout(self.layer)
        self.heads = self.layout.heads or shape.kv_heads
        size = (blocks, self.heads, shape.block, self.layout.bytes_per_token_head)
        self.pages = torch.zeros(size, dtype=torch.uint8)
        self.scale = shape.head_size**-0.5
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).tolist()
        self._free: list[int] = order
        self.tables: dict[int, list[int]] = {}
        self.lens: dict[int, int] = {}
        self.exact: dict[int, tuple[Tensor, Tensor]] = {}
        self.ring: Recent | None = None
        if held := self.policy.recent(self.layer):
            ring = torch.full((8, held, shape.kv_heads, shape.head_size), 1e3, dtype=dtype)
            self.ring = Recent(ring, ring.clone())
        n = blocks * shape.block
        key, value = vectors(shape, n, seed=99)
        key, value = (3 * key).to(dtype), (3 * value).to(dtype)
        self.policy.write(self.layer, WriteBatch(key, value, torch.arange(n)), self.pages)

    # -- a step --------------------------------------------------------------------------------

    def slots(self, request: int, first: int, count: int) -> list[int]:
        """Slots of some tokens of a request, with blocks given to it as needed."""
        table = self.tables.setdefault(request, [])
        while len(table) * self.shape.block < first + count:
            table.append(self._free.pop())
        size = self.shape.block
        return [table[at // size] * size + at % size for at in range(first, first + count)]

    def batch(
        self, rows: dict[int, tuple[Tensor, Tensor]], query: Tensor, exact: bool
    ) -> tuple[WriteBatch, AttendBatch]:
        """One step of some requests, each with K and V of its new tokens.

        Args:
            rows: New keys and values of each request, ``[n, kv_heads, head_size]``.
            query: Of all rows, ``[tokens, heads, head_size]``.
            exact: Whether the step's tokens see each other exactly.
        """
        slots, request_slots, lens, starts = [], [], [], [0]
        for request, (key, value) in rows.items():
            first = self.lens.get(request, 0)
            slots += self.slots(request, first, len(key))
            request_slots += [request] * len(key)
            lens.append(first + len(key))
            starts.append(starts[-1] + len(key))
            before = self.exact.get(request)
            self.exact[request] = (
                (key, value)
                if before is None
                else (torch.cat([before[0], key]), torch.cat([before[1], value]))
            )
            self.lens[request] = lens[-1]
        key = torch.cat([key for key, _ in rows.values()])
        value = torch.cat([value for _, value in rows.values()])
        width = max(len(self.tables[request]) for request in rows)
        table = [self.tables[r] + [0] * (width - len(self.tables[r])) for r in rows]
        row_slots = torch.tensor(list(rows))
        ring = self.ring
        write = WriteBatch(key, value, torch.tensor(slots), torch.tensor(request_slots), ring)
        attend = AttendBatch(
            query,
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor(table, dtype=torch.int32),
            torch.tensor(lens, dtype=torch.int32),
            self.scale,
            max(len(key) for key, _ in rows.values()),
            max(lens),
            key if exact else None,
            value if exact else None,
            request_slots=row_slots if ring is not None else None,
            recent=ring,
        )
        return write, attend

    def step(
        self, rows: dict[int, tuple[Tensor, Tensor]], query: Tensor, exact: bool
    ) -> tuple[Tensor, Tensor]:
        """Write a step, attend it and keep its latest tokens.

        Returns:
            What the format gave, and what attention over its pages is.
        """
        write, attend = self.batch(rows, query, exact)
        self.policy.write(self.layer, write, self.pages)
        out = torch.full_like(query, torch.nan)
        dense.attend(self.policy, self.layer, attend, self.pages, out)
        expected = self.expected(attend)
        self.remember(rows)
        return out, expected

    def remember(self, rows: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Keep the latest tokens of each request, as a host does after attention."""
        if self.ring is None:
            return
        held = self.ring.key.shape[1]
        for request in rows:
            n = self.lens[request]
            for at in range(max(n - held, 0), n):
                self.ring.key[request, at % held] = self.exact[request][0][at]
                self.ring.value[request, at % held] = self.exact[request][1][at]

    def store(self, rows: dict[int, tuple[Tensor, Tensor]]) -> None:
        """A step whose attention nobody asks for."""
        tokens = sum(len(key) for key, _ in rows.values())
        query = torch.zeros(tokens, self.shape.heads, self.shape.head_size)
        write, _ = self.batch(rows, query, True)
        self.policy.write(self.layer, write, self.pages)
        self.remember(rows)

    # -- what is right -------------------------------------------------------------------------

    def read(self, request: int) -> tuple[Tensor, Tensor]:
        """K and V of a request as its pages hold them, ``[n, kv_heads, head_size]`` float32."""
        blocks = torch.tensor(self.tables[request])
        found = self.policy.read(self.layer, self.pages, blocks)
        key, value = (x.transpose(1, 2).flatten(0, 1)[: self.lens[request]].float() for x in found)
        return key, value

    def expected(self, batch: AttendBatch) -> Tensor:
        """Attention row by row over what the pages hold, with the step's tokens exact where the
        batch has them and, if so, those of the open group too."""
        groups = self.shape.heads // self.shape.kv_heads
        out = torch.empty_like(batch.query)
        requests = [
            next(r for r in self.tables if self.tables[r][0] == int(row[0]))
            for row in batch.block_table
        ]
        for i, request in enumerate(requests):
            first, last = int(batch.query_start[i]), int(batch.query_start[i + 1])
            n, new = int(batch.seq_lens[i]), last - first
            key, value = self.read(request)
            key, value = key[:n], value[:n]
            if batch.key is not None and batch.value is not None:
                known = n - new
                if batch.recent is not None:
                    known -= known % batch.recent.key.shape[1]
                exact = self.exact[request]
                key = torch.cat([key[:known], exact[0][known:n].float()])
                value = torch.cat([value[:known], exact[1][known:n].float()])
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            query = batch.query[first:last].float()
            logits = torch.einsum("qhd,thd->hqt", query, key) * batch.scale
            if batch.softcap:
                logits = batch.softcap * torch.tanh(logits / batch.softcap)
            unseen = torch.arange(n) > torch.arange(n - new, n)[:, None]
            weights = logits.masked_fill(unseen, -torch.inf).softmax(-1)
            out[first:last] = torch.einsum("hqt,thd->qhd", weights, value).to(out.dtype)
        return out

    def holds_the_same(self, other: Pool, request: int) -> bool:
        """True if the pages are equal, byte for byte.

        Where vectors are mapped before they are coded, floats may round differently in another
        batch, and a few codes differ by one.
        """
        if getattr(type(self.policy), "into", CodedFormat.into) is CodedFormat.into:
            return torch.equal(self.pages, other.pages)
        both = zip(self.read(request), other.read(request), strict=True)
        return all(relative(mine, theirs) < 0.01 for mine, theirs in both)

    def touched(self, slots: Tensor) -> Tensor:
        """Slots whose bytes a write to some slots may change: those of tokens that share scales
        with them too, and of the whole block where the format says no more."""
        if self.policy.moves_tokens:
            return slots
        group = self.policy.recent(self.layer) or self.shape.block
        return (slots[:, None] // group * group + torch.arange(group)).flatten().unique()

    def bytes_of(self, slots: Tensor) -> Tensor:
        """A mask of the page bytes that belong to some slots' fields."""
        mask = torch.zeros_like(self.pages)
        size = self.shape.block
        for plane in self.layout.planes(mask):
            plane[slots // size, :, slots % size] = 1
        return mask.bool()


def view(shape: Shape, index: int = 0, dtype: str = "float32") -> LayerView:
    """A layer of the shape."""
    return LayerView(index, NUM_LAYERS, shape.kv_heads, shape.heads, shape.head_size, dtype)


def vectors(shape: Shape, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Gaussian K and V of some tokens, ``[n, kv_heads, head_size]`` float32."""
    random = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, n, shape.kv_heads, shape.head_size, generator=random)
    return key, value


def queries(shape: Shape, n: int, seed: int) -> Tensor:
    """Gaussian queries, ``[n, heads, head_size]`` float32."""
    return torch.randn(
        n, shape.heads, shape.head_size, generator=torch.Generator().manual_seed(seed)
    )


def allowed(case: Case, pool: Pool) -> tuple[float, float]:
    """Relative root-mean-square errors of Gaussian K and V that are allowed."""
    if case.policy.name in ERRORS:
        return ERRORS[case.policy.name]
    bits = {32: 1e-6, 16: 1e-3, 8: 0.04, 4: 0.14, 3: 0.28, 2: 0.62}
    return bits[pool.layout.key_bits], bits[pool.layout.value_bits]


def relative(found: Tensor, right: Tensor) -> float:
    """Root-mean-square error over the root mean square of what is right."""
    return float((found.float() - right.float()).norm() / right.float().norm())
