"""Evictions between the steps of the second model runner, on hand-made steps and small caches.

The first runner's phases are the reference: for the same texts both must leave the same tokens in
the same slots of every layer and show attention the same rows, whatever the order of the pages.
The second runs on a stand-in for an accelerator that fails where the host would wait.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from no_sync import DEVICE, Accelerator
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import (
    KVCacheTensor,
    compute_layout_strides,
    create_kv_cache_views,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from kvplug.contract import EngineView, LayerView, ResidentView, ScoringPolicy
from kvplug.hosts.pruning import FLUSH, EvictionPlan, Limits, layout
from kvplug.hosts.vllm.messages import RowPlan, SequenceDirectives, StepDirectives, StepReport
from kvplug.hosts.vllm.spec import PrunedSpec
from kvplug.hosts.vllm.worker import after_step, residents
from kvplug.hosts.vllm.worker.after_step import rehearsed
from kvplug.hosts.vllm.worker.composition import plugged_builder, plugged_impl
from kvplug.hosts.vllm.worker.page_tails import with_tail
from kvplug.hosts.vllm.worker.rows import StepRows
from kvplug.hosts.vllm.worker.sequence import ScoringWorker, SecondRunner
from kvplug_policies.sequence.ada_kv import AdaKV
from kvplug_policies.sequence.h2o import H2O
from kvplug_policies.sequence.keydiff import KeyDiff
from kvplug_policies.sequence.snapkv import SnapKV

BLOCK, HEADS, KV_HEADS, SIZE, LAYERS, SLOTS = 16, 4, 2, 8, 3, 4
POOL, WIDTH = 64, 16
CPU = torch.device("cpu")
NAMES = [f"model.layers.{i}.self_attn.attn" for i in range(LAYERS)]
LIMITS = Limits(BLOCK, budget=48, share=1.0, always=12, interval=1, protected=1, prefill_limit=9)
ORDERS = {"LBHNC": (0, 1, 2, 3, 4), "LBNHC": (0, 1, 3, 2, 4), "BLHNC": (1, 0, 2, 3, 4)}
APART = "apart"
"""Each layer in an allocation of its own."""
TAILS = " with tails"
"""Pages as an engine has them; see `page_tails`."""
OPTIONS: dict[str, Any] = {"budget": 48, "sink": 4, "recent": 8, "interval": 16}


class ByLayer(KeyDiff):
    """Says that its scores depend on which layer it is."""

    layerwise = True


POLICIES: dict[str, tuple[type[ScoringPolicy], dict[str, Any]]] = {
    "keydiff": (KeyDiff, {}),
    "snapkv": (SnapKV, {"window": 8}),
    "h2o": (H2O, {"recent_part": 0.125}),
    "ada_kv": (AdaKV, {}),
}


def policy_of(name: str) -> ScoringPolicy:
    cls, more = (ByLayer, {}) if name == "by_layer" else POLICIES[name]
    layers = tuple(LayerView(i, LAYERS, KV_HEADS, HEADS, SIZE, "float32") for i in range(LAYERS))
    engine = EngineView(
        block_size=BLOCK,
        num_blocks=POOL,
        max_model_len=WIDTH * BLOCK,
        max_in_flight_tokens=64,
        layers=layers,
    )
    return cls(cls.Options(**OPTIONS, **more), engine)


def pruned_spec(tails: bool = False) -> PrunedSpec:
    plain = PrunedSpec(
        block_size=BLOCK, num_kv_heads=KV_HEADS, head_size=SIZE, dtype=torch.float32,
        limits=LIMITS, exact_tokens=BLOCK, in_flight_tokens=64, max_tokens=WIDTH * BLOCK,
    )  # fmt: skip
    return with_tail(plain, 2) if tails else plain


class StockBuilder:
    """Gives back the common metadata, with room for more."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def build(self, common_prefix_len: int, common: Any, fast_build: bool = False) -> Any:
        return SimpleNamespace(common=common, fast=fast_build)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        return AttentionCGSupport.ALWAYS


