"""Chunks of all layers out of pages and into others, on vLLM's own CPU op and no engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from no_sync import Accelerator
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from kvplug.contract import EngineView, FormatPolicy, Kind, LayerView, WriteBatch
from kvplug.errors import KVPlugError
from kvplug.hosts.vllm.worker.segments import LayerPages
from kvplug.hosts.vllm.worker.tier_copy import PageCopier, Planes
from kvplug.hosts.vllm.worker.tier_line import Slot, Slots, processors
from kvplug.parser import load_deployment

SIZE, BLOCKS, LAYERS, HEADS, WIDTH = 32, 12, 3, 2, 64


class Stock:
    """vLLM's CPU backend, as far as it writes pages."""

    scale = 0.125

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor
    ) -> None:
        blocks, heads, size, content = cache.shape
        head = content // 2
        isa = _get_attn_isa(cache.dtype, size, head, "auto")
        halves = cache.view(blocks, heads, size * 2, head).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            key, value, *halves, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
        )


def view(index: int, dtype: str, heads: int = HEADS) -> LayerView:
    return LayerView(index, LAYERS, heads, 2 * HEADS, WIDTH, dtype)


def native(dtype: torch.dtype, heads: Sequence[int] = (HEADS,) * LAYERS) -> list[LayerPages]:
    """Layers full of noise, written by the backend."""
    made = []
    for index, own in enumerate(heads):
        cache = torch.zeros(BLOCKS, own, SIZE, 2 * WIDTH, dtype=dtype)
        layer = SimpleNamespace(impl=Stock())
        pages = LayerPages(layer, cache, view(index, str(dtype).removeprefix("torch."), own), None)
        rng = torch.Generator().manual_seed(index)
        key, value = (
            torch.randn(BLOCKS * SIZE, own, WIDTH, generator=rng).to(dtype) for _ in range(2)
        )
        pages.write(torch.arange(BLOCKS * SIZE), key, value)
        made.append(pages)
    return made


def coded(name: str | dict[str, Any]) -> list[LayerPages]:
    """Layers full of noise in the bytes of a format."""
    views = tuple(view(index, "bfloat16") for index in range(LAYERS))
    choice = load_deployment({"format": name}).choice(Kind.FORMAT)
    assert choice is not None
    policy = choice.build(EngineView(block_size=SIZE, layers=views))
    assert isinstance(policy, FormatPolicy)
    made = []
    for index, own in enumerate(views):
        width = policy.layout(own).bytes_per_token_head
        cache = torch.zeros(BLOCKS, HEADS, SIZE, width, dtype=torch.uint8)
        rng = torch.Generator().manual_seed(index)
        key, value = (
            torch.randn(BLOCKS * SIZE, HEADS, WIDTH, generator=rng).bfloat16() for _ in range(2)
        )
        policy.write(own, WriteBatch(key, value, torch.arange(BLOCKS * SIZE)), cache)
        made.append(LayerPages(SimpleNamespace(impl=Stock()), cache, own, policy))
    return made


def copier(layers: Sequence[LayerPages]) -> PageCopier:
    return PageCopier({f"layer.{i}": layer for i, layer in enumerate(layers)})


def copied(planes: Sequence[Planes]) -> list[Planes]:
    return [{name: tensor.clone() for name, tensor in one.items()} for one in planes]


def noise(layers: Sequence[LayerPages]) -> None:
    for layer in layers:
        cache = layer._cache
        if cache.dtype == torch.uint8:
            cache.random_(0, 256)
        else:
            cache.normal_()


