from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from format_laws import (
    CALIBRATED,
    NUM_LAYERS,
    SHAPES,
    Case,
    Pool,
    Shape,
    allowed,
    cases,
    pairs,
    queries,
    relative,
    vectors,
    view,
)

from kvplug.contract import WriteBatch
from kvplug.hosts import dense
from kvplug_policies.coded import LayerOptions

CASES = list(cases())
PAIRS = list(pairs())
EVERY = pytest.mark.parametrize(("case", "shape"), PAIRS, ids=str)
ONE = pytest.mark.parametrize("case", CASES, ids=str)
SHAPE = SHAPES[1]


def test_there_are_formats() -> None:
    assert {"fp8", "int8", "int4", "kivi", "rotated", "hack"} <= {c.policy.name for c in CASES}


# -- writing and reading ---------------------------------------------------------------------------


@EVERY
def test_what_is_written_is_read_back_within_the_formats_error(case: Case, shape: Shape) -> None:
    pool = Pool(case, shape)
    key, value = vectors(shape, 2 * shape.block + 5, seed=1)
    pool.store({0: (key, value)})
    found = pool.read(0)
    assert [x.shape for x in found] == [key.shape, value.shape]
    most = allowed(case, pool)
    assert relative(found[0], key) <= most[0]
    assert relative(found[1], value) <= most[1]


@EVERY
@pytest.mark.parametrize("size", [1e-4, 1e3])
def test_the_size_of_the_elements_does_not_matter(case: Case, shape: Shape, size: float) -> None:
    if case.policy.name in CALIBRATED:
        pytest.skip("it is made for the sizes it was calibrated with")
    pool = Pool(case, shape)
    key, value = vectors(shape, shape.block, seed=1)
    pool.store({0: (key * size, value * size)})
    found, most = pool.read(0), allowed(case, pool)
    assert relative(found[0], key * size) <= most[0] * 1.1
    assert relative(found[1], value * size) <= most[1] * 1.1


@ONE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_in_and_comes_out(case: Case, dtype: torch.dtype) -> None:
    pool = Pool(case, SHAPE, dtype=dtype)
    key, value = (x.to(dtype) for x in vectors(SHAPE, 40, seed=1))
    query = queries(SHAPE, 40, 2).to(dtype)
    out, expected = pool.step({0: (key, value)}, query, True)
    assert out.dtype == dtype
    assert relative(out, expected) < 1e-2 + case.tolerance
    decoded, expected = pool.step({0: (key[:1], value[:1])}, query[:1], True)
    assert relative(decoded, expected) < 1e-2 + case.tolerance


@EVERY
def test_a_write_touches_the_named_slots_and_nothing_else(case: Case, shape: Shape) -> None:
    pool = Pool(case, shape)
    before = pool.pages.clone()
    slots = torch.tensor([5, 6, -1, 3 * shape.block + 2, -1, 7 * shape.block + shape.block - 1])
    key, value = vectors(shape, len(slots), seed=3)
    pool.policy.write(pool.layer, WriteBatch(10 * key, 10 * value, slots), pool.pages)
    mine = pool.bytes_of(pool.touched(slots[slots >= 0]))
    assert torch.equal(pool.pages[~mine], before[~mine])
    assert not torch.equal(pool.pages[mine], before[mine])


