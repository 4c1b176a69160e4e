"""The check `compensate`: a fitted correction is put where it belongs, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvplug.contract import EngineView, Feature, LayerView, Rope
from kvplug.contract.reuse import Candidate, Fingerprint, Placement, ReuseRequest, Verdict
from kvplug_reuse_learned.calibration import DECAYS, FEATURES, ReuseCalibration
from kvplug_reuse_learned.compensate import Compensate

H, D, RANK = 2, 8, 6
WIDTH = 2 * H * D
TABLE = (1.0, 0.3, 0.1, 0.03)
HALVES = Rope(TABLE)
APPROXIMATE = Verdict(True, exact=False)


def made(seed: int = 0, corrected: bool = True, credibility: float = 0.5) -> ReuseCalibration:
    random = np.random.default_rng(seed)
    count = len(FEATURES)
    scale = np.stack([np.zeros(count), np.ones(count), np.zeros(count), np.ones(count)])
    tensors: dict[str, Any] = {
        "features": scale,
        "credibility_mean": np.array([credibility]),
        "logistic.weight": np.zeros(count),
        "logistic.bias": np.zeros(1),
    }
    for layer in range(2) if corrected else ():
        at, inputs = f"layers.{layer}.", WIDTH + len(DECAYS)
        tensors[f"{at}mean"] = random.normal(size=inputs)
        tensors[f"{at}encode"] = random.normal(size=(inputs, RANK)) * 0.2
        tensors[f"{at}decode"] = random.normal(size=(RANK, WIDTH)) * 0.2
        tensors[f"{at}residual"] = random.normal(size=WIDTH)
        # The length of a key of H * D unit normal elements.
        tensors[f"{at}norm"] = np.array([math.log(H * D) / 2, 0.3])
    single = {name: np.asarray(t, dtype=np.float32) for name, t in tensors.items()}
    return ReuseCalibration(
        "", "f" * 64, "model", "0" * 64, "logistic", {0: (H, D), 1: (H, D)}, {}, {}, single
    )


def layer(index: int = 0, rope: Rope | None = HALVES, heads: int = H) -> LayerView:
    return LayerView(index, 2, heads, 4, D, "float32", rope)


def placement(
    *, start: int = 50, offset: int = 0, length: int = 10, then: int = 7,
    verdict: Verdict = APPROXIMATE, position: str = "rope/neox/1",
) -> Placement:  # fmt: skip
    fingerprint = Fingerprint(
        model="", tokenizer="", lora="", dtype="float32", format="", position=position,
        geometry=(2, H, D), tenant="", mask="causal", start=then, length=64, context=b"",
        tokens=b"", created=0.0, request_id="",
    )  # fmt: skip
    return Placement(fingerprint, offset, length, start, verdict)


@pytest.fixture
def policy(tmp_path: Path) -> Callable[..., Compensate]:
    def build(
        calibration: ReuseCalibration | None = None, engine: EngineView | None = None, **more: Any
    ) -> Compensate:
        file = tmp_path / "reuse.safetensors"
        (calibration or made()).save(file)
        options = Compensate.Options.model_validate({"model": str(file), "keys": True, **more})
        return Compensate(options, engine or EngineView(16, layers=(layer(0), layer(1))))

    return build


def kv(n: int = 10, seed: int = 1) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(n, H, D, generator=source), torch.randn(n, H, D, generator=source)


def rotation(key: Tensor, at: int, rope: Rope) -> Tensor:
    """Keys ``[n, H, d]`` rotated by ``at, at + 1, ...``, pair by pair in complex numbers."""
    p = len(rope.frequencies)
    first, second = (
        (slice(0, 2 * p, 2), slice(1, 2 * p, 2)) if rope.interleaved
        else (slice(0, p), slice(p, 2 * p))
    )  # fmt: skip
    out = key.double().clone()
    angles = (
        torch.arange(at, at + len(key))[:, None, None] * torch.tensor(rope.frequencies).double()
    )
    turn = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.complex(out[..., first], out[..., second]) * turn
    out[..., first], out[..., second] = pairs.real, pairs.imag
    return out


def expected(
    bare: Tensor, value: Tensor, index: int, rank: int, offset: int, alpha: float
) -> tuple[Tensor, Tensor]:
    """The correction by its definition, token by token, in float64 and before rotation."""
    t = {n: torch.from_numpy(a).double() for n, a in made().tensors.items()}
    at = f"layers.{index}."
    keys, values = bare.double().clone(), value.double().clone()
    for i in range(len(bare)):
        where = torch.tensor([math.exp(-(offset + i) / d) for d in DECAYS], dtype=torch.float64)
        x = torch.cat([keys[i].flatten(), values[i].flatten(), where])
        found = (x - t[f"{at}mean"]) @ t[f"{at}encode"][:, :rank] @ t[f"{at}decode"][:rank]
        found = found + t[f"{at}residual"]
        mean, deviation = t[f"{at}norm"].tolist()
        far = abs(math.log(float(keys[i].norm())) - mean) / deviation
        found *= alpha * math.exp(-max(far - 2, 0))
        keys[i] += found[: WIDTH // 2].view(H, D)
        values[i] += found[WIDTH // 2 :].view(H, D)
    return keys, values


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("index", "rank", "offset"), [(0, 6, 0), (1, 3, 0), (0, 1, 17)])
def test_the_correction_is_added_before_rotation(
    policy: Callable[..., Compensate], interleaved: bool, index: int, rank: int, offset: int
) -> None:
    rope = Rope(TABLE, interleaved)
    bare, value = kv()
    key = rotation(bare, 50, rope).float()
    before = key.clone(), value.clone()
    found = policy(rank=rank).adapt(layer(index, rope), placement(offset=offset), key, value)
    keys, values = expected(bare, value, index, rank, offset, 1.0)
    torch.testing.assert_close(found[0].double(), rotation(keys, 50, rope), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1].double(), values, atol=1e-4, rtol=1e-4)
    assert torch.equal(key, before[0]) and torch.equal(value, before[1])


def test_by_default_values_alone_are_corrected(policy: Callable[..., Compensate]) -> None:
    assert not Compensate.Options().keys
    key, value = kv()
    both = policy().adapt(layer(), placement(), key, value)
    found = policy(keys=False).adapt(layer(), placement(), key, value)
    assert found[0] is key
    assert torch.equal(found[1], both[1]) and not torch.equal(found[1], value)


def test_keys_without_rotation_are_corrected_as_they_are(
    policy: Callable[..., Compensate],
) -> None:
    key, value = kv()
    found = policy().adapt(layer(rope=None), placement(position="none"), key, value)
    keys, values = expected(key, value, 0, RANK, 0, 1.0)
    torch.testing.assert_close(found[0].double(), keys, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1].double(), values, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="rotation of layer 0 is unknown"):
        policy().adapt(layer(rope=None), placement(), key, value)


def test_a_run_in_two_parts_is_corrected_as_in_one(policy: Callable[..., Compensate]) -> None:
    key, value = kv()
    one = policy().adapt(layer(), placement(), key, value)
    parts = [
        policy().adapt(
            layer(), placement(offset=a, start=50 + a, length=b - a), key[a:b], value[a:b]
        )
        for a, b in ((0, 4), (4, 10))
    ]
    for whole, pieces in zip(one, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(pieces), whole, atol=1e-5, rtol=1e-5)


def test_exact_placements_are_left_alone(policy: Callable[..., Compensate]) -> None:
    exact = placement(verdict=Verdict(True, exact=True))
    own = policy()
    assert not own.adapts(exact) and own.adapts(placement())
    key, value = kv()
    found = own.adapt(layer(), exact, key, value)
    assert found[0] is key and found[1] is value
    assert own.counters() == {"compensated": 0.0}
    own.adapt(layer(), placement(), key, value)
    own.adapt(layer(1), placement(), key, value)
    assert own.counters() == {"compensated": 1.0}


def test_it_is_blended_by_credibility_and_strength(policy: Callable[..., Compensate]) -> None:
    def alpha(credibility: float | None, **more: Any) -> float:
        verdict = Verdict(True, exact=False, confidence=credibility)
        return policy(made(credibility=0.6), **more).alpha(placement(verdict=verdict))

    assert alpha(None) == 1.0 and alpha(None, strength=0.3) == 0.3
    assert alpha(0.2) == alpha(0.6) == 1.0
    assert alpha(0.8) == pytest.approx(0.5)
    assert alpha(1.0) == 0.0
    assert alpha(0.8, strength=0.5) == pytest.approx(0.25)
    sure = placement(verdict=Verdict(True, exact=False, confidence=1.0))
    assert not policy().adapts(sure)
    key, value = kv()
    half = Verdict(True, exact=False, confidence=0.75)
    found = policy().adapt(layer(rope=None), placement(verdict=half, position="none"), key, value)
    keys, values = expected(key, value, 0, RANK, 0, 0.5)
    torch.testing.assert_close(found[0].double(), keys, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1].double(), values, atol=1e-4, rtol=1e-4)


def test_keys_unlike_those_of_calibration_are_hardly_changed(
    policy: Callable[..., Compensate],
) -> None:
    key, value = kv()
    key[3] *= 1000
    keys, values = policy().adapt(layer(rope=None), placement(position="none"), key, value)
    change = (values - value).abs().amax((1, 2))
    assert change[3] < 1e-3 < 0.05 < change[[0, 1, 2, 4, 5]].min()
    assert (keys[3] - key[3]).abs().max() < 1


def test_the_sink_of_a_text_of_its_own_stays(policy: Callable[..., Compensate]) -> None:
    key, value = kv()
    alone = policy().adapt(layer(), placement(then=0), key, value)
    assert torch.equal(alone[0][0], key[0]) and torch.equal(alone[1][0], value[0])
    assert not torch.equal(alone[0][1], key[1])
    later = policy().adapt(layer(), placement(then=0, offset=1), key, value)
    assert not torch.equal(later[0][0], key[0])


def test_dtypes_and_empty_runs(policy: Callable[..., Compensate]) -> None:
    key, value = kv()
    found = policy().adapt(layer(), placement(), key.bfloat16(), value.bfloat16())
    exact = policy().adapt(layer(), placement(), key.bfloat16().float(), value.bfloat16().float())
    for low, high in zip(found, exact, strict=True):
        assert low.dtype == torch.bfloat16
        assert torch.equal(low, high.bfloat16())
    assert policy().adapt(layer(), placement(length=0), key[:0], value[:0])[0].shape == (0, H, D)


def test_what_does_not_fit_is_refused(policy: Callable[..., Compensate], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no corrections"):
        policy(made(corrected=False))
    with pytest.raises(ValueError, match=r"2 KV heads of 8 where layer 1 .* 1 KV heads of 8"):
        policy(None, EngineView(16, layers=(layer(0), layer(1, heads=1))))
    with pytest.raises(ValueError, match="no such layer where layer 2"):
        policy(None, EngineView(16, layers=(layer(0), layer(1), layer(2))))
    with pytest.raises(ValueError, match="another model"):
        policy(None, EngineView(16, layers=(layer(0),), model="e" * 64))
    key, value = kv()
    with pytest.raises(ValueError, match="1 KV heads of 8 here"):
        policy().adapt(layer(), placement(), key[:, :1], value[:, :1])
    with pytest.raises(ValueError, match="has no layer 7"):
        policy().adapt(layer(7), placement(), key, value)
    assert Feature.TENSOR_PARALLEL not in Compensate.supports
    options = Compensate.Options.model_validate({"model": str(tmp_path / "later.safetensors")})
    early = Compensate(options, EngineView(16))
    assert not early.adapts(placement())
    candidate = Candidate(placement().fingerprint)
    assert early.check(candidate, ReuseRequest(candidate.fingerprint, "", 0, 99, True)).ok
