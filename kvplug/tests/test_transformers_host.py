"""Sequence policies on Hugging Face models: exact where nothing is dropped, and where something is,
the logits are those of the plain model with the dropped tokens masked."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kvplug.contract import (
    AttendBatch,
    FormatPolicy,
    Kind,
    LayerView,
    PageLayout,
    ResidentView,
    ScoringPolicy,
    WriteBatch,
)
from kvplug.errors import KVPlugError
from kvplug.hosts.transformers import Host, Text, UnsupportedModel, Watched, generate, watched_by
from kvplug.registry import plugins
from kvplug_lab import models

transformers = pytest.importorskip("transformers")

PROMPT = 150
SCORERS = [
    name
    for name in plugins().registry.names(Kind.SEQUENCE)
    if (policy := plugins().registry.get(Kind.SEQUENCE, name)) is not None
    and issubclass(policy, ScoringPolicy)
    and not any(f.is_required() for n, f in policy.Options.model_fields.items() if n != "budget")
]


FORMATS = [
    policy.name
    for policy in plugins().registry
    if policy.kind is Kind.FORMAT
    # What needs a calibration file has tests of its own.
    and "calibration" not in policy.Options.model_fields
]


class Oldest(ScoringPolicy):
    """Keeps the first tokens of the text: every head and layer the same ones."""

    name, changes = "oldest", "drops the latest tokens"

    def score(self, held: ResidentView) -> Tensor:
        return -held.positions.float()


class ByHead(ScoringPolicy):
    """Keeps even positions in even heads and odd ones in odd heads."""

    name, changes = "by_head", "drops every other token"

    def score(self, held: ResidentView) -> Tensor:
        heads = torch.arange(held.positions.shape[1])[None, :, None]
        return ((held.positions + heads) % 2 == 0).float()


def load(directory: Path, **how: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, **how
    ).eval()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Grouped-query, multi-head and multi-query models."""
    return {
        name: load(
            models.tiny_llama(
                tmp_path_factory.mktemp(name),
                heads=4,
                kv_heads=kv_heads,
                head_dim=32,
                dtype="float32",
                layers=3,
            )
        )
        for name, kv_heads in (("gqa", 2), ("mha", 4), ("mqa", 1))
    }


@pytest.fixture(scope="module")
def model(shapes: dict[str, Any]) -> Any:
    return shapes["gqa"]


@pytest.fixture(scope="module")
def host(model: Any) -> Host:
    return Host(model)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(64, 320, (240,), generator=torch.Generator().manual_seed(1))


