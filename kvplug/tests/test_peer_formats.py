"""vLLM's own formats: their bytes, their rounding, and what they take as computed."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from kvplug.contract import AttendBatch, EngineView, FormatPolicy, LayerView
from kvplug_lab.fidelity import peer_formats
from kvplug_lab.fidelity.peer_formats import PEERS, PeerFormat

LAYERS = tuple(LayerView(i, 8, 2, 4, 64, "bfloat16") for i in range(8))
PTH = ("vllm_int8", "vllm_fp8", "vllm_int4")


def peer(name: str, layers: tuple[LayerView, ...] = LAYERS, **options: Any) -> PeerFormat:
    (found,) = (p for p in PEERS if p.name == name)
    return found(found.Options.model_validate(options), EngineView(16, layers=layers))


def vectors(n: int = 40, width: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(n, 2, width, generator=source).bfloat16() for _ in range(2))
    return key * 3, value


# Bytes of a token and head by hand: codes and scales, head size 64 and 128.
BYTES = {
    "bf16": (256, 512),
    "vllm_fp8": (2 * (64 + 4), 2 * (128 + 4)),
    "vllm_int8": (2 * (64 + 4), 2 * (128 + 4)),
    "vllm_int4": (2 * (32 + 4), 2 * (64 + 4)),
    "turboquant_k8v4": (64 + 32 + 4, 128 + 64 + 4),
    "turboquant_4bit_nc": (32 + 2 + 32 + 4, 64 + 2 + 64 + 4),
    "turboquant_k3v4_nc": (24 + 2 + 32 + 4, 48 + 2 + 64 + 4),
    "turboquant_3bit_nc": (24 + 2 + 24 + 4, 48 + 2 + 48 + 4),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_are_those_vllm_counts(name: str) -> None:
    for width, expected in zip((64, 128), BYTES[name], strict=True):
        layer = LayerView(4, 8, 2, 4, width, "bfloat16")
        own = peer(name, (layer,))
        assert own.published_bytes(layer) == expected
        layout = own.layout(layer)
        assert 0 <= layout.bytes_per_token_head - expected < 4
        cells = own.encode(layer, *vectors(3, width))
        assert cells.shape == (3, 2, layout.bytes_per_token_head)


def test_every_peer_is_tested() -> None:
    assert set(BYTES) == {p.name for p in PEERS}


@pytest.mark.parametrize(
    ("name", "key_error", "value_error"),
    [
        ("bf16", 0.0, 0.0),
        ("vllm_fp8", 0.026, 0.026),
        ("vllm_int8", 0.006, 0.006),
        ("vllm_int4", 0.095, 0.095),
        ("turboquant_k8v4", 0.027, 0.09),
        ("turboquant_4bit_nc", 0.095, 0.09),
        ("turboquant_k3v4_nc", 0.185, 0.09),
        ("turboquant_3bit_nc", 0.185, 0.195),
    ],
)
def test_what_comes_back_of_gaussians_is_as_near_as_the_bits_allow(
    name: str, key_error: float, value_error: float
) -> None:
    key, value = vectors(2000)
    own = peer(name)
    back = own.decode(LAYERS[4], own.encode(LAYERS[4], key, value))
    for x, y, error in zip((key, value), back, (key_error, value_error), strict=True):
        assert (y - x).norm() / x.float().norm() == pytest.approx(error, rel=0.06, abs=1e-9)


def test_int8_rounds_half_away_from_zero() -> None:
    key = torch.zeros(1, 2, 64)
    key[..., :4] = torch.tensor([127.0, 2.5, -2.5, 0.4])
    own = peer("vllm_int8")
    cells = own.encode(LAYERS[4], key, key)
    assert cells[0, 0, :4].view(torch.int8).tolist() == [127, 3, -3, 0]
    assert cells[0, 0, 64:68].view(torch.float32).item() == 1.0
    zeros = own.encode(LAYERS[4], key * 0, key * 0)
    assert zeros[0, 0, 64:68].view(torch.float32).item() == pytest.approx(1e-6)


def test_int4_hides_the_zero_point_in_the_scale() -> None:
    key, value = vectors(5)
    cells = peer("vllm_int4").encode(LAYERS[4], key, value)
    rotated = peer_formats.randomized_hadamard(key.float()).bfloat16().float()
    low, high = rotated.amin(-1), rotated.amax(-1)
    bits = cells[..., 32:36].contiguous().view(torch.int32)[..., 0]
    scale = (bits & -16).view(torch.float32)
    torch.testing.assert_close(scale, (high - low) / 15, rtol=1e-5, atol=0)
    assert torch.equal(bits & 15, (-low / ((high - low) / 15) + 0.5).int())
    first, second = cells[..., 0] & 15, cells[..., 0] >> 4
    for at, code in ((0, first), (1, second)):
        decoded = (code.float() - (bits & 15)) * scale
        assert ((decoded - rotated[..., at]).abs() <= 0.51 * scale).all()


def test_the_levels_norm_is_corrected() -> None:
    key, value = vectors(9)
    own = peer("turboquant_3bit_nc")
    back, _ = own.decode(LAYERS[4], own.encode(LAYERS[4], key, value))
    expected = key.float().norm(dim=-1).half().float()
    torch.testing.assert_close(back.norm(dim=-1), expected, rtol=1e-5, atol=0)


def test_the_first_and_last_layers_stay_bf16() -> None:
    own = peer("turboquant_4bit_nc")
    assert [own.published_bytes(layer) for layer in LAYERS] == [256, 256, *[70] * 4, 256, 256]
    key, value = vectors(3)
    back = own.decode(LAYERS[1], own.encode(LAYERS[1], key, value))
    assert torch.equal(back[0], key) and torch.equal(back[1], value)
    none = peer("turboquant_4bit_nc", boundary=0)
    assert {none.published_bytes(layer) for layer in LAYERS} == {70}


@pytest.mark.parametrize(("bits", "mse"), [(3, 0.03454), (4, 0.009497)])
def test_levels_are_lloyd_and_max(bits: int, mse: float) -> None:
    """Max (1960), table I: distortion of the best 8 and 16 levels."""
    levels = peer_formats.lloyd_max(64, bits) * 8
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    near = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
    assert (x - near).square().mean() == pytest.approx(mse, rel=0.02)
    torch.testing.assert_close(levels, -levels.flip(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bits", [3, 4])
def test_codes_are_one_string_of_bits(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (7, 64), generator=torch.Generator().manual_seed(bits))
    packed = peer_formats._packed(codes, bits)
    assert packed.shape == (7, 8 * bits)
    assert torch.equal(peer_formats._unpacked(packed, bits), codes)
    word = sum(int(codes[0, i]) << (bits * i) for i in range(8))
    assert packed[0, :bits].tolist() == list(word.to_bytes(bits, "little"))


def test_a_head_size_that_cannot_be_rotated_is_named() -> None:
    with pytest.raises(ValueError, match=r"layer 0, 96 a head: .* power of two"):
        peer("turboquant_4bit_nc", (LayerView(0, 8, 2, 4, 96, "bfloat16"),))


@pytest.mark.parametrize(("name", "new", "before", "layer", "exact"), [
    ("turboquant_3bit_nc", 300, 0, 4, True),
    ("turboquant_3bit_nc", 300, 64, 4, True),
    ("turboquant_3bit_nc", 1, 64, 4, False),
    ("turboquant_3bit_nc", 128, 64, 4, False),
    ("turboquant_3bit_nc", 1, 64, 0, True),
])  # fmt: skip
def test_what_is_read_back_is_what_vllm_reads_back(
    name: str, new: int, before: int, layer: int, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[AttendBatch] = []
    monkeypatch.setattr(
        FormatPolicy, "attend", lambda self, layer, batch, cache, out: handed.append(batch)
    )
    key = torch.zeros(new, 2, 64)
    batch = AttendBatch(
        query=torch.zeros(new, 4, 64),
        query_start=torch.tensor([0, new]),
        block_table=torch.zeros(1, 30, dtype=torch.int32),
        seq_lens=torch.tensor([before + new]),
        scale=1.0,
        max_query_len=new,
        max_seq_len=before + new,
        key=key,
        value=key,
    )
    peer(name).attend(LAYERS[layer], batch, key, key)
    assert (handed[0].key is not None) is exact and (handed[0].value is not None) is exact
    peer(name, reread=0).attend(LAYERS[layer], batch, key, key)
    assert handed[1].key is key


def test_per_token_and_head_reads_everything_back() -> None:
    for name in PTH:
        assert peer(name).options.exact_chunk is False  # type: ignore[attr-defined]
    assert peer("turboquant_4bit_nc").options.exact_chunk is True  # type: ignore[attr-defined]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_rotations_levels_and_sizes_are_vllms_own() -> None:
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.model_executor.layers.quantization.turboquant.config import (
        TQ_PRESETS,
        TurboQuantConfig,
    )
    from vllm.v1.attention.backends.turboquant_attn import _build_hadamard
    from vllm.v1.attention.ops.int4_per_token_head import single_rht

    for width in (64, 96, 128):
        x = torch.randn(5, width, generator=torch.Generator().manual_seed(width))
        turned = peer_formats.randomized_hadamard(x)
        assert torch.equal(turned, single_rht(x))
        block = width & -width
        back = peer_formats.randomized_hadamard(turned, inverse=True)
        torch.testing.assert_close(back, single_rht(turned, inverse=True) / block)
        torch.testing.assert_close(back, x)
    for width in (64, 128):
        x = torch.randn(5, width, generator=torch.Generator().manual_seed(width))
        theirs = x @ _build_hadamard(width, "cpu")
        torch.testing.assert_close(peer_formats.hadamard(x) / width**0.5, theirs)
        for bits in (3, 4):
            mine = peer_formats.lloyd_max(width, bits)
            torch.testing.assert_close(mine, get_centroids(width, bits), atol=1e-6, rtol=0)
    own = {p.name: p for p in PEERS if p.name.startswith("turboquant")}
    assert set(own) == set(TQ_PRESETS)
    for name, policy in own.items():
        preset = TurboQuantConfig.from_cache_dtype(name, 128)
        assert preset.slot_size_aligned == BYTES[name][1]
        assert (preset.key_quant_bits, preset.value_quant_bits) == (
            policy.key_bits,
            policy.value_bits,
        )
        assert preset.norm_correction is (policy.key_bits != 8)
