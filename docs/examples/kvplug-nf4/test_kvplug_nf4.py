"""The format without an engine: laws, its levels, its bytes, and a model that answers under it."""

import pytest
import torch
import transformers
from kvplug_nf4 import LEVELS, Nf4

from kvplug.contract import EngineView, Kind, LayerView
from kvplug.hosts.transformers import generate
from kvplug.registry import plugins
from kvplug.testing import FormatLaws

LAYER = LayerView(0, 1, num_kv_heads=2, num_heads=4, head_size=64, dtype="float32")


def make() -> Nf4:
    return Nf4(Nf4.Options(), EngineView(block_size=16, layers=(LAYER,)))


class TestNf4(FormatLaws):
    policy = Nf4


def test_the_entry_point_registers_it() -> None:
    assert plugins().registry.get(Kind.FORMAT, "nf4") is Nf4


def test_the_levels_are_those_of_the_paper() -> None:
    assert len(LEVELS) == 16
    paper = [-1.0, -0.6961928, -0.5250731, 0.0, 0.0795803, 0.5626170, 0.7229568, 1.0]
    torch.testing.assert_close(
        LEVELS[[0, 1, 2, 7, 8, 13, 14, 15]], torch.tensor(paper), atol=1e-5, rtol=0
    )


def test_a_token_takes_68_bytes_a_head_and_comes_back_near() -> None:
    policy = make()
    key, value = torch.randn(2, 50, 2, 64).unbind(0)
    cells = policy.encode(LAYER, key, value)
    assert cells.shape == (50, 2, policy.layout(LAYER).bytes_per_token_head) == (50, 2, 68)
    for was, now in zip((key, value), policy.decode(LAYER, cells), strict=True):
        scale = was.abs().amax(-1, keepdim=True)
        assert (now - was).abs().le(0.1521 * scale + 1e-3).all(), "half the widest gap of levels"
        assert (now - was).norm() / was.norm() < 0.12
    again = policy.encode(LAYER, *policy.decode(LAYER, cells))
    assert torch.equal(again, cells), "levels are fixed points"


def test_an_odd_head_is_refused() -> None:
    with pytest.raises(ValueError, match="must be even"):
        make().layout(LayerView(0, 1, 2, 4, 63))


def test_a_model_runs_under_it() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=100, **sizes, **heads)
    model = transformers.LlamaForCausalLM(config).eval()
    prompt = torch.randint(100, (200,))
    full = generate(model, prompt, None, max_new_tokens=40)
    coded = generate(model, prompt, "nf4", max_new_tokens=40)
    assert len(coded.ids) == len(full.ids) == 40
