"""The plugin of docs/examples/kvplug-nf4, installed like anybody's, on a real engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from format_oracle import FormatOracle
from torch import Tensor

from kvplug_lab.engine.trial import TrialRequest, TrialResult
from kvplug_lab.models import tiny_llama

LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
    ]
)
"""As QLoRA publishes them."""
PROMPTS = [[1 + (61 * i + i * i) % 300 for i in range(n)] for n in (7, 300)]
GENERATED = 32

pytestmark = pytest.mark.engine


def nearest(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True).half().float()
    return LEVELS[(x[..., None] / scale[..., None] - LEVELS).abs().argmin(-1)] * scale


def test_its_codes_are_what_a_real_engine_attends(
    run: Callable[..., TrialResult], tmp_path: Path
) -> None:
    model = tiny_llama(tmp_path / "model", dtype="float32")
    result = run(
        model,
        [TrialRequest(prompt, GENERATED) for prompt in PROMPTS],
        {"format": {"use": "nf4", "exact_chunk": False}},
        dtype="float32",
        block_size=32,
        max_model_len=512,
    )
    oracle = FormatOracle(model)
    assert [a.token_ids for a in result.answers] == [
        oracle.greedy(prompt, GENERATED, lambda k, v: (nearest(k), nearest(v)))
        for prompt in PROMPTS
    ]
    (report,) = result.reports
    assert (report["name"], report["errors"]) == ("nf4", 0)
    layers, heads = 2, 2
    assert report["counters"]["bytes_per_token"] == layers * heads * 68