CHUNKS = [
    pytest.param([([7, 2], 64), ([4, 9], 64), ([0, 1], 64)], id="alike"),
    pytest.param([([7, 2], 64), ([4], 32), ([0, 1, 3], 96)], id="of different lengths"),
    pytest.param([([7, 2], 40), ([4, 9], 33)], id="whose last block is not full"),
]


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_chunks_return_bit_for_bit_in_other_blocks(
    dtype: torch.dtype, chunks: list[tuple[list[int], int]]
) -> None:
    layers = native(dtype)
    copy = copier(layers)
    chunks = [(np.array(ids, np.int64), tokens) for ids, tokens in chunks]  # type: ignore[misc]
    planes = copied(copy.read(chunks))
    for (ids, tokens), one in zip(chunks, planes, strict=True):
        assert {name: tuple(t.shape) for name, t in one.items()} == {
            name: shape.shape for name, shape in copy.shapes(tokens).items()
        }
        assert sum(t.nbytes for t in one.values()) == copy.bytes_per_token * tokens
        for index, layer in enumerate(layers):
            key, value = layer.read(torch.as_tensor(ids), 0, tokens)
            assert torch.equal(one["key"][index], key)
            assert torch.equal(one["value"][index], value)
    noise(layers)
    free = iter([11, 10, 8, 6, 5, 3, 0])
    others = [([next(free) for _ in ids], tokens) for ids, tokens in chunks]
    before = [layer._cache.clone() for layer in layers]
    copy.write([(np.array(ids, np.int64), tokens) for ids, tokens in others], planes)
    again = copy.read([(np.array(ids, np.int64), tokens) for ids, tokens in others])
    for one, other in zip(planes, again, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    untouched = torch.ones(BLOCKS, dtype=torch.bool)
    untouched[[block for ids, _ in others for block in ids]] = False
    for layer, was in zip(layers, before, strict=True):
        assert torch.equal(layer._cache[untouched], was[untouched])
    assert copy.read([]) == []


@pytest.mark.parametrize(
    "name",
    [
        "int8",
        "int4",
        "fp8",
        {"use": "mixed", "default": {"use": "int4"}, "layers": {"0": {"use": "int8"}}},
    ],
    ids=["int8", "int4", "fp8", "mixed"],
)
def test_coded_pages_travel_as_they_are(name: str | dict[str, Any]) -> None:
    layers = coded(name)
    copy = copier(layers)
    chunks = [(torch.tensor([7, 2]), 64), (torch.tensor([4, 9]), 64)]
    planes = copied(copy.read(chunks))
    for (ids, tokens), one in zip(chunks, planes, strict=True):
        for index, layer in enumerate(layers):
            heads, width = layer.cell
            stored = layer.stored(ids, 0, tokens)["cells"]
            assert torch.equal(one["cells"][index, :, :heads, :width], stored)
            assert not one["cells"][index, :, :, width:].any()
    noise(layers)
    others = [(torch.tensor([1, 3]), 64), (torch.tensor([5, 6]), 64)]
    transfer = copy.begin_write(others, planes)
    assert transfer.ready() and transfer.count == 2
    for one, other in zip(planes, copy.begin_read(others).planes(), strict=True):
        assert torch.equal(one["cells"], other["cells"])


def test_layers_of_fewer_heads_are_padded_and_written_without_the_padding() -> None:
    layers = native(torch.float32, heads=(2, 1, 2))
    copy = copier(layers)
    chunk = (torch.tensor([7, 2]), 50)
    (planes,) = copied(copy.read([chunk]))
    assert planes["key"].shape == (3, 50, 2, WIDTH)
    assert not planes["key"][1, :, 1].any() and planes["key"][0, :, 1].any()
    key, _ = layers[1].read(chunk[0], 0, 50)
    noise(layers)
    copy.write([(torch.tensor([1, 3]), 50)], [planes])
    assert torch.equal(layers[1].read(torch.tensor([1, 3]), 0, 50)[0], key)


def test_a_chunk_of_more_tokens_than_its_blocks_hold_is_refused() -> None:
    copy = copier(native(torch.float32))
    with pytest.raises(KVPlugError, match="65 tokens does not lie in 2 blocks"):
        copy.read([(torch.tensor([7, 2]), 65)])


def test_layers_that_a_format_stores_in_part_are_refused() -> None:
    with pytest.raises(KVPlugError, match="a format stores only some"):
        copier([native(torch.bfloat16)[0], coded("int8")[0]])


# -- over a line -----------------------------------------------------------------------------------


class Mark:
    """A point in the line's stream that is reached when the test says so."""

    def __init__(self, work: list[Any]):
        self.work = work
        self.waited = False

    def query(self) -> bool:
        return not self.work

    def synchronize(self) -> None:
        self.waited = True
        for call in self.work:
            call()
        self.work.clear()


class TestLine(Slots):
    """A line on which copies happen late: what was copied without waiting is there once the stream
    has come so far."""

    __test__ = False

    def __init__(self, size: int, slots: int = 1):
        made = [
            Slot(torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8), out)
            for out in (True, False)
            for _ in range(slots)
        ]
        super().__init__(made)
        self.within = False
        self.marks: list[Mark] = []

    @contextmanager
    def after_compute(self) -> Iterator[None]:
        self.within = True
        yield
        self.within = False

    def mark(self) -> Mark:
        assert self.within, "a mark outside the line's stream"
        self.marks.append(Mark([lambda: None]))
        return self.marks[-1]

    def come_so_far(self) -> None:
        for mark in self.marks:
            mark.synchronize()
            mark.waited = False