class StockImpl:
    """Stores a token's key and value in its slot, and attends nothing."""

    scale = SIZE**-0.5
    logits_soft_cap = 0.0

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor
    ) -> None:
        cache[slots // BLOCK, :, slots % BLOCK] = torch.cat([key, value], -1)

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, cache: Tensor,
        metadata: Any, output: Tensor,
    ) -> Tensor:  # fmt: skip
        return output


@dataclass
class Text:
    """A request's tokens: what each layer computes of them, and where they lie."""

    slot: int
    prompt: int
    table: list[int]
    seed: int
    done: int = 0
    plan: EvictionPlan = field(init=False)

    def __post_init__(self) -> None:
        self.plan = EvictionPlan(LIMITS, self.prompt)
        rng = torch.Generator().manual_seed(self.seed)
        shape = (LAYERS, WIDTH * BLOCK)
        self.query = torch.randn(*shape, HEADS, SIZE, generator=rng)
        self.key = torch.randn(*shape, KV_HEADS, SIZE, generator=rng)
        self.value = torch.randn(*shape, KV_HEADS, SIZE, generator=rng)


def caches_of(order: str) -> list[Tensor]:
    shape = (LAYERS, POOL, KV_HEADS, BLOCK, 2 * SIZE)
    if order == APART:
        return [torch.zeros(shape[1:]) for _ in range(LAYERS)]
    if order.endswith(TAILS):
        spec, found = pruned_spec(True), KVCacheLayout[order.removesuffix(TAILS)]
        layer, block, *_ = compute_layout_strides(spec, POOL, LAYERS, found)
        size = LAYERS * POOL * spec.page_size_bytes
        tensor = KVCacheTensor(
            size=size, layers=NAMES, layer_stride=layer, block_stride=block, offset=0
        )
        raw = torch.zeros(size, dtype=torch.int8)
        return create_kv_cache_views(raw, spec, POOL, found, tensor)
    physical = torch.zeros([shape[i] for i in ORDERS[order]])
    logical = physical.permute([ORDERS[order].index(i) for i in range(5)])
    return list(logical)


