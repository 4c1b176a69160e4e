"""A format's steps without an engine: what a CUDA graph replays, where the host must not wait, and
both page layouts.

The runner here keeps what vLLM's second model runner keeps at fixed addresses, and pads decode
steps as it does. A replay is a step whose layers are given the metadata that was built before, as a
graph would have it, while the metadata of the step itself is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from no_sync import Accelerator
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves
from vllm.v1.attention.backend import CommonAttentionMetadata

from kvplug.contract import (
    AttendBatch,
    EngineView,
    FormatPolicy,
    Kind,
    LayerView,
    PageLayout,
    WriteBatch,
)
from kvplug.hosts.dense import attend_dense
from kvplug.hosts.vllm.worker.composition import plugged_builder
from kvplug.hosts.vllm.worker.format import Assignments, FormatLayer, FormatStep, FormatWorker
from kvplug.hosts.vllm.worker.pages import CodedPages
from kvplug.hosts.vllm.worker.rows import StepRows
from kvplug.hosts.vllm.worker.stored_format import StoredFormat
from kvplug.registry import plugins

LAYERS, HEADS, KV_HEADS, SIZE = 2, 6, 2, 64
REQUESTS, MAX_TOKENS, MAX_LEN, BLOCKS = 4, 160, 256, 48
CPU = torch.device("cpu")

FORMATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "int8": {},
    "int4": {},
    "fp8": {},
    "hack": {},
    "rotated": {"bits": 3},
    "kivi": {"group": 16},
    "mixed": {"default": "int8", "layers": {"1": {"use": "kivi", "group": 16}}},
}
EVERY = pytest.mark.parametrize("name", FORMATS)


class Stock:
    """A builder as backends have them: it keeps what it is given."""

    supports_update_block_table = False

    def __init__(self, *_: Any):
        pass

    def build(self, prefix: int, common: Any, fast: bool = False) -> Any:
        return SimpleNamespace(common=common)


def build_policy(name: str, block: int, dtype: str, **options: Any) -> FormatPolicy:
    layers = tuple(LayerView(i, LAYERS, KV_HEADS, HEADS, SIZE, dtype) for i in range(LAYERS))
    found = plugins().registry.get(Kind.FORMAT, name)
    assert found is not None
    chosen = found.Options.model_validate(FORMATS[name] | options)
    policy = found(chosen, EngineView(block, BLOCKS, max_model_len=MAX_LEN, layers=layers))
    assert isinstance(policy, FormatPolicy)
    return policy


def pages_of(policy: FormatPolicy, block: int, layout: str, device: Any) -> list[Tensor]:
    """Pages of all layers, in one allocation per layer or in one for all."""
    sizes = [policy.layout(layer).bytes_per_token_head for layer in policy.engine.layers]
    shape = (KV_HEADS, block)
    if layout == "LBHNC":
        return [torch.zeros(BLOCKS, *shape, n, dtype=torch.uint8, device=device) for n in sizes]
    page = sum(KV_HEADS * block * n for n in sizes)
    whole = torch.zeros(BLOCKS, page, dtype=torch.uint8, device=device)
    found, at = [], 0
    for n in sizes:
        end = at + KV_HEADS * block * n
        found.append(whole[:, at:end].view(BLOCKS, *shape, n))
        at = end
    return found


class Runner:
    """As much of the second model runner as formats see.

    Args:
        name: The format.
        block: Tokens per block.
        dtype: Of keys and values.
        layout: Page layout.
        device: Device of what the runner keeps.
    """

    def __init__(
        self,
        name: str,
        block: int = 16,
        dtype: str = "float32",
        layout: str = "LBHNC",
        device: Any = CPU,
    ):
        self.block = block
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.policy = build_policy(name, block, dtype)
        self.kind = FormatWorker(self.policy, ("x", "y"), StepRows(), REQUESTS)
        config: Any = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_batched_tokens=MAX_TOKENS)
        )
        spec: Any = SimpleNamespace(block_size=block)
        builder = plugged_builder(Stock, (self.kind,), self.kind.rows)
        self.builder = builder(spec, [], config, device)
        self.pages = pages_of(self.policy, block, layout, device)
        impl = SimpleNamespace(scale=SIZE**-0.5)
        self.layers: list[FormatLayer] = [
            self.kind.layer(impl, SimpleNamespace(layer_name=f"model.layers.{i}.attn"))
            for i in range(LAYERS)
        ]
        width = MAX_LEN // block
        self.starts = torch.zeros(REQUESTS + 1, dtype=torch.int32, device=device)
        self.lens = torch.zeros(REQUESTS, dtype=torch.int32, device=device)
        self.table = torch.zeros(REQUESTS, width, dtype=torch.int32, device=device)
        self.mapping = torch.full((MAX_TOKENS,), -1, dtype=torch.int64, device=device)
        # Blocks in no order; block 0 is nobody's.
        order = 1 + torch.randperm(BLOCKS - 1, generator=torch.Generator().manual_seed(5))
        self.blocks = order[: REQUESTS * (width // 2)].view(REQUESTS, -1)
        self.computed = [0] * REQUESTS
        shape = (MAX_TOKENS, HEADS, SIZE)
        self.query = torch.zeros(shape, dtype=self.dtype, device=device)
        self.out = torch.zeros(shape, dtype=self.dtype, device=device)
        key = torch.zeros(MAX_TOKENS, KV_HEADS, SIZE, dtype=self.dtype, device=device)
        self.keys = [key.clone() for _ in range(LAYERS)]
        self.values = [key.clone() for _ in range(LAYERS)]

    def prepare(self, widths: dict[int, int], padded: int = 0) -> CommonAttentionMetadata:
        """Fill in a step of some requests, by slot: how many tokens of each."""
        rows, total = len(widths), sum(widths.values())
        padded = padded or rows
        ends = np.cumsum([0, *widths.values()], dtype=np.int32)
        starts = torch.from_numpy(np.pad(ends, (0, REQUESTS - rows), constant_values=total))
        lens = torch.zeros(REQUESTS, dtype=torch.int32)
        table = torch.zeros(REQUESTS, MAX_LEN // self.block, dtype=torch.int32)
        mapping = torch.full((MAX_TOKENS,), -1, dtype=torch.int64)
        for row, (slot, width) in enumerate(widths.items()):
            first, self.computed[slot] = self.computed[slot], self.computed[slot] + width
            lens[row] = self.computed[slot]
            table[row, : self.blocks.shape[1]] = self.blocks[slot]
            at = torch.arange(first, first + width)
            own = self.blocks[slot][at // self.block] * self.block + at % self.block
            mapping[int(starts[row]) : int(starts[row + 1])] = own
        for into, new in (
            (self.starts, starts),
            (self.lens, lens),
            (self.table, table),
            (self.mapping, mapping),
        ):
            into.copy_(new, non_blocking=True)
        return self._common(padded, starts, lens, total, widths)

    def _common(
        self, rows: int, starts: Tensor, lens: Tensor, total: int, widths: dict[int, int]
    ) -> CommonAttentionMetadata:
        return CommonAttentionMetadata(
            query_start_loc=self.starts[: rows + 1],
            query_start_loc_cpu=starts[: rows + 1],
            seq_lens=self.lens[:rows],
            num_reqs=rows,
            num_actual_tokens=rows if rows > len(widths) else total,
            max_query_len=max(widths.values()),
            max_seq_len=int(lens.max()),
            block_table_tensor=self.table[:rows],
            slot_mapping=self.mapping[: max(rows, total)],
            seq_lens_cpu_upper_bound=lens[:rows],
            req_idx=np.array(list(widths)),
        )

    def capture(self) -> FormatStep:
        """Build for the capture of decode steps of all requests: a dummy step, as the runner's."""
        self.starts.copy_(torch.arange(REQUESTS + 1, dtype=torch.int32), non_blocking=True)
        self.lens.fill_(1)
        self.table.zero_()
        self.mapping.fill_(-1)
        common = self._common(
            REQUESTS,
            torch.arange(REQUESTS + 1, dtype=torch.int32),
            torch.ones(REQUESTS, dtype=torch.int32),
            REQUESTS,
            dict.fromkeys(range(REQUESTS), 1),
        )
        step = self.build(common.replace(max_seq_len=MAX_LEN))
        self.forward(step)
        return step

    def build(self, common: CommonAttentionMetadata) -> FormatStep:
        step = self.builder.build(0, common).kvplug_format
        assert isinstance(step, FormatStep)
        return step

    def compute(self, total: int, seed: int) -> None:
        """Let the model compute queries, keys and values of a step's tokens."""
        made = torch.Generator().manual_seed(seed)
        for into in (self.query, *self.keys, *self.values):
            new = torch.randn((total, *into.shape[1:]), generator=made).to(self.dtype)
            into[:total].copy_(new, non_blocking=True)
            # What is behind them is of other steps.
            into[total:].fill_(1e4)

    def forward(self, step: FormatStep) -> Tensor:
        """Run the layers on the step's metadata; returns what attention gave in each."""
        n, found = step.num_tokens, []
        for layer, cache, key, value in zip(
            self.layers, self.pages, self.keys, self.values, strict=True
        ):
            layer.write(step, key[:n], value[:n], cache, self.mapping[:n])
            layer.attend(step, self.query[:n], key[:n], value[:n], cache, self.out[:n])
            if layer.recent_size:
                assert step.tokens is not None
                layer.remember(step.tokens, n, key[:n], value[:n])
            found.append(self.out[:n].clone())
        return torch.stack(found)


