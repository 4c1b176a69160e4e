"""Segments out of pages and into others, on real cache-write operations and no engine."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from no_sync import Accelerator
from torch import Tensor

from kvplug.contract import EngineView, FormatPolicy, Kind, LayerView, WriteBatch
from kvplug.hosts.vllm.messages import (
    LoadOrder,
    PieceOrder,
    ReuseDirectives,
    ReuseReport,
    SaveOrder,
    StepDirectives,
    StepReport,
)
from kvplug.hosts.vllm.worker.composition import plugged_builder, plugged_impl
from kvplug.hosts.vllm.worker.reuse import ReuseWorker
from kvplug.hosts.vllm.worker.segments import LayerPages, stacked
from kvplug.hosts.vllm.worker.state import WorkerState
from kvplug.parser import load_deployment
from kvplug.reuse.memory import SegmentMemory
from kvplug.reuse.settings import ReuseSettings

SIZE, BLOCKS = 32, 12
VIEW = LayerView(0, 1, num_kv_heads=2, num_heads=4, head_size=64, dtype="float32")


class Impl:
    """Stores tokens as the plain layout does: keys, then values."""

    scale = 0.125

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor
    ) -> None:
        blocks, at = slots // SIZE, slots % SIZE
        cache[blocks, :, at] = torch.cat([key, value], -1)


def arranged(layout: str, dense: Tensor) -> Tensor:
    """A cache's tensor in one of vLLM's layouts: heads before tokens, tokens before heads, or a
    block of all layers together."""
    blocks, heads, size, content = dense.shape
    if layout == "BLHNC":
        between = dense.new_empty((blocks, 3, heads, size, content))
        between[:, 1] = dense
        return between[:, 1]
    return dense.transpose(1, 2).contiguous().transpose(1, 2) if layout == "LBNHC" else dense


def native(layout: str = "LBHNC") -> tuple[LayerPages, Tensor]:
    cache = arranged(layout, torch.full((BLOCKS, 2, SIZE, 128), float("nan")))
    return LayerPages(SimpleNamespace(impl=Impl()), cache, VIEW, None), cache


def coded(name: str, layout: str = "LBHNC") -> tuple[LayerPages, Tensor, FormatPolicy]:
    choice = load_deployment({"format": name}).choice(Kind.FORMAT)
    assert choice is not None
    policy = choice.build(EngineView(block_size=SIZE, layers=(VIEW,)))
    assert isinstance(policy, FormatPolicy)
    width = policy.layout(VIEW).bytes_per_token_head
    cache = torch.randint(0, 256, (BLOCKS, 2, SIZE, width), dtype=torch.uint8)
    cache = arranged(layout, cache)
    return LayerPages(SimpleNamespace(impl=Impl()), cache, VIEW, policy), cache, policy


def some(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(n, 2, 64, generator=generator) for _ in range(2))
    return key, value


def slots_of(blocks: Tensor, start: int, n: int) -> Tensor:
    at = torch.arange(start, start + n)
    return blocks[at // SIZE] * SIZE + at % SIZE


@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC", "LBNHC"])
def test_what_was_written_is_read_wherever_it_begins(layout: str) -> None:
    pages, cache = native(layout)
    blocks = torch.tensor([7, 2, 9, 4])
    key, value = some(100)
    pages.write(slots_of(blocks, 5, 100), key, value)
    for start, end in ((5, 105), (31, 33), (32, 64), (40, 41), (104, 105)):
        k, v = pages.read(blocks, start, end)
        assert torch.equal(k, key[start - 5 : end - 5])
        assert torch.equal(v, value[start - 5 : end - 5])
    k, v = pages.read(blocks, 8, 8)
    assert k.shape == v.shape == (0, 2, 64)
    stored = pages.stored(blocks, 20, 90)
    elsewhere = torch.tensor([1, 3, 5])
    pages.put(slots_of(elsewhere, 11, 70), stored)
    assert torch.equal(pages.read(elsewhere, 11, 81)[0], key[15:85])
    untouched = torch.ones(BLOCKS, dtype=torch.bool)
    untouched[torch.cat([blocks, elsewhere])] = False
    assert cache[untouched].isnan().all()


@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC"])
@pytest.mark.parametrize("name", ["int8", "int4", "fp8", "hack", "rotated", "plain"])
def test_bytes_of_a_format_move_as_they_are(name: str, layout: str) -> None:
    pages, cache, policy = coded(name, layout)
    blocks = torch.tensor([7, 2, 9, 4])
    key, value = some(100)
    policy.write(VIEW, WriteBatch(key, value, slots_of(blocks, 5, 100)), cache)
    stored = pages.stored(blocks, 20, 90)
    assert stored["cells"].shape[:2] == (70, 2)
    before = cache.clone()
    elsewhere = torch.tensor([1, 3, 5])
    slots = slots_of(elsewhere, 11, 70)
    pages.put(slots, stored)
    for which in (0, 1):
        moved = pages.read(elsewhere, 11, 81)[which]
        assert torch.equal(moved, pages.read(blocks, 20, 90)[which])
    others = torch.ones(BLOCKS, dtype=torch.bool)
    others[elsewhere] = False
    assert torch.equal(cache[others], before[others])
    again = pages.stored(elsewhere, 11, 81)
    assert torch.equal(again["cells"], stored["cells"])


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_a_corrected_run_is_decoded_and_coded_again(name: str) -> None:
    pages, cache, policy = coded(name)
    blocks, elsewhere = torch.tensor([7, 2]), torch.tensor([1, 3])
    policy.write(VIEW, WriteBatch(*some(40), slots_of(blocks, 0, 40)), cache)
    slots = slots_of(elsewhere, 9, 40)
    key, value = pages.decoded(slots, pages.stored(blocks, 0, 40))
    assert torch.equal(key, pages.read(blocks, 0, 40)[0])
    pages.write(slots, -key, value)
    scratch = torch.zeros_like(cache)
    policy.write(VIEW, WriteBatch(-key, value, torch.arange(40)), scratch)
    expected = policy.read(VIEW, scratch, torch.tensor([0, 1]))[0].transpose(1, 2).flatten(0, 1)
    assert torch.equal(pages.read(elsewhere, 9, 49)[0], expected[:40])


@pytest.mark.parametrize("name", ["", "int8", "int4"])
def test_a_run_is_loaded_without_a_wait(name: str) -> None:
    """Put as it is, and decoded, turned and written again."""
    accelerator = Accelerator()
    pages, cache = coded(name)[:2] if name else native()
    accelerator.put(cache)
    blocks, elsewhere = torch.tensor([7, 2, 9, 4]), torch.tensor([1, 3, 5])
    slots = slots_of(elsewhere, 11, 70)
    with accelerator.no_sync():
        with accelerator.waiting():
            # What a kernel needs once, and how a backend orders its pages, is found out here.
            pages.write(slots_of(blocks, 5, 100), *some(100))
            stored = {name: plane.cpu() for name, plane in pages.stored(blocks, 20, 90).items()}
        pages.put(slots, stored)
        key, value = pages.decoded(slots, stored)
        pages.write(slots, key, value)
        read = pages.read(elsewhere, 11, 81)
        expected = pages.read(blocks, 20, 90)
    for mine, theirs in zip(read, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.2 if name else 0, atol=0.2 if name else 0)


def test_layers_of_other_bytes_are_padded() -> None:
    one, other = torch.ones(3, 2, 4, dtype=torch.uint8), torch.ones(3, 1, 6, dtype=torch.uint8)
    made = stacked([one, other])
    assert made.shape == (2, 3, 2, 6)
    assert torch.equal(made[0, :, :, :4], one)
    assert torch.equal(made[1, :, :1, :6], other)
    assert int(made.sum()) == one.numel() + other.numel()


def test_ranks_are_merged_into_what_all_of_them_did() -> None:
    one = ReuseReport(saved={"a": {"x": 1.0}}, counts={"a": 1}, computed=5, loaded=(7, 3))
    other = ReuseReport(saved={"a": {"x": 3.0}, "b": {}}, counts={"a": 1, "b": 1}, computed=5)
    other.failed["c"] = "bad checksum"
    one.adapted, other.adapted = {1: 0.5, 2: 0.1}, {1: 0.2, 2: 0.3}
    one.merge(other)
    assert one.saved == {"a": {"x": 2.0}, "b": {}}
    assert one.counts == {"a": 2, "b": 1}
    assert (one.computed, one.loaded) == (5, (7, 3))
    assert one.failed == {"c": "bad checksum"}
    assert one.adapted == {1: 0.5, 2: 0.3}, "the slowest rank's"
    assert one
    assert not ReuseReport()
    assert not ReuseDirectives()


def test_each_segment_of_a_step_is_measured_by_its_own_last_queries() -> None:
    """A row of 90 tokens after 30: two segments end in it, and a row of another request. On the
    second runner nothing waits for the device."""

    def save(name: str, start: int, length: int) -> SaveOrder:
        print_ = SimpleNamespace(start=start, length=length)
        empty = torch.zeros(0).numpy()
        return SaveOrder(name, print_, empty, empty, empty, slot=3)  # type: ignore[arg-type]

    state = WorkerState()
    config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=SIZE),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=512, max_num_seqs=8),
    )
    deployment: Any = SimpleNamespace(reuse=ReuseSettings())
    kind = ReuseWorker(deployment, config, state, ("", ""))
    saves = [save("a", 20, 40), save("b", 60, 60), save("c", 0, 30)]
    rows = np.array([[2, 0], [5, 3]], dtype=np.int32)
    directives = StepDirectives(rows, reuse=ReuseDirectives(saves=saves))
    common = SimpleNamespace(
        num_reqs=2,
        query_start_loc_cpu=torch.tensor([0, 7, 97]),
        seq_lens=torch.tensor([40, 120]),
        seq_lens_cpu_upper_bound=torch.tensor([40, 120]),
        block_table_tensor=torch.tensor([[1, 2, 0, 0], [8, 7, 6, 5]]),
        req_idx=None,
    )

    accelerator = Accelerator()
    accelerator.put(common.seq_lens, common.block_table_tensor)

    def watched(second: bool = False) -> dict[tuple[str, str], list[float]]:
        """One step: the metadata is built, and two layers attend."""
        builder = plugged_builder(StockBuilder, (kind,), state.rows)
        with accelerator.no_sync() if second else nullcontext():
            metadata = builder(SimpleNamespace(block_size=SIZE), [], None, None).build(0, common)
        if second:
            state.rows.see(np.array([5, 1]))
            state.rows.begin(None, {"a request": 3})
            kind.begin(directives)
            state.rows.name(["another", "a request"])
        impl = object.__new__(plugged_impl(StockImpl, (kind,), lambda *args: StockImpl))
        query = torch.arange(97.0)[:, None, None].expand(97, 4, 64)
        accelerator.put(query)
        with accelerator.no_sync() if second else nullcontext():
            for shift, name in enumerate(("layer", "next")):
                layer = SimpleNamespace(layer_name=name)
                impl.forward(layer, query + shift, query, query, query, metadata, query)
        return {key: value[:, 0, 0].tolist() for key, value in kind.saver.queries.items()}

    kind._memory = SegmentMemory("")
    state.rows.begin(directives.rows)
    kind.begin(directives)
    first = watched()
    # Token 59 of the request is query 7 + 29 of the step; token 119 is the last.
    assert first["a", "layer"] == [float(i) for i in range(21, 37)]
    assert first["b", "layer"] == [float(i) for i in range(81, 97)]
    assert first["b", "next"] == [float(i) for i in range(82, 98)]
    assert ("c", "layer") not in first, "it was computed before"
    kind.saver.queries.clear()
    with state.rows.hidden():
        assert watched() == {}, "a forward that is not the step's own"
    kind.begin(StepDirectives(rows))
    assert watched() == {}
    state.rows.begin(None)
    assert watched(second=True) == {}, "its own forward, inside the step's"
    kind.begin(StepDirectives())
    common.req_idx = np.array([5, 1])
    assert watched(second=True) == first, "the second model runner builds first"


def test_weights_loaded_again_stop_what_is_stored_until_the_scheduler_has_reset() -> None:
    config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=SIZE),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=512, max_num_seqs=8),
    )
    deployment: Any = SimpleNamespace(reuse=ReuseSettings())
    kind = ReuseWorker(deployment, config, WorkerState(), ("", ""))
    kind._memory = SegmentMemory("")
    stored: Any = SimpleNamespace(header=SimpleNamespace(size=0))
    kind._memory._segments["a"] = stored
    empty = np.zeros(0, np.int32)
    facts: Any = SimpleNamespace(request_id="r", start=0, length=0)
    save = SaveOrder("b", facts, empty, empty, np.zeros(0, np.int64))
    piece = PieceOrder("a", 0, 16, 0, True, 0, None)
    load = LoadOrder("r", np.array([7, 8]), empty, (piece,), ())

    def step(generation: int) -> ReuseReport:
        report = StepReport()
        part = ReuseDirectives(loads=[load], saves=[save], generation=generation)
        directives = StepDirectives(reuse=part)
        kind.begin(directives)
        kind.load(directives)
        kind.end(directives)
        kind.report(report)
        return report.reuse or ReuseReport()

    loaded, saved = [], []
    kind.loader.load = lambda order, stored, report: loaded.append(stored["a"])  # type: ignore
    kind.saver.save = lambda order, memory, report: saved.append(order)  # type: ignore
    # As the model is loaded for the first time.
    kind.loaded("layer", None, torch.float32, None)
    assert not step(0).reloaded and len(loaded) == len(saved) == 1
    kind._started = True
    kind.loaded("layer", None, torch.float32, None)
    kind.loaded("next", None, torch.float32, None)
    report = step(0)
    assert (
        report.reloaded
        and not report.errors
        and report.unloaded == ["r"]
        and kind.unfilled() == {7, 8}
    )
    assert report.failed == {"b": "could not be stored"}
    assert not step(0).reloaded and len(loaded) == len(saved) == 1
    assert not step(1).unloaded and len(loaded) == len(saved) == 2


class StockBuilder:
    def __init__(self, *args: Any):
        pass

    def build(self, prefix: int, common: Any, fast: bool = False) -> Any:
        return SimpleNamespace()


class StockImpl:
    def forward(self, *args: Any) -> None:
        pass
