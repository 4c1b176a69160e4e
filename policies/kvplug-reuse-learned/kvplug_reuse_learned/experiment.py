"""A model under experiment: KV computed anywhere, placed in a prompt, compared with recompute."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kvplug.contract.reuse import Fingerprint
from kvplug.reuse.measures import QUERIES, RunningScale, measures
from kvplug_kernels.segment_stats import segment_stats
from kvplug_lab.calibrate.attention import How, attached
from kvplug_lab.reuse.partial_forward import Piece, forward_reused, frequencies, rotated
from kvplug_reuse_learned.documents import Document


@dataclass(frozen=True, eq=False)
class StoredKV:
    """A document's KV as it was computed somewhere.

    Attributes:
        start: Position of its first token there.
        context: Tokens before it there.
        key: Per layer ``[n, kv_heads, head_size]``, rotated as it stood.
        value: Per layer, the same shape.
        stats: `segment_stats` of every layer, ``[layers, kv_heads, 5]``.
        ancestry: Approximate reuses behind it.
    """

    start: int
    context: tuple[int, ...]
    key: list[Tensor]
    value: list[Tensor]
    stats: Tensor
    ancestry: int = 0


@dataclass(frozen=True)
class Compared:
    """Two distributions over the tokens that follow, position by position.

    Attributes:
        divergence: Mean KL divergence of reuse from recompute, nats.
        agreement: Share of positions whose first choice is the same.
        nll: Mean negative log-likelihood of the true next tokens under reuse, nats.
        nll_recomputed: The same under recompute.
    """

    divergence: float
    agreement: float
    nll: float
    nll_recomputed: float


@dataclass(eq=False)
class Prompt:
    """A prompt with the KV that all of it gives.

    Attributes:
        prefix: The shared prefix.
        documents: In their order.
        truth: KV of prefix and documents, computed whole.
    """

    prefix: tuple[int, ...]
    documents: list[Document]
    truth: StoredKV

    def __post_init__(self) -> None:
        self.tokens: tuple[int, ...] = self.prefix
        self.runs: list[tuple[int, int]] = []
        for document in self.documents:
            start = len(self.tokens)
            self.tokens += document.tokens
            self.runs.append((start, len(self.tokens)))

    def true_piece(self, start: int, end: int) -> Piece:
        """True KV of a run of its tokens."""
        return Piece(
            start, [k[start:end] for k in self.truth.key], [v[start:end] for v in self.truth.value]
        )


@dataclass(eq=False)
class _Sight:
    """Probe that keeps what each layer's attention receives, from token ``first`` on."""

    first: int
    key: list[Tensor] = field(default_factory=list)
    value: list[Tensor] = field(default_factory=list)
    stats: list[Tensor] = field(default_factory=list)

    def see(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: How
    ) -> tuple[Tensor, Tensor]:
        keys, values = key.transpose(0, 1), value.transpose(0, 1)
        last = query[:, self.first :][:, -QUERIES:].transpose(0, 1)
        own, before = keys[self.first :], keys[: self.first]
        self.stats.append(segment_stats(own, values[self.first :], last, before, how.scale))
        self.key.append(own.clone())
        self.value.append(values[self.first :].clone())
        return key, value


class Experiment:
    """A model whose KV is computed, placed and compared.

    Args:
        model: A Hugging Face ``...ForCausalLM``.
        prefix: Tokens every prompt begins with.
    """

    def __init__(self, model: Any, prefix: Sequence[int]):
        self.model = model
        self.prefix = tuple(prefix)
        self.frequencies = frequencies(model)
        self.running = RunningScale()

    @torch.inference_mode()
    def compute(self, context: Sequence[int], tokens: Sequence[int]) -> StoredKV:
        """KV of tokens after a context."""
        sight = _Sight(len(context))
        ids = torch.tensor([[*context, *tokens]], device=self.model.device)
        with attached(self.model):
            self.model(input_ids=ids, use_cache=False, logits_to_keep=1, kvplug_probe=sight)
        stats = torch.stack(sight.stats)
        self.running.add(stats)
        return StoredKV(len(context), tuple(context), sight.key, sight.value, stats)

    def compute_over(
        self, context: Sequence[int], pieces: Sequence[Piece], tokens: Sequence[int], ancestry: int
    ) -> StoredKV:
        """KV of tokens after a partly reused context, without query statistics."""
        whole = forward_reused(self.model, [*context, *tokens], pieces, keep=[])
        start = len(context)
        key, value = [k[start:] for k in whole.keys], [v[start:] for v in whole.values]
        stats = torch.stack([segment_stats(k, v) for k, v in zip(key, value, strict=True)])
        return StoredKV(start, tuple(context), key, value, stats, ancestry)

    def prompt(self, found: Sequence[Document]) -> Prompt:
        """A prompt, computed whole."""
        tokens = [t for document in found for t in document.tokens]
        return Prompt(self.prefix, list(found), self.compute((), [*self.prefix, *tokens]))

    def place(self, stored: StoredKV, start: int) -> Piece:
        """Stored KV with its keys re-rotated to a position."""
        shift = start - stored.start
        return Piece(start, [rotated(k, shift, self.frequencies) for k in stored.key], stored.value)

    def logits(
        self,
        text: Sequence[int],
        pieces: Sequence[Piece],
        follow: Sequence[int],
        recomputed: Sequence[tuple[int, int]] = (),
    ) -> Tensor:
        """Log-probabilities ``[len(follow), vocab]``, float32, at what follows a text."""
        ids = [*text, *follow]
        keep = list(range(len(text), len(ids)))
        found = forward_reused(self.model, ids, pieces, recomputed, keep=keep)
        return functional.log_softmax(found.logits.float(), -1)

    def fingerprint(self, stored: StoredKV, tokens: Sequence[int]) -> Fingerprint:
        """Fingerprint with the fields that the learned checks read; the others are empty."""
        layers, heads, _ = stored.stats.shape
        return Fingerprint(
            model="", tokenizer="", lora="", dtype="", format="", position="", tenant="",
            geometry=(layers, heads, stored.key[0].shape[-1]),
            mask="causal",
            start=stored.start,
            length=len(tokens),
            context=digest(stored.context),
            tokens=digest(tokens),
            created=0.0,
            request_id="",
            ancestry=stored.ancestry,
            measures=measures(stored.stats, self.running),
        )  # fmt: skip


def digest(tokens: Sequence[int]) -> bytes:
    """16-byte BLAKE2b of token ids as little-endian int32."""
    data = torch.tensor(list(tokens), dtype=torch.int32).numpy().astype("<i4").tobytes()
    return hashlib.blake2b(data, digest_size=16).digest()


def compare(true: Tensor, found: Tensor, follow: Sequence[int]) -> Compared:
    """Compare distributions ``[n, vocab]`` (log-probabilities) at the ``n`` tokens ``follow``."""
    divergence = (true.exp() * (true - found)).sum(-1).clamp_min(0)
    nexts = torch.tensor(list(follow[1:]), device=true.device)[:, None]
    return Compared(
        float(divergence.mean()),
        float((true.argmax(-1) == found.argmax(-1)).float().mean()),
        float(-found[:-1].gather(1, nexts).mean()),
        float(-true[:-1].gather(1, nexts).mean()),
    )