def plain(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of the plain model; ``mask [n, n]`` masks attention."""
    with torch.inference_mode():
        found: Tensor = model(
            ids[None], attention_mask=None if mask is None else mask[None, None]
        ).logits[0]
    return found


def policy(host: Host, use: Any, **options: Any) -> Any:
    return host.policy(use, **{"sink": 4, "recent": 8, **options})


# -- exact -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["gqa", "mha", "mqa"])
def test_a_text_without_a_policy_has_the_plain_models_logits(
    shapes: dict[str, Any], shape: str, ids: Tensor
) -> None:
    host, expected = Host(shapes[shape]), plain(shapes[shape], ids)
    whole = host.feed(host.open(len(ids)), ids)
    assert torch.equal(whole, expected)
    text = host.open(100)
    pieces = [host.feed(text, piece) for piece in ids.split([100, 1, 60, 79])]
    torch.testing.assert_close(torch.cat(pieces), expected, atol=2e-5, rtol=0)
    assert text.num_tokens == len(ids) and text.kept == len(ids)


def test_generate_gives_the_plain_models_tokens(model: Any, ids: Tensor) -> None:
    expected = model.generate(ids[None, :50], max_new_tokens=24, do_sample=False, eos_token_id=319)
    assert generate(model, ids[:50], max_new_tokens=24, eos=[319]).ids == expected[0, 50:].tolist()


@pytest.mark.parametrize("name", SCORERS)
def test_a_budget_of_everything_is_exact(host: Host, ids: Tensor, name: str) -> None:
    full = host.open(PROMPT)
    expected = [host.feed(full, ids[:PROMPT]), host.feed(full, ids[PROMPT:])]
    text = host.open(PROMPT, host.policy(name, budget=1 << 14))
    assert torch.equal(host.feed(text, ids[:PROMPT]), expected[0])
    assert torch.equal(host.feed(text, ids[PROMPT:]), expected[1])
    assert text.evictions == [] and text.kept == len(ids)


def test_a_one_token_prompt_runs_under_every_policy(host: Host, ids: Tensor) -> None:
    expected = host.generate(ids[:1], max_new_tokens=4).ids
    for name in SCORERS:
        assert host.generate(ids[:1], host.policy(name, budget=64), 4).ids == expected


def test_the_models_own_attention_is_restored(host: Host, model: Any, ids: Tensor) -> None:
    before = model.config._attn_implementation
    host.feed(host.open(5), ids[:5])
    assert model.config._attn_implementation == before != "kvplug"
    with pytest.raises(IndexError):
        host.feed(host.open(1), torch.tensor([10**6]))
    assert model.config._attn_implementation == before


# -- what is kept ----------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 16, 32, 128])
@pytest.mark.parametrize("name", [n for n in SCORERS if n not in ("pyramidkv",)])
def test_cuts_keep_what_the_budget_says(
    model: Any, ids: Tensor, name: str, block_size: int
) -> None:
    host = Host(model, block_size)
    text = host.open(PROMPT, host.policy(name, budget=0.4))
    host.feed(text, ids[:PROMPT])
    full, kept = PROMPT // block_size, -(-60 // block_size)
    assert text.kept == (min(full, kept) * block_size + PROMPT - full * block_size)
    for layer in text.layers:
        positions = layer.positions[0]
        assert (positions.diff(dim=-1) > 0).all()
        assert positions[:, -1].eq(PROMPT - 1).all()


def test_survivors_are_the_best_with_sinks_and_recent_ones(host: Host, ids: Tensor) -> None:
    text, _ = host.read(ids[:PROMPT], policy(host, ByHead, budget=64, sink=5, recent=10))
    # 144 tokens are in full blocks, 6 in the block being filled.
    for layer in text.layers:
        for head, positions in enumerate(layer.positions[0].tolist()):
            assert len(positions) == 64 + 6
            always = [p for p in range(PROMPT) if p < 5 or p >= PROMPT - 10]
            mine = [p for p in range(144) if p not in always and (p + head) % 2 == 0]
            room = 64 - len([p for p in always if p < 144])
            assert positions == sorted([*always, *mine[:room]])


def test_logits_after_a_cut_are_those_of_the_plain_model_with_a_mask(
    host: Host, model: Any, ids: Tensor
) -> None:
    text = host.open(PROMPT, policy(host, Oldest, budget=64, interval=1024))
    got = torch.cat([host.feed(text, ids[:PROMPT]), host.feed(text, ids[PROMPT:])])
    kept = text.layers[0].positions[0, 0]
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    hidden = torch.ones(len(ids), dtype=torch.bool)
    hidden[kept.long()] = False
    hidden[PROMPT:] = False
    assert int(hidden.sum()) == 144 - 64
    seen[PROMPT:, hidden] = False
    torch.testing.assert_close(got, plain(model, ids, seen), atol=2e-5, rtol=0)


def test_cuts_come_again_every_interval(host: Host, ids: Tensor) -> None:
    text = host.open(PROMPT, policy(host, Oldest, budget=64, interval=32))
    host.feed(text, ids)
    assert text.evictions == [(150, 70.0), (176, 64.0), (208, 64.0), (240, 64.0)]
    one_by_one = host.open(PROMPT, policy(host, Oldest, budget=64, interval=32))
    for token in ids:
        host.step([one_by_one], token[None])
    assert one_by_one.evictions == text.evictions
    assert torch.equal(one_by_one.layers[2].positions, text.layers[2].positions)


def test_a_long_prompt_is_read_under_its_cap(host: Host, ids: Tensor) -> None:
    chosen = policy(host, Oldest, budget=32, interval=16, prefill=80)
    text = host.open(len(ids), chosen)
    most = 0
    for token in ids:
        host.feed(text, token[None])
        most = max(most, *(layer.kept for layer in text.layers))
    # Tokens are evicted when the 80 are full, and all are kept until then.
    assert most <= 80 and text.kept <= 32 + 16
    at_once, _ = host.read(ids, chosen)
    assert at_once.evictions == text.evictions
    assert torch.equal(at_once.layers[1].positions, text.layers[1].positions)


def test_layers_keep_their_share(host: Host, ids: Tensor) -> None:
    text, _ = host.read(ids[:144], policy(host, Oldest, budget=64, layers={"0": 1.5, "-1": 0.5}))
    assert [layer.kept for layer in text.layers] == [96, 64, 32]
    assert text.kept == 64


def test_a_policy_resizes_its_budget(host: Host, ids: Tensor) -> None:
    class Halving(Oldest):
        asked: ClassVar[list[tuple[list[float], int, int]]] = []

        def measure(self, held: ResidentView, scores: Tensor) -> Tensor:
            return torch.full((1, 2), float(held.layer.index))

        def resize(self, measured: Any, budget: int, num_tokens: int) -> int:
            self.asked.append((list(measured), budget, num_tokens))
            return budget // 2

    text = host.open(144, policy(host, Halving, budget=64, interval=32))
    host.feed(text, ids)
    assert text.evictions == [(144, 64.0), (176, 32.0), (208, 16.0), (240, 16.0)]
    assert [asked[:2] for asked in Halving.asked] == [([1.0, 1.0], b) for b in (64, 32, 16)]


# -- branches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCORERS)
def test_a_branch_is_what_reading_with_the_policy_gives(host: Host, ids: Tensor, name: str) -> None:
    chosen = host.policy(name, budget=0.5, interval=16)
    full, _ = host.read(ids[:PROMPT], watched=Watched(300, True))
    branch, text = full.branch(chosen), host.read(ids[:PROMPT], chosen)[0]
    host.feed(branch, ids[PROMPT:])
    host.feed(text, ids[PROMPT:])
    assert branch.evictions == text.evictions and len(text.evictions) > 1
    for ours, theirs in zip(branch.layers, text.layers, strict=True):
        assert torch.equal(ours.positions, theirs.positions)
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


def test_branches_leave_the_text_as_it_is(host: Host, ids: Tensor) -> None:
    full, _ = host.read(ids[:PROMPT], watched=Watched(8, True))
    before = [(layer.keys.clone(), layer.totals.clone()) for layer in full.layers]  # type: ignore[union-attr]
    for name in ("h2o", "snapkv"):
        branch = full.branch(host.policy(name, budget=0.5, **snap(name)))
        host.feed(branch, ids[PROMPT:])
    host.feed(full.branch(None), ids[PROMPT:])
    assert full.kept == PROMPT and full.num_tokens == PROMPT
    for layer, (keys, totals) in zip(full.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert layer.totals is not None and torch.equal(layer.totals, totals)


def snap(name: str) -> dict[str, int]:
    return {"window": 8} if name == "snapkv" else {}


def test_a_branch_that_cannot_be_is_refused(host: Host, ids: Tensor) -> None:
    full, _ = host.read(ids[:PROMPT], watched=Watched(8))
    with pytest.raises(KVPlugError, match="open it with watched="):
        full.branch(host.policy("snapkv", budget=0.5, window=16))
    with pytest.raises(KVPlugError, match="open it with watched="):
        full.branch(host.policy("h2o", budget=0.5))
    inside = policy(host, Oldest, budget=32, interval=16, prefill=80)
    assert not full.can_branch(inside)
    with pytest.raises(KVPlugError, match="acts before token 150"):
        full.branch(inside)
    with pytest.raises(KVPlugError, match="acts before token 150"):
        full.branch(host.policy("sink_window", window=32))
    with pytest.raises(KVPlugError, match="without a policy"):
        full.branch(policy(host, Oldest, budget=64)).branch(None)


def test_texts_in_step_are_texts_alone(host: Host, ids: Tensor) -> None:
    full, _ = host.read(ids[:PROMPT], watched=Watched(32, True))

    def texts() -> list[Text]:
        return [
            full.branch(None),
            full.branch(policy(host, Oldest, budget=64, interval=16)),
            full.branch(host.policy("h2o", budget=0.5, interval=32)),
        ]

    together, alone = texts(), texts()
    for token in ids[PROMPT : PROMPT + 40]:
        same = host.step(together, token.expand(3))
        each = torch.cat([host.feed(text, token[None]) for text in alone])
        torch.testing.assert_close(same, each, atol=2e-5, rtol=0)
    assert [t.evictions for t in together] == [t.evictions for t in alone]
    assert [t.kept for t in together] == [t.kept for t in alone]


# -- what policies see -----------------------------------------------------------------------------


def eager(model: Any, ids: Tensor) -> tuple[Tensor, ...]:
    """Attention weights of each layer, ``[num_heads, n, n]``."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            found = model(ids[None], output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    return tuple(one[0] for one in found)


@pytest.mark.parametrize("shape", ["gqa", "mha", "mqa"])
def test_totals_and_observed_queries_give_the_models_attention(
    shapes: dict[str, Any], shape: str, ids: Tensor
) -> None:
    model = shapes[shape]
    host, weights = Host(model), eager(model, ids)
    needs = Watched(20, True)
    text = host.open(len(ids), watched=needs)
    for piece in ids.split([100, 1, 99, 40]):
        host.feed(text, piece)
    for layer, expected in zip(text.layers, weights, strict=True):
        view = layer.view_for(needs, len(ids), len(ids))
        kv_heads = view.positions.shape[1]
        group = expected.view(kv_heads, -1, len(ids), len(ids)).mean(1)
        assert view.cumulative_attention is not None and view.query_positions is not None
        torch.testing.assert_close(view.cumulative_attention[0], group.sum(1), atol=2e-5, rtol=0)
        mass = view.attention_mass(20)[0]
        torch.testing.assert_close(mass, expected[:, -20:].sum(1), atol=2e-5, rtol=0)
        assert view.query_positions[0].tolist() == list(range(220, 240))


def test_observed_queries_are_padded_where_the_text_is_shorter(host: Host, ids: Tensor) -> None:
    text, _ = host.read(ids[:5], watched=Watched(8))
    view = text.layers[0].view_for(Watched(8), 5, 5)
    assert view.queries is not None and view.query_positions is not None
    assert view.query_positions[0].tolist() == [-1, -1, -1, 0, 1, 2, 3, 4]
    assert view.queries.shape == (1, 8, 4, 32)
    assert view.attention_mass().sum() == pytest.approx(5 * 4, abs=1e-4)


def test_totals_survive_a_cut_with_their_tokens(host: Host, ids: Tensor) -> None:
    full, _ = host.read(ids[:144], watched=Watched(0, True))
    branch = full.branch(host.policy("h2o", budget=64))
    for before, after in zip(full.layers, branch.layers, strict=True):
        assert before.totals is not None and after.totals is not None
        kept = after.positions[0].long()
        assert torch.equal(after.totals[0], before.totals[0].gather(1, kept))


def test_pages_as_a_gpu_kernel_sees_them_hold_the_same(host: Host, ids: Tensor) -> None:
    text, _ = host.read(ids[:PROMPT], watched=Watched(32, True))
    chosen = host.policy("snapkv", budget=64)
    for layer in text.layers:
        view = layer.view_for(Watched(32, True), PROMPT, PROMPT)
        keys, values = layer._paged()
        table = torch.arange(keys.shape[0], dtype=torch.int32)[None]
        paged = replace(view, key_pages=keys, value_pages=values, block_table=table)
        assert keys.shape == (10, 2, 16, 32)
        assert torch.equal(paged.keys, view.keys) and torch.equal(paged.values, view.values)
        assert torch.equal(chosen.score(paged), chosen.score(view))


def test_a_layer_says_how_it_rotates(host: Host, model: Any) -> None:
    rope = host.layers[0].rope
    assert rope is not None and not rope.interleaved
    assert rope.frequencies == pytest.approx(model.model.rotary_emb.inv_freq.tolist())


# -- positional rules and sliding windows ----------------------------------------------------------


def test_sink_window_is_its_rule_as_a_mask(host: Host, model: Any, ids: Tensor) -> None:
    chosen = host.policy("sink_window", sink=16, window=40)
    text, parts = host.open(PROMPT, chosen), []
    for piece in ids.split([PROMPT, 1, 60, 29]):
        parts.append(host.feed(text, piece))
    at = torch.arange(len(ids))
    rule = chosen.window(host.layers[0])
    assert rule is not None
    query, key = at[:, None], at[None] // 16
    seen = (at[None] <= query) & (
        (key < rule.sink_blocks) | (key >= query // 16 - rule.window_blocks)
    )
    torch.testing.assert_close(torch.cat(parts), plain(model, ids, seen), atol=2e-5, rtol=0)
    assert text.kept == 16 + 48 + len(ids) % 16


@pytest.fixture(scope="module")
def gemma() -> Any:
    config = transformers.Gemma3TextConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(config).eval()


def test_sliding_layers_are_left_alone(gemma: Any, ids: Tensor) -> None:
    host = Host(gemma)
    torch.testing.assert_close(
        host.feed(host.open(len(ids)), ids), plain(gemma, ids), atol=2e-5, rtol=0
    )
    assert [layer.index for layer in host.engine.layers] == [1]
    text, _ = host.read(ids[:144], policy(host, Oldest, budget=64))
    assert [layer.kept for layer in text.layers] == [144, 64, 144]
    assert text.kept == 64
    after = host.feed(text, ids[144:160])
    assert torch.isfinite(after).all()
    assert host.layers[1].rope != host.layers[0].rope


def test_a_soft_cap_is_applied(ids: Tensor) -> None:
    config = transformers.Gemma2Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=24,
        attn_logit_softcapping=0.5,
    )
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    host = Host(model)
    text = host.open(len(ids))
    torch.testing.assert_close(host.feed(text, ids), plain(model, ids), atol=2e-5, rtol=0)
    assert text.layers[1].view_for(Watched(), 1, 1).softcap == 0.5
    coded = host.open(len(ids), host.policy(Whole))
    torch.testing.assert_close(host.feed(coded, ids), plain(model, ids), atol=2e-5, rtol=0)


# -- bad input -------------------------------------------------------------------------------------


def tiny(config: Any, cls: Any) -> Any:
    with torch.device("meta"):
        return cls(config)


SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def test_models_without_prunable_layers_are_refused() -> None:
    sliding = tiny(
        transformers.MistralConfig(**SMALL, sliding_window=8), transformers.MistralForCausalLM
    )
    with pytest.raises(UnsupportedModel, match=r"MistralForCausalLM: .*sliding window"):
        Host(sliding)
    latent = tiny(
        transformers.DeepseekV3Config(
            **SMALL, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1
        ),
        transformers.DeepseekV3ForCausalLM,
    )
    with pytest.raises(UnsupportedModel, match=r"DeepseekV3ForCausalLM: .*MLA"):
        Host(latent)
    mamba = tiny(
        transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1),
        transformers.MambaForCausalLM,
    )
    with pytest.raises(UnsupportedModel, match="MambaForCausalLM"):
        Host(mamba)


