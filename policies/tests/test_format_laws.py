"""The laws of `kvplug.testing` for every registered format, and laws of formats with bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from format_cases import CALIBRATED, cases, pairs

from kvplug.testing import FormatLaws, each
from kvplug.testing.format import NUM_LAYERS, SHAPES, Case, Pool, Shape, view
from kvplug_policies.coded import LayerOptions

CASES = list(cases())
SHAPE = SHAPES[1]


class Shipped(FormatLaws):
    """The laws, for a case with a calibration if it takes one."""

    of: Case

    def options_for(self, shape: Shape) -> Mapping[str, Any]:
        return {} if self.of.prepare is None else self.of.prepare(shape)

    def spoilt(self, spoilt: Pool, clean: Pool) -> None:
        if self.policy.__module__.startswith("kvplug_policies."):
            assert spoilt.policy.counters()["nonfinite"] >= 2
            assert clean.policy.counters()["nonfinite"] == 0
            assert all(x.isfinite().all() for x in spoilt.read(0))


def classes() -> Iterator[tuple[str, Mapping[str, Any]]]:
    for case, shapes in pairs():
        attributes = {
            "of": case,
            "policy": case.policy,
            "options": case.options,
            "shapes": shapes,
            "tolerance": case.tolerance,
            "bytewise": case.bytewise,
            "errors": case.errors,
            "scales": case.policy.name not in CALIBRATED,
        }
        yield str(case), attributes


globals().update(each(Shipped, classes()))


def test_there_are_formats() -> None:
    assert {"fp8", "int8", "int4", "kivi", "rotated", "hack"} <= {c.policy.name for c in CASES}


def test_the_fingerprint_tells_options_apart() -> None:
    def print_of(case: Case) -> str:
        return Pool(case, SHAPE, blocks=1).policy.fingerprint()

    prints = {str(case): print_of(case) for case in CASES}
    assert len(set(prints.values())) == len(prints)
    for case in CASES:
        assert print_of(case) == prints[str(case)]
        if Pool(case, SHAPE, blocks=1).ring is None:
            other = Pool(case, SHAPE, blocks=1, exact_chunk=False).policy
            assert other.fingerprint() != prints[str(case)]


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if issubclass(c.policy.Options, LayerOptions) and "layers" not in c.options],
    ids=str,
)
def test_layers_of_other_bits_have_other_layouts(case: Case) -> None:
    own = Pool(case, SHAPE).layout
    other = 2 if own.key_bits != 2 else 4
    options = {**case.options, "layers": {"0-1": other, -1: other}}
    pool = Pool(replace(case, options=options), SHAPE)
    bits = [pool.policy.layout(view(SHAPE, index)).key_bits for index in range(NUM_LAYERS)]
    assert bits == [other, other, own.key_bits, other]
    sizes = [pool.policy.layout(view(SHAPE, i)).bytes_per_token_head for i in range(NUM_LAYERS)]
    assert len(set(sizes)) == 2
    outside = {**case.options, "layers": {"9": other}}
    with pytest.raises(ValueError, match="layers '9' is outside the model's 0-3"):
        Pool(replace(case, options=outside), SHAPE)
    with pytest.raises(ValueError, match="not a layer or range"):
        Pool(replace(case, options={**case.options, "layers": {"a": other}}), SHAPE)
    with pytest.raises(ValueError, match="layers"):
        Pool(replace(case, options={**case.options, "layers": {"0": 5}}), SHAPE)
