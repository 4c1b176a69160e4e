"""sink_window on models of other shapes: heads, layer kinds, block sizes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import Oracle
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig

from kvplug_lab.engine.trial import TrialRequest, TrialResult
from kvplug_lab.models import tiny_llama

Run = Callable[..., TrialResult]

SINK, WINDOW = 40, 100
SECTION = {"sequence": {"use": "sink_window", "sink": SINK, "window": WINDOW}}
ENGINE = {"dtype": "float32", "max_model_len": 1024, "max_num_batched_tokens": 200}
GENERATED = 16


def prompts(*lengths: int) -> list[list[int]]:
    choose = random.Random(11)
    return [[choose.randrange(10, 300) for _ in range(n)] for n in lengths]


def requests(texts: list[list[int]], wave: int = 0) -> list[TrialRequest]:
    return [TrialRequest(text, GENERATED, wave) for text in texts]


def tokens(result: TrialResult) -> list[list[int]]:
    return [a.token_ids for a in result.answers]


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [pytest.param(4, 4, id="MHA"), pytest.param(4, 1, id="MQA")]
)
def test_other_head_counts(run: Run, tmp_path: Path, heads: int, kv_heads: int) -> None:
    """Prompts of one token to beyond the window, together."""
    model = tiny_llama(tmp_path, heads=heads, kv_heads=kv_heads)
    oracle = Oracle(model)
    texts = prompts(1, 1, 33, 450)
    expected = [oracle.greedy(text, GENERATED, sink=SINK, window=WINDOW) for text in texts]
    assert expected[3] != oracle.greedy(texts[3], GENERATED), "the window matters"

    result = run(model, requests(texts), SECTION, **ENGINE)
    assert tokens(result) == expected
    assert result.classes["managers"] == ["WindowedManager"]
    assert [a.kvplug is None for a in result.answers] == [True, True, True, False]


SLIDING = 48
LAYERS = ["sliding_attention", "full_attention"] * 2
OWN = {i: SLIDING for i, kind in enumerate(LAYERS) if kind == "sliding_attention"}


@pytest.fixture(scope="module")
def gemma(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 3: sliding-window layers beside full attention, each with its own RoPE."""
    directory = tmp_path_factory.mktemp("gemma")
    config = Gemma3TextConfig(
        vocab_size=320,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=len(LAYERS),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        layer_types=LAYERS,
        sliding_window=SLIDING,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config).float()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() == 2:
                # Large enough to set tokens apart; the embeddings are scaled by the model itself.
                scale = 4 if "lm_head" in name else 1
                weight.normal_(0, scale * weight.shape[1] ** -0.5)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def mixed(gemma: Path) -> Oracle:
    return Oracle(gemma)


def test_the_oracle_knows_the_models_own_window(gemma: Path, mixed: Oracle) -> None:
    """Under `sliding` alone it answers what transformers answers with its own masks."""
    (text,) = prompts(300)
    answer = mixed.model.generate(
        torch.tensor([text]), max_new_tokens=GENERATED, do_sample=False, eos_token_id=None
    )[0, len(text) :].tolist()
    assert mixed.greedy(text, GENERATED, sliding=OWN) == answer
    assert mixed.greedy(text, GENERATED) != answer, "the model's own window matters"
    assert mixed.greedy(text, GENERATED, sliding=OWN, sink=SINK, window=WINDOW) != answer
    assert len(set(answer)) > GENERATED // 2, "it does not repeat one token"


def test_sliding_window_layers_stay_as_they_are(run: Run, gemma: Path, mixed: Oracle) -> None:
    """The full layers get the window; the others keep vLLM's manager and the model's rule.

    The second wave finds what the first left in the prefix cache, and may use only what is exact:
    two blocks of sink, four of window and the query's own. The third asks to keep everything.
    """
    texts = prompts(20, 150, 450)
    expected = [
        mixed.greedy(text, GENERATED, sliding=OWN, sink=SINK, window=WINDOW) for text in texts
    ]
    exact = mixed.greedy(texts[2], GENERATED, sliding=OWN)
    assert exact != expected[2]
    keep = TrialRequest(texts[2], GENERATED, 2, {"sequence": "off"})
    result = run(
        gemma,
        [*requests(texts), *requests(texts, wave=1), keep],
        SECTION,
        # By default sliding-window layers cache the end of a prompt only, which is past what is
        # exact.
        prefix_cache_retention_interval=32,
        **ENGINE,
    )
    assert tokens(result) == [*expected, *expected, exact]
    assert sorted(result.classes["managers"]) == ["SlidingWindowManager", "WindowedManager"]
    assert len(result.cap_blocks) == 1
    (report,) = result.reports
    assert report["acted"] > 0
    assert [a.kvplug is None for a in result.answers] == [True, True, False, True, True] + [
        False
    ] * 2
    assert result.answers[6].kvplug == {"exact": True, "blocks_freed": 0}
    assert [a.cached_tokens for a in result.answers] == [0, 0, 0, 0, 4 * 32, 7 * 32, 7 * 32]


def test_vllms_own_block_size(run: Run, tiny: Path, oracle: Oracle) -> None:
    """Without --block-size the CPU backend takes blocks of 128 tokens."""
    texts = prompts(1, 300, 701)
    result = run(tiny, requests(texts), SECTION, block_size=None, **ENGINE)
    assert result.block_size == 128
    expected = [
        oracle.greedy(text, GENERATED, block_size=128, sink=SINK, window=WINDOW) for text in texts
    ]
    assert tokens(result) == expected
    assert [a.kvplug is None for a in result.answers] == [True, True, False]