# -- formats ---------------------------------------------------------------------------------------


class Whole(FormatPolicy):
    """Float32 elements as they are."""

    name, changes = "whole", "nothing"

    def layout(self, layer: LayerView) -> PageLayout:
        return PageLayout(8 * layer.head_size, 32, 32)

    def encode(self, layer: LayerView, key: Tensor, value: Tensor) -> Tensor:
        return torch.cat([key, value], -1).float().view(torch.uint8)

    def decode(self, layer: LayerView, cells: Tensor) -> tuple[Tensor, Tensor]:
        key, value = cells.view(torch.float32).split(layer.head_size, -1)
        return key, value


class Coarse(Whole):
    """Elements rounded to halves."""

    name, changes = "coarse", "rounds"

    def encode(self, layer: LayerView, key: Tensor, value: Tensor) -> Tensor:
        return super().encode(layer, (key * 2).round() / 2, (value * 2).round() / 2)


class Watching(Coarse):
    """Keeps eight tokens exact and notes what it is handed."""

    name, changes = "watching", "rounds"

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.keys: dict[int, Tensor] = {}
        self.seen: list[tuple[int, int]] = []

    def recent(self, layer: LayerView) -> int:
        return 8

    def write(self, layer: LayerView, batch: WriteBatch, cache: Tensor) -> None:
        before = self.keys.get(layer.index, batch.key[:0])
        assert batch.slots.tolist() == list(range(len(before), len(before) + len(batch.key)))
        assert batch.request_slots is not None and batch.recent is not None
        assert batch.request_slots.tolist() == [0] * len(batch.key)
        kept = range(max(0, len(before) - 8), len(before))
        for at in kept:
            assert torch.equal(batch.recent.key[0, at % 8], before[at])
        self.keys[layer.index] = torch.cat([before, batch.key])
        super().write(layer, batch, cache)

    def attend(self, layer: LayerView, batch: AttendBatch, cache: Tensor, out: Tensor) -> None:
        assert batch.recent is not None and batch.request_slots is not None
        new = batch.max_query_len
        for at in range(max(0, batch.max_seq_len - new - 8), batch.max_seq_len - new):
            assert torch.equal(batch.recent.key[0, at % 8], self.keys[layer.index][at])
        if batch.key is not None:
            assert torch.equal(batch.key, self.keys[layer.index][-new:])
        self.seen.append((layer.index, -1 if batch.key is None else new))
        super().attend(layer, batch, cache, out)