@EVERY
def test_written_one_by_one_a_token_has_the_bytes_it_has_in_a_prompt(
    case: Case, shape: Shape
) -> None:
    whole, parts = Pool(case, shape), Pool(case, shape)
    n = 2 * shape.block
    key, value = vectors(shape, n, seed=4)
    whole.store({2: (key, value)})
    cuts = [0, shape.block // 2 + 3, shape.block + 1, *range(shape.block + 4, n - 8, 3), n]
    for first, last in itertools.pairwise(cuts):
        parts.store({2: (key[first:last], value[first:last])})
    assert whole.tables == parts.tables
    assert whole.holds_the_same(parts, 2)


@EVERY
def test_a_token_can_be_moved_with_its_bytes(case: Case, shape: Shape) -> None:
    pool = Pool(case, shape)
    if not pool.policy.moves_tokens:
        pytest.skip("its tokens share scales")
    key, value = vectors(shape, 2 * shape.block, seed=6)
    pool.store({0: (key, value)})
    first, second = pool.tables[0]
    size = shape.block
    old = pool.read(0)
    moves = torch.randperm(size, generator=torch.Generator().manual_seed(8))[: size // 2]
    for plane in pool.layout.planes(pool.pages):
        plane[second, :, : size // 2] = plane[first, :, moves].clone()
    new = pool.read(0)
    for before, after in zip(old, new, strict=True):
        assert torch.equal(after[size : size + size // 2], before[moves])
        assert torch.equal(after[size + size // 2 :], before[size + size // 2 :])
        assert torch.equal(after[:size], before[:size])


# -- attention -------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize(("exact", "softcap"), [(True, 0.0), (False, 0.0), (True, 2.0)])
def test_attention_is_that_over_what_the_pages_hold(
    case: Case, shape: Shape, exact: bool, softcap: float
) -> None:
    """Prompts, parts of prompts and decoding requests in one step."""
    pool = Pool(case, shape)
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
    assert relative(out, expected) <= case.tolerance
    reference = torch.full_like(out, torch.nan)
    dense.attend_dense(pool.policy, pool.layer, attend, pool.pages, reference)
    assert relative(reference, expected) <= 2e-4


@EVERY
def test_attention_is_near_that_over_the_exact_keys_and_values(case: Case, shape: Shape) -> None:
    """The first step of a prompt sees nothing but itself, so it is exact; later ones are near."""
    pool = Pool(case, shape)
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
    assert relative(first, plain[:64]) < 1e-4
    assert relative(later, plain[64:]) < 2 * sum(allowed(case, pool)) + case.tolerance


@EVERY
def test_chunks_do_not_matter_where_all_is_read_back(case: Case, shape: Shape) -> None:
    if Pool(case, shape).ring is not None:
        pytest.skip("what is recent is exact, so chunks do matter")
    key, value = vectors(shape, 90, seed=13)
    query = queries(shape, 90, 14)
    whole = Pool(case, shape, exact_chunk=False)
    at_once, _ = whole.step({0: (key, value)}, query, False)
    parts = Pool(case, shape, exact_chunk=False)
    found = []
    for first, last in ((0, 7), (7, 8), (8, 50), (50, 51), (51, 90)):
        found.append(
            parts.step({0: (key[first:last], value[first:last])}, query[first:last], False)[0]
        )
    assert whole.holds_the_same(parts, 0)
    assert relative(torch.cat(found), at_once) <= max(case.tolerance / 2, 1e-5)


@EVERY
def test_decoding_token_by_token(case: Case, shape: Shape) -> None:
    pool = Pool(case, shape)
    key, value = vectors(shape, 200, seed=15)
    query = queries(shape, 200, 16)
    pool.step({0: (key[:29], value[:29]), 5: (key[29:60], value[29:60])}, query[:60], True)
    for at in range(60, 130, 2):
        rows = {0: (key[at : at + 1], value[at : at + 1]), 5: (key[at + 1 : at + 2],) * 2}
        out, expected = pool.step(rows, query[at : at + 2], True)
        assert relative(out, expected) <= case.tolerance


@EVERY
def test_the_same_steps_give_the_same_bytes_and_outputs(case: Case, shape: Shape) -> None:
    key, value = vectors(shape, 60, seed=17)
    query = queries(shape, 60, 18)
    runs = []
    for _ in range(2):
        pool = Pool(case, shape)
        pool.step({0: (key[:41], value[:41])}, query[:41], True)
        out, _ = pool.step({0: (key[41:], value[41:])}, query[41:], True)
        runs.append((pool.pages, out))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


# -- bad numbers -----------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_a_number_that_is_none_stays_where_it_is_and_is_counted(
    case: Case, shape: Shape, bad: float
) -> None:
    key, value = vectors(shape, shape.block + 9, seed=19)
    clean, spoilt = Pool(case, shape), Pool(case, shape)
    clean.store({0: (key, value)})
    bad_key, bad_value = key.clone(), value.clone()
    bad_key[7, 0, 5], bad_value[7, 0, 3] = bad, bad
    spoilt.store({0: (bad_key, bad_value)})
    if case.policy.__module__.startswith("kvplug_policies."):
        assert spoilt.policy.counters()["nonfinite"] >= 2
        assert clean.policy.counters()["nonfinite"] == 0
        assert all(x.isfinite().all() for x in spoilt.read(0))
    found, right = spoilt.read(0), clean.read(0)
    table = clean.tables[0]
    slot = torch.tensor(
        [table[at // shape.block] * shape.block + at % shape.block for at in range(len(key))]
    )
    others = ~torch.isin(slot, clean.touched(slot[7:8]))
    for mine, theirs in zip(found, right, strict=True):
        assert torch.equal(mine[others], theirs[others])


# -- what a format says of itself ------------------------------------------------------------------


@EVERY
def test_the_fields_of_the_layout_fill_its_bytes(case: Case, shape: Shape) -> None:
    layout = Pool(case, shape).layout
    at = 0
    for f in layout.fields:
        assert f.offset == at
        at += f.size
    assert at <= layout.bytes_per_token_head < at + 4
    assert len({f.name for f in layout.fields}) == len(layout.fields)


def test_the_fingerprint_tells_options_apart() -> None:
    def print_of(case: Case) -> str:
        return Pool(case, SHAPE, blocks=1).policy.fingerprint()

    prints = {str(case): print_of(case) for case in CASES}
    assert len(set(prints.values())) == len(prints)
    for case in CASES:
        assert print_of(case) == prints[str(case)]
        if Pool(case, SHAPE, blocks=1).ring is None:
            other = Pool(case, SHAPE, blocks=1, exact_chunk=False).policy
            assert other.fingerprint() != prints[str(case)]


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if issubclass(c.policy.Options, LayerOptions) and "layers" not in c.options],
    ids=str,
)
def test_layers_of_other_bits_have_other_layouts(case: Case) -> None:
    own = Pool(case, SHAPE).layout
    other = 2 if own.key_bits != 2 else 4
    options = {**case.options, "layers": {"0-1": other, -1: other}}
    pool = Pool(replace(case, options=options), SHAPE)
    bits = [pool.policy.layout(view(SHAPE, index)).key_bits for index in range(NUM_LAYERS)]
    assert bits == [other, other, own.key_bits, other]
    sizes = [pool.policy.layout(view(SHAPE, i)).bytes_per_token_head for i in range(NUM_LAYERS)]
    assert len(set(sizes)) == 2
    outside = {**case.options, "layers": {"9": other}}
    with pytest.raises(ValueError, match="layers '9' is outside the model's 0-3"):
        Pool(replace(case, options=outside), SHAPE)
    with pytest.raises(ValueError, match="not a layer or range"):
        Pool(replace(case, options={**case.options, "layers": {"a": other}}), SHAPE)
    with pytest.raises(ValueError, match="layers"):
        Pool(replace(case, options={**case.options, "layers": {"0": 5}}), SHAPE)
