"""Measuring reuse against recompute on real text: what placements of stored KV do to what follows.

A prompt is a short shared prefix, some documents cut from the text at its empty lines, and what
follows the last of them in the text. A document's KV is computed elsewhere: after the prefix
alone, after other documents, alone at position 0, after another text of the same length, after a
text of which part is gone now, or after the same text some of which was itself reused. It is put
where the document stands in the prompt, and the model's distributions over the tokens that follow
are compared with those of the whole prompt computed.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kvplug.contract.reuse import Candidate, Fingerprint, ReuseRequest
from kvplug.errors import KVPlugError
from kvplug.reuse.deviation import deviation, most_deviating, spans
from kvplug.reuse.measures import QUERIES, RunningScale, measures
from kvplug_kernels.segment_stats import segment_stats
from kvplug_lab.calibrate.attention import How, attached
from kvplug_lab.reuse.replay import Piece, forward_reused, frequencies, rotated

PREFIX = "Read the passages below with care. Then go on with the text.\n\n"
"""What every prompt begins with, by default."""

SOURCES = ("prefix", "documents", "alone", "same place", "shifted", "reused before")
"""Where the KV of a placement was computed."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Document:
    """A passage of the text.

    Attributes:
        tokens: The passage, whole paragraphs.
        after: What follows it in the text.
    """

    tokens: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """Of the experiment.

    Attributes:
        prompts: Prompts to learn from.
        held_out: Prompts to report on, from the last part of the text.
        documents: Documents of a prompt.
        least: Tokens of a document at least.
        most: Tokens of a document at most.
        placements: Placements tried of each document.
        follow: Tokens after a document that are compared, at most.
        seed: Of every choice.
    """

    prompts: int = 32
    held_out: int = 16
    documents: int = 3
    least: int = 100
    most: int = 250
    placements: int = 2
    follow: int = 64
    seed: int = 0

    def check(self) -> None:
        """Raise KVPlugError where they cannot be."""
        if self.least > self.most:
            raise KVPlugError(f"--least {self.least} is more than --most {self.most}")


@dataclass(frozen=True, eq=False)
class Stored:
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


@dataclass(frozen=True)
class Trial:
    """One placement and what came of it.

    Attributes:
        source: One of `SOURCES`.
        prompt: Number of the prompt.
        candidate: What was stored.
        request: Where it went.
        outcome: Reuse against recompute.
    """

    source: str
    prompt: int
    candidate: Candidate
    request: ReuseRequest
    outcome: Compared


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
    truth: Stored

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


# -- text ------------------------------------------------------------------------------------------


def documents(
    text: str, encode: Callable[[str], list[int]], count: int, sizes: Sizes
) -> list[Document]:
    """Documents cut at empty lines, evenly from the text and in its order, none twice.

    Args:
        text: The text.
        encode: Tokens of a string, without special tokens.
        count: How many.
        sizes: Of a document, and how much of what follows it is kept.

    Raises:
        KVPlugError: The text has fewer.
    """
    paragraphs = [
        m.group() for m in re.finditer(r"(?:(?!\n[ \t]*\n).)+?\n(?:[ \t]*\n)+", text, re.S)
    ]
    found: list[Document] = []
    gap = len(paragraphs) / max(count, 1)
    at, tokens_of = 0, {}

    def tokens(index: int) -> list[int]:
        if index not in tokens_of:
            tokens_of[index] = encode(paragraphs[index])
        return tokens_of[index]

    while len(found) < count and at < len(paragraphs):
        taken: list[int] = []
        end = at
        while end < len(paragraphs) and len(taken) < sizes.least:
            taken += tokens(end)
            end += 1
        after: list[int] = []
        follow = end
        while follow < len(paragraphs) and len(after) < sizes.follow:
            after += tokens(follow)
            follow += 1
        if sizes.least <= len(taken) <= sizes.most and len(after) >= sizes.follow:
            found.append(Document(tuple(taken), tuple(after[: sizes.follow])))
            # What follows a document is read too, so the next one begins after it.
            at = max(follow, int(gap * len(found)))
        else:
            at += 1
    if len(found) < count:
        raise KVPlugError(
            f"the text has only {len(found)} passages of {sizes.least} to {sizes.most} tokens "
            f"between empty lines, too few for {count}: give a longer text or ask for fewer prompts"
        )
    return found