class Paired(Whole):
    """Stores the first of each two heads, and gives it for both."""

    name, changes = "paired", "merges heads"

    def layout(self, layer: LayerView) -> PageLayout:
        return PageLayout(8 * layer.head_size, 32, 32, heads=layer.num_kv_heads // 2)

    def encode(self, layer: LayerView, key: Tensor, value: Tensor) -> Tensor:
        return super().encode(layer, key[:, ::2], value[:, ::2])

    def decode(self, layer: LayerView, cells: Tensor) -> tuple[Tensor, Tensor]:
        key, value = super().decode(layer, cells)
        return key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)


@pytest.mark.parametrize("shape", ["gqa", "mha", "mqa"])
@pytest.mark.parametrize("chunk", [1, 16, 100, 512])
def test_a_format_that_loses_nothing_has_the_plain_models_logits(
    shapes: dict[str, Any], shape: str, chunk: int, ids: Tensor
) -> None:
    host, expected = Host(shapes[shape], chunk=chunk), plain(shapes[shape], ids)
    for again in (False, True):
        text = host.open(PROMPT, host.policy(Whole, exact_chunk=not again))
        found = [host.feed(text, ids[:PROMPT]), host.feed(text, ids[PROMPT:])]
        torch.testing.assert_close(torch.cat(found), expected, atol=2e-5, rtol=0)
        assert text.kept == len(ids)


