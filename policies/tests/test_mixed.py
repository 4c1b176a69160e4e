"""Every layer gets its format, whole; and what cannot be is refused by the layers' name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import activations, attends_as_it_reads, build, through, view
from pydantic import ValidationError
from torch import Tensor

from kvplug.contract import FormatPolicy, LayerView, PageLayout
from kvplug.parser import load_deployment
from kvplug.registry import plugins
from kvplug_policies.format.int4 import Int4
from kvplug_policies.format.int8 import Int8
from kvplug_policies.format.kivi import Kivi
from kvplug_policies.format.mixed import Mixed, layers_of
from kvplug_policies.format.plain import Plain

ENGINE = view(layers=6, width=32)
CHOICE: dict[str, Any] = {
    "default": {"use": "int4"},
    "layers": {"0-1": {"use": "int8"}, "-1": "plain", "3--2": {"use": "kivi", "group": 16}},
}


def test_each_layer_has_the_format_chosen_for_it() -> None:
    policy = build(Mixed, ENGINE, **CHOICE)
    kinds = [type(policy.format_of(layer)) for layer in ENGINE.layers]
    assert kinds == [Int8, Int8, Int4, Kivi, Kivi, Plain]
    bare = [Int8, Int8, Int4, None, None, Plain]
    for layer, kind in zip(ENGINE.layers, bare, strict=True):
        if kind is None:
            continue
        own = build(kind, ENGINE)
        assert policy.layout(layer) == own.layout(layer)
        _, key, value = activations(layer, 40)
        for got, wanted in zip(
            through(policy, layer, key, value), through(own, layer, key, value), strict=True
        ):
            assert torch.equal(got, wanted)
    assert len({policy.layout(layer).bytes_per_token_head for layer in ENGINE.layers}) == 4


def test_it_attends_as_the_inner_formats_do() -> None:
    policy = build(Mixed, ENGINE, **CHOICE)
    for layer in ENGINE.layers:
        attends_as_it_reads(policy, layer, activations(layer), 1e-4)


def test_tokens_move_where_every_format_lets_them() -> None:
    assert build(Mixed, ENGINE, **CHOICE).moves_tokens is False
    both = build(Mixed, ENGINE, default={"use": "int4"}, layers={"0": {"use": "int8"}})
    assert both.moves_tokens is True
    assert Mixed.moves_tokens is True


def test_recent_tokens_are_those_of_the_layer() -> None:
    policy = build(Mixed, ENGINE, **CHOICE)
    assert [policy.recent(layer) for layer in ENGINE.layers] == [0, 0, 0, 16, 16, 0]


def test_only_layers_here_are_built() -> None:
    """A pipeline stage has some of the layers; ranges are those of the whole model."""
    stage = replace(ENGINE, layers=ENGINE.layers[:2])
    policy = build(Mixed, stage, **CHOICE)
    assert [type(policy.format_of(layer)) for layer in stage.layers] == [Int8, Int8]
    assert set(policy.inner) == {"0-1"}


def test_another_choice_is_another_identity() -> None:
    one = build(Mixed, ENGINE, **CHOICE)
    other = build(Mixed, ENGINE, default={"use": "int4"}, layers={"0": {"use": "int8"}})
    again = build(Mixed, ENGINE, **CHOICE)
    assert one.fingerprint() == again.fingerprint() != other.fingerprint()


class Halves(FormatPolicy):
    """A third party's: float16, three methods."""

    name, changes = "halves", "stores K and V as float16"

    def layout(self, layer: LayerView) -> PageLayout:
        return PageLayout(4 * layer.head_size, 16, 16)

    def encode(self, layer: LayerView, key: Tensor, value: Tensor) -> Tensor:
        return torch.cat([key, value], -1).half().contiguous().view(torch.uint8)

    def decode(self, layer: LayerView, cells: Tensor) -> tuple[Tensor, Tensor]:
        both = cells.contiguous().view(torch.float16)
        return both[..., : layer.head_size], both[..., layer.head_size :]


def test_a_third_partys_format_is_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = plugins().registry
    monkeypatch.setattr(registry, "_policies", dict(registry._policies))
    registry.add(Halves)
    policy = build(Mixed, ENGINE, default="int4", layers={"2": "halves"})
    assert isinstance(policy.format_of(ENGINE.layers[2]), Halves)
    attends_as_it_reads(policy, ENGINE.layers[2], activations(ENGINE.layers[2]))
    _, key, value = activations(ENGINE.layers[2], 20)
    assert torch.equal(through(policy, ENGINE.layers[2], key, value)[0], key.half().float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": {"0-3": {"use": "int5"}}}, "layers 0-3: unknown format 'int5'; did you mean"),
        ({"layers": {"2": {"use": "int8", "bit": 3}}}, "layers 2: int8 has no option 'bit'"),
        ({"layers": {"2": {"use": "kivi", "bits": 5}}}, "layers 2: kivi: bits: Input should be"),
        ({"layers": {"2": {"bits": 3}}}, "layers 2: does not name a format"),
        ({"layers": {"x": {"use": "int8"}}}, "'x' is not a layer or range"),
        ({"layers": {"3-1": {"use": "int8"}}}, "the last layer is before the first"),
        ({"layers": {"1": {"use": "mixed"}}}, "layers 1: mixed cannot be used inside mixed"),
        ({"default": {"use": "nope"}}, "the default: unknown format 'nope'"),
        (
            {"layers": {"1": {"use": "int8", "exact_chunk": False}}},
            "layers 1: exact_chunk applies to all layers",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Mixed.Options.model_validate(options)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"4-6": {"use": "int8"}}, "outside the model's 0-5"),
        ({"1": {"use": "int8", "group": 5}}, "layers 1: layer 1 \\(head size 32\\): groups of 5"),
        (
            {"1-2": {"use": "lowrank", "calibration": "/nowhere/c.safetensors"}},
            "layers 1-2: calibration /nowhere/c.safetensors cannot be read",
        ),
    ],
)
def test_what_the_model_cannot_have_is_refused(layers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(Mixed, ENGINE, layers=layers)


def test_yaml_may_be_short(tmp_path: Path) -> None:
    file = tmp_path / "d.yaml"
    file.write_text("format:\n  use: mixed\n  default: int4\n  layers: {0: int8, 4--1: plain}\n")
    (choice,) = load_deployment(file).all()
    policy = choice.build(ENGINE)
    assert isinstance(policy, Mixed)
    kinds = [type(policy.format_of(layer)) for layer in ENGINE.layers]
    assert kinds == [Int8, Int4, Int4, Int4, Plain, Plain]


def test_ranges() -> None:
    assert layers_of("4--1", 30) == (4, 29)
    assert layers_of("4--3", 30) == (4, 27)
    assert layers_of("-1", 30) == (29, 29)
    assert layers_of("0-3", 30) == (0, 3)
    assert layers_of("4--1", None) == (4, 4)
    with pytest.raises(ValueError, match="before the first"):
        layers_of("29--3", 30)
