"""Laws of attention policies, and decode rows to check them with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from kvplug.contract import AttentionPolicy, DecodeRows
from kvplug.testing.laws import LAYERS, PolicyLaws, law

LAYER = LAYERS[1]


def decode_rows(
    lens: Sequence[int],
    *,
    seed: int = 0,
    owners: Sequence[int] | None = None,
    query: Tensor | None = None,
) -> DecodeRows:
    """One decode row for each length, of random keys and values.

    What lies beyond a row's own tokens is NaN.

    Args:
        lens: Tokens of each row.
        seed: Of the keys, values and queries; row ``r`` is the same whatever rows are beside it.
        owners: Number of the request in each row's slot; the row's index by default.
        query: Queries, ``[rows, num_heads, head_size]``; random by default.
    """
    size, most = LAYER.head_size, max(lens)
    key = torch.full((len(lens), LAYER.num_kv_heads, most, size), float("nan"))
    value = key.clone()
    queries = torch.empty(len(lens), LAYER.num_heads, size)
    for r, n in enumerate(lens):
        random = torch.Generator().manual_seed(1000 * seed + r)
        queries[r] = torch.randn(LAYER.num_heads, size, generator=random)
        key[r, :, :n] = torch.randn(n, LAYER.num_kv_heads, size, generator=random).transpose(0, 1)
        value[r, :, :n] = torch.randn(n, LAYER.num_kv_heads, size, generator=random).transpose(0, 1)

    def gather(
        rows: Sequence[int], starts: Sequence[int], ends: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        assert all(s % 16 == 0 for s in starts), "starts must be multiples of the block size"
        width = max(e - s for s, e in zip(starts, ends, strict=True))
        found = []
        for pages in (key, value):
            part = pages.new_full((len(rows), pages.shape[1], width, size), float("nan"))
            for i, (r, s, e) in enumerate(zip(rows, starts, ends, strict=True)):
                part[i, :, : e - s] = pages[r, :, s:e]
            found.append(part)
        return found[0], found[1]

    return DecodeRows(
        queries if query is None else query,
        list(range(len(lens))),
        list(range(len(lens))) if owners is None else owners,
        list(lens),
        size**-0.5,
        0.0,
        gather,
    )


def full_attention(rows: DecodeRows) -> Tensor:
    """Attention over every token of each row, ``[rows, num_heads, head_size]`` float32."""
    found = []
    for r, n in enumerate(rows.lens):
        key, value = rows.gather([r], [0], [n])
        found.append(
            torch.nn.functional.scaled_dot_product_attention(
                rows.query[r : r + 1, :, None], key, value, scale=rows.scale, enable_gqa=True
            )[:, :, 0]
        )
    return torch.cat(found)


def _same(found: Tensor | None, fresh: Tensor | None, said: str) -> None:
    """Fail with what is said where both were attended and differ."""
    if found is not None and fresh is not None:
        torch.testing.assert_close(found, fresh, rtol=1e-4, atol=1e-5, msg=said)


class AttentionLaws(PolicyLaws):
    """Laws of every attention policy.

    Attributes:
        error: Relative error allowed of a policy that has seen nothing yet.
        lens: Lengths of the rows that it is held against.
    """

    policy: ClassVar[type[AttentionPolicy]]
    error: float = 1e-3
    lens: Sequence[int] = (1, 15, 16, 100, 700)

    @law("AttentionPolicy.attend", "Attention output, float32 ``[rows, num_heads, head_size]``")
    def test_the_output_is_float32_of_the_rows(self) -> None:
        for lens in (self.lens[:1], self.lens):
            rows = decode_rows(lens)
            found = self.build().attend(LAYER, rows)
            if found is None:
                continue
            good = found.shape == rows.query.shape and found.dtype == torch.float32
            assert good, f"{len(lens)} rows: {list(found.shape)} {found.dtype}"
            assert bool(found.isfinite().all()), (
                f"rows of {list(lens)} tokens: the output is not finite; what `gather` returns "
                "beyond a row's tokens is undefined"
            )

    @law("AttentionPolicy", "approximately")
    def test_what_has_seen_nothing_is_near_full_attention(self) -> None:
        for n in self.lens:
            rows = decode_rows([n], seed=3)
            found = self.build().attend(LAYER, rows)
            if found is None:
                continue
            right = full_attention(rows)
            off = float((found - right).norm() / right.norm())
            assert off <= self.error, f"one row of {n} tokens: an error of {off:.3g}"

    @law("DecodeRows", "one query each")
    def test_a_row_is_attended_alone_as_it_is_beside_others(self) -> None:
        rows = decode_rows(self.lens)
        together = self.build().attend(LAYER, rows)
        if together is None:
            return
        alone = self.build().attend(LAYER, decode_rows(self.lens[:1]))
        assert alone is not None, "rows beside others are attended, and one alone is not"
        torch.testing.assert_close(
            alone, together[:1], rtol=1e-4, atol=1e-5, msg=lambda said: f"the first row: {said}"
        )

    @law("DecodeRows", "what was remembered of it is stale then")
    def test_another_request_in_the_slot_is_attended_anew(self) -> None:
        for n in self.lens:
            policy = self.build()
            first, other = decode_rows([n], seed=5), decode_rows([n], seed=6)
            policy.attend(LAYER, first)
            taken = replace(other, query=first.query, owners=[99])
            found = policy.attend(LAYER, taken)
            fresh = self.build().attend(LAYER, taken)
            _same(
                found,
                fresh,
                f"{n} tokens: the same query of another owner has another result than at first",
            )

    @law("AttentionPolicy.attend", "Attend the rows of a step in one layer.")
    def test_a_layer_is_attended_apart_from_another(self) -> None:
        for n in self.lens:
            policy = self.build()
            policy.attend(LAYERS[0], decode_rows([n], seed=5))
            rows = replace(decode_rows([n], seed=6), query=decode_rows([n], seed=5).query)
            found, fresh = policy.attend(LAYER, rows), self.build().attend(LAYER, rows)
            _same(
                found,
                fresh,
                f"{n} tokens: the result is another after another layer had the same query",
            )

    @law("AttentionPolicy.serves", "Return True if rows of that many tokens go to `attend`")
    def test_it_says_which_rows_it_serves(self) -> None:
        policy = self.build()
        for n in (1, 16, 4096):
            assert isinstance(policy.serves(n), bool), f"serves({n}) gave {policy.serves(n)!r}"
