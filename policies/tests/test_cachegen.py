"""`cachegen`: differences from anchor tokens, in bins that widen with depth."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from kvplug.contract import EngineView
from kvplug.testing.transfer import as_stored, check_round_trip, chunk, engine, shapes_of
from kvplug_policies.transfer.cachegen import CacheGen


def build(view: EngineView | None = None, **options: object) -> CacheGen:
    return CacheGen(CacheGen.Options.model_validate(options), view or engine())


def errors(codec: CacheGen, planes: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean square error by layer and token, over the deviation of channels."""
    found = codec.decode(as_stored(codec.encode(planes, 0)), shapes_of(planes), 0)
    right = planes["key"].float()
    spread = (right - right.mean(1, keepdim=True)).square().mean(1, keepdim=True)
    return ((found["key"].float() - right).square() / spread).mean((2, 3))


def test_anchors_are_nearer_than_the_tokens_behind_them() -> None:
    found = errors(build(group=10), chunk(40))
    anchors = torch.arange(40) % 10 == 0
    assert float(found[:, anchors].mean()) < 0.1 * float(found[:, ~anchors].mean())


def test_deeper_layers_have_wider_bins() -> None:
    first, middle, last = errors(build(), chunk(40)).mean(1).tolist()
    assert first < 0.5 * middle < 0.5 * last


def test_a_stage_of_a_pipeline_knows_how_deep_it_is() -> None:
    whole = engine()
    stage = EngineView(16, layers=whole.layers[2:])
    planes = {name: plane[2:].contiguous() for name, plane in chunk(40).items()}
    all_of_it = errors(build(), chunk(40))[2]
    torch.testing.assert_close(errors(build(stage), planes)[0], all_of_it)


def test_like_tokens_take_few_bytes() -> None:
    one = chunk(1)
    still = {name: plane.expand(-1, 40, -1, -1).contiguous() for name, plane in one.items()}
    assert check_round_trip(build(), still) < 0.1
    assert check_round_trip(build(), chunk(40)) < 0.35


@pytest.mark.parametrize("bins", [[1, 2], [0.5, 1, 1.5, 2], [0, 1, 1], [1, 1, 99], "wide"])
def test_bins_that_cannot_work_are_refused(bins: object) -> None:
    with pytest.raises(ValidationError, match="width"):
        build(bins=bins)


def test_options_are_in_the_fingerprint() -> None:
    found = {
        build().fingerprint(),
        build(group=4).fingerprint(),
        build(bins=[1, 1, 1]).fingerprint(),
    }
    assert len(found) == 3