def test_a_text_under_a_format_sees_what_its_pages_hold(host: Host, ids: Tensor) -> None:
    full, _ = host.read(ids[:PROMPT])
    text = full.branch(host.policy(Coarse))
    for layer, other in zip(text.layers, full.layers, strict=True):
        assert torch.equal(layer.keys, (other.keys * 2).round() / 2)
        assert torch.equal(layer.values, (other.values * 2).round() / 2)
        assert torch.equal(layer.positions, other.positions)
    rounded = full.branch(None)
    for layer in rounded.layers:
        layer._keys, layer._values = (layer.keys * 2).round() / 2, (layer.values * 2).round() / 2
    more = ids[PROMPT:]
    expected = host.feed(rounded, more)
    torch.testing.assert_close(host.feed(text, more), expected, atol=2e-5, rtol=0)
    assert (expected - host.feed(full.branch(None), more)).abs().max() > 0.01


def test_a_prompt_branched_into_a_format_is_one_read_in_a_chunk(host: Host, ids: Tensor) -> None:
    coarse = host.policy(Coarse)
    full, _ = host.read(ids[:PROMPT])
    branched, (read, _) = full.branch(coarse), host.read(ids[:PROMPT], coarse)
    chunked, _ = Host(host.model, chunk=64).read(ids[:PROMPT], coarse)
    assert torch.equal(branched.layers[0].keys, read.layers[0].keys)
    assert torch.equal(chunked.layers[0].keys, read.layers[0].keys)
    # Sums in another order may tip a few elements over to the next code.
    same = [(t.layers[2].keys == read.layers[2].keys).float().mean() for t in (branched, chunked)]
    assert same[0] > 0.999 > 0.99 > same[1]
    with pytest.raises(KVPlugError, match="reads its own tokens back"):
        full.branch(host.policy(Coarse, exact_chunk=False))


