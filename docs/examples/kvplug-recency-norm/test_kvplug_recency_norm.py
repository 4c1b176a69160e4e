"""The policy without an engine: its scores on a view made by hand, then a model that it prunes."""

import torch
import transformers
from kvplug_recency_norm import RecencyNorm

from kvplug.contract import EngineView, Kind, LayerView, ResidentView
from kvplug.hosts.pruning import choose
from kvplug.hosts.transformers import generate
from kvplug.registry import plugins

HELD, SIZE = 64, 4


def make(**options: object) -> RecencyNorm:
    return RecencyNorm(RecencyNorm.Options.model_validate(options), EngineView(block_size=16))


def resident(norms: torch.Tensor) -> ResidentView:
    """One request, one KV head, all 64 tokens resident: keys of these norms, ``[64]``."""
    keys = torch.zeros(1, 1, HELD, SIZE)
    keys[0, 0, :, 0] = norms
    return ResidentView(
        layer=LayerView(0, 1, 1, 1, SIZE),
        scale=SIZE**-0.5,
        softcap=0.0,
        num_tokens=torch.tensor([HELD], dtype=torch.int32),
        num_prompt_tokens=torch.tensor([HELD], dtype=torch.int32),
        count=HELD,
        positions=torch.arange(HELD, dtype=torch.int32)[None, None],
        key_pages=keys,
        value_pages=torch.ones_like(keys),
        block_table=torch.zeros(1, 1, dtype=torch.int32),
    )


def test_the_entry_point_registers_it() -> None:
    assert plugins().registry.get(Kind.SEQUENCE, "recency_norm") is RecencyNorm


def test_a_half_life_of_age_counts_as_a_norm_twice_as_large() -> None:
    norms = torch.full((HELD,), 8.0)
    norms[10], norms[30] = 2.0, 4.0
    scores = make(budget=64, half_life=20).score(resident(norms))[0, 0]
    torch.testing.assert_close(scores[10], scores[30])
    assert scores[63] > scores[62] > scores[0]


def test_the_best_survive_with_the_first_and_the_latest() -> None:
    norms = torch.full((HELD,), 8.0)
    norms[[20, 25]] = 1.0
    policy = make(budget=8, sink=2, recent=4, half_life=1 << 20)
    keep, _ = choose(policy, resident(norms), candidates=HELD, count=8)
    assert keep.tolist() == [[[0, 1, 20, 25, 60, 61, 62, 63]]]


def test_a_model_runs_under_it() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=100, **sizes, **heads)
    model = transformers.LlamaForCausalLM(config).eval()
    prompt = torch.randint(100, (200,))

    full = generate(model, prompt, None, max_new_tokens=40)
    roomy = generate(model, prompt, "recency_norm", max_new_tokens=40, budget=512)
    assert (roomy.ids, roomy.evictions) == (full.ids, []), "a budget beyond the text is exact"

    pruned = generate(model, prompt, "recency_norm", max_new_tokens=40, budget=64, interval=32)
    assert [at for at, _ in pruned.evictions] == [200, 224]
    assert pruned.kept < 64 + 32 + 16 < full.kept == 239