def plain(heads: int = HEADS) -> list[LayerPages]:
    """Layers whose slots hold a token's key and then its value, as on a GPU: tokens before heads.

    What is written through the backend is as it would be there."""

    class Impl:
        scale = 0.125

        def do_kv_cache_update(
            self, layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor
        ) -> None:
            cache[slots // SIZE, :, slots % SIZE] = torch.cat([key, value], -1)

    made = []
    rng = torch.Generator().manual_seed(4)
    for index in range(LAYERS):
        shape = (BLOCKS, SIZE, heads, 2 * WIDTH)
        cache = torch.randn(shape, generator=rng).bfloat16().transpose(1, 2)
        layer = SimpleNamespace(impl=Impl())
        made.append(LayerPages(layer, cache, view(index, "bfloat16", heads), None))
    return made


MADE = {
    "plain": plain,
    "int4": lambda: coded("int4"),
    "mixed": lambda: coded(
        {"use": "mixed", "default": {"use": "int4"}, "layers": {"0": {"use": "int8"}}}
    ),
    "the CPU's own order": lambda: native(torch.bfloat16),
}


@pytest.mark.parametrize("name", MADE)
def test_chunks_go_over_a_line_and_back(name: str) -> None:
    """In as many launches as there are fields where layers are alike; else layer by layer."""
    layers = MADE[name]()
    direct = copier(layers)
    chunks = [(torch.tensor(ids), 64) for ids in ([7, 2], [4, 9], [0, 1])]
    wanted = copied(direct.read(chunks))
    per = 64 * direct.bytes_per_token
    line = TestLine(2 * per + 5)
    over = PageCopier({f"layer.{i}": layer for i, layer in enumerate(layers)}, line)
    fused = {"plain": 2, "int4": 6, "mixed": 0, "the CPU's own order": 0}
    assert name not in fused or len(over._fused or ()) == fused[name]
    first = over.begin_read(chunks)
    assert first.count == 2 and not first.ready()
    assert over.begin_read(chunks[2:]).count == 0, "its staging memory is in use"
    noise(layers)
    line.come_so_far()
    assert first.ready()
    got = copied(first.planes())
    for one, other in zip(got, wanted[:2], strict=True):
        assert all(torch.equal(one[key], other[key]) for key in other)
    first.release()
    first.release()

    others = [(torch.tensor(ids), 64) for ids in ([1, 3], [5, 6], [8, 10])]
    second = over.begin_write(others, wanted)
    assert second.count == 2 and not second.ready()
    assert over.begin_write(others[2:], wanted[2:]).count == 0
    line.come_so_far()
    second.release()
    assert over.begin_write(others[2:], wanted[2:]).count == 1
    for one, other in zip(wanted, direct.read(others), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_only_chunks_alike_share_a_transfer_and_none_is_larger_than_the_line() -> None:
    layers = plain()
    per = 64 * copier(layers).bytes_per_token
    named = {str(i): layer for i, layer in enumerate(layers)}
    over = PageCopier(named, TestLine(4 * per))
    chunks = [(torch.tensor([7, 2]), 64), (torch.tensor([4, 9]), 64), (torch.tensor([3]), 32)]
    assert over.begin_read(chunks).count == 2
    assert over.begin_read([]).count == 0
    with pytest.raises(KVPlugError, match="64 tokens is larger than 100 bytes"):
        PageCopier(named, TestLine(100)).begin_read(chunks)


def test_a_slot_is_given_back_only_when_nothing_uses_it() -> None:
    layers = plain()
    per = 64 * copier(layers).bytes_per_token
    line = TestLine(per)
    over = PageCopier({str(i): layer for i, layer in enumerate(layers)}, line)
    transfer = over.begin_read([(torch.tensor([7, 2]), 64)])
    transfer.release()
    assert line.marks[0].waited
    assert over.begin_read([(torch.tensor([7, 2]), 64)]).planes()
    assert line.marks[1].waited, "planes are waited for"


def test_nothing_waits_for_an_accelerator() -> None:
    """Reading and writing over the line, on pages and staging memory of the device."""
    layers = plain()
    accelerator = Accelerator()
    per = 64 * copier(layers).bytes_per_token
    chunks = [(torch.tensor([7, 2]), 64)]
    wanted = copied(copier(layers).read(chunks))
    line = TestLine(per)
    accelerator.put(*(layer._cache for layer in layers))
    accelerator.put(*(slot.device for slot in line._free))
    with accelerator.no_sync():
        with accelerator.waiting():
            over = PageCopier({str(i): layer for i, layer in enumerate(layers)}, line)
        transfer = over.begin_read(chunks)
        back = over.begin_write([(torch.tensor([1, 3]), 64)], wanted)
    line.come_so_far()
    assert all(torch.equal(transfer.planes()[0][key], wanted[0][key]) for key in wanted[0])
    assert back.count == 1
    again = copier(layers).read([(torch.tensor([1, 3]), 64)])
    assert torch.equal(again[0]["key"], wanted[0]["key"])


def test_the_processors_next_to_a_device_are_read_from_linux(tmp_path: Path) -> None:
    device = tmp_path / "bus/pci/devices/0000:3b:00.0"
    node = tmp_path / "devices/system/node/node1"
    device.mkdir(parents=True)
    node.mkdir(parents=True)
    (device / "numa_node").write_text("1\n")
    (node / "cpulist").write_text("4-6,9\n")
    assert processors("0000:3b:00.0", tmp_path) == {4, 5, 6, 9}
    (device / "numa_node").write_text("-1\n")
    assert processors("0000:3b:00.0", tmp_path) == set()
    (device / "numa_node").write_text("what\n")
    assert processors("0000:3b:00.0", tmp_path) == set()
    assert processors("", tmp_path) == processors("0000:99:00.0", tmp_path) == set()