def test_a_format_is_handed_slots_lanes_and_the_latest_exact_tokens(
    host: Host, ids: Tensor
) -> None:
    format = host.policy(Watching)
    text = host.open(40, format)
    for length in (3, 1, 1, 6, 30, 1):
        host.feed(text, ids[text.num_tokens : text.num_tokens + length])
    assert [n for layer, n in format.seen if layer == 2] == [3, 1, 1, 6, 30, 1]
    back = host.policy(Watching, exact_chunk=False)
    host.read(ids[:10], back)
    assert back.seen == [(layer, -1) for layer in range(3)]


def test_a_branched_format_keeps_the_latest_tokens_too(host: Host, ids: Tensor) -> None:
    full, _ = host.read(ids[:PROMPT])
    one, other = host.policy(Watching), host.policy(Watching)
    branched, (read, _) = full.branch(one), host.read(ids[:PROMPT], other)
    for text in (branched, read):
        host.feed(text, ids[PROMPT : PROMPT + 9])
    for mine, theirs in zip(branched.layers, read.layers, strict=True):
        for which in ("key", "value"):
            kept, other_kept = (getattr(layer.recent, which) for layer in (mine, theirs))
            torch.testing.assert_close(kept, other_kept, atol=1e-4, rtol=0)


def test_texts_under_formats_and_without_go_in_step(host: Host, ids: Tensor) -> None:
    full, _ = host.read(ids[:PROMPT])
    coarse = host.policy(Coarse)

    def texts() -> list[Text]:
        under = full.branch(coarse)
        host.feed(under, ids[:3])
        return [full.branch(None), full.branch(coarse), under, under.branch(coarse)]

    alone = [host.feed(text, ids[5:6])[0] for text in texts()]
    together = texts()
    found = host.step(together, ids[5:6].expand(4))
    torch.testing.assert_close(found, torch.stack(alone), atol=2e-5, rtol=0)
    assert torch.equal(together[2].layers[1].keys, together[3].layers[1].keys)
    host.feed(together[3], ids[:1])
    assert together[2].kept == together[3].kept - 1 == PROMPT + 4
    assert full.kept == PROMPT