STEPS: list[dict[int, int]] = [
    {2: 37, 0: 5},
    *({2: 1, 0: 1} for _ in range(18)),
    {2: 1, 0: 1, 3: 50},
    *({2: 1, 0: 1, 3: 1} for _ in range(9)),
    {2: 1, 3: 1, 1: 70},
    *({3: 1, 1: 1, 2: 1, 0: 1} for _ in range(20)),
    *({3: 1, 1: 1, 2: 1} for _ in range(2)),
    *({0: 1, 2: 1} for _ in range(3)),
]
"""Requests come, are decoded, pause and go on, and cross the borders of blocks and groups."""


FEW_STEPS: list[dict[int, int]] = [
    {2: 37, 0: 5},
    {2: 1, 0: 1},
    {0: 1, 3: 50},
    {2: 1, 0: 1, 3: 1},
    {2: 1, 0: 1, 3: 1},
]

PAGES = [
    ("bfloat16", 16),
    ("float16", 32),
    ("bfloat16", 64),
    *(
        pytest.param(dtype, block, marks=pytest.mark.slow)
        for dtype, block in [("float16", 16), ("bfloat16", 32), ("float16", 64)]
    ),
]


def decodes(widths: dict[int, int]) -> bool:
    return set(widths.values()) == {1}


