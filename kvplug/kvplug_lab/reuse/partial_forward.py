"""Reuse on a Hugging Face causal LM, without an engine: effects of stored KV on what follows it.

A text is put together from pieces of stored KV and from tokens recomputed, wherever they lie:
the loaded tokens are in the model's cache, the others go through the model in one forward, and
an explicit mask over their real positions says who sees whom. It is what the worker does on pages,
so it can be computed again exactly, and measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvplug.errors import KVPlugError


@dataclass(frozen=True, eq=False)
class Piece:
    """Stored KV of a run of tokens, as it is put into a text.

    Attributes:
        start: Position of its first token in the text.
        key: Per layer ``[n, kv_heads, head_size]``, rotated as keys at ``start`` are.
        value: Per layer, the same shape.
    """

    start: int
    key: list[Tensor]
    value: list[Tensor]

    def __len__(self) -> int:
        return int(self.key[0].shape[0])

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.start + len(self)


@dataclass(frozen=True, eq=False)
class Reused:
    """A forward over a text of which parts were loaded.

    Attributes:
        logits: ``[n, vocab]`` of ``positions``, in the model's dtype.
        positions: ``[n]`` int64, ascending: the computed tokens, or of them those asked for.
        keys: Per layer ``[N, kv_heads, head_size]`` of the whole text, loaded or computed.
        values: Per layer, the same shape.
    """

    logits: Tensor
    positions: Tensor
    keys: list[Tensor]
    values: list[Tensor]


@torch.inference_mode()
def capture(
    model: Any, context_ids: Sequence[int], token_ids: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """The KV of a run of tokens after a context, computed in one forward.

    Args:
        model: A Hugging Face ``...ForCausalLM``.
        context_ids: The text before the run; may be empty.
        token_ids: The run.

    Returns:
        Keys and values, per layer ``[len(token_ids), kv_heads, head_size]`` in the model's dtype;
        keys are rotated to positions after the context.

    Raises:
        KVPlugError: The run is empty, or the model's attention is not plainly causal.
    """
    if not len(token_ids):
        raise KVPlugError("cannot capture an empty run of tokens")
    whole = forward_reused(model, [*context_ids, *token_ids], keep=[])
    start = len(context_ids)
    return [k[start:].clone() for k in whole.keys], [v[start:].clone() for v in whole.values]


@torch.inference_mode()
def forward_reused(
    model: Any,
    token_ids: Sequence[int],
    pieces: Sequence[Piece] = (),
    compute: Sequence[tuple[int, int]] = (),
    *,
    keep: Sequence[int] | None = None,
) -> Reused:
    """One forward over a text with stored KV in it; without pieces the plain one.

    Args:
        model: A Hugging Face ``...ForCausalLM``.
        token_ids: The whole text, N tokens.
        pieces: Stored KV; pieces do not overlap.
        compute: Spans ``(start, end)`` recomputed although they lie in a piece.
        keep: Computed positions whose logits are wanted; None for all of them.

    Raises:
        KVPlugError: A piece or a span lies outside the text, pieces overlap or have other layers
            than the model, nothing is left to compute, or a kept position is not computed.
    """
    reused, _ = _forward(model, token_ids, pieces, compute, keep)
    return reused


@torch.inference_mode()
def greedy(
    model: Any,
    token_ids: Sequence[int],
    pieces: Sequence[Piece] = (),
    compute: Sequence[tuple[int, int]] = (),
    n: int = 32,
) -> list[int]:
    """The next ``n`` tokens by greedy choice, after a text with stored KV in it.

    No token ends it early.

    Raises:
        KVPlugError: As `forward_reused`; the text's last token must be computed.
    """
    total = len(token_ids)
    if n < 1:
        return []
    reused, cache = _forward(model, token_ids, pieces, compute, [total - 1])
    chosen = [int(reused.logits[0].argmax())]
    while len(chosen) < n:
        at = torch.tensor([[total + len(chosen) - 1]], device=model.device)
        latest = torch.tensor([[chosen[-1]]], device=model.device)
        # The order of the cache does not matter: one query that sees all of it.
        out = model(input_ids=latest, position_ids=at, past_key_values=cache, use_cache=True)
        chosen.append(int(out.logits[0, -1].argmax()))
    return chosen


def rotated(
    key: Tensor, shift: int | Tensor, frequencies: Tensor, *, interleaved: bool = False
) -> Tensor:
    """Keys moved along the text: RoPE by ``shift`` more positions (arXiv 2104.09864).

    Args:
        key: ``[n, heads, head_size]``, any float dtype.
        shift: Positions, one number or int64 ``[n]``; negative moves to the front.
        frequencies: ``[p]`` radians per position; the first ``2 p`` elements are rotated.
        interleaved: Pairs of neighbours (GPT-J) rather than halves (NeoX).

    Returns:
        The same shape and dtype; computed in float32, angles in float64.
    """
    if isinstance(shift, int) and not shift:
        return key
    angle = frequencies.to(key.device, torch.float64) * (
        shift[:, None, None] if isinstance(shift, Tensor) else shift
    )
    cos, sin = angle.cos().float(), angle.sin().float()
    width = 2 * len(frequencies)
    turning, rest = key[..., :width].float(), key[..., width:]
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turning.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned.to(key.dtype), rest), -1)


def frequencies(model: Any) -> Tensor:
    """The model's own RoPE table, float32 ``[p]``: radians per position.

    Raises:
        KVPlugError: The model has none, or one that depends on the length of the text.
    """
    inner = getattr(model, "model", model)
    found = getattr(getattr(inner, "rotary_emb", None), "inv_freq", None)
    if not isinstance(found, Tensor):
        raise KVPlugError(
            f"{type(model).__name__} has no RoPE table: its keys cannot be re-rotated"
        )
    kind = getattr(inner.rotary_emb, "rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise KVPlugError(
            f"{type(model).__name__} has RoPE of type {kind!r}, whose table depends on the length "
            "of the text: its keys cannot be re-rotated"
        )
    return found.detach().float()


# -- inside ----------------------------------------------------------------------------------------


def _forward(
    model: Any,
    token_ids: Sequence[int],
    pieces: Sequence[Piece],
    compute: Sequence[tuple[int, int]],
    keep: Sequence[int] | None,
) -> tuple[Reused, Any]:
    """The forward, and the cache it leaves: loaded tokens first, then the computed."""
    from transformers import DynamicCache

    _refuse_windows(model)
    total, device = len(token_ids), model.device
    loaded = _loaded(model, total, pieces, compute)
    positions = (~loaded).nonzero()[:, 0]
    if not len(positions):
        raise KVPlugError("the last token of a text must be computed, not loaded")
    wanted = positions if keep is None else torch.tensor(sorted(keep), dtype=torch.int64)
    rows = torch.searchsorted(positions, wanted)
    if len(wanted) and (
        int(rows.max()) >= len(positions) or not torch.equal(positions[rows], wanted)
    ):
        raise KVPlugError("logits were requested of a position that is loaded, not computed")

    cache: Any = DynamicCache()
    order = torch.cat([loaded.nonzero()[:, 0], positions])
    mask = None
    if len(positions) < total:
        seen = order[None] <= positions[:, None]
        mask = torch.zeros(seen.shape, dtype=model.dtype)
        mask = mask.masked_fill(~seen, torch.finfo(model.dtype).min)[None, None].to(device)
        ordered = sorted(pieces, key=lambda p: p.start)
        for layer in range(_layers(model)):
            # Rows of all pieces in the order of the text, less what is recomputed.
            rest = torch.cat([loaded[p.start : p.end] for p in ordered]).to(device)
            key = torch.cat([p.key[layer] for p in ordered]).to(device, model.dtype)[rest]
            value = torch.cat([p.value[layer] for p in ordered]).to(device, model.dtype)[rest]
            cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], layer)
    ids = torch.as_tensor(token_ids, dtype=torch.int64)[positions]
    out = model(
        input_ids=ids[None].to(device),
        attention_mask=mask,
        position_ids=positions[None].to(device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=rows.to(device),
    )
    back = torch.argsort(order).to(device)
    keys = [layer.keys[0].transpose(0, 1)[back] for layer in cache.layers]
    values = [layer.values[0].transpose(0, 1)[back] for layer in cache.layers]
    return Reused(out.logits[0], wanted, keys, values), cache


def _layers(model: Any) -> int:
    return int(model.config.get_text_config().num_hidden_layers)


def _loaded(
    model: Any, total: int, pieces: Sequence[Piece], compute: Sequence[tuple[int, int]]
) -> Tensor:
    """Mask of the tokens that come from pieces, bool ``[total]`` on the CPU."""
    loaded, layers = torch.zeros(total, dtype=torch.bool), _layers(model)
    for piece in pieces:
        if len(piece.key) != layers or len(piece.value) != layers:
            raise KVPlugError(
                f"a piece has KV of {len(piece.key)} layers, and the model has {layers}"
            )
        if piece.start < 0 or piece.end > total:
            raise KVPlugError(
                f"a piece at {piece.start}-{piece.end} is outside a text of {total} tokens"
            )
        if loaded[piece.start : piece.end].any():
            raise KVPlugError(f"the piece at {piece.start}-{piece.end} overlaps another")
        loaded[piece.start : piece.end] = True
    for start, end in compute:
        if not 0 <= start <= end <= total:
            raise KVPlugError(f"a span {start}-{end} is outside a text of {total} tokens")
        loaded[start:end] = False
    return loaded


def _refuse_windows(model: Any) -> None:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    windowed = getattr(config, "sliding_window", None) and getattr(
        config, "use_sliding_window", True
    )
    if kinds - {"full_attention"} or (not kinds and windowed):
        raise KVPlugError(
            f"{type(model).__name__} has layers without full attention: only causal models with "
            "full attention are supported"
        )
