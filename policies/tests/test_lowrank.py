"""Latent attention equals attention over what is read back; the rank is what the error allows."""

from __future__ import annotations

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
from pydantic import ValidationError

from kvplug_policies.calibration import load
from kvplug_policies.format.lowrank import LowRank, smallest_rank, spread

ENGINE = view(layers=2, width=32)
SEEN = {layer.index: activations(layer, rank=8, noise=0.02) for layer in ENGINE.layers}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_calibration(tmp_path_factory.mktemp("cal") / "c.safetensors", ENGINE, SEEN)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_attention_among_latents_is_attention_over_what_is_read(file: str, bits: int) -> None:
    policy = build(LowRank, ENGINE, calibration=file, bits=bits)
    for layer in ENGINE.layers:
        attends_as_it_reads(policy, layer, SEEN[layer.index], 1e-4)


def test_capped_logits_see_whole_products(file: str) -> None:
    policy = build(LowRank, ENGINE, calibration=file)
    attends_as_it_reads(policy, ENGINE.layers[0], SEEN[0], softcap=2.0)


def test_the_rank_is_that_of_the_data_and_bytes_follow(file: str) -> None:
    policy = build(LowRank, ENGINE, calibration=file, max_error=0.05)
    layout = policy.layout(ENGINE.layers[0])
    assert policy.ranks(ENGINE.layers[0]) == (8, 8)
    assert layout.bytes_per_token_head == 2 * 8 * 4
    assert layout.rank == 8


def test_more_error_allowed_is_never_a_larger_rank(file: str) -> None:
    energy = load(file).of(0, "key_energy")
    ranks = [smallest_rank(energy, error) for error in (0.0, 0.001, 0.01, 0.1, 0.9, 1.0)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[-1] == 8
    rank = smallest_rank(energy, 0.001)
    lost = energy[:, rank:].sum(-1) / energy.sum(-1)
    assert float(lost.max()) <= 0.001


def test_error_falls_with_rank_and_bits(file: str) -> None:
    layer = ENGINE.layers[1]
    errors = [
        output_error(build(LowRank, ENGINE, calibration=file, rank=r, bits=b), layer, SEEN[1])
        for r, b in ((8, 4), (8, 8), (8, 16), (24, 16))
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02


def test_keys_are_projected_where_queries_look(tmp_path: Path) -> None:
    """Products with queries lose less than by the principal components of keys alone."""
    engine = view(layers=1, width=32)
    query, key, value = activations(engine.layers[0], noise=0.3)
    query = query * torch.linspace(0.05, 2, 32).flip(0)
    file = write_calibration(tmp_path / "c.safetensors", engine, {0: (query, key, value)})
    policy = build(LowRank, engine, calibration=file, rank=16)
    back, _ = through(policy, engine.layers[0], key, value)
    centred = key - key.mean(1, keepdim=True)
    axes = torch.linalg.eigh(centred.mT @ centred)[1][..., -16:]
    plain = key.mean(1, keepdim=True) + centred @ axes @ axes.mT

    def lost(keys: torch.Tensor) -> float:
        error = (keys - key).repeat_interleave(3, 0)
        return float(torch.einsum("hnd,hmd->hnm", query, error).square().mean())

    assert lost(back) < 0.7 * lost(plain)


@pytest.mark.parametrize("rank", [8, 16, 24, 40, 48, 64])
def test_spreading_is_orthogonal_and_spreads(rank: int) -> None:
    turn = spread(rank)
    torch.testing.assert_close(turn @ turn.T, torch.eye(rank, dtype=torch.float64))
    assert float(turn[0].abs().max()) < 0.6


def test_full_rank_is_refused_where_it_saves_nothing(tmp_path: Path) -> None:
    engine = view(layers=1, width=16)
    seen = {0: activations(engine.layers[0])}
    file = write_calibration(tmp_path / "c.safetensors", engine, seen)
    with pytest.raises(ValueError, match="leaves every layer at its full 16 coordinates"):
        build(LowRank, engine, calibration=file, max_error=0.0)
    assert build(LowRank, engine, calibration=file, max_error=0.0, bits=4)


def test_ranks_that_cannot_be_are_refused(file: str) -> None:
    with pytest.raises(ValidationError, match="multiple of 8"):
        build(LowRank, ENGINE, calibration=file, rank=12)
    with pytest.raises(
        ValueError, match=r"layer 0 \(head size 32\): rank 64 is above the head size 32"
    ):
        build(LowRank, ENGINE, calibration=file, rank=64)


def test_the_calibration_is_part_of_the_blocks_identity(file: str, tmp_path: Path) -> None:
    other = {i: activations(layer, rank=8, seed=5) for i, layer in enumerate(ENGINE.layers)}
    path = write_calibration(tmp_path / "c.safetensors", ENGINE, other)
    one, two = (build(LowRank, ENGINE, calibration=f).fingerprint() for f in (file, path))
    assert one.removesuffix(load(file).checksum) != one
    assert load(file).checksum not in two


def test_fitting_is_for_four_bits(file: str) -> None:
    codings = [
        build(LowRank, ENGINE, calibration=file, rank=16, bits=bits, fit=3)
        .coded(ENGINE.layers[0])
        .key.fit
        for bits in (4, 8)
    ]
    assert codings == [3, 0]
