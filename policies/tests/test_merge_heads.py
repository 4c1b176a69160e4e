"""Heads that are alike share a stored one, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calibrated import (
    activations,
    attends_as_it_reads,
    build,
    output_error,
    through,
    view,
    write_calibration,
)
from torch import Tensor

from kvplug.contract import EngineView
from kvplug_lab.calibrate.statistics import received
from kvplug_policies.calibration import load
from kvplug_policies.format.merge_heads import MergeHeads

Seen = dict[int, tuple[Tensor, Tensor, Tensor]]


def alike(engine: EngineView, fit: str, noise: float = 0.02) -> Seen:
    """Layer 0: heads 0 and 2 nearly say the same; layer 1: heads differ."""
    found = {}
    for layer in engine.layers:
        query, key, value = activations(layer, rank=0, seed=3)
        if layer.index == 0:
            random = torch.Generator().manual_seed(1)
            for x, gain in ((key, 0.7), (value, 1.6)):
                width = layer.head_size
                turn = torch.eye(width) * gain
                if fit == "linear":
                    turn = torch.randn(width, width, generator=random) / width**0.5
                x[2] = x[0] @ turn + noise * torch.randn(x[2].shape, generator=random) + 1.0
        found[layer.index] = (query, key, value)
    return found


@pytest.fixture(params=["linear", "gain"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[EngineView, Seen, str, str]:
    engine = view(layers=2, kv_heads=3, width=16)
    seen = alike(engine, request.param)
    file = write_calibration(tmp_path / "c.safetensors", engine, seen)
    return engine, seen, file, request.param


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_attention_over_shared_heads_is_attention_over_what_is_read(
    case: tuple[EngineView, Seen, str, str], bits: int
) -> None:
    engine, seen, file, fit = case
    policy = build(MergeHeads, engine, calibration=file, fit=fit, bits=bits)
    for layer in engine.layers:
        attends_as_it_reads(policy, layer, seen[layer.index], 1e-4)
    attends_as_it_reads(policy, engine.layers[0], seen[0], 1e-4, softcap=3.0)


def test_only_heads_that_are_alike_share(case: tuple[EngineView, Seen, str, str]) -> None:
    engine, seen, file, fit = case
    policy = build(MergeHeads, engine, calibration=file, fit=fit, max_error=0.05)
    assert policy.shared[0].group == (0, 1, 0)
    assert policy.shared[1].group == (0, 1, 2)
    assert [policy.layout(layer).heads for layer in engine.layers] == [2, 3]
    assert policy.counters()["stored_heads"] == 5
    assert 0 < policy.shared[0].error < 0.05 < policy.shared[1].best
    assert output_error(policy, engine.layers[0], seen[0]) < 0.1
    key, value = seen[1][1:]
    back = through(policy, engine.layers[1], key, value)
    assert torch.equal(back[0], key)
    assert torch.equal(back[1], value)
    assert torch.equal(through(policy, engine.layers[0], *seen[0][1:])[0][1], seen[0][1][1])


def test_the_error_stated_is_the_energy_lost(case: tuple[EngineView, Seen, str, str]) -> None:
    engine, seen, file, fit = case
    policy = build(MergeHeads, engine, calibration=file, fit=fit, max_error=0.05)
    query, key, value = seen[0]
    back = through(policy, engine.layers[0], key, value)
    pair, lost = [0, 2], []
    weight = 1 + received(query, key, 16**-0.5)
    products = torch.einsum("hmd,hme->hde", query.view(3, -1, 16), query.view(3, -1, 16))
    for x, y, by in ((key, back[0], products), (value, back[1], torch.eye(16).expand(3, -1, -1))):
        error, centred = x - y, x - x.mean(1, keepdim=True)
        parts = [
            torch.einsum("hnd,hde,hne,n->", e[pair], by[pair], e[pair], weight)
            for e in (error, centred)
        ]
        lost.append(float(parts[0] / parts[1]))
    assert max(lost) == pytest.approx(policy.shared[0].error, rel=0.02)


def test_all_heads_may_become_one(tmp_path: Path) -> None:
    engine = view(layers=1, kv_heads=4, width=16)
    query, key, value = activations(engine.layers[0])
    for x in (key, value):
        x[1:] = x[:1] + 0.01 * x[1:]
    file = write_calibration(tmp_path / "c.safetensors", engine, {0: (query, key, value)})
    policy = build(MergeHeads, engine, calibration=file)
    assert policy.layout(engine.layers[0]).heads == 1
    attends_as_it_reads(policy, engine.layers[0], (query, key, value), 1e-4)


def test_nothing_to_merge_is_refused_with_the_best_there_is(tmp_path: Path) -> None:
    engine = view(layers=2, kv_heads=2, width=16)
    seen = {layer.index: activations(layer) for layer in engine.layers}
    file = write_calibration(tmp_path / "c.safetensors", engine, seen)
    best = min(float(load(file).of(i, "merge_linear.errors")[0]) for i in range(2))
    with pytest.raises(ValueError, match=rf"cannot merge any heads: the best .* loses {best:.3g}"):
        build(MergeHeads, engine, calibration=file, max_error=0.01)
    single = view(layers=1, kv_heads=1)
    file = write_calibration(tmp_path / "d.safetensors", single, {0: activations(single.layers[0])})
    with pytest.raises(ValueError, match="no layer has two KV heads"):
        build(MergeHeads, single, calibration=file)


def test_part_of_the_layers_may_have_nothing_to_merge(
    case: tuple[EngineView, Seen, str, str],
) -> None:
    """A stage of a pipeline, or the layers that `mixed` gives it."""
    engine, seen, file, fit = case
    stage = replace(engine, layers=engine.layers[1:])
    policy = build(MergeHeads, stage, calibration=file, fit=fit, max_error=0.05)
    back = through(policy, engine.layers[1], *seen[1][1:])
    assert torch.equal(back[0], seen[1][1])
