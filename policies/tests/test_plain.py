"""`plain` returns what was stored, to the bit."""

from __future__ import annotations

import pytest
import torch
from calibrated import activations, attends_as_it_reads, build, through, view

from kvplug.contract import AttendBatch, EngineView, LayerView, WriteBatch
from kvplug.hosts.dense import attend_dense
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


def test_what_nobody_wrote_is_not_attended() -> None:
    """Bytes of all ones are NaN; the host's own attention reads whole pages of them."""
    layer = LayerView(0, 1, num_kv_heads=2, num_heads=4, head_size=16, dtype="float32")
    policy = Plain(Plain.Options(), EngineView(block_size=16, layers=(layer,)))
    size = policy.layout(layer).bytes_per_token_head
    cache = torch.full((4, 2, 16, size), 0xFF, dtype=torch.uint8)
    key, value = torch.randn(2, 21, 2, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    slots = torch.cat([torch.arange(16, 32), torch.arange(48, 53)])
    policy.write(layer, WriteBatch(key, value, slots), cache)
    batch = AttendBatch(
        query=torch.ones(2, 4, 16),
        query_start=torch.tensor([0, 1, 2], dtype=torch.int32),
        block_table=torch.tensor([[1, 3], [1, 0]], dtype=torch.int32),
        seq_lens=torch.tensor([21, 9], dtype=torch.int32),
        scale=0.25,
        max_query_len=1,
        max_seq_len=21,
    )
    out = torch.full_like(batch.query, float("nan"))
    attend_dense(policy, layer, batch, cache, out)
    for row, n in ((0, 21), (1, 9)):
        logits = torch.einsum("d,nhd->hn", torch.ones(16), key[:n]) * 0.25
        expected = torch.einsum("hn,nhd->hd", logits.softmax(-1), value[:n])
        torch.testing.assert_close(out[row], expected.repeat_interleave(2, 0))