def test_a_format_with_fewer_heads_and_another_dtype(shapes: dict[str, Any], ids: Tensor) -> None:
    model = shapes["gqa"]
    host = Host(model, kv_dtype=torch.bfloat16)
    text, _ = host.read(ids[:PROMPT], host.policy(Paired))
    assert text.layers[0].pages.shape[1] == 1  # type: ignore[attr-defined]
    keys = text.layers[0].keys
    assert torch.equal(keys[:, 0], keys[:, 1]) and torch.equal(keys, keys.bfloat16().float())
    assert host.engine.layers[0].dtype == "bfloat16"


def test_what_is_held_as_it_is_meets_queries_of_its_type(model: Any, ids: Tensor) -> None:
    host = Host(model, kv_dtype=torch.bfloat16)
    layers = {"0": "int8", "2": "plain"}
    text, _ = host.read(ids[:PROMPT], host.policy("mixed", layers=layers))
    found = host.feed(text, ids[PROMPT:])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain(model, ids)[PROMPT:], atol=0.1, rtol=0)
    keys = text.layers[2].keys
    assert torch.equal(keys, keys.bfloat16().to(keys.dtype))


def test_sliding_layers_stay_dense_under_a_format(gemma: Any, ids: Tensor) -> None:
    host = Host(gemma)
    expected = plain(gemma, ids)
    text = host.open(PROMPT, host.policy(Whole))
    found = torch.cat([host.feed(text, ids[:PROMPT]), host.feed(text, ids[PROMPT:])])
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)
    coded = [layer.view.index for layer in text.layers if hasattr(layer, "pages")]
    assert coded == sorted(host.prunable) and len(coded) < len(text.layers)
    other = text.branch(text.policy)
    assert torch.equal(host.feed(other, ids[:1]), host.feed(text, ids[:1]))


