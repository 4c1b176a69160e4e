"""Every preset serves a real model: on a CPU in blocks of 32 or 64 tokens, with tiers that fit.

Slow: `test_multimodal` runs what `multi_turn` and `multimodal` name, and the kinds of the others
run in the tests of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvplug import configs
from kvplug.hosts.vllm.flags import read_config
from kvplug_lab.engine.trial import TrialRequest, TrialResult

Run = Callable[..., TrialResult]


@pytest.mark.slow
@pytest.mark.parametrize("name", configs.known(configs.PRESETS))
def test_a_preset_serves(
    run: Run, smollm2: Path, passages: Callable[..., list[str]], name: str
) -> None:
    file = read_config(configs.shipped(f"presets/{name}"))
    section: dict[str, Any] = dict(file.deployment.section)
    if "tiers" in section:
        section["tiers"] = [_small(tier) for tier in section["tiers"]]
    texts = passages(3, 150)
    requests = [*(TrialRequest(t, 16) for t in texts), TrialRequest(texts[0], 16, wave=1)]
    result = run(
        smollm2,
        requests,
        section,
        max_model_len=1024,
        block_size=max(int(file.flags["block-size"]), 32),
        dtype="bfloat16",
    )
    assert [len(answer.token_ids) for answer in result.answers] == [16] * 4
    kinds = {report["kind"] for report in result.reports}
    assert kinds >= {key for key in section if key in ("prefix_cache", "format", "sequence")}
    for report in result.reports:
        # Nobody runs the server; its tier says so, and requests compute.
        assert (report["errors"] > 0) == (report["name"] == "redis"), report


def _small(tier: dict[str, Any]) -> dict[str, Any]:
    """A tier with room for a test, and a server that nobody runs."""
    ((name, options),) = tier.items()
    if name == "host":
        return {name: {**options, "size": "64MiB"}}
    return {name: {**options, "url": "redis://127.0.0.1:9/0", "timeout": 0.2}}
