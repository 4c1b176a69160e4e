"""Replay of reuse on Hugging Face models: equal to the plain forward where it has to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvplug.errors import KVPlugError
from kvplug_lab.models import tiny_llama
from kvplug_lab.reuse.partial_forward import (
    Piece,
    capture,
    forward_reused,
    frequencies,
    greedy,
    rotated,
)

TEXT = torch.randint(64, 320, (60,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    path: Path = tiny_llama(
        tmp_path_factory.mktemp("tiny") / "model",
        heads=4, kv_heads=2, head_dim=32, layers=3, dtype="float32",
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def plain(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.as_tensor(model(input_ids=torch.tensor([ids])).logits[0])


def piece(model: Any, start: int, end: int, at: int | None = None) -> Piece:
    """KV of TEXT's tokens, as the plain forward over all before them makes it."""
    key, value = capture(model, TEXT[:start], TEXT[start:end])
    return Piece(start if at is None else at, key, value)


def stale(model: Any, start: int, end: int) -> Piece:
    """KV of the same tokens after another context, as long as it is."""
    key, value = capture(model, TEXT[::-1][:start], TEXT[start:end])
    return Piece(start, key, value)


def test_without_pieces_it_is_the_plain_forward(model: Any) -> None:
    found = forward_reused(model, TEXT)
    assert torch.equal(found.logits, plain(model, TEXT))
    assert found.positions.tolist() == list(range(60))
    assert [k.shape for k in found.keys] == [(60, 2, 32)] * 3


def test_true_pieces_leave_the_logits_as_they_are(model: Any) -> None:
    pieces = [piece(model, 30, 45), piece(model, 5, 20)]
    found = forward_reused(model, TEXT, pieces)
    assert found.positions.tolist() == [*range(5), *range(20, 30), *range(45, 60)]
    torch.testing.assert_close(found.logits, plain(model, TEXT)[found.positions])
    whole = forward_reused(model, TEXT)
    for layer in range(3):
        torch.testing.assert_close(found.keys[layer], whole.keys[layer])
        torch.testing.assert_close(found.values[layer], whole.values[layer])
        assert torch.equal(found.keys[layer][30:45], pieces[0].key[layer])


def test_stale_pieces_do_not_and_only_what_follows_them_changes(model: Any) -> None:
    found = forward_reused(model, TEXT, [stale(model, 20, 40)])
    truth = plain(model, TEXT)
    torch.testing.assert_close(found.logits[:20], truth[:20])
    assert (found.logits[20:] - truth[40:]).abs().max() > 0.1


def test_spans_anew_heal_all_that_follows_where_nothing_stale_stands_before_them(
    model: Any,
) -> None:
    whole = forward_reused(model, TEXT)
    healed = forward_reused(model, TEXT, [stale(model, 20, 40)], [(20, 40)])
    assert torch.equal(healed.logits, whole.logits)
    # True up to 27, stale after it: from the first stale token on everything is computed.
    true, wrong = piece(model, 20, 40), stale(model, 20, 40)
    mixed = Piece(
        20,
        [torch.cat((a[:7], b[7:])) for a, b in zip(true.key, wrong.key, strict=True)],
        [torch.cat((a[:7], b[7:])) for a, b in zip(true.value, wrong.value, strict=True)],
    )
    found = forward_reused(model, TEXT, [mixed], [(27, 60)])
    torch.testing.assert_close(found.logits, whole.logits[[*range(20), *range(27, 60)]])
    partly = forward_reused(model, TEXT, [mixed], [(29, 60)])
    assert (partly.logits[-1] - whole.logits[-1]).abs().max() > 1e-3


def test_keys_turned_by_a_shift_are_those_of_the_place(model: Any) -> None:
    table = frequencies(model)
    # The first layer's keys depend on the token and its position alone.
    here, values = capture(model, TEXT[:5], TEXT[20:40])
    there, _ = capture(model, TEXT[:20], TEXT[20:40])
    moved = rotated(here[0], 15, table)
    torch.testing.assert_close(moved, there[0], atol=1e-4, rtol=1e-4)
    assert (here[0] - there[0]).abs().max() > 0.5
    torch.testing.assert_close(rotated(moved, -15, table), here[0], atol=1e-5, rtol=1e-5)
    assert rotated(here[0], 0, table) is here[0]
    # And a text that begins with the piece sees it as if it stood there from the start.
    text = [*TEXT[20:40], *TEXT[50:]]
    key, value = capture(model, [], TEXT[20:40])
    late = [rotated(rotated(k, 1000, table), -1000, table) for k in key]
    found = forward_reused(model, text, [Piece(0, late, value)])
    torch.testing.assert_close(found.logits, plain(model, text)[20:], atol=1e-3, rtol=1e-3)
    assert len(values) == 3


