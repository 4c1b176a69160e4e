"""Laws of every format, and a small host to check them with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
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
from kvplug.testing.laws import PolicyLaws, law, skip

NUM_LAYERS = 4
MODEL = "0123456789abcdef" * 2
"""Fingerprint of the model that the host runs."""

BITS = {32: 1e-6, 16: 1e-3, 8: 0.04, 4: 0.14, 3: 0.28, 2: 0.62}
"""Relative root-mean-square error allowed of Gaussian vectors, by the bits of an element."""


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
        prepare: Returns further options for a shape, e.g. a file that is made for it.
        bytewise: True if a token's bytes are the same in every batch. False where vectors are
            mapped before they are coded: floats may round differently, and a few codes differ by
            one.
        errors: Relative root-mean-square errors allowed of Gaussian K and V; by their bits if None.
    """

    policy: type[FormatPolicy]
    options: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 2e-4
    prepare: Callable[[Shape], Mapping[str, Any]] | None = None
    bytewise: bool = True
    errors: tuple[float, float] | None = None

    def __str__(self) -> str:
        suffix = "-".join(f"{name}{value}" for name, value in self.options.items())
        return f"{self.policy.name}{'-' if suffix else ''}{suffix}".replace(" ", "")


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
        self.bytewise = case.bytewise
        options = dict(case.options)
        if case.prepare is not None:
            options |= case.prepare(shape)
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
        """True if the pages are equal: byte for byte, or nearly so where the case says so."""
        if self.bytewise:
            return torch.equal(self.pages, other.pages)
        both = zip(self.read(request), other.read(request), strict=True)
        return all(relative(mine, theirs) < 0.01 for mine, theirs in both)

    def touched(self, slots: Tensor) -> Tensor:
        """Slots whose bytes a write to some slots may change: those of tokens that share scales
        with them too, and of the whole block where the format says no more."""
        if self.policy.moves_tokens:
            return slots
        group = self.policy.recent(self.layer) or self.shape.block
        near = (slots[:, None] // group * group + torch.arange(group)).flatten()
        return torch.tensor(sorted({*near.tolist()}), dtype=torch.int64)

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
    if case.errors is not None:
        return case.errors
    return bound(pool.layout.key_bits), bound(pool.layout.value_bits)


def bound(bits: int) -> float:
    """Error allowed of elements of so many bits."""
    return BITS[max((known for known in BITS if known <= bits), default=2)]


def relative(found: Tensor, right: Tensor) -> float:
    """Root-mean-square error over the root mean square of what is right."""
    return float((found.float() - right.float()).norm() / right.float().norm())


class FormatLaws(PolicyLaws):
    """Laws of every format.

    Attributes:
        shapes: Layers that it is held against, smallest first; those that `layout` refuses are
            left out.
        tolerance: As in `Case`.
        bytewise: As in `Case`.
        errors: As in `Case`.
        scales: True if vectors of every size are stored alike; False for a format that is fitted
            to the sizes of its calibration.
    """

    policy: ClassVar[type[FormatPolicy]]
    shapes: Sequence[Shape] = (SHAPES[0], SHAPES[1], SHAPES[3])
    tolerance: float = 2e-4
    bytewise: bool = True
    errors: tuple[float, float] | None = None
    scales: bool = True

    def options_for(self, shape: Shape) -> Mapping[str, Any]:
        """Return options for layers of a shape; override it for a file that is made for one."""
        return self.options

    @property
    def case(self) -> Case:
        """The format with its options."""
        return Case(
            self.policy,
            self.options,
            self.tolerance,
            self.options_for,
            self.bytewise,
            self.errors,
        )

    def build(self, engine: EngineView | None = None, **more: Any) -> Any:
        """Make the format, by default for layers of the first shape."""
        if engine is not None:
            return super().build(engine, **more)
        return Pool(replace(self.case, options={**self.options, **more}), self.fitting()[0]).policy

    def fitting(self) -> list[Shape]:
        """The shapes that the format takes.

        Raises:
            AssertionError: It takes none.
        """
        found, said = [], ""
        for shape in self.shapes:
            try:
                Pool(self.case, shape, blocks=1)
            except ValueError as error:
                said = str(error)
                continue
            found.append(shape)
        assert found, f"it refuses every shape of {[str(s) for s in self.shapes]}: {said}"
        return found

    # -- writing and reading -------------------------------------------------------------------

    @law("FormatPolicy.decode", "as precisely as the bytes hold them")
    def test_what_is_written_is_read_back_within_the_formats_error(self) -> None:
        for shape in self.fitting():
            pool = Pool(self.case, shape)
            key, value = vectors(shape, 2 * shape.block + 5, seed=1)
            pool.store({0: (key, value)})
            found, right = pool.read(0), (key, value)
            for what, got, was, most in zip(
                "KV", found, right, allowed(self.case, pool), strict=True
            ):
                assert got.shape == was.shape, f"{shape}: {what} of {list(got.shape)}"
                off = relative(got, was)
                assert off <= most, f"{shape}: {what} comes back with an error of {off:.3g}"

    @law("FormatPolicy.encode", "Encode tokens to bytes.")
    def test_the_size_of_the_elements_does_not_matter(self) -> None:
        if not self.scales:
            skip("it is made for the sizes it was calibrated with")
        for shape, size in itertools.product(self.fitting(), (1e-4, 1e3)):
            pool = Pool(self.case, shape)
            key, value = vectors(shape, shape.block, seed=1)
            pool.store({0: (key * size, value * size)})
            found, right = pool.read(0), (key * size, value * size)
            for what, got, was, most in zip(
                "KV", found, right, allowed(self.case, pool), strict=True
            ):
                off = relative(got, was)
                assert off <= most * 1.1, f"{shape}: {what} of size {size} is off by {off:.3g}"

    @law("FormatPolicy.attend", "the dtype of the query")
    def test_half_precision_goes_in_and_comes_out(self) -> None:
        shape = self.fitting()[-1]
        for dtype in (torch.bfloat16, torch.float16):
            pool = Pool(self.case, shape, dtype=dtype)
            key, value = (x.to(dtype) for x in vectors(shape, 40, seed=1))
            query = queries(shape, 40, 2).to(dtype)
            out, expected = pool.step({0: (key, value)}, query, True)
            assert out.dtype == dtype, f"{shape}: {out.dtype} for queries of {dtype}"
            off = relative(out, expected)
            assert off < 1e-2 + self.tolerance, f"{shape}: {dtype} prompt, error {off:.3g}"
            out, expected = pool.step({0: (key[:1], value[:1])}, query[:1], True)
            off = relative(out, expected)
            assert off < 1e-2 + self.tolerance, f"{shape}: {dtype} token, error {off:.3g}"

    @law("WriteBatch", "negative is padding")
    def test_a_write_touches_the_named_slots_and_nothing_else(self) -> None:
        for shape in self.fitting():
            pool = Pool(self.case, shape)
            before, size = pool.pages.clone(), shape.block
            slots = torch.tensor([5, 6, -1, 3 * size + 2, -1, 7 * size + size - 1])
            key, value = vectors(shape, len(slots), seed=3)
            pool.policy.write(pool.layer, WriteBatch(10 * key, 10 * value, slots), pool.pages)
            mine = pool.bytes_of(pool.touched(slots[slots >= 0]))
            off = int((pool.pages != before)[~mine].sum())
            what = f"{shape}: a write to slots {slots.tolist()}"
            assert not off, f"{what} changed {off} bytes of others"
            assert not torch.equal(pool.pages[mine], before[mine]), f"{what} changed nothing"

    @law("FormatPolicy.encode", "uint8 ``[num_tokens, heads, bytes_per_token_head]``")
    def test_written_one_by_one_a_token_has_the_bytes_it_has_in_a_prompt(self) -> None:
        for shape in self.fitting():
            whole, parts = Pool(self.case, shape), Pool(self.case, shape)
            n = 2 * shape.block
            key, value = vectors(shape, n, seed=4)
            whole.store({2: (key, value)})
            cuts = [0, shape.block // 2 + 3, shape.block + 1, *range(shape.block + 4, n - 8, 3), n]
            for first, last in itertools.pairwise(cuts):
                parts.store({2: (key[first:last], value[first:last])})
            assert whole.tables == parts.tables
            assert whole.holds_the_same(parts, 2), (
                f"{shape}: {n} tokens at once have other bytes than in parts cut at {cuts}"
            )

    @law("FormatPolicy", "a token's bytes can be moved to another slot by themselves")
    def test_a_token_can_be_moved_with_its_bytes(self) -> None:
        for shape in self.fitting():
            pool = Pool(self.case, shape)
            if not pool.policy.moves_tokens:
                skip("its tokens share scales")
            size = shape.block
            pool.store({0: vectors(shape, 2 * size, seed=6)})
            first, second = pool.tables[0]
            old = pool.read(0)
            moves = torch.randperm(size, generator=torch.Generator().manual_seed(8))[: size // 2]
            for plane in pool.layout.planes(pool.pages):
                plane[second, :, : size // 2] = plane[first, :, moves].clone()
            for before, after in zip(old, pool.read(0), strict=True):
                moved = after[size : size + size // 2]
                what = f"{shape}: half a block's bytes in the slots of the next block's tokens"
                assert torch.equal(moved, before[moves]), f"{what} are other tokens there"
                rest = torch.equal(after[size + size // 2 :], before[size + size // 2 :])
                assert rest and torch.equal(after[:size], before[:size]), f"{what} change others"

    # -- attention -----------------------------------------------------------------------------

    @law("FormatPolicy.attend", "Attend the queries to the stored tokens")
    def test_attention_is_that_over_what_the_pages_hold(self) -> None:
        """Prompts, parts of prompts and decoding requests in one step."""
        for shape, (exact, softcap) in itertools.product(
            self.fitting(), ((True, 0.0), (False, 0.0), (True, 2.0))
        ):
            pool = Pool(self.case, shape)
            key, value = vectors(shape, 400, seed=9)
            query = queries(shape, 400, 10)
            old = {0: 71, 1: shape.block, 3: 32, 4: 1}
            at = 0
            for request, n in old.items():
                pool.step({request: (key[at : at + n], value[at : at + n])}, query[:n], True)
                at += n
            rows = {}
            for request, n in {0: 1, 1: 20, 2: 37, 3: 1, 4: 5}.items():
                rows[request] = (key[at : at + n], value[at : at + n])
                at += n
            total = sum(len(k) for k, _ in rows.values())
            write, attend = pool.batch(rows, query[:total], exact)
            attend = replace(attend, softcap=softcap)
            pool.policy.write(pool.layer, write, pool.pages)
            out = torch.full_like(query[:total], torch.nan)
            dense.attend(pool.policy, pool.layer, attend, pool.pages, out)
            expected = pool.expected(attend)
            what = f"{shape}: five rows, exact={exact}, softcap={softcap}"
            off = relative(out, expected)
            assert off <= self.tolerance, f"{what}: an error of {off:.3g}"
            reference = torch.full_like(out, torch.nan)
            dense.attend_dense(pool.policy, pool.layer, attend, pool.pages, reference)
            off = relative(reference, expected)
            assert off <= 2e-4, f"{what}: the host, by `read`, has an error of {off:.3g}"

    @law("AttendBatch", "Exact keys of the query tokens")
    def test_attention_is_near_that_over_the_exact_keys_and_values(self) -> None:
        """The first step of a prompt sees nothing but itself, so it is exact; later ones near."""
        for shape in self.fitting():
            pool = Pool(self.case, shape)
            key, value = vectors(shape, 80, seed=11)
            query = queries(shape, 80, 12)
            first, _ = pool.step({0: (key[:64], value[:64])}, query[:64], True)
            later, _ = pool.step({0: (key[64:], value[64:])}, query[64:], True)
            plain = torch.nn.functional.scaled_dot_product_attention(
                query.transpose(0, 1),
                key.transpose(0, 1),
                value.transpose(0, 1),
                is_causal=True,
                enable_gqa=True,
            ).transpose(0, 1)
            off = relative(first, plain[:64])
            assert off < 1e-4, f"{shape}: the first step of 64 tokens has an error of {off:.3g}"
            off, most = relative(later, plain[64:]), 2 * sum(allowed(self.case, pool))
            assert off < most + self.tolerance, f"{shape}: 16 tokens later: {off:.3g}"

    @law("FormatOptions", "so nothing depends on how a prompt is chunked")
    def test_chunks_do_not_matter_where_all_is_read_back(self) -> None:
        for shape in self.fitting():
            if Pool(self.case, shape).ring is not None:
                skip("what is recent is exact, so chunks do matter")
            key, value = vectors(shape, 90, seed=13)
            query = queries(shape, 90, 14)
            whole = Pool(self.case, shape, exact_chunk=False)
            at_once, _ = whole.step({0: (key, value)}, query, False)
            parts = Pool(self.case, shape, exact_chunk=False)
            found = []
            for first, last in ((0, 7), (7, 8), (8, 50), (50, 51), (51, 90)):
                rows = {0: (key[first:last], value[first:last])}
                found.append(parts.step(rows, query[first:last], False)[0])
            assert whole.holds_the_same(parts, 0), f"{shape}: other bytes in five chunks"
            off = relative(torch.cat(found), at_once)
            assert off <= max(self.tolerance / 2, 1e-5), f"{shape}: five chunks differ by {off:.3g}"

    @law("FormatPolicy.attend", "this step's tokens are stored already")
    def test_decoding_token_by_token(self) -> None:
        for shape in self.fitting():
            pool = Pool(self.case, shape)
            key, value = vectors(shape, 200, seed=15)
            query = queries(shape, 200, 16)
            pool.step({0: (key[:29], value[:29]), 5: (key[29:60], value[29:60])}, query[:60], True)
            for at in range(60, 130, 2):
                rows = {0: (key[at : at + 1], value[at : at + 1]), 5: (key[at + 1 : at + 2],) * 2}
                out, expected = pool.step(rows, query[at : at + 2], True)
                off = relative(out, expected)
                assert off <= self.tolerance, f"{shape}: step {at // 2 - 29}: an error of {off:.3g}"

    @law("FormatPolicy", "nothing\n            but the tensors of their batches")
    def test_the_same_steps_give_the_same_bytes_and_outputs(self) -> None:
        for shape in self.fitting():
            key, value = vectors(shape, 60, seed=17)
            query = queries(shape, 60, 18)
            runs = []
            for _ in range(2):
                pool = Pool(self.case, shape)
                pool.step({0: (key[:41], value[:41])}, query[:41], True)
                out, _ = pool.step({0: (key[41:], value[41:])}, query[41:], True)
                runs.append((pool.pages, out))
            assert torch.equal(runs[0][0], runs[1][0]), f"{shape}: two objects, other bytes"
            assert torch.equal(runs[0][1], runs[1][1]), f"{shape}: two objects, other outputs"

    # -- bad numbers ---------------------------------------------------------------------------

    @law("FormatPolicy.write", "Encode and store new tokens.")
    def test_a_number_that_is_none_stays_where_it_is(self) -> None:
        for shape, bad in itertools.product(self.fitting(), (torch.nan, -torch.inf)):
            key, value = vectors(shape, shape.block + 9, seed=19)
            clean, spoilt = Pool(self.case, shape), Pool(self.case, shape)
            clean.store({0: (key, value)})
            bad_key, bad_value = key.clone(), value.clone()
            bad_key[7, 0, 5], bad_value[7, 0, 3] = bad, bad
            spoilt.store({0: (bad_key, bad_value)})
            self.spoilt(spoilt, clean)
            found, right = spoilt.read(0), clean.read(0)
            table, size = clean.tables[0], shape.block
            slot = torch.tensor([table[at // size] * size + at % size for at in range(len(key))])
            others = ~torch.isin(slot, clean.touched(slot[7:8]))
            for what, mine, theirs in zip("KV", found, right, strict=True):
                assert torch.equal(mine[others], theirs[others]), (
                    f"{shape}: {bad} in token 7 changes {what} of other tokens"
                )

    def spoilt(self, spoilt: Pool, clean: Pool) -> None:
        """Check more of a pool that was given numbers that are none, beside one that was not."""

    # -- what a format says of itself ----------------------------------------------------------

    @law("PageField", "A page of one KV head is divided into planes")
    def test_the_fields_of_the_layout_fill_its_bytes(self) -> None:
        for shape in self.fitting():
            layout = Pool(self.case, shape).layout
            at = 0
            for f in layout.fields:
                assert f.offset == at, f"{shape}: field {f.name} begins at {f.offset}, not {at}"
                at += f.size
            size = layout.bytes_per_token_head
            assert at <= size < at + 4, f"{shape}: fields of {at} bytes in {size}"
            names = [f.name for f in layout.fields]
            assert len({*names}) == len(names), f"{shape}: two fields of one name in {names}"

    @law("FormatPolicy.fingerprint", "name and every option")
    def test_the_fingerprint_tells_options_apart(self) -> None:
        shape = self.fitting()[0]
        own = Pool(self.case, shape, blocks=1).policy.fingerprint()
        assert own == Pool(self.case, shape, blocks=1).policy.fingerprint(), "another each time"
        if Pool(self.case, shape, blocks=1).ring is None:
            other = Pool(self.case, shape, blocks=1, exact_chunk=False).policy.fingerprint()
            assert other != own, f"{own} with exact_chunk on and off"
