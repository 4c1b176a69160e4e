"""What goes in comes out, to the bit."""

from __future__ import annotations

import pytest
import torch
from calibrated import activations, attends_as_it_reads, build, through, view

from kvplug_policies.format.plain import Plain


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_tokens_come_back_as_they_were(dtype: str, size: int) -> None:
    engine = view(dtype=dtype)
    policy = build(Plain, engine)
    layer = engine.layers[0]
    assert policy.layout(layer).bytes_per_token_head == 2 * 16 * size
    _, key, value = activations(layer, 50)
    kind = getattr(torch, dtype)
    back = through(policy, layer, key, value)
    assert torch.equal(back[0], key.to(kind).float())
    assert torch.equal(back[1], value.to(kind).float())


def test_attention_is_that_of_the_tokens() -> None:
    engine = view()
    seen = activations(engine.layers[0])
    attends_as_it_reads(build(Plain, engine), engine.layers[0], seen, 1e-5)


def test_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match="type 'float8_e4m3fn' cannot be stored"):
        build(Plain, view(dtype="float8_e4m3fn"))
