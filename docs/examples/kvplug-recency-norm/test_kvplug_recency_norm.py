"""The policy without an engine: laws, scores on a view made by hand, then a model it prunes."""

import torch
import transformers
from kvplug_recency_norm import RecencyNorm

from kvplug.contract import Kind
from kvplug.hosts.pruning import choose
from kvplug.hosts.transformers import generate
from kvplug.registry import plugins
from kvplug.testing import ScoringLaws, residents

HELD = 64


def keys(norms: torch.Tensor) -> torch.Tensor:
    """One request, one KV head, 64 tokens: keys of these norms, ``[64]``."""
    found = torch.zeros(1, 1, HELD, 4)
    found[0, 0, :, 0] = norms
    return found


class TestRecencyNorm(ScoringLaws):
    policy = RecencyNorm

    def test_the_entry_point_registers_it(self) -> None:
        assert plugins().registry.get(Kind.SEQUENCE, "recency_norm") is RecencyNorm

    def test_a_half_life_of_age_counts_as_a_norm_twice_as_large(self) -> None:
        norms = torch.full((HELD,), 8.0)
        norms[10], norms[30] = 2.0, 4.0
        policy: RecencyNorm = self.build(budget=64, half_life=20)
        scores = policy.score(residents(keys(norms)))[0, 0]
        torch.testing.assert_close(scores[10], scores[30])
        assert scores[63] > scores[62] > scores[0]

    def test_the_best_survive_with_the_first_and_the_latest(self) -> None:
        norms = torch.full((HELD,), 8.0)
        norms[[20, 25]] = 1.0
        policy: RecencyNorm = self.build(budget=8, sink=2, recent=4, half_life=1 << 20)
        keep, _ = choose(policy, residents(keys(norms)), candidates=HELD, count=8)
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
