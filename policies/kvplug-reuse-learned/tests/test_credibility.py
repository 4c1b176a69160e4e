"""The check `credibility`: its file, its features, and what it decides by them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from kvplug.contract import EngineView, LayerView
from kvplug.contract.reuse import Candidate, Fingerprint, ReuseRequest
from kvplug_reuse_learned.calibration import FEATURES, Estimator, ReuseCalibration, features, load
from kvplug_reuse_learned.credibility import Credibility

F = len(FEATURES)
PRINT = Fingerprint(
    model="m", tokenizer="t", lora="", dtype="bfloat16", format="", position="rope/neox/1",
    geometry=(2, 2, 8), tenant="", mask="causal", start=20, length=100, context=b"a" * 16,
    tokens=b"t" * 16, created=0.0, request_id="r",
)  # fmt: skip


def stored(**changes: Any) -> Candidate:
    return Candidate(dataclasses.replace(PRINT, **changes))


def asked(tokens: int = 400, **changes: Any) -> ReuseRequest:
    return ReuseRequest(dataclasses.replace(PRINT, **changes), "r2", 0, tokens, True)


def logistic(**weights: float) -> ReuseCalibration:
    """A logistic regression over features that are not standardised."""
    scale = np.stack([np.zeros(F), np.ones(F), np.full(F, -100.0), np.full(F, 100.0)])
    tensors = {
        "features": scale.astype(np.float32),
        "credibility_mean": np.array([0.5], dtype=np.float32),
        "logistic.weight": np.array([weights.get(n, 0.0) for n in FEATURES], dtype=np.float32),
        "logistic.bias": np.array([weights.get("bias", 0.0)], dtype=np.float32),
    }
    return ReuseCalibration(
        "", "f" * 64, "model", "0" * 64, "logistic", {0: (2, 8), 1: (2, 8)},
        {"agreement": 0.9, "divergence": 0.05}, {"auc": 0.8}, tensors,
    )  # fmt: skip


def perceptron(seed: int = 0) -> ReuseCalibration:
    random = np.random.default_rng(seed)
    base = logistic()
    tensors = {name: t for name, t in base.tensors.items() if not name.startswith("logistic")}
    shapes = {
        "hidden.weight": (F, 4), "hidden.bias": (4,), "output.weight": (4,), "output.bias": (1,)
    }  # fmt: skip
    for name, shape in shapes.items():
        tensors[name] = random.normal(size=shape).astype(np.float32)
    return dataclasses.replace(base, kind="mlp", tensors=tensors)


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., Credibility]:
    def build(made: ReuseCalibration, engine: EngineView | None = None, **options: Any) -> Any:
        file = tmp_path / "reuse.safetensors"
        made.save(file)
        known = Credibility.Options.model_validate({"model": str(file), **options})
        return Credibility(known, engine or EngineView(16))

    return build


# -- what it decides -------------------------------------------------------------------------------


def test_exact_candidates_are_credible_whatever_the_model_says(
    check: Callable[..., Credibility],
) -> None:
    never = check(logistic(bias=-20))
    verdict = never.check(stored(), asked())
    assert (verdict.ok, verdict.exact, verdict.confidence) == (True, True, 1.0)
    for candidate, request in (
        (stored(ancestry=1), asked()),
        (stored(), asked(context=b"b" * 16)),
        (stored(), asked(start=40)),
    ):
        verdict = never.check(candidate, request)
        assert (verdict.ok, verdict.exact, verdict.reason) == (False, False, "not credible")
        assert verdict.confidence == pytest.approx(1 / (1 + math.exp(20)))


def test_the_threshold_is_the_least_probability(check: Callable[..., Credibility]) -> None:
    made = logistic(shifted=1.0)
    chance = 1 / (1 + math.exp(-1))
    candidate, request = stored(), asked(start=50, context=b"b" * 16)
    below = check(made, threshold=chance - 1e-3).check(candidate, request)
    assert below.ok and not below.exact
    assert below.confidence == pytest.approx(chance)
    above = check(made, threshold=chance + 1e-3).check(candidate, request)
    assert (above.ok, above.reason) == (False, "not credible")
    assert above.confidence == pytest.approx(chance)


def test_what_it_gave_is_counted(check: Callable[..., Credibility]) -> None:
    policy = check(logistic(shifted=2.0), threshold=0)
    for start in (20, 20, 50):
        policy.check(stored(), asked(start=start, context=b"b" * 16))
    policy.check(stored(), asked())
    assert policy.counters() == {
        "credibility_0.5_to_0.6": 2.0,
        "credibility_0.8_to_0.9": 1.0,
    }


# -- what it looks at ------------------------------------------------------------------------------


def test_features_say_what_their_names_do() -> None:
    measures = {
        "k_drift": 0.1, "v_drift": 0.2, "sparsity": 0.3, "key_cosine": 0.4, "outgoing": 0.5
    }  # fmt: skip
    candidate = stored(start=0, length=99, ancestry=2, measures=measures)
    found = dict(zip(FEATURES, features(candidate, asked(396, start=63)), strict=True))
    assert found == pytest.approx(
        {
            "log_length": math.log(100),
            "log_shift": math.log(64),
            "shifted": 1.0,
            "log_before": math.log(64),
            "log_before_then": 0.0,
            "no_context_then": 1.0,
            "same_context": 1.0,
            "ancestry": 2.0,
            **measures,
            "outgoing_absent": 0.0,
            "share": 0.25,
            "log_after": math.log(396 - 63 - 99 + 1),
        }
    )


def test_a_measure_nobody_took_counts_as_the_mean_of_training() -> None:
    bare = features(stored(), asked())
    where = FEATURES.index("outgoing")
    assert math.isnan(bare[where]) and bare[FEATURES.index("outgoing_absent")] == 1.0
    broken = features(stored(measures={"outgoing": math.inf}), asked())
    assert broken[FEATURES.index("outgoing_absent")] == 1.0
    made = logistic(outgoing=3.0)
    scale = made.tensors["features"].copy()
    scale[0, where] = 0.7
    estimator = Estimator("logistic", scale, made.tensors)
    assert estimator.probability(bare) == pytest.approx(0.5)
    assert estimator.probability(broken) == pytest.approx(0.5)


def test_nothing_is_further_out_than_in_training() -> None:
    made = logistic(log_length=1.0)
    scale = made.tensors["features"].copy()
    scale[2:, 0] = 3.0, 5.0
    scale[0, 0] = 4.0
    estimator = Estimator("logistic", scale, made.tensors)
    long = features(stored(length=100_000), asked(200_000))
    assert estimator.standard(long)[0] == 1.0
    assert estimator.probability(long) == pytest.approx(1 / (1 + math.exp(-1)))


def test_a_perceptron_is_what_its_weights_say(check: Callable[..., Credibility]) -> None:
    made = perceptron()
    x = features(stored(measures={"outgoing": 0.1}), asked(start=30))
    z = np.where(np.isfinite(x), x, 0.0)
    t = made.tensors
    logit = 0.0
    for h in range(4):
        inside = sum(z[f] * t["hidden.weight"][f, h] for f in range(F)) + t["hidden.bias"][h]
        logit += math.tanh(inside) * t["output.weight"][h]
    expected = 1 / (1 + math.exp(-(logit + t["output.bias"][0])))
    assert made.estimator.probability(x) == pytest.approx(expected, rel=1e-5)
    verdict = check(made, threshold=0).check(stored(measures={"outgoing": 0.1}), asked(start=30))
    assert verdict.confidence == pytest.approx(expected, rel=1e-5)


# -- the file --------------------------------------------------------------------------------------


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    for made in (logistic(bias=1.5), perceptron()):
        path = tmp_path / f"{made.kind}.safetensors"
        made.save(path)
        found = load(path)
        for field in dataclasses.fields(made):
            if field.name not in ("path", "tensors"):
                assert getattr(found, field.name) == getattr(made, field.name), field.name
        assert set(found.tensors) == set(made.tensors)
        for name, tensor in made.tensors.items():
            np.testing.assert_array_equal(found.tensors[name], tensor)


def resave(path: Path, edit: Callable[[dict[str, str], dict[str, Any]], None]) -> None:
    with safe_open(path, framework="np") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    edit(metadata, tensors)
    save_file(tensors, path, metadata=metadata)


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "reuse.safetensors"

    def refused(edit: Callable[[dict[str, str], dict[str, Any]], None], said: str) -> None:
        logistic().save(path)
        resave(path, edit)
        with pytest.raises(ValueError, match=said) as error:
            load(path)
        assert str(path) in str(error.value)

    def weight(m: dict[str, str], t: dict[str, Any]) -> None:
        t["logistic.weight"][0] += 1

    refused(weight, "edited or damaged")
    refused(lambda m, t: m.update(version="1"), "version '1'")
    refused(lambda m, t: m.update(format="kvplug-calibration"), "is not a reuse calibration")
    refused(lambda m, t: m.update(model="other"), "edited or damaged")
    refused(lambda m, t: m.pop("bounds"), "edited or damaged")  # type: ignore[arg-type,return-value]
    logistic().save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated"):
        load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load(path)
    with pytest.raises(ValueError, match="kvplug calibrate reuse --output"):
        load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"logistic.weight": np.zeros(3, dtype=np.float32)}, "shape"),
        (
            {"logistic.weight": np.full(F, np.nan, dtype=np.float32)},
            "lacks a valid tensor logistic.weight",
        ),
        ({"features": np.zeros((4, F), dtype=np.float32)}, "inconsistent feature statistics"),
        ({"other": np.zeros(1, dtype=np.float32)}, "unknown tensor other"),
        ({"layers.0.mean": np.zeros(35, dtype=np.float32)}, "lacks a valid tensor layers.0.encode"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str
) -> None:
    made = logistic()
    broken = dataclasses.replace(made, tensors={**made.tensors, **change})
    path = tmp_path / "reuse.safetensors"
    with pytest.raises(ValueError, match=said):
        broken.save(path)
    # A file whose checksum is right and whose tensors are not was made to deceive.
    with monkeypatch.context() as patch:
        patch.setattr("kvplug_reuse_learned.calibration._check_tensors", lambda *a: None)
        broken.save(path)
    with pytest.raises(ValueError, match=said):
        load(path)


def test_another_model_is_refused(check: Callable[..., Credibility], tmp_path: Path) -> None:
    layers = (LayerView(0, 2, 2, 4, 8), LayerView(1, 2, 2, 4, 8))
    check(logistic(), EngineView(16, layers=layers, model="f" * 64))
    check(logistic(), EngineView(16, layers=layers))
    with pytest.raises(ValueError, match="made for another model"):
        check(logistic(), EngineView(16, layers=layers, model="e" * 64))


def test_the_file_need_not_be_there_before_an_engine_is(tmp_path: Path) -> None:
    options = Credibility.Options.model_validate({"model": str(tmp_path / "later.safetensors")})
    early = Credibility(options, EngineView(16))
    assert early.check(stored(), asked()).confidence == 1.0
    verdict = early.check(stored(), asked(start=30))
    assert (verdict.ok, verdict.reason) == (False, "not calibrated")
    with pytest.raises(ValueError, match="cannot be read"):
        Credibility(options, EngineView(16, layers=(LayerView(0, 1, 2, 4, 8),)))
