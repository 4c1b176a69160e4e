from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from kvplug.testing.sequence import build, residents
from kvplug_policies import scores as shared
from kvplug_policies.scores import ALWAYS
from kvplug_policies.sequence.morph_kv import MorphKV


@pytest.mark.parametrize("fusion", ["max", "sum"])
@pytest.mark.parametrize("small_chunks", [False, True])
def test_old_tokens_score_what_the_window_pays_them(
    fusion: str, small_chunks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small_chunks:
        monkeypatch.setattr(shared, "CHUNK_BYTES", 4 * 2 * 4 * 60 * 3)
    window, held = 8, 60
    random = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 2, held, 8, generator=random)
    queries = torch.randn(2, window, 4, 8, generator=random)
    logits = torch.einsum("rwhd,rhtd->rhwt", queries, keys.repeat_interleave(2, 1)) / math.sqrt(8)
    above = torch.ones(window, held).triu(held - window + 1).bool()
    weights = logits.masked_fill(above, -math.inf).softmax(-1)
    fused = weights.amax(2) if fusion == "max" else weights.sum(2)
    expected = fused.unflatten(1, (2, 2)).mean(2)
    got = build(MorphKV, window=window, fusion=fusion).score(residents(keys, queries=queries))
    torch.testing.assert_close(got[..., :-window], expected[..., :-window])
    assert (got[..., -window:] == ALWAYS).all()


def test_one_strong_query_outweighs_two_mild_ones_by_max_and_not_by_sum() -> None:
    keys = torch.zeros(1, 1, 6, 2)
    keys[0, 0, 0, 0] = keys[0, 0, 1, 1] = 1.0
    queries = torch.tensor([[[[5.0, 0.0]], [[-5.0, 1.5]], [[-5.0, 1.5]]]])
    held = residents(keys, queries=queries, scale=1.0)
    by_max, by_sum = (
        build(MorphKV, window=3, fusion=f, budget=4, recent=0).score(held)[0, 0]
        for f in ("max", "sum")
    )
    assert by_max[0] > by_max[1]
    assert by_sum[0] < by_sum[1]


@pytest.mark.parametrize("options", [{"fusion": "mean"}, {"window": 0}, {"budget": 33, "sink": 2}])
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        MorphKV.Options.model_validate(options)