def steps(
    runner: Runner,
    forward: Callable[[FormatStep, bool], Tensor],
    schedule: list[dict[int, int]] = STEPS,
    padded: bool = False,
) -> Iterator[Tensor]:
    """Run steps, and give what attention gave their tokens, ``[layers, tokens, ...]``."""
    for i, widths in enumerate(schedule):
        common = runner.prepare(widths, padded=REQUESTS if padded and decodes(widths) else 0)
        step = runner.build(common)
        total = sum(widths.values())
        runner.compute(total, seed=i)
        yield forward(step, decodes(widths))[:, :total]


# -- replay ----------------------------------------------------------------------------------------


def addresses(step: FormatStep) -> dict[str, int]:
    held = {"starts": step.query_start, "table": step.block_table, "lens": step.seq_lens}
    if step.tokens is not None:
        held["slots"] = step.tokens.slots
        held |= {f"places of {size}": own for size, own in step.tokens.places.items()}
    return {name: tensor.data_ptr() for name, tensor in held.items()}


REPLAYED = [
    *(pytest.param(name, True, id=f"{name}-exact_chunk") for name in FORMATS),
    # An open group of the others is exact whatever the option says.
    *(
        pytest.param(name, False, id=f"{name}-read_back")
        for name in FORMATS
        if name not in ("kivi", "mixed")
    ),
]


@pytest.mark.parametrize(("name", "exact"), REPLAYED)
def test_a_replay_gives_what_the_step_itself_gives(name: str, exact: bool) -> None:
    eager, replayed = Runner(name), Runner(name)
    for runner in (eager, replayed):
        for layer in runner.layers:
            layer.exact_chunk = exact
    assert replayed.policy.graph_safe
    captured = replayed.capture()
    # As a graph does, it computes again what layers share.
    captured._made.clear()
    before = [page.clone() for page in replayed.pages]

    def forward(step: FormatStep, decode: bool) -> Tensor:
        if not decode:
            return replayed.forward(step)
        assert addresses(step) == addresses(captured)
        # Nothing of the step's own metadata reaches the layers.
        step.num_tokens = step.max_query_len = step.max_seq_len = -1
        captured._made.clear()
        return replayed.forward(captured)

    assert all(torch.equal(*pair) for pair in zip(before, replayed.pages, strict=True))
    for i, (own, again) in enumerate(
        zip(
            steps(eager, lambda step, _: eager.forward(step)),
            steps(replayed, forward, padded=True),
            strict=True,
        )
    ):
        torch.testing.assert_close(again, own, atol=2e-4, rtol=2e-4, msg=lambda m, i=i: f"{i}: {m}")
    for one, other in zip(eager.pages, replayed.pages, strict=True):
        assert torch.equal(one[1:], other[1:])
    for runner in (eager, replayed):
        assert runner.kind.log.failed is None


