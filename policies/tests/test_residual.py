"""A corrected format loses less, attends what it reads, and costs the bytes it says."""

from __future__ import annotations

from typing import Any

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
from torch import Tensor

from kvplug.contract import Feature, LayerView, Recent, WriteBatch
from kvplug_policies.format.fp8 import Fp8
from kvplug_policies.format.int4 import Int4
from kvplug_policies.format.int8 import Int8
from kvplug_policies.format.kivi import Kivi
from kvplug_policies.format.residual import Residual, rank_one

ENGINE = view(layers=2, width=32)


def skewed(layer: LayerView) -> tuple[Tensor, Tensor, Tensor]:
    """Channels far from 0, and two of them much wider than the others."""
    query, key, value = activations(layer, seed=7)
    for x in (key, value):
        x[:, :, 5] *= 12
        x[:, :, 20] *= 9
        x += 6 * torch.sign(torch.randn(x.shape[0], 1, 32, generator=torch.Generator()))
    return query / 8, key, value


SEEN = {layer.index: skewed(layer) for layer in ENGINE.layers}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_calibration(tmp_path_factory.mktemp("cal") / "c.safetensors", ENGINE, SEEN)


INNER = [
    ("int8", {}, {}),
    ("int4", {}, {"outliers": 4}),
    ("int4", {"group": 16}, {"outliers": 16}),
    ("fp8", {}, {"outliers": 2}),
    ("kivi", {"group": 16, "bits": 2}, {}),
    ("kivi", {"group": 16, "bits": 4}, {"outliers": 4}),
    ("rotated", {"bits": 3}, {}),
    ("lowrank", {"rank": 16, "bits": 8}, {}),
    ("merge_heads", {"max_error": 1.0}, {}),
]


@pytest.mark.parametrize(("name", "options", "own"), INNER, ids=lambda x: str(x))
def test_attention_is_that_over_what_is_read(
    file: str, name: str, options: dict[str, Any], own: dict[str, Any]
) -> None:
    policy = build(Residual, ENGINE, calibration=file, format=name, options=options, **own)
    for layer in ENGINE.layers:
        attends_as_it_reads(policy, layer, SEEN[layer.index], 3e-4)
    attends_as_it_reads(policy, ENGINE.layers[0], SEEN[0], 3e-4, softcap=3.0)


def test_integer_products_stay_integer(file: str) -> None:
    policy = build(Residual, ENGINE, calibration=file, format="hack", options={"bits": 8})
    assert policy.integer
    attends_as_it_reads(policy, ENGINE.layers[0], SEEN[0], 0.2)


def test_each_correction_lowers_the_error_at_the_bytes_it_says(file: str) -> None:
    layer = ENGINE.layers[0]
    bare = build(Int4, ENGINE, rotate=False)
    off = {"mean": False, "rank1": False, "options": {"rotate": False}}
    size = bare.layout(layer).bytes_per_token_head
    error = output_error(bare, layer, SEEN[0])

    def residual(**options: Any) -> tuple[float, int]:
        policy = build(Residual, ENGINE, calibration=file, **{**off, **options})
        return output_error(policy, layer, SEEN[0]), policy.layout(layer).bytes_per_token_head

    mean, outliers = residual(mean=True), residual(outliers=2)
    both = residual(mean=True, outliers=2)
    assert mean[1] == size
    assert outliers[1] == both[1] <= size + 2 * (2 + 4)
    assert mean[0] < 0.8 * error
    assert outliers[0] < 0.8 * error
    assert both[0] < 0.6 * min(mean[0], outliers[0])


def test_the_outliers_are_the_wide_channels(file: str) -> None:
    policy = build(Residual, ENGINE, calibration=file, outliers=2, rank1=False)
    order = policy._maps.get(ENGINE.layers[0], torch.device("cpu"))["key_order"]
    assert order[:, :2].tolist() == [[5, 20]] * 2
    back = through(policy, ENGINE.layers[0], *SEEN[0][1:])[0]
    error = (back - SEEN[0][1]).abs().amax((0, 1))
    wide = SEEN[0][1].amax(1) - SEEN[0][1].amin(1)
    assert float(error[5]) < float(wide[:, 5].max()) / 100