# -- KV --------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Sight:
    """Keeps what every layer's attention gets, from a token on."""

    cut: int
    key: list[Tensor] = field(default_factory=list)
    value: list[Tensor] = field(default_factory=list)
    stats: list[Tensor] = field(default_factory=list)

    def see(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: How
    ) -> tuple[Tensor, Tensor]:
        keys, values = key.transpose(0, 1), value.transpose(0, 1)
        last = query[:, self.cut :][:, -QUERIES:].transpose(0, 1)
        own, before = keys[self.cut :], keys[: self.cut]
        self.stats.append(segment_stats(own, values[self.cut :], last, before, how.scale))
        self.key.append(own.clone())
        self.value.append(values[self.cut :].clone())
        return key, value


class Lab:
    """A model, and experiments with its KV.

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
    def compute(self, context: Sequence[int], tokens: Sequence[int]) -> Stored:
        """KV of tokens after a context."""
        sight = _Sight(len(context))
        ids = torch.tensor([[*context, *tokens]], device=self.model.device)
        with attached(self.model):
            self.model(input_ids=ids, use_cache=False, logits_to_keep=1, kvplug_probe=sight)
        stats = torch.stack(sight.stats)
        self.running.add(stats)
        return Stored(len(context), tuple(context), sight.key, sight.value, stats)

    def compute_over(
        self, context: Sequence[int], pieces: Sequence[Piece], tokens: Sequence[int], ancestry: int
    ) -> Stored:
        """KV of tokens after a context some of which was reused; nobody saw their queries."""
        whole = forward_reused(self.model, [*context, *tokens], pieces, keep=[])
        cut = len(context)
        key, value = [k[cut:] for k in whole.keys], [v[cut:] for v in whole.values]
        stats = torch.stack([segment_stats(k, v) for k, v in zip(key, value, strict=True)])
        return Stored(cut, tuple(context), key, value, stats, ancestry)

    def prompt(self, found: Sequence[Document]) -> Prompt:
        """A prompt, computed whole."""
        tokens = [t for document in found for t in document.tokens]
        return Prompt(self.prefix, list(found), self.compute((), [*self.prefix, *tokens]))

    def place(self, stored: Stored, start: int) -> Piece:
        """Stored KV, its keys moved to a position."""
        shift = start - stored.start
        return Piece(start, [rotated(k, shift, self.frequencies) for k in stored.key], stored.value)

    def logits(
        self,
        text: Sequence[int],
        pieces: Sequence[Piece],
        follow: Sequence[int],
        anew: Sequence[tuple[int, int]] = (),
    ) -> Tensor:
        """Log-probabilities ``[len(follow), vocab]``, float32, at what follows a text."""
        ids = [*text, *follow]
        keep = list(range(len(text), len(ids)))
        found = forward_reused(self.model, ids, pieces, anew, keep=keep)
        return functional.log_softmax(found.logits.float(), -1)

    def fingerprint(self, stored: Stored, tokens: Sequence[int]) -> Fingerprint:
        """What a host would say of it, as far as the checks that are trained look at it."""
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
    """Distributions ``[n, vocab]`` (log-probabilities) at the ``n`` tokens ``follow``."""
    divergence = (true.exp() * (true - found)).sum(-1).clamp_min(0)
    nexts = torch.tensor(list(follow[1:]), device=true.device)[:, None]
    return Compared(
        float(divergence.mean()),
        float((true.argmax(-1) == found.argmax(-1)).float().mean()),
        float(-found[:-1].gather(1, nexts).mean()),
        float(-true[:-1].gather(1, nexts).mean()),
    )


# -- placements ------------------------------------------------------------------------------------


def stored_elsewhere(
    lab: Lab, prompt: Prompt, index: int, source: str, others: Sequence[Document]
) -> Stored | None:
    """A document's KV, computed elsewhere.

    Args:
        lab: The model.
        prompt: The prompt it goes into.
        index: Which of its documents.
        source: One of `SOURCES`.
        others: Documents of other prompts, for texts to put before it.

    Returns:
        None where the source makes no sense for this document, or is the prompt itself.
    """
    tokens, start = prompt.documents[index].tokens, prompt.runs[index][0]
    foreign = [t for document in others for t in document.tokens]
    context: tuple[int, ...]
    if source == "prefix":
        context = lab.prefix
    elif source == "documents":
        context = lab.prefix + tuple(t for d in others[:2] for t in d.tokens)
    elif source == "alone":
        context = ()
    elif source == "same place":
        body = start - len(lab.prefix)
        context = lab.prefix + tuple(foreign[:body])
        if len(context) < start:
            return None
    elif source == "shifted":
        # Stored late in a long text, used where the oldest document is gone.
        context = lab.prefix + others[0].tokens + prompt.tokens[len(lab.prefix) : start]
    elif source == "reused before":
        if index == 0:
            return None
        pieces = []
        for i in range(index):
            # After the prefix the first document would be where it belongs, and exact.
            then = lab.prefix if i else ()
            pieces.append(
                lab.place(lab.compute(then, prompt.documents[i].tokens), prompt.runs[i][0])
            )
        return lab.compute_over(prompt.tokens[:start], pieces, tokens, len(pieces))
    else:
        raise ValueError(source)
    if context == prompt.tokens[:start]:
        return None
    return lab.compute(context, tokens)


Pairs = Callable[[Stored, Piece, Piece], None]
"""Is shown stored KV, and placed and true KV of the same tokens."""


def trials(
    lab: Lab,
    found: Sequence[Document],
    sizes: Sizes,
    pairs: Pairs | None = None,
    progress: Progress | None = None,
    first: int = 0,
) -> list[Trial]:
    """Place documents of prompts and compare reuse with recompute.

    Each placement is measured by itself: what stands before the document is true, and what
    follows it in the text is computed.

    Args:
        lab: The model.
        found: Documents, `Sizes.documents` for each prompt.
        sizes: Of the experiment.
        pairs: Called with every placement.
        progress: Called once per prompt.
        first: Number of the first prompt.
    """
    chance = random.Random(f"{sizes.seed}:{first}")
    pool = list(found)
    chance.shuffle(pool)
    results: list[Trial] = []
    groups = [pool[i : i + sizes.documents] for i in range(0, len(pool), sizes.documents)]
    for number, group in enumerate(groups):
        prompt = lab.prompt(group)
        strangers = [d for d in pool if d not in group]
        for index, document in enumerate(group):
            start, end = prompt.runs[index]
            follow = document.after[: chance.choice((sizes.follow // 2, sizes.follow))]
            text = prompt.tokens[:end]
            before = prompt.true_piece(0, start)
            true_piece = prompt.true_piece(start, end)
            true = lab.logits(text, [before, true_piece], follow)
            order = chance.sample(SOURCES, len(SOURCES))
            done = 0
            for source in order:
                if done == sizes.placements:
                    break
                others = chance.sample(strangers, min(3, len(strangers)))
                stored = stored_elsewhere(lab, prompt, index, source, others)
                if stored is None:
                    continue
                done += 1
                piece = lab.place(stored, start)
                if pairs is not None:
                    pairs(stored, piece, true_piece)
                outcome = compare(true, lab.logits(text, [before, piece], follow), follow)
                here = Stored(start, text[:start], [], [], stored.stats)
                asked = lab.fingerprint(
                    Stored(start, here.context, stored.key, stored.value, stored.stats),
                    document.tokens,
                )
                candidate = Candidate(lab.fingerprint(stored, document.tokens))
                request = ReuseRequest(asked, "", 0, len(text) + len(follow), True)
                results.append(Trial(source, first + number, candidate, request, outcome))
        if progress is not None:
            progress(f"prompt {first + number + 1}: {len(results)} placements")
    return results


# -- what improves it ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """One way to reuse all documents of a prompt, measured over held-out prompts.

    Attributes:
        label: What was done.
        anew: Share of the documents' tokens computed anew.
        divergence: Mean KL divergence from recompute, nats.
        error: Standard error of that mean over prompts, nats.
        agreement: Share of equal first choices.
        perplexity: Of the true continuation.
    """

    label: str
    anew: float
    divergence: float
    error: float
    agreement: float
    perplexity: float


Adapt = Callable[[int, Stored, Piece], Piece]
"""Corrects a placed piece: document's number in the prompt, what was stored, what was placed."""


