"""Attention memory between vLLM's metadata and its pages: the rows it takes, and what they get."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, _get_attn_isa

from kvplug.hosts.vllm.worker.state import drop_worker_state, worker_state
from kvplug.reuse.settings import Memo
from kvplug_attention_memo.vllm_attic import LANES, LaneOwners, LayerMemo, memo_builder, memo_impl

BLOCK, HEADS, KV_HEADS, SIZE = 32, 4, 2, 64
NEAR = 32


def config() -> Any:
    return SimpleNamespace(kv_transfer_config=SimpleNamespace(engine_id="a memo engine"))


@pytest.fixture(autouse=True)
def _forget_engine() -> Any:
    yield
    drop_worker_state(config())


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
    def __init__(self, lane: int, blocks: list[int], seed: int, queries: str = "random"):
        self.lane, self.blocks = lane, blocks
        self.rng = torch.Generator().manual_seed(seed)
        self.done = 0
        self.query = torch.randn(HEADS, SIZE, generator=self.rng) if queries == "alike" else None


class Layer:
    """One layer in which requests run, beside the same without a memory."""

    def __init__(self, memo: Memo, *, builder: bool = True, dtype: torch.dtype = torch.float32):
        blocks = 60
        self.state = worker_state(config())
        self.impl = type("Impl", (memo_impl(memo, self.state), Stock), {})(blocks, dtype)
        spec = SimpleNamespace(block_size=BLOCK)
        made = (memo_builder(memo), StockBuilder) if builder else (StockBuilder,)
        self.builder = type("Builder", made, {})(spec, ["a layer"], config(), torch.device("cpu"))
        self.layer = SimpleNamespace(
            layer_name="a layer",
            attn_backend=SimpleNamespace(),
            isa=_get_attn_isa(dtype, BLOCK, SIZE, "auto"),
            _k_scale_float=1.0,
            _v_scale_float=1.0,
        )
        self.cache = torch.zeros(blocks, KV_HEADS, BLOCK, 2 * SIZE, dtype=dtype)
        self.dtype = dtype

    def step(self, work: list[tuple[Request, int]], memo: bool = True) -> tuple[Tensor, Tensor]:
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
            req_idx=np.arange(len(work)),
        )
        self.state.memo_lanes = {
            r.blocks[(r.done - 1) // BLOCK]: r.lane for r, _ in work if memo and r.lane >= 0
        }
        q = torch.stack(query).to(self.dtype)
        rng = torch.Generator().manual_seed(sum(slots))
        k, v = (torch.randn(len(slots), KV_HEADS, SIZE, generator=rng).to(self.dtype) for _ in "kv")
        metadata = self.builder.build(0, common)
        self.impl.do_kv_cache_update(self.layer, k, v, self.cache, common.slot_mapping)
        self.impl.keep(k, v, common.slot_mapping)
        self.impl.asked.clear()
        out = torch.full_like(q, float("nan"))
        returned = self.impl.forward(self.layer, q, k, v, self.cache, metadata, out)
        assert returned is out
        plain = StockBuilder(None, [], None, None).build(0, common)
        asked = list(self.impl.asked)
        want = Stock.forward(self.impl, self.layer, q, k, v, self.cache, plain, torch.empty_like(q))
        self.impl.asked = asked
        return out, want


def close(found: tuple[Tensor, Tensor], dtype: torch.dtype = torch.float32) -> bool:
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    return torch.allclose(*found, rtol=bound, atol=bound)


@pytest.mark.parametrize("builder", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_rows_are_attended_from_the_pages(dtype: torch.dtype, builder: bool) -> None:
    layer = Layer(Memo(cosine=1.0, near=NEAR), builder=builder, dtype=dtype)
    requests = [Request(i, list(range(8 * i, 8 * i + 8)), i) for i in range(3)]
    assert close(layer.step([(r, 100 + 7 * i) for i, r in enumerate(requests)]), dtype)
    assert layer.impl.asked == [3]
    for _ in range(6):
        assert close(layer.step([(r, 1) for r in requests]), dtype)
        assert layer.impl.asked == []
    assert layer.state.memo_rows == (18, 0)


def test_other_rows_go_to_the_backend_unchanged() -> None:
    """Chunks, requests that did not ask, and texts with nothing far: bit for bit."""
    layer = Layer(Memo(cosine=1.0, near=NEAR))
    memo, chunk, exact = (Request(i, list(range(8 * i, 8 * i + 8)), i) for i in range(3))
    short = Request(3, list(range(24, 32)), 3)
    exact.lane = -1
    layer.step([(memo, 90), (exact, 80), (chunk, 64), (short, 5)])
    out, want = layer.step([(chunk, 40), (memo, 1), (exact, 1), (short, 1)])
    assert layer.impl.asked == [3]
    assert torch.equal(out[:40], want[:40]) and torch.equal(out[41:], want[41:])
    assert close((out[40:41], want[40:41])) and layer.state.memo_rows == (1, 0)


def test_without_the_builder_a_mixed_step_is_the_backends() -> None:
    layer = Layer(Memo(cosine=0.5, near=NEAR), builder=False)
    memo, chunk = (Request(i, list(range(8 * i, 8 * i + 8)), i, "alike") for i in range(2))
    layer.step([(memo, 90)])
    layer.step([(memo, 1)])
    out, want = layer.step([(memo, 1), (chunk, 70)])
    assert torch.equal(out, want) and layer.impl.asked == [2]
    # What was remembered before is still of this request.
    layer.step([(memo, 1)])
    assert layer.state.memo_rows == (2, 1)


def test_alike_queries_reuse_their_far_attention() -> None:
    layer = Layer(Memo(cosine=0.99, near=NEAR, every=8))
    requests = [Request(i, list(range(8 * i, 8 * i + 8)), i, "alike") for i in range(2)]
    layer.step([(r, 100) for r in requests])
    for _ in range(16):
        assert close(layer.step([(r, 1) for r in requests])), "the query is the same"
    assert layer.state.memo_rows == (32, 28)


def test_nothing_is_memoized_unless_the_request_allows_it() -> None:
    layer = Layer(Memo(cosine=0.5, near=NEAR))
    request = Request(0, list(range(8)), 0, "alike")
    layer.step([(request, 100)], memo=False)
    for _ in range(4):
        out, want = layer.step([(request, 1)], memo=False)
        assert torch.equal(out, want) and layer.impl.asked == [1]
    assert layer.state.memo_rows == (0, 0)


@pytest.mark.parametrize("same_blocks", [True, False])
def test_a_lane_of_another_request_does_not_leak(same_blocks: bool) -> None:
    """It takes the lane, the queries, and the very blocks of one that ended."""
    layer = Layer(Memo(cosine=0.5, near=NEAR, every=100))
    one = Request(0, list(range(8)), 5, "alike")
    layer.step([(one, 100)])
    layer.step([(one, 1)])
    other = Request(0, one.blocks if same_blocks else list(range(8, 16)), 6, "alike")
    other.query = one.query
    layer.step([(other, 102)])
    found = layer.step([(other, 1)])
    assert close(found) and layer.state.memo_rows == (2, 0)
    layer.step([(other, 1)])
    assert layer.state.memo_rows == (3, 1)


def test_a_request_that_starts_over_does_not_use_what_it_had() -> None:
    layer = Layer(Memo(cosine=0.5, near=NEAR, every=100))
    request = Request(0, list(range(8)), 5, "alike")
    layer.step([(request, 100)])
    layer.step([(request, 1)])
    request.done, request.blocks = 0, list(range(8, 16))
    layer.step([(request, 101)])
    assert close(layer.step([(request, 1)])) and layer.state.memo_rows == (2, 0)


@pytest.mark.parametrize("builder", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_any_schedule_is_full_attention_when_nothing_is_reused(seed: int, builder: bool) -> None:
    choose = random.Random(seed)
    layer = Layer(Memo(cosine=0.01, near=NEAR, every=1), builder=builder)
    free = [list(range(6 * i, 6 * i + 6)) for i in range(8)]
    running: list[Request] = []
    for _ in range(60):
        if len(running) < 5 and choose.random() < 0.4:
            lane = min(set(range(9)) - {r.lane for r in running})
            running.append(Request(lane, free.pop(choose.randrange(len(free))), lane))
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
    asked, reused = layer.state.memo_rows
    assert reused == 0 and (asked > 0 or not builder)


def test_a_failure_falls_back_and_retires_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(Memo(cosine=0.5, near=NEAR))
    request = Request(0, list(range(8)), 5, "alike")
    layer.step([(request, 100)])

    def broken(*args: Any) -> Tensor:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(LayerMemo, "attend", broken)
    for _ in range(2):
        out, want = layer.step([(request, 1)])
        assert torch.equal(out, want) and layer.impl.asked == [1]
    assert "no memory left" in layer.impl.kvplug_memo_broken


@pytest.mark.parametrize(
    "change",
    [{"sliding_window": 64}, {"alibi_slopes": torch.ones(4)}, {"sinks": torch.ones(4)}],
    ids=["window", "alibi", "sinks"],
)
def test_layers_that_attend_otherwise_are_left_alone(change: dict[str, Any]) -> None:
    layer = Layer(Memo(cosine=0.5, near=NEAR))
    request = Request(0, list(range(8)), 5)
    layer.step([(request, 100)])
    vars(layer.impl).update(change)
    layer.step([(request, 1)])
    assert layer.impl.asked == [1] and layer.state.memo_rows == (0, 0)


def test_owners_are_bounded_and_change_with_the_request() -> None:
    owners = LaneOwners(4)
    first = owners.owner(0, 9, [1, 2, 3])
    assert owners.owner(0, 10, [1, 2, 3]) == first
    assert owners.owner(0, 13, [1, 2, 3, 4]) == first
    assert owners.owner(0, 14, [1, 9, 3, 4]) != first
    again = owners.owner(0, 14, [1, 9, 3, 4])
    assert again != first and owners.owner(0, 15, [1, 9, 3, 4]) == again
    owners.forget(0)
    assert owners.owner(0, 16, [1, 9, 3, 4]) != again
    for lane in range(10 * LANES):
        owners.owner(lane, 5, [1, 2])
    assert len(owners._seen) <= 4 * LANES


@pytest.mark.parametrize("recent", [0, 32])
def test_pages_in_a_format_are_read_through_it_unless_it_keeps_recent_tokens(recent: int) -> None:
    layer = Layer(Memo(cosine=0.5, near=NEAR))
    layer.layer.attn_backend.kvplug_layout = object()
    impl = layer.impl

    def gather(which: int, blocks: Tensor) -> Tensor:
        found: Tensor = impl.plain[which][blocks]
        return found.permute(0, 3, 1, 2, 4).flatten(2, 3)

    impl.kvplug_layer = lambda layer: SimpleNamespace(recent_size=recent)
    impl.kvplug_pages = lambda layer, cache, dtype: SimpleNamespace(gather=gather)
    request = Request(0, list(range(8)), 5, "alike")
    layer.step([(request, 100)])
    layer.cache.fill_(float("nan"))
    for _ in range(3):
        assert close(layer.step([(request, 1)]))
    assert layer.state.memo_rows == ((0, 0) if recent else (3, 2))