def test_a_shift_turns_pairs_of_neighbours_or_halves_and_leaves_the_rest() -> None:
    key = torch.randn(4, 2, 10, generator=torch.Generator().manual_seed(2))
    table = torch.tensor([1.0, 0.1, 0.01, 0.001])
    for interleaved in (False, True):
        found = rotated(key, 3, table, interleaved=interleaved)
        assert torch.equal(found[..., 8:], key[..., 8:])
        for p, frequency in enumerate(table.tolist()):
            a, b = (2 * p, 2 * p + 1) if interleaved else (p, p + 4)
            was = torch.complex(key[..., a], key[..., b])
            angle = torch.tensor(3 * frequency)
            expected = was * torch.complex(angle.cos(), angle.sin())
            torch.testing.assert_close(found[..., a], expected.real)
            torch.testing.assert_close(found[..., b], expected.imag)


def test_each_key_may_have_a_shift_of_its_own() -> None:
    key = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(3))
    table = torch.tensor([1.0, 0.1, 0.01])
    found = rotated(key, torch.tensor([0, 5, -7]), table)
    for i, shift in enumerate((0, 5, -7)):
        assert torch.equal(found[i], rotated(key[i : i + 1], shift, table)[0])


def test_greedy_goes_on_as_the_model_does(model: Any) -> None:
    ids = list(TEXT)
    for _ in range(8):
        ids.append(int(plain(model, ids)[-1].argmax()))
    assert greedy(model, TEXT, n=8) == ids[60:]
    assert greedy(model, TEXT, [piece(model, 10, 30), piece(model, 35, 50)], n=8) == ids[60:]
    assert greedy(model, TEXT, [stale(model, 30, 60)], [(30, 60)], n=8) == ids[60:]
    assert greedy(model, TEXT, n=0) == []


def test_logits_of_some_positions(model: Any) -> None:
    pieces = [piece(model, 20, 40)]
    every = forward_reused(model, TEXT, pieces)
    some = forward_reused(model, TEXT, pieces, keep=[59, 3])
    assert some.positions.tolist() == [3, 59]
    torch.testing.assert_close(some.logits, every.logits[[3, -1]])
    assert forward_reused(model, TEXT, pieces, keep=[]).logits.shape[0] == 0


def test_what_cannot_be_is_refused(model: Any) -> None:
    part = piece(model, 20, 40)
    short = Piece(20, part.key[:1], part.value[:1])
    for pieces, compute, said in (
        ([Piece(41, part.key, part.value)], [], "outside a text of 60"),
        ([Piece(-1, part.key, part.value)], [], "outside a text of 60"),
        ([part, piece(model, 39, 42)], [], "overlaps"),
        ([short], [], "1 layers, and the model has 3"),
        ([part], [(50, 61)], "is outside"),
        ([piece(model, 0, 60)], [], "must be computed, not loaded"),
    ):
        with pytest.raises(KVPlugError, match=said):
            forward_reused(model, TEXT, pieces, compute)
    with pytest.raises(KVPlugError, match="loaded, not computed"):
        forward_reused(model, TEXT, [part], keep=[30])
    with pytest.raises(KVPlugError, match="loaded, not computed"):
        greedy(model, TEXT, [piece(model, 40, 60)])
    with pytest.raises(KVPlugError, match="empty"):
        capture(model, TEXT, [])


def test_other_attention_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.config, "layer_types", ["sliding_attention"] * 3, raising=False)
    with pytest.raises(KVPlugError, match="full attention"):
        forward_reused(model, TEXT)


def test_a_table_that_depends_on_length_is_refused(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.model.rotary_emb, "rope_type", "dynamic")
    with pytest.raises(KVPlugError, match="length of the text"):
        frequencies(model)