@dataclass(frozen=True, eq=False)
class Improvers:
    """What calibration gives beside recompute.

    Attributes:
        compensate: Corrects values; None where no correction was learned.
        compensate_keys: Corrects keys too.
        credible: Whether a placement is credible enough.
    """

    compensate: Adapt | None
    compensate_keys: Adapt | None
    credible: Callable[[Candidate, ReuseRequest], bool]


BOUNDARIES = (8, 16, 32)
SHARES = (0.1, 0.15, 0.3)


def effects(
    lab: Lab,
    found: Sequence[Document],
    sizes: Sizes,
    improvers: Improvers | None = None,
    progress: Progress | None = None,
) -> list[Effect]:
    """Reuse all documents of prompts at once, with and without what makes it good.

    Every document but what follows the last one comes from storage, as in retrieval-augmented
    generation; compared is what follows the last.

    Args:
        lab: The model.
        found: Documents, `Sizes.documents` for each prompt.
        sizes: Of the experiment.
        improvers: A calibration's, of other documents; without it its rows are left out.
        progress: Called once per prompt.
    """
    chance = random.Random(f"{sizes.seed}:effects")
    pool = list(found)
    chance.shuffle(pool)
    rows: dict[str, list[tuple[float, Compared]]] = {}
    groups = [pool[i : i + sizes.documents] for i in range(0, len(pool), sizes.documents)]
    for number, group in enumerate(groups):
        for label, anew, outcome in _one_prompt(lab, group, improvers, chance):
            rows.setdefault(label, []).append((anew, outcome))
        if progress is not None:
            progress(f"prompt {number + 1} of {len(groups)}")
    return [_effect(label, row) for label, row in rows.items()]