class Runner:
    """Either runner's worker with its layers.

    Args:
        policy: Name of the policy.
        order: Order of the pages.
        accelerator: Where the second runner's tensors lie; None for the first runner.
    """

    def __init__(self, policy: str, order: str, accelerator: Accelerator | None):
        self.second = accelerator is not None
        self.accelerator = accelerator
        self.rows = StepRows()
        self.caches = caches_of(order)
        device = DEVICE if accelerator is not None else CPU
        if accelerator is not None:
            accelerator.put(*self.caches)
        self.config: Any = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=SLOTS, max_num_batched_tokens=256),
            compilation_config=SimpleNamespace(
                static_forward_context={}, max_cudagraph_capture_size=8
            ),
            device_config=SimpleNamespace(device=device),
        )
        self.kind = ScoringWorker(
            policy_of(policy),
            ("x.yaml", "kvplug.sequence"),
            SecondRunner(self.config, self.rows) if self.second else None,
        )
        context = self.config.compilation_config.static_forward_context
        impl_class = plugged_impl(StockImpl, (self.kind,), lambda *args: StockImpl)
        spec = pruned_spec(order.endswith(TAILS))
        for name, cache in zip(NAMES, self.caches, strict=True):
            impl = object.__new__(impl_class)
            context[name] = SimpleNamespace(
                layer_name=name, impl=impl, kv_cache=cache, num_heads=HEADS, head_size=SIZE,
                sliding_window=None, get_kv_cache_spec=lambda config: None,
                attn_backend=SimpleNamespace(customize_spec=lambda own: spec),
            )  # fmt: skip
        for name, layer in context.items():
            self.kind.loaded(name, layer, torch.float32, self.config)
        builder = plugged_builder(StockBuilder, (self.kind,), self.rows)
        # vLLM makes one for each number of query heads.
        self.builder = builder(spec, NAMES[:1], self.config, device)
        self.others = builder(spec, NAMES[1:], self.config, device)
        self.kind.register(dict(zip(NAMES, self.caches, strict=True)))
        self.layers = list(context.values())

    def step(self, common: Any, texts: list[Text], counts: list[int]) -> Any:
        """Run one step; returns what attention was shown: ``(tables, lengths)`` of each phase."""
        plans, phased = {}, False
        for text, count in zip(texts, counts, strict=True):
            end = text.done + count
            state, evictions = text.plan.between(text.done, end)
            plans[0, text.slot] = RowPlan(text.prompt, state, tuple(evictions))
            phased |= any(e.at != end for e in evictions)
            phased |= self.kind.policy.wants_cumulative_attention and count > 1
        ends = {t.slot: t.done + n for t, n in zip(texts, counts, strict=True)}
        if self.second and not phased:
            plans = {
                (g, s): p for (g, s), p in plans.items() if p.evictions or ends[s] % FLUSH == 0
            }
        directives = StepDirectives(sequence=SequenceDirectives(phased=phased and self.second))
        assert directives.sequence is not None
        directives.sequence.set_plans(plans)
        if not self.second:
            last = [(int(common.seq_lens[i]) - 1) // BLOCK for i in range(len(texts))]
            blocks = [t.table[b] for t, b in zip(texts, last, strict=True)]
            pairs = [(b, t.slot) for b, t in zip(blocks, texts, strict=True)]
            self.rows.begin(np.array(pairs, dtype=np.int32))
            self.kind.begin(directives)
            made = [self.builder.build(0, common)]
        else:
            made = [one.build(0, common) for one in (self.builder, self.others)]
            names = {f"r{s}": s for _, s in plans}
            self.rows.begin(None, names)
            self.kind.begin(directives)
            if phased:
                self.name(directives, texts)
        self.forward(common, made, texts, counts)
        if self.second and not phased:
            self.name(directives, texts)
        self.kind.end(directives)
        phases = getattr(made[0], "kvplug_phases", None)
        shown = [p.metadata.common for p in phases] if phases else [made[0].common]
        return [(c.block_table_tensor, c.seq_lens) for c in shown]

    def name(self, directives: StepDirectives, texts: list[Text]) -> None:
        self.rows.name([f"r{text.slot}" for text in texts])
        self.kind.load(directives)

    def forward(self, common: Any, made: list[Any], texts: list[Text], counts: list[int]) -> None:
        for i, layer in enumerate(self.layers):
            metadata = made[min(i, len(made) - 1)]
            parts = [(t, slice(t.done, t.done + n)) for t, n in zip(texts, counts, strict=True)]
            query, key, value = (
                torch.cat([getattr(t, what)[i, part] for t, part in parts])
                for what in ("query", "key", "value")
            )
            if self.accelerator is not None:
                self.accelerator.put(query, key, value)
            StockImpl().do_kv_cache_update(layer, key, value, layer.kv_cache, common.slot_mapping)
            output = torch.zeros_like(query)
            layer.impl.forward(layer, query, key, value, layer.kv_cache, metadata, output)


def common_of(texts: list[Text], counts: list[int], runner_slots: list[int]) -> Any:
    ends = [t.done + n for t, n in zip(texts, counts, strict=True)]
    starts = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    lens = torch.tensor(ends, dtype=torch.int32)
    slots = [
        t.table[p // BLOCK] * BLOCK + p % BLOCK
        for t, n in zip(texts, counts, strict=True)
        for p in range(t.done, t.done + n)
    ]
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=lens,
        seq_lens_cpu_upper_bound=lens.clone(),
        num_reqs=len(texts),
        num_actual_tokens=sum(counts),
        max_query_len=max(counts),
        max_seq_len=max(ends),
        block_table_tensor=torch.tensor([t.table for t in texts], dtype=torch.int32),
        slot_mapping=torch.tensor(slots),
        causal=True,
        req_idx=np.array(runner_slots),
    )


def some_texts(choose: random.Random) -> list[Text]:
    ids = choose.sample(range(1, POOL), 3 * WIDTH)
    prompts = [choose.randrange(1, 200) for _ in range(3)]
    return [
        Text(slot, prompt, ids[slot * WIDTH : (slot + 1) * WIDTH], choose.randrange(1000))
        for slot, prompt in enumerate(prompts)
    ]


# Every policy and every order of pages; the rest of the product is slow.
QUICK = {
    *itertools.product(POLICIES, ["LBNHC"]),
    *itertools.product(["keydiff"], ORDERS),
    ("snapkv", APART),
    ("h2o", f"BLHNC{TAILS}"),
}
CASES = [
    *itertools.product(POLICIES, ORDERS),
    ("snapkv", APART),
    ("h2o", APART),
    ("snapkv", f"LBNHC{TAILS}"),
    ("h2o", f"BLHNC{TAILS}"),
]


@pytest.mark.parametrize(
    ("policy", "order"),
    [c if c in QUICK else pytest.param(*c, marks=pytest.mark.slow) for c in CASES],
)
def test_the_same_tokens_stay_as_in_phases(policy: str, order: str) -> None:
    choose = random.Random(f"{policy} {order}")
    accelerator = Accelerator()
    # One of the two has tails behind its pages, or neither.
    other = f"LBHNC{TAILS}" if order == APART else "LBHNC"
    reference, texts = Runner(policy, other, None), some_texts(choose)
    with accelerator.faked():
        runner = Runner(policy, order, accelerator)
    slots = choose.sample(range(SLOTS), 3)
    addresses = set()
    while any(t.done < WIDTH * BLOCK for t in texts):
        running = [t for t in texts if t.done < WIDTH * BLOCK]
        prefill = choose.random() < 0.1
        counts = [
            choose.randrange(1, min(60, WIDTH * BLOCK - t.done) + 1)
            if prefill or t.done < t.prompt
            else 1
            for t in running
        ]
        own = [slots[t.slot] for t in running]
        seen = reference.step(common_of(running, counts, own), running, counts)
        common = common_of(running, counts, own)
        for name in ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping"):
            accelerator.put(getattr(common, name))
        with accelerator.no_sync():
            shown = runner.step(common, running, counts)
        if len(shown) == 1 and max(counts) == 1:
            addresses.add(shown[0][0].data_ptr())
        assert len(shown) == len(seen)
        for (table, lens), (expected, expected_lens) in zip(shown, seen, strict=True):
            assert torch.equal(lens, expected_lens)
            assert torch.equal(table[:, : expected.shape[1]], expected)
        for t, n in zip(running, counts, strict=True):
            t.done += n
        for cache, like in zip(runner.caches, reference.caches, strict=True):
            assert torch.equal(cache[1:], like[1:])
    assert len(addresses) == 1, "what a graph has captured is where later steps write"
    totals = []
    for one in (reference, runner):
        report = StepReport()
        one.kind.report(report)
        assert report.sequence is not None
        totals.append((report.sequence.evictions, report.sequence.fallbacks))
    assert totals[0] == totals[1]
    assert totals[0][0] > 10


def test_a_slot_that_changed_hands_shows_its_new_request_whole() -> None:
    accelerator = Accelerator()
    with accelerator.faked():
        runner = Runner("keydiff", "LBNHC", accelerator)
    choose = random.Random(1)
    first, second, _ = some_texts(choose)
    first.prompt, second.prompt = 150, 5
    first.__post_init__()
    second.__post_init__()

    def step(text: Text, count: int) -> Any:
        common = common_of([text], [count], [2])
        for name in ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping"):
            accelerator.put(getattr(common, name))
        with accelerator.no_sync():
            *_, shown = runner.step(common, [text], [count])
        text.done += count
        return shown

    step(first, 150)
    assert step(first, 1)[1].tolist() != [151], "an eviction is in force"
    assert step(second, 5)[1].tolist() == [5]
    table, lens = step(second, 1)
    assert lens.tolist() == [6]
    assert table[0, 0] == second.table[0]


def test_a_request_that_keeps_everything_sees_nothing_of_whose_slot_it_has() -> None:
    accelerator = Accelerator()
    with accelerator.faked():
        runner = Runner("keydiff", "LBNHC", accelerator)
    first, second, _ = some_texts(random.Random(1))
    first.prompt = 150
    first.__post_init__()
    second.plan = EvictionPlan(dataclasses.replace(LIMITS, budget=1 << 20), 1)
    for text, counts in ((first, [150, 1]), (second, [100, 49, 1, 1, 1])):
        for count in counts:
            common = common_of([text], [count], [2])
            for name in ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping"):
                accelerator.put(getattr(common, name))
            with accelerator.no_sync():
                *_, (_, lens) = runner.step(common, [text], [count])
            text.done += count
    assert lens.tolist() == [second.done] == [152]


def test_layers_and_queries_may_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shown at once bounds memory; it decides nothing."""
    monkeypatch.setattr(after_step, "MOST_TOKENS", 2 * 70)
    monkeypatch.setattr(residents, "MASS_ELEMENTS", 1)
    test_the_same_tokens_stay_as_in_phases("h2o", "LBNHC")


def test_only_uniform_batches_are_captured_whole() -> None:
    accelerator = Accelerator()
    with accelerator.faked():
        runner = Runner("keydiff", "LBHNC", accelerator)
    support = type(runner.builder).get_cudagraph_support(runner.config, pruned_spec())
    assert support is AttentionCGSupport.UNIFORM_BATCH
    first = Runner("keydiff", "LBHNC", None)
    support = type(first.builder).get_cudagraph_support(first.config, pruned_spec())
    assert support is AttentionCGSupport.NEVER


def test_rehearsals_have_the_shapes_of_generating_requests_and_of_prompts() -> None:
    shapes = [layout(last, e, 1, BLOCK) for last, e in rehearsed(LIMITS, 1000)]
    assert [found.tokens for found in shapes] == [64, 64, 128, 256, 512, 1000]
    assert [found.candidates for found in shapes] == [4, 4, 8, 16, 32, 62]
    assert all(found.survivors == 3 for found in shapes)


def test_a_rehearsal_touches_the_null_block_alone_and_retires_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[int] = []
    score = H2O.score

    def noting(self: H2O, resident: ResidentView) -> Tensor:
        shown.append(resident.count)
        return score(self, resident)

    monkeypatch.setattr(H2O, "score", noting)
    accelerator = Accelerator()
    with accelerator.faked():
        runner = Runner("h2o", "LBNHC", accelerator)
        assert shown == [64, 64, 128, 256], "once for each shape there is to compile"
        assert all(bool((cache[1:] == 0).all()) for cache in runner.caches)
    runner.kind.report(report := StepReport())
    assert report.sequence is None
    assert runner.kind.log.failed is None


def test_layers_are_decided_together_where_they_may_and_can_be() -> None:
    def groups(policy: str, order: str) -> list[int]:
        runner = Runner(policy, order, accelerator)
        return [group.fold.num_layers for group in runner.kind._folded[0]]

    accelerator = Accelerator()
    with accelerator.faked():
        assert groups("keydiff", "LBNHC") == [LAYERS]
        assert groups("keydiff", APART) == [1] * LAYERS
        assert groups("by_layer", "LBNHC") == [1] * LAYERS, "its scores depend on the layer"