def test_a_format_and_a_sequence_policy_are_refused_together(host: Host, ids: Tensor) -> None:
    coarse, keep = host.policy(Coarse), policy(host, Oldest, budget=64)
    full, _ = host.read(ids[:PROMPT])
    both = "the engine runs both together"
    with pytest.raises(KVPlugError, match=both):
        full.branch(coarse).branch(keep)
    with pytest.raises(KVPlugError, match=both):
        full.branch(keep).branch(coarse)
    with pytest.raises(KVPlugError, match="without a policy"):
        full.branch(coarse).branch(host.policy(Coarse))
    with pytest.raises(ValueError, match="chunk must be"):
        Host(host.model, chunk=0)


def test_a_format_is_told_which_model_it_is_for(host: Host) -> None:
    where = Path(host.model.config._name_or_path)
    assert host.policy(Coarse).engine.model == models.model_fingerprint(where) != ""
    assert host.engine.model == ""
    nameless = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()
    assert Host(nameless).policy(Coarse).engine.model == ""


@pytest.mark.parametrize("name", FORMATS)
def test_installed_formats_run_by_name(model: Any, host: Host, ids: Tensor, name: str) -> None:
    wide = Host(model, block_size=32)
    full, _ = wide.read(ids[:PROMPT])
    format = wide.policy(name)
    assert isinstance(format, FormatPolicy)
    text, _ = wide.read(ids[:PROMPT], format)
    error = text.layers[0].keys - full.layers[0].keys
    assert 0 < error.norm() / full.layers[0].keys.norm() < 0.5 or format.exact
    more = wide.feed(text, ids[PROMPT:])
    assert torch.isfinite(more).all()
    answer = generate(model, ids[:PROMPT], name, max_new_tokens=4, block_size=32)
    assert len(answer.ids) == 4 and answer.kept == PROMPT + 3 and not answer.evictions


def test_bad_input_is_named(host: Host, model: Any, ids: Tensor) -> None:
    with pytest.raises(KVPlugError, match="unknown sequence policy 'snapvk'"):
        generate(model, ids, "snapvk")
    with pytest.raises(KVPlugError, match="prefix_cache policy"):
        host.policy(plugins().registry.get(Kind.PREFIX_CACHE, "lru"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="smaller than sink"):
        host.policy("snapkv", budget=16)
    with pytest.raises(ValueError, match="at least one token"):
        host.open(0)
    with pytest.raises(ValueError, match="at least one token"):
        host.feed(host.open(1), ids[:0])
    with pytest.raises(ValueError, match="block_size"):
        Host(model, 0)


def test_a_share_too_small_for_what_is_always_kept_is_refused(host: Host) -> None:
    small = policy(host, Oldest, budget=64, sink=32, recent=32, layers={"0": 0.5})
    with pytest.raises(ValueError, match="layer 0 keeps 32 tokens"):
        host.open(PROMPT, small)


def test_what_a_policy_needs_is_what_is_noted(host: Host) -> None:
    assert watched_by(None) == Watched()
    assert watched_by(host.policy("snapkv", window=24)) == Watched(24, False)
    assert watched_by(host.policy("h2o")) == Watched(0, True)
    assert watched_by(host.policy("sink_window")) == Watched()


def test_the_example_on_the_fidelity_page_runs(model: Any, ids: Tensor) -> None:
    page = (Path(__file__).parents[2] / "docs" / "fidelity.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    space: dict[str, Any] = {"model": model, "ids": ids[:PROMPT], "more_ids": ids[PROMPT:]}
    exec(compile(example, "fidelity.md", "exec"), space)
    assert len(space["answer"].ids) == 64 and space["answer"].evictions
    assert space["logits"].shape == (len(ids) - PROMPT, 320)
    assert space["full"].kept == PROMPT and space["text"].evictions[0] == (PROMPT, 86.0)