def test_rank_one_is_the_best_map_of_rank_one() -> None:
    random = torch.Generator().manual_seed(0)
    coded = torch.randn(4000, 8, generator=random, dtype=torch.float64) + 3
    u, v = torch.randn(2, 8, generator=random, dtype=torch.float64)
    bias = torch.arange(8, dtype=torch.float64)
    exact = coded + (coded @ v)[:, None] * u + bias
    exact += 0.01 * torch.randn(exact.shape, generator=random, dtype=torch.float64)
    query = torch.randn(100, 8, generator=random, dtype=torch.float64)
    got = rank_one(exact, coded, query.T @ query)
    fixed = coded + (coded @ got[1])[:, None] * got[0] + got[2]
    assert float((fixed - exact).abs().mean()) < 0.05
    assert float((coded - exact).abs().mean()) > 1


def test_a_biased_format_is_corrected_and_a_sound_one_left_alone(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rank1 is kept only where attention outputs come nearer."""
    layer = ENGINE.layers[0]
    sound = build(Residual, ENGINE, calibration=file, format="int8", mean=False)
    bare = output_error(build(Int8, ENGINE), layer, SEEN[0])
    assert output_error(sound, layer, SEEN[0]) < 1.01 * bare
    back = Fp8.value_back
    monkeypatch.setattr(Fp8, "value_back", lambda self, layer, x: back(self, layer, x) - 1)
    biased = build(Fp8, ENGINE)
    policy = build(Residual, ENGINE, calibration=file, format="fp8", mean=False)
    assert policy.corrected[0, "value"] == 2
    assert output_error(policy, layer, SEEN[0]) < 0.7 * output_error(biased, layer, SEEN[0])
    attends_as_it_reads(policy, layer, SEEN[0], 3e-4)


def test_open_groups_are_coded_from_the_exact_tokens_kept(file: str) -> None:
    """Token by token with what is recent gives the codes of all tokens at once."""
    engine, layer = ENGINE, ENGINE.layers[0]
    options = {"group": 16, "bits": 4}
    policy = build(Residual, engine, calibration=file, format="kivi", options=options)
    assert isinstance(policy.inner, Kivi)
    assert policy.recent(layer) == 16
    assert policy.moves_tokens is False
    _, key, value = (x.transpose(0, 1) for x in SEEN[0])
    layout = policy.layout(layer)
    shape = (1, 2, 16, layout.bytes_per_token_head)
    whole, parts = (torch.zeros(shape, dtype=torch.uint8) for _ in range(2))
    policy.write(layer, WriteBatch(key[:12], value[:12], torch.arange(12)), whole)
    kept = Recent(torch.zeros(3, 16, 2, 32), torch.zeros(3, 16, 2, 32))
    for t in range(12):
        batch = WriteBatch(
            key[t : t + 1], value[t : t + 1], torch.tensor([t]), torch.tensor([1]), kept
        )
        policy.write(layer, batch, parts)
        kept.key[1, t], kept.value[1, t] = key[t], value[t]
    block = torch.tensor([0])
    for got, wanted in zip(
        policy.read(layer, parts, block), policy.read(layer, whole, block), strict=True
    ):
        torch.testing.assert_close(got[:, :, :12], wanted[:, :, :12])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int5"}, "unknown format 'int5'; did you mean int"),
        ({"format": "plain"}, "cannot correct plain"),
        ({"format": "mixed"}, "cannot correct mixed"),
        ({"format": "residual", "options": {}}, "cannot correct residual"),
        ({"options": {"grup": 1}}, "int4 has no option 'grup'; options: "),
        ({"options": {"group": -1}}, "int4: group: Input should be greater"),
        ({"options": {"exact_chunk": False}}, "exact_chunk is residual's own"),
        ({"mean": False, "rank1": False}, "corrects nothing"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValidationError, ValueError), match=message):
        Residual.Options.model_validate({"calibration": "c.safetensors", **options})


def test_outliers_of_mixed_channels_are_refused(file: str) -> None:
    with pytest.raises(ValueError, match="rotated mixes channels"):
        build(Residual, ENGINE, calibration=file, format="rotated", outliers=2)
    with pytest.raises(ValueError, match="4 outliers do not fill groups of 16"):
        build(Residual, ENGINE, calibration=file, outliers=4, options={"group": 16})


def test_it_does_not_run_on_part_of_the_heads() -> None:
    assert Feature.TENSOR_PARALLEL not in Residual.supports


def test_outliers_under_integer_products_are_refused(file: str) -> None:
    options = {"rotate": False}
    with pytest.raises(
        ValueError, match=r"hack multiplies integer codes of one width.*set outliers to 0"
    ):
        build(Residual, ENGINE, format="hack", options=options, outliers=4, calibration=file)
