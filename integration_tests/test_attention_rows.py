"""An attention policy between vLLM's metadata and its pages: the rows it serves, and their output.

The policy is the attention memory, whose rows must be those of full attention or marked as reused.
"""

from __future__ import annotations

import itertools
import random
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from no_sync import Accelerator
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, _get_attn_isa

from kvplug.contract import EngineView, LayerView
from kvplug.hosts.vllm.messages import AttentionDirectives, StepDirectives
from kvplug.hosts.vllm.worker.attention import AttentionWorker
from kvplug.hosts.vllm.worker.composition import plugged_builder, plugged_impl
from kvplug.hosts.vllm.worker.rows import StepRows
from kvplug_attention_memo.policy import Memo

BLOCK, HEADS, KV_HEADS, SIZE = 32, 4, 2, 64
NEAR = 32
OWNERS = itertools.count()


class Stock:
    """A backend that stores through vLLM's own op, and attends plain copies of the same pages."""

    def __init__(self, blocks: int, dtype: torch.dtype):
        self.num_heads, self.num_kv_heads, self.head_size = HEADS, KV_HEADS, SIZE
        self.scale, self.logits_soft_cap = SIZE**-0.5, 0
        self.sliding_window, self.alibi_slopes, self.sinks = -1, None, None
        self.attn_type, self.kv_cache_dtype = "decoder", "auto"
        self.plain = torch.zeros(2, blocks, BLOCK, KV_HEADS, SIZE, dtype=dtype)
        self.asked: list[int] = []

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor
    ) -> None:
        CPUAttentionBackendImpl.do_kv_cache_update(
            self,  # type: ignore[arg-type]
            layer,
            key,
            value,
            cache,
            slots,
        )

    def keep(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        self.plain[0, slots // BLOCK, slots % BLOCK] = key
        self.plain[1, slots // BLOCK, slots % BLOCK] = value

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: Tensor,
        metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        starts, lens = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        assert len(starts) == len(lens) + 1 and starts[-1] == metadata.num_actual_tokens
        self.asked.append(len(lens))
        for row, (first, end, n) in enumerate(zip(starts, starts[1:], lens, strict=False)):
            k, v = (x[metadata.block_table[row].long()].flatten(0, 1)[:n] for x in self.plain)
            sees = torch.arange(n) <= torch.arange(n - (end - first), n)[:, None]
            output[first:end] = torch.nn.functional.scaled_dot_product_attention(
                query[first:end].transpose(0, 1)[None],
                k.transpose(0, 1)[None],
                v.transpose(0, 1)[None],
                attn_mask=sees,
                enable_gqa=True,
            )[0].transpose(0, 1)
        return output


class StockBuilder:
    def __init__(self, spec: Any, layer_names: list[str], vllm_config: Any, device: Any):
        self.kv_cache_spec = spec

    def build(self, prefix: int, common: Any, fast_build: bool = False) -> Any:
        return SimpleNamespace(
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            causal=True,
        )


class Request:
    def __init__(self, slot: int, blocks: list[int], seed: int, queries: str = "random"):
        self.slot, self.blocks = slot, blocks
        self.owner = next(OWNERS)
        self.rng = torch.Generator().manual_seed(seed)
        self.done = 0
        self.query = torch.randn(HEADS, SIZE, generator=self.rng) if queries == "alike" else None


class Layer:
    """One layer in which requests run, beside the same without a policy."""

    second_runner = False
    accelerator: Accelerator | None = None

    def __init__(self, *, dtype: torch.dtype = torch.float32, **options: Any):
        blocks = 60
        view = LayerView(0, 1, KV_HEADS, HEADS, SIZE, str(dtype).removeprefix("torch."))
        engine = EngineView(block_size=BLOCK, layers=(view,))
        self.policy = Memo(Memo.Options(near=NEAR, **options), engine)
        self.rows = StepRows()
        self.kind = AttentionWorker(self.policy, ("inline", "attention"), self.rows)
        kinds = [self.kind]
        context = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))
        with patch("vllm.config.get_current_vllm_config", lambda: context):
            self.impl = plugged_impl(Stock, kinds, lambda name, impl: Stock)(blocks, dtype)
        spec = SimpleNamespace(block_size=BLOCK)
        builder = plugged_builder(StockBuilder, kinds, self.rows)
        self.builder = builder(spec, ["layers.0"], None, torch.device("cpu"))
        self.layer = SimpleNamespace(
            layer_name="layers.0",
            attn_backend=SimpleNamespace(),
            isa=_get_attn_isa(dtype, BLOCK, SIZE, "auto"),
            _k_scale_float=1.0,
            _v_scale_float=1.0,
        )
        self.cache = torch.zeros(blocks, KV_HEADS, BLOCK, 2 * SIZE, dtype=dtype)
        self.dtype = dtype

    @property
    def counts(self) -> tuple[float, float]:
        """Rows with far tokens, and those that reused their attention."""
        counters = self.policy.counters()
        return counters["far_rows"], counters["reused_rows"]

    def build(self, common: CommonAttentionMetadata, *of: Any) -> Any:
        """Build metadata; on a stand-in for an accelerator, if there is one, without a wait."""
        if self.accelerator is None:
            return self._build(common, *of)
        self.accelerator.put(common.query_start_loc, common.seq_lens)
        self.accelerator.put(common.block_table_tensor, common.slot_mapping)
        with self.accelerator.no_sync():
            return self._build(common, *of)

    def _build(
        self, common: CommonAttentionMetadata, work: list[Request], directives: StepDirectives
    ) -> Any:
        """Build metadata after the step has begun, or on the second model runner before."""
        if self.second_runner:
            metadata = self.builder.build(0, common)
            self.rows.begin(None, {str(r.slot): r.slot for r in work if r.slot >= 0})
            self.kind.begin(directives)
            self.rows.name([str(r.slot) for r in work])
            self.kind.load(directives)
            return metadata
        common.req_idx = None
        named = [(r.blocks[(r.done - 1) // BLOCK], r.slot) for r in work if r.slot >= 0]
        self.rows.begin(np.array(named, dtype=np.int32).reshape(-1, 2))
        self.kind.begin(directives)
        return self.builder.build(0, common)

    def step(self, work: list[tuple[Request, int]], serve: bool = True) -> tuple[Tensor, Tensor]:
        """Run ``n`` tokens of each request; returns the output and the stock backend's."""
        table = torch.zeros(len(work), max(len(r.blocks) for r, _ in work), dtype=torch.int32)
        query, slots = [], []
        for row, (request, n) in enumerate(work):
            table[row, : len(request.blocks)] = torch.tensor(request.blocks)
            for position in range(request.done, request.done + n):
                own = torch.randn(HEADS, SIZE, generator=request.rng)
                query.append(own if request.query is None else request.query)
                slots.append(request.blocks[position // BLOCK] * BLOCK + position % BLOCK)
            request.done += n
        widths = torch.tensor([n for _, n in work])
        starts = torch.zeros(len(work) + 1, dtype=torch.int32)
        starts[1:] = torch.cumsum(widths, 0)
        lens = torch.tensor([r.done for r, _ in work], dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts.clone(),
            seq_lens=lens,
            num_reqs=len(work),
            num_actual_tokens=len(slots),
            max_query_len=int(widths.max()),
            max_seq_len=int(lens.max()),
            block_table_tensor=table,
            slot_mapping=torch.tensor(slots),
            is_prefilling=widths > 1,
            seq_lens_cpu_upper_bound=lens.clone(),
            req_idx=np.arange(len(work)) + 3,
        )
        served = [(r.slot, r.owner) for r, _ in work if serve and r.slot >= 0]
        own = AttentionDirectives(np.array(served, dtype=np.int32)) if served else None
        metadata = self.build(common, [r for r, _ in work], StepDirectives(attention=own))
        q = torch.stack(query).to(self.dtype)
        rng = torch.Generator().manual_seed(sum(slots))
        k, v = (torch.randn(len(slots), KV_HEADS, SIZE, generator=rng).to(self.dtype) for _ in "kv")
        self.impl.do_kv_cache_update(self.layer, k, v, self.cache, common.slot_mapping)
        self.impl.keep(k, v, common.slot_mapping)
        self.impl.asked.clear()
        out = torch.full_like(q, float("nan"))
        returned = self.impl.forward(self.layer, q, k, v, self.cache, metadata, out)
        assert returned is out
        self.kind.end(StepDirectives())
        plain = StockBuilder(None, [], None, None).build(0, common)
        asked = list(self.impl.asked)
        want = Stock.forward(self.impl, self.layer, q, k, v, self.cache, plain, torch.empty_like(q))
        self.impl.asked = asked
        return out, want


@pytest.fixture(autouse=True, params=[False, True], ids=["first runner", "second runner"])
def _runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layer, "second_runner", request.param)


def close(found: tuple[Tensor, Tensor], dtype: torch.dtype = torch.float32) -> bool:
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    return torch.allclose(*found, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_rows_are_attended_from_the_pages(dtype: torch.dtype) -> None:
    layer = Layer(cosine=1.0, dtype=dtype)
    requests = [Request(i, list(range(8 * i, 8 * i + 8)), i) for i in range(3)]
    assert close(layer.step([(r, 100 + 7 * i) for i, r in enumerate(requests)]), dtype)
    assert layer.impl.asked == [3]
    for _ in range(6):
        assert close(layer.step([(r, 1) for r in requests]), dtype)
        assert layer.impl.asked == []
    assert layer.counts == (18, 0)


def test_other_rows_go_to_the_backend_unchanged() -> None:
    """Chunks, requests that did not ask, and texts with nothing far: bit for bit."""
    layer = Layer(cosine=1.0)
    memo, chunk, exact = (Request(i, list(range(8 * i, 8 * i + 8)), i) for i in range(3))
    short = Request(3, list(range(24, 32)), 3)
    exact.slot = -1
    layer.step([(memo, 90), (exact, 80), (chunk, 64), (short, 5)])
    out, want = layer.step([(chunk, 40), (memo, 1), (exact, 1), (short, 1)])
    assert layer.impl.asked == [3]
    assert torch.equal(out[:40], want[:40]) and torch.equal(out[41:], want[41:])
    assert close((out[40:41], want[40:41])) and layer.counts == (1, 0)


def test_the_second_runners_rows_are_found_without_a_wait() -> None:
    layer = Layer(cosine=1.0)
    layer.second_runner, layer.accelerator = True, Accelerator()
    memo, chunk, exact = (Request(i, list(range(8 * i, 8 * i + 8)), i) for i in range(3))
    exact.slot = -1
    layer.step([(memo, 90), (exact, 80), (chunk, 64)])
    out, want = layer.step([(chunk, 40), (memo, 1), (exact, 1)])
    assert layer.impl.asked == [2]
    assert close((out, want)) and layer.counts == (1, 0)


def test_alike_queries_reuse_their_far_attention() -> None:
    layer = Layer(cosine=0.99, every=8)
    requests = [Request(i, list(range(8 * i, 8 * i + 8)), i, "alike") for i in range(2)]
    layer.step([(r, 100) for r in requests])
    for _ in range(16):
        assert close(layer.step([(r, 1) for r in requests])), "the query is the same"
    assert layer.counts == (32, 28)


def test_nothing_is_served_unless_the_request_allows_it() -> None:
    layer = Layer(cosine=0.5)
    request = Request(0, list(range(8)), 0, "alike")
    layer.step([(request, 100)], serve=False)
    for _ in range(4):
        out, want = layer.step([(request, 1)], serve=False)
        assert torch.equal(out, want) and layer.impl.asked == [1]
    assert layer.counts == (0, 0)


@pytest.mark.parametrize("same_blocks", [True, False])
def test_a_slot_of_another_request_does_not_leak(same_blocks: bool) -> None:
    """It takes the slot, the queries, and the very blocks of one that ended."""
    layer = Layer(cosine=0.5, every=100)
    one = Request(0, list(range(8)), 5, "alike")
    layer.step([(one, 100)])
    layer.step([(one, 1)])
    other = Request(0, one.blocks if same_blocks else list(range(8, 16)), 6, "alike")
    other.query = one.query
    layer.step([(other, 102)])
    found = layer.step([(other, 1)])
    assert close(found) and layer.counts == (2, 0)
    layer.step([(other, 1)])
    assert layer.counts == (3, 1)


def test_a_request_that_starts_over_does_not_use_what_it_had() -> None:
    layer = Layer(cosine=0.5, every=100)
    request = Request(0, list(range(8)), 5, "alike")
    layer.step([(request, 100)])
    layer.step([(request, 1)])
    request.done, request.blocks, request.owner = 0, list(range(8, 16)), next(OWNERS)
    layer.step([(request, 101)])
    assert close(layer.step([(request, 1)])) and layer.counts == (2, 0)


@pytest.mark.parametrize("seed", range(4))
def test_any_schedule_is_full_attention_when_nothing_is_reused(seed: int) -> None:
    choose = random.Random(seed)
    layer = Layer(cosine=0.01, every=1)
    free = [list(range(6 * i, 6 * i + 6)) for i in range(8)]
    running: list[Request] = []
    for _ in range(60):
        if len(running) < 5 and choose.random() < 0.4:
            slot = min(set(range(9)) - {r.slot for r in running})
            running.append(Request(slot, free.pop(choose.randrange(len(free))), slot))
        for request in [r for r in running if r.done > 150 or choose.random() < 0.03]:
            running.remove(request)
            free.append(request.blocks)
        work = [
            (r, 1 if r.done and choose.random() < 0.8 else choose.randrange(1, 40))
            for r in running
            if choose.random() < 0.9
        ]
        if work:
            assert close(layer.step(work))
    asked, reused = layer.counts
    assert reused == 0 and asked > 0


def test_a_failure_falls_back_and_retires_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(cosine=0.5)
    request = Request(0, list(range(8)), 5, "alike")
    layer.step([(request, 100)])

    def broken(*args: Any) -> Tensor:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(layer.policy, "attend", broken)
    for _ in range(2):
        out, want = layer.step([(request, 1)])
        assert torch.equal(out, want) and layer.impl.asked == [1]
    assert layer.kind.failed == "attend: RuntimeError: no memory left"


@pytest.mark.parametrize(
    "change",
    [{"sliding_window": 64}, {"alibi_slopes": torch.ones(4)}, {"sinks": torch.ones(4)}],
    ids=["window", "alibi", "sinks"],
)
def test_layers_that_attend_otherwise_are_left_alone(change: dict[str, Any]) -> None:
    layer = Layer(cosine=0.5)
    request = Request(0, list(range(8)), 5)
    layer.step([(request, 100)])
    vars(layer.impl).update(change)
    layer.step([(request, 1)])
    assert layer.impl.asked == [1] and layer.counts == (0, 0)


def test_pages_in_a_format_are_read_through_it() -> None:
    layer = Layer(cosine=0.5)
    impl = layer.impl

    def gather(which: int, blocks: Tensor) -> Tensor:
        found: Tensor = impl.plain[which][blocks]
        return found.permute(0, 3, 1, 2, 4).flatten(2, 3)

    impl.kvplug_pages = lambda layer, cache: SimpleNamespace(gather=gather)
    request = Request(0, list(range(8)), 5, "alike")
    layer.step([(request, 100)])
    layer.cache.fill_(float("nan"))
    for _ in range(3):
        assert close(layer.step([(request, 1)]))
    assert layer.counts == (3, 2)


def test_an_output_of_another_shape_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(cosine=0.5)
    request = Request(0, list(range(8)), 5)
    layer.step([(request, 100)])
    monkeypatch.setattr(layer.policy, "attend", lambda view, rows: torch.zeros(1, 1))
    out, want = layer.step([(request, 1)])
    assert torch.equal(out, want) and "attend returned shape (1, 1)" in (layer.kind.failed or "")


BAD_OUTPUTS: dict[str, Any] = {
    "nan": lambda q: torch.full_like(q, float("nan")),
    "too large": lambda q: torch.full(q.shape, 1e300, dtype=torch.float64),
    "complex": lambda q: torch.ones(q.shape, dtype=torch.complex64),
    "elsewhere": lambda q: torch.ones(q.shape, device="meta"),
    "sparse": lambda q: torch.ones(q.shape).to_sparse(),
    "numpy": lambda q: q.numpy(),
    "a subclass": lambda q: torch.nn.Parameter(torch.ones(q.shape)),
    "an exit": lambda q: sys.exit(1),
}


@pytest.mark.parametrize("what", BAD_OUTPUTS)
def test_an_output_that_is_none_is_a_failure(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(cosine=0.5)
    request = Request(0, list(range(8)), 5)
    layer.step([(request, 100)])

    def attend(view: Any, rows: Any) -> Any:
        made = BAD_OUTPUTS[what](rows.query.clone())
        rows.query.zero_()
        return made

    monkeypatch.setattr(layer.policy, "attend", attend)
    for _ in range(2):
        out, want = layer.step([(request, 1)])
        assert torch.equal(out, want) and layer.kind.failed is not None


def test_rows_that_the_policy_leaves_go_to_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(cosine=0.5)
    request = Request(0, list(range(8)), 5)
    layer.step([(request, 100)])
    monkeypatch.setattr(layer.policy, "attend", lambda view, rows: None)
    out, want = layer.step([(request, 1)])
    assert torch.equal(out, want) and layer.kind.failed is None and layer.impl.asked == [1]