def _effect(label: str, row: Sequence[tuple[float, Compared]]) -> Effect:
    divergences = torch.tensor([c.divergence for _, c in row], dtype=torch.float64)
    error = float(divergences.std() / len(row) ** 0.5) if len(row) > 1 else 0.0
    nll = sum(c.nll for _, c in row) / len(row)
    return Effect(
        label,
        sum(anew for anew, _ in row) / len(row),
        float(divergences.mean()),
        error,
        sum(c.agreement for _, c in row) / len(row),
        float(torch.tensor(nll).exp()),
    )


def _one_prompt(
    lab: Lab, group: Sequence[Document], improvers: Improvers | None, chance: random.Random
) -> list[tuple[str, float, Compared]]:
    prompt = lab.prompt(group)
    follow, text = group[-1].after, prompt.tokens
    head, begin = prompt.true_piece(0, len(lab.prefix)), len(lab.prefix)
    total = len(text) - begin
    true = lab.logits(text, [prompt.true_piece(0, len(text))], follow)
    made: list[tuple[str, float, Compared]] = [("recompute", 1.0, compare(true, true, follow))]

    def add(label: str, pieces: Sequence[Piece], anew: Sequence[int] = ()) -> None:
        logits = lab.logits(text, [head, *pieces], follow, spans(sorted(anew)))
        made.append((label, len(anew) / total, compare(true, logits, follow)))

    def boundary(tokens: int = 0, share: float = 0.0) -> list[int]:
        ends = [(a, min(a + tokens + round(share * (b - a)), b)) for a, b in prompt.runs]
        return [t for start, end in ends for t in range(start, end)]

    own = [lab.compute((), d.tokens) for d in group]
    shared = [lab.compute(lab.prefix, d.tokens) for d in group]
    starts = [start for start, _ in prompt.runs]
    add(
        "own sink, keys not moved",
        [Piece(s, o.key, o.value) for s, o in zip(starts, own, strict=True)],
    )
    own_pieces = [lab.place(o, s) for s, o in zip(starts, own, strict=True)]
    pieces = [lab.place(o, s) for s, o in zip(starts, shared, strict=True)]
    add("own sink", own_pieces)
    for n in BOUNDARIES:
        add(f"own sink + boundary {n}", own_pieces, boundary(n))
    add("shared prefix", pieces)
    for n in BOUNDARIES:
        add(f"shared prefix + boundary {n}", pieces, boundary(n))
    deviations = _second_layer(prompt, pieces)
    for share in SHARES:
        count = round(share * total)
        most = (most_deviating(deviations, count) + begin).tolist()
        add(f"shared prefix + {share:.0%} most deviating", pieces, most)
        anew = chance.sample(range(begin, len(text)), count)
        add(f"shared prefix + {share:.0%} at random", pieces, anew)
        first = boundary(share=share)
        add(f"shared prefix + {share:.0%} at boundaries", pieces, first)
    if improvers is None:
        return made
    correct = improvers.compensate
    if correct is not None:
        better = [correct(i, *both) for i, both in enumerate(zip(shared, pieces, strict=True))]
        own_better = [correct(i, *both) for i, both in enumerate(zip(own, own_pieces, strict=True))]
        add("own sink + compensate", own_better)
        add("shared prefix + compensate", better)
        if improvers.compensate_keys is not None:
            both = zip(shared, pieces, strict=True)
            keys_too = [improvers.compensate_keys(i, *pair) for i, pair in enumerate(both)]
            add("shared prefix + compensate, keys too", keys_too)
        add("shared prefix + compensate + boundary 16", better, boundary(16))
        most = (most_deviating(deviations, round(SHARES[1] * total)) + begin).tolist()
        add(f"shared prefix + compensate + {SHARES[1]:.0%} most deviating", better, most)
    for name, stored, placed in (("own sink", own, own_pieces), ("shared prefix", shared, pieces)):
        poor: list[int] = []
        for (start, end), s, document in zip(prompt.runs, stored, group, strict=True):
            there = Stored(start, text[:start], s.key, s.value, s.stats)
            asked = lab.fingerprint(there, document.tokens)
            request = ReuseRequest(asked, "", 0, len(text) + len(follow), True)
            candidate = Candidate(lab.fingerprint(s, document.tokens))
            exact = s.context == text[:start]
            if not exact and not improvers.credible(candidate, request):
                poor += range(start, end)
        add(f"{name}, not credible computed", placed, poor)
    return made


def _second_layer(prompt: Prompt, pieces: Sequence[Piece]) -> Tensor:
    """How far each token of the documents is from the truth in the second layer."""
    layer = min(1, len(prompt.truth.key) - 1)
    stale_key = torch.cat([p.key[layer] for p in pieces])
    stale_value = torch.cat([p.value[layer] for p in pieces])
    begin = len(prompt.prefix)
    return deviation(
        stale_key, stale_value, prompt.truth.key[layer][begin:], prompt.truth.value[layer][begin:]
    )