def test_a_replay_counts_its_tokens() -> None:
    runner = Runner("kivi")
    captured = runner.capture()
    for i, widths in enumerate(STEPS[:6]):
        step = runner.build(runner.prepare(widths, padded=REQUESTS if decodes(widths) else 0))
        runner.compute(sum(widths.values()), i)
        runner.forward(captured if decodes(widths) else step)
        runner.kind.end(None)  # type: ignore[arg-type]
    assert runner.kind.log.counts.tokens == LAYERS * (42 + 5 * 2)


# -- nobody waits ----------------------------------------------------------------------------------

KERNELS = {
    "kvplug_policies.coded": (
        "quant_write",
        "paged_attend_quant",
        "attend_exact",
        "merge_attention",
    ),
    "kvplug_policies.rotation": ("hadamard",),
}
"""Kernels of formats, by the module that calls them. Their CPU forms keep tables between calls."""


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    """A stand-in that kernels do not run on."""
    made = Accelerator()

    def outside(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                found = kernel(*args, **kwargs)
            made.put(*(x for x in tree_leaves(found) if isinstance(x, Tensor)))
            return found

        return run

    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(f"{module}.{name}", outside(getattr(import_module(module), name)))
    return made


@EVERY
def test_the_host_does_not_wait_in_a_step(accelerator: Accelerator, name: str) -> None:
    with accelerator.faked():
        runner = Runner(name, device=accelerator.device)
        runner.capture()

        def forward(step: FormatStep, decode: bool) -> Tensor:
            with accelerator.no_sync():
                return runner.forward(step)

        for out in steps(runner, forward):
            assert accelerator.holds(out)
    assert runner.kind.log.failed is None


@EVERY
def test_the_host_does_not_wait_for_a_build(accelerator: Accelerator, name: str) -> None:
    with accelerator.faked():
        runner = Runner(name, device=accelerator.device)
        for widths in STEPS:
            common = runner.prepare(widths)
            with accelerator.no_sync():
                runner.build(common)


def test_the_host_does_not_wait_for_assignments(accelerator: Accelerator) -> None:
    with accelerator.faked():
        assignments, slots = Assignments(REQUESTS), torch.arange(REQUESTS - 1, -2, -1)
        slots = slots.to(accelerator.device)
        first = assignments.of(slots)
        with accelerator.no_sync():
            assignments.put(np.array([[3, 1], [0, 2]], dtype=np.int32))
            second = assignments.of(slots)
        assert first.tolist() == [0] * 5 and second.tolist() == [1, 0, 0, 2, 2]


def test_the_host_does_not_wait_for_counters(accelerator: Accelerator) -> None:
    """They are a report late."""
    with accelerator.faked():
        runner = Runner("int8", device=accelerator.device)
        step = runner.build(runner.prepare({0: 3}))
        runner.compute(3, 0)
        runner.keys[0][1, 0, :5] = torch.nan
        runner.forward(step)
        with accelerator.no_sync():
            found = [runner.policy.counters() for _ in range(2)]
    assert found == [{"nonfinite": 0.0}, {"nonfinite": 5.0}]


class Bytes(FormatPolicy):
    """A format of two methods: eight bits of each element, and no kernel."""

    name = "bytes"
    changes = "everything"

    def layout(self, layer: LayerView) -> PageLayout:
        return PageLayout(2 * layer.head_size, 8, 8)

    def encode(self, layer: LayerView, key: Tensor, value: Tensor) -> Tensor:
        return (torch.cat([key, value], -1) * 32 + 128).clamp(0, 255).to(torch.uint8)

    def decode(self, layer: LayerView, cells: Tensor) -> tuple[Tensor, Tensor]:
        key, value = ((cells.float() - 128) / 32).chunk(2, -1)
        return key, value


def test_padding_is_not_stored_and_not_waited_for(accelerator: Accelerator) -> None:
    """Slots that are negative count from the end, where they are indices: it was the last block
    that padding overwrote on a GPU."""
    layer = LayerView(0, 1, KV_HEADS, HEADS, SIZE, "float32")
    policy = Bytes(Bytes.Options(), EngineView(16, BLOCKS, layers=(layer,)))
    made = torch.Generator().manual_seed(0)
    key, value = (torch.randn(6, KV_HEADS, SIZE, generator=made) for _ in range(2))
    plain = policy.layout(layer).pages(layer, BLOCKS, 16)
    slots = torch.tensor([-1, 37, 38, -1, 700, -1])
    policy.write(layer, WriteBatch(key, value, slots), plain)
    assert int(plain.any(-1).sum()) == 3 * KV_HEADS
    with accelerator.faked():
        on = accelerator.device
        there = policy.layout(layer).pages(layer, BLOCKS, 16, on)
        batch = WriteBatch(key.to(on), value.to(on), slots.to(on))
        padding = WriteBatch(key.to(on), value.to(on), torch.full((6,), -1, device=on))
        with accelerator.no_sync():
            policy.write(layer, batch, there)
        assert torch.equal(there.cpu(), plain)
        with accelerator.no_sync():
            policy.write(layer, padding, there)
        assert torch.equal(there[1:].cpu(), plain[1:]), "block 0 is no request's"


# -- layouts ---------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize(("dtype", "block"), PAGES)
def test_both_page_layouts_hold_the_same(name: str, dtype: str, block: int) -> None:
    """Pages of all layers in one allocation, block by block, leave gaps between those of one."""
    apart, woven = (Runner(name, block, dtype, layout) for layout in ("LBHNC", "BLHNC"))
    assert not woven.pages[1].is_contiguous()
    for one, other in zip(
        steps(apart, lambda step, _: apart.forward(step), FEW_STEPS),
        steps(woven, lambda step, _: woven.forward(step), FEW_STEPS),
        strict=True,
    ):
        assert torch.equal(one, other)
    blocks = woven.blocks[:3]
    for index, layer in enumerate(woven.policy.engine.layers):
        assert torch.equal(apart.pages[index][1:], woven.pages[index][1:])
        layout = woven.policy.layout(layer)
        opened = [
            CodedPages(StoredFormat(runner.policy), layer, layout, runner.pages[index])
            for runner in (apart, woven)
        ]
        for which in (0, 1):
            assert torch.equal(*(pages.gather(which, blocks) for pages in opened))
    for runner in (apart, woven):
        assert runner.kind.log.failed is None


@EVERY
@pytest.mark.parametrize(("dtype", "block"), PAGES)
def test_a_step_attends_what_reads_back(name: str, dtype: str, block: int) -> None:
    """The last step's outputs, against attention over pages that are read back."""
    runner = Runner(name, block, dtype, "BLHNC")
    expected: list[Tensor] = []

    def forward(step: FormatStep, decode: bool) -> Tensor:
        rings = [
            layer.recent(step.tokens, key)
            for layer, key in zip(runner.layers, runner.keys, strict=True)
        ]
        exact = [(ring.key.clone(), ring.value.clone()) if ring else None for ring in rings]
        out = runner.forward(step)
        n = step.num_tokens
        for index, layer in enumerate(runner.layers):
            kept = exact[index]
            batch = AttendBatch(
                runner.query[:n],
                step.query_start,
                step.block_table,
                step.seq_lens,
                layer.scale,
                step.max_query_len,
                step.max_seq_len,
                runner.keys[index][:n],
                runner.values[index][:n],
                request_slots=step.row_slots() if kept is not None else None,
                recent=type(rings[index])(*kept) if kept is not None else None,  # type: ignore[misc]
            )
            dense = torch.zeros_like(out[index])
            attend_dense(runner.policy, layer.layer, batch, runner.pages[index], dense)
            expected.append(dense)
        return out

    for out in steps(runner, forward, FEW_STEPS):
        own, expected[:] = torch.stack(expected), []
        tolerance = 0.06 if name == "hack" else 0.02
        torch.testing.assert_close(out, own[:, : out.shape[1]], atol=tolerance, rtol=tolerance)
