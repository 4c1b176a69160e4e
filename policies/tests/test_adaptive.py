"""`adaptive`: rows of several levels in one batch, what is measured, and what is decided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from kvplug.contract import AttendBatch, EngineView, LayerView, WriteBatch
from kvplug_policies.format.adaptive import Adaptive
from kvplug_policies.format.int4 import Int4
from kvplug_policies.format.int8 import Int8

BLOCK, HEADS, KV_HEADS, SIZE, LAYERS = 16, 4, 2, 64, 3
VIEW = EngineView(
    block_size=BLOCK,
    layers=tuple(LayerView(i, LAYERS, KV_HEADS, HEADS, SIZE, "float32") for i in range(LAYERS)),
)


def adaptive(**options: Any) -> Adaptive:
    own = {"levels": ["int4", "int8"], "sample_layers": 1, "sample_every": 1, "patience": 2}
    return Adaptive(Adaptive.Options.model_validate(own | options), VIEW)


def pages(policy: Any, blocks: int = 8) -> Tensor:
    size = policy.layout(VIEW.layers[0]).bytes_per_token_head
    return torch.full((blocks, KV_HEADS, BLOCK, size), 0xAA, dtype=torch.uint8)


def tokens(n: int, seed: int, outlier: float = 0.0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    key = torch.randn(n, KV_HEADS, SIZE, generator=source)
    key[..., 0] += outlier
    return key, torch.randn(n, KV_HEADS, SIZE, generator=source)


def store(
    policy: Any, cache: Tensor, block: int, seed: int, level: int, outlier: float = 0
) -> None:
    key, value = tokens(BLOCK, seed, outlier)
    slots = torch.arange(block * BLOCK, (block + 1) * BLOCK)
    assigned = torch.full((BLOCK,), level) if isinstance(policy, Adaptive) else None
    policy.write(VIEW.layers[0], WriteBatch(key, value, slots, assigned=assigned), cache)


def queries(table: list[list[int]], lens: list[int], seed: int = 9) -> AttendBatch:
    rows = len(table)
    query = torch.randn(rows, HEADS, SIZE, generator=torch.Generator().manual_seed(seed))
    return AttendBatch(
        query=query,
        query_start=torch.arange(rows + 1, dtype=torch.int32),
        block_table=torch.tensor(table, dtype=torch.int32),
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        scale=SIZE**-0.5,
        max_query_len=1,
        max_seq_len=max(lens),
    )


def test_rows_of_both_levels_in_one_batch() -> None:
    """Each row comes out as the format of its level alone gives it."""
    mixed, cache = adaptive(), None
    alone = {0: Int4(Int4.Options(), VIEW), 1: Int8(Int8.Options(), VIEW)}
    cache = pages(mixed)
    own = {level: pages(policy) for level, policy in alone.items()}
    for block, level in ((1, 0), (2, 1), (3, 0), (4, 1)):
        store(mixed, cache, block, block, level)
        store(alone[level], own[level], block, block, level)
    batch = queries([[1, 3], [2, 4], [3, 0]], [32, 30, 16])
    out = torch.full_like(batch.query, float("nan"))
    mixed.attend(VIEW.layers[0], batch, cache, out)
    for row, level in ((0, 0), (1, 1), (2, 0)):
        table = batch.block_table[row : row + 1].tolist()
        one = queries(table, [int(batch.seq_lens[row])])
        expected = torch.full_like(one.query, float("nan"))
        one = AttendBatch(batch.query[row : row + 1], *[getattr(one, f) for f in one.__slots__[1:]])
        alone[level].attend(VIEW.layers[0], one, own[level], expected)
        assert torch.allclose(out[row], expected[0], atol=1e-5)
    key, value = mixed.read(VIEW.layers[0], cache, torch.tensor([1, 2]))
    for i, level in ((0, 0), (1, 1)):
        expected_key, expected_value = alone[level].read(
            VIEW.layers[0], own[level], torch.tensor([i + 1])
        )
        assert torch.equal(key[i], expected_key[0]) and torch.equal(value[i], expected_value[0])


def test_a_block_goes_on_at_the_level_it_was_begun() -> None:
    policy = adaptive()
    cache = pages(policy)
    key, value = tokens(BLOCK, 1)
    first = WriteBatch(
        key[:5], value[:5], torch.arange(16, 21), assigned=torch.zeros(5, dtype=torch.int64)
    )
    policy.write(VIEW.layers[0], first, cache)
    policy.write(VIEW.layers[0], WriteBatch(key[5:], value[5:], torch.arange(21, 32)), cache)
    whole = Int4(Int4.Options(), VIEW)
    own = pages(whole)
    store(whole, own, 1, 1, 0)
    got = policy.read(VIEW.layers[0], cache, torch.tensor([1]))
    assert torch.equal(got[0], whole.read(VIEW.layers[0], own, torch.tensor([1]))[0])


def test_padding_is_not_stored() -> None:
    policy = adaptive()
    cache = pages(policy)
    before = cache.clone()
    key, value = tokens(3, 1)
    batch = WriteBatch(key, value, torch.full((3,), -1), assigned=torch.zeros(3, dtype=torch.int64))
    policy.write(VIEW.layers[0], batch, cache)
    assert torch.equal(cache, before)


def measure(policy: Adaptive, level: int, outlier: float, seed: int) -> list[float]:
    cache = pages(policy)
    store(policy, cache, 1, seed, level, outlier)
    batch = queries([[1]], [BLOCK], seed)
    policy.attend(VIEW.layers[0], batch, cache, torch.empty_like(batch.query))
    signals = policy.signals()
    assert signals is not None
    return list(signals)


def test_the_error_is_that_of_attention_over_the_page() -> None:
    policy = adaptive()
    signals = measure(policy, 0, 0.0, 5)
    assert signals[2:] == [1.0, 0.0]
    key, value = tokens(BLOCK, 5)
    cache = pages(policy)
    store(policy, cache, 1, 5, 0)
    coded = [x[0].float() for x in policy.read(VIEW.layers[0], cache, torch.tensor([1]))]
    query = queries([[1]], [BLOCK], 5).query[0].view(KV_HEADS, 2, SIZE)

    def attend(k: Tensor, v: Tensor) -> Tensor:
        return (query @ k.transpose(1, 2) * SIZE**-0.5).softmax(-1) @ v

    exact = attend(key.transpose(0, 1), value.transpose(0, 1))
    expected = (attend(*coded) - exact).norm() / exact.norm()
    assert signals[0] == pytest.approx(float(expected), rel=1e-4)
    assert policy.signals() is None, "reported once"


def test_only_whole_pages_of_sampled_layers_are_looked_at() -> None:
    policy = adaptive()
    cache = pages(policy)
    key, value = tokens(BLOCK, 1)
    for layer in VIEW.layers[1:]:
        slots = torch.arange(BLOCK, 2 * BLOCK)
        policy.write(
            layer, WriteBatch(key, value, slots, assigned=torch.zeros(BLOCK).long()), cache
        )
        batch = queries([[1]], [BLOCK])
        policy.attend(layer, batch, cache, torch.empty_like(batch.query))
    assert policy.signals() is None
    part = WriteBatch(key[:9], value[:9], torch.arange(32, 41), assigned=torch.zeros(9).long())
    policy.write(VIEW.layers[0], part, cache)
    batch = queries([[2]], [9])
    policy.attend(VIEW.layers[0], batch, cache, torch.empty_like(batch.query))
    assert policy.signals() is None


def test_a_page_written_anew_is_another_page() -> None:
    """The shadow follows the block: what was there before is not compared with."""
    policy = adaptive(levels=["int8", {"use": "plain"}])
    cache = pages(policy)
    store(policy, cache, 1, 3, 1)
    store(policy, cache, 1, 4, 1)
    batch = queries([[1]], [BLOCK])
    policy.attend(VIEW.layers[0], batch, cache, torch.empty_like(batch.query))
    signals = policy.signals()
    assert signals is not None and signals[1] == pytest.approx(0, abs=1e-6) and signals[3] == 1


def test_outliers_make_new_requests_safer_and_their_end_cheaper(tmp_path: Path) -> None:
    """Both halves together, on keys with an outlier channel and then without."""
    log = tmp_path / "decisions.jsonl"
    levels = [{"use": "int4", "rotate": False}, "int8"]
    options = {"low": 0.06, "high": 0.2, "retry": 3, "log": str(log), "start": 0, "levels": levels}
    scheduler, worker = adaptive(**options), adaptive(**options)
    decisions = []
    for round_, outlier in enumerate([60.0] * 4 + [0.0] * 12):
        level = scheduler.assign()
        decided = scheduler.observe(measure(worker, level, outlier, round_))
        if decided:
            decisions.append((round_, decided))
    assert "int8 instead of int4" in decisions[0][1] and "above high 0.2" in decisions[0][1]
    assert "int4 instead of int8" in decisions[1][1] and "below low 0.06" in decisions[1][1]
    assert decisions[0][0] == 1, "patience of two samples"
    assert decisions[1][0] >= 4, "while outliers last int8 is kept"
    logged = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [(d["from"], d["to"]) for d in logged][:2] == [("int4", "int8"), ("int8", "int4")]
    assert scheduler.decisions == logged
    counters = scheduler.counters()
    assert counters["decisions"] == len(logged)
    assert counters["requests_0_int4"] + counters["requests_1_int8"] == 16


def test_it_stays_between_its_bounds() -> None:
    policy = adaptive(start=-1, low=0.1, high=0.2)
    assert policy.assign() == 1
    for _ in range(4):
        assert policy.observe([0.0, 0.9, 0, 1]) is None, "nothing is safer"
    policy = adaptive(start=0, low=0.1, high=0.2)
    for _ in range(4):
        assert policy.observe([0.01, 0.0, 1, 0]) is None, "nothing is cheaper"
    for _ in range(4):
        assert policy.observe([0.15, 0.0, 1, 0]) is None, "within the bounds"


def test_a_level_left_for_its_error_rests() -> None:
    policy = adaptive(start=0, low=0.1, high=0.2, retry=4)
    assert [bool(policy.observe([0.5, 0, 1, 0])) for _ in range(2)] == [False, True]
    looks = [bool(policy.observe([0, 0.01, 0, 1])) for _ in range(6)]
    assert looks == [False, False, False, True, False, False]


def test_levels_have_identities_of_their_own() -> None:
    names = adaptive().assignments()
    assert len(set(names)) == 2 and all(n.startswith("adaptive/int") for n in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": ["int4"]}, "at least 2"),
        ({"levels": ["int4", "int5"]}, "level 1: unknown format 'int5'"),
        ({"levels": ["int4", {"bits": 4}]}, "level 1: unknown format None"),
        ({"levels": ["int4", "adaptive"]}, "adaptive cannot be one of its own levels"),
        ({"levels": ["int4", {"use": "int8", "exact_chunk": False}]}, "applies to all levels"),
        ({"low": 0.3, "high": 0.2}, "low 0.3 must be below high 0.2"),
        ({"start": 2}, "start 2 is not one of the 2 levels"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        adaptive(**options)


def test_levels_that_need_the_host_are_refused() -> None:
    options = Adaptive.Options.model_validate({"levels": ["kivi", "int8"]})
    with pytest.raises(ValueError, match="level kivi keeps recent tokens"):
        Adaptive(options, EngineView(block_size=32, layers=VIEW.layers))


def looks(policy: Adaptive, layer: LayerView, steps: int, pages_: int = 1) -> float:
    """Looks at the layer when some pages are seen in so many steps."""
    cache = pages(policy)
    for block in range(1, pages_ + 1):
        key, value = tokens(BLOCK, block)
        slots = torch.arange(block * BLOCK, (block + 1) * BLOCK)
        assigned = torch.zeros(BLOCK, dtype=torch.int64)
        policy.write(layer, WriteBatch(key, value, slots, assigned=assigned), cache)
    batch = queries([list(range(1, pages_ + 1))], [pages_ * BLOCK])
    for _ in range(steps):
        policy.attend(layer, batch, cache, torch.empty_like(batch.query))
    return sum((policy.signals() or [0.0] * 4)[2:])


def test_how_often_and_at_how_much_it_looks() -> None:
    first, second = VIEW.layers[:2]
    assert looks(adaptive(sample_every=1), first, 6) == 6
    assert looks(adaptive(sample_every=3), first, 6) == 2
    assert looks(adaptive(shadow_pages=4), first, 1, pages_=6) == 4
    assert looks(adaptive(shadow_pages=2), first, 1, pages_=6) == 2
    assert looks(adaptive(sample_layers=1), second, 1) == 0
    assert looks(adaptive(sample_layers=3), second, 1) == 1


def test_the_first_level_is_the_one_asked_for() -> None:
    assert [adaptive(start=start).assign() for start in (-2, -1, 0, 1)] == [0, 1, 0, 1]
