"""The effect of reusing all documents of a prompt at once, with and without improvements."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvplug.contract.reuse import Candidate, ReuseRequest
from kvplug.reuse.deviation import deviation, most_deviating, spans
from kvplug_lab.reuse.partial_forward import Piece
from kvplug_reuse_learned.documents import Document, ExperimentSizes
from kvplug_reuse_learned.experiment import Compared, Experiment, Prompt, StoredKV, compare
from kvplug_reuse_learned.placements import Progress


@dataclass(frozen=True)
class Effect:
    """One way to reuse all documents of a prompt, measured over held-out prompts.

    Attributes:
        label: What was done.
        recomputed: Share of the documents' tokens that are recomputed.
        divergence: Mean KL divergence from recompute, nats.
        error: Standard error of that mean over prompts, nats.
        agreement: Share of equal first choices.
        perplexity: Of the true continuation.
    """

    label: str
    recomputed: float
    divergence: float
    error: float
    agreement: float
    perplexity: float


Adapt = Callable[[int, StoredKV, Piece], Piece]
"""Corrects a placed piece: document's number in the prompt, what was stored, what was placed."""


@dataclass(frozen=True, eq=False)
class Improvers:
    """Improvements that a calibration adds to recomputation.

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
    experiment: Experiment,
    found: Sequence[Document],
    sizes: ExperimentSizes,
    improvers: Improvers | None = None,
    progress: Progress | None = None,
) -> list[Effect]:
    """Measure the reuse of all documents of a prompt at once, with and without improvements.

    Every document but what follows the last one comes from storage, as in retrieval-augmented
    generation; compared is what follows the last.

    Args:
        experiment: The model under experiment.
        found: Documents, `ExperimentSizes.documents` for each prompt.
        sizes: Sizes of the experiment.
        improvers: A calibration's, of other documents; without it its rows are left out.
        progress: Called once per prompt.
    """
    chance = random.Random(f"{sizes.seed}:effects")
    pool = list(found)
    chance.shuffle(pool)
    rows: dict[str, list[tuple[float, Compared]]] = {}
    groups = [pool[i : i + sizes.documents] for i in range(0, len(pool), sizes.documents)]
    for number, group in enumerate(groups):
        for label, recomputed, outcome in _one_prompt(experiment, group, improvers, chance):
            rows.setdefault(label, []).append((recomputed, outcome))
        if progress is not None:
            progress(f"prompt {number + 1} of {len(groups)}")
    return [_effect(label, row) for label, row in rows.items()]


def _effect(label: str, row: Sequence[tuple[float, Compared]]) -> Effect:
    divergences = torch.tensor([c.divergence for _, c in row], dtype=torch.float64)
    error = float(divergences.std() / len(row) ** 0.5) if len(row) > 1 else 0.0
    nll = sum(c.nll for _, c in row) / len(row)
    return Effect(
        label,
        sum(recomputed for recomputed, _ in row) / len(row),
        float(divergences.mean()),
        error,
        sum(c.agreement for _, c in row) / len(row),
        float(torch.tensor(nll).exp()),
    )


def _one_prompt(
    experiment: Experiment,
    group: Sequence[Document],
    improvers: Improvers | None,
    chance: random.Random,
) -> list[tuple[str, float, Compared]]:
    prompt = experiment.prompt(group)
    follow, text = group[-1].after, prompt.tokens
    head, begin = prompt.true_piece(0, len(experiment.prefix)), len(experiment.prefix)
    total = len(text) - begin
    true = experiment.logits(text, [prompt.true_piece(0, len(text))], follow)
    made: list[tuple[str, float, Compared]] = [("recompute", 1.0, compare(true, true, follow))]

    def add(label: str, pieces: Sequence[Piece], recomputed: Sequence[int] = ()) -> None:
        logits = experiment.logits(text, [head, *pieces], follow, spans(sorted(recomputed)))
        made.append((label, len(recomputed) / total, compare(true, logits, follow)))

    def boundary(tokens: int = 0, share: float = 0.0) -> list[int]:
        ends = [(a, min(a + tokens + round(share * (b - a)), b)) for a, b in prompt.runs]
        return [t for start, end in ends for t in range(start, end)]

    own = [experiment.compute((), d.tokens) for d in group]
    shared = [experiment.compute(experiment.prefix, d.tokens) for d in group]
    starts = [start for start, _ in prompt.runs]
    add(
        "own sink, keys not moved",
        [Piece(s, o.key, o.value) for s, o in zip(starts, own, strict=True)],
    )
    own_pieces = [experiment.place(o, s) for s, o in zip(starts, own, strict=True)]
    pieces = [experiment.place(o, s) for s, o in zip(starts, shared, strict=True)]
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
        recomputed = chance.sample(range(begin, len(text)), count)
        add(f"shared prefix + {share:.0%} at random", pieces, recomputed)
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
            there = StoredKV(start, text[:start], s.key, s.value, s.stats)
            asked = experiment.fingerprint(there, document.tokens)
            request = ReuseRequest(asked, "", 0, len(text) + len(follow), True)
            candidate = Candidate(experiment.fingerprint(s, document.tokens))
            exact = s.context == text[:start]
            if not exact and not improvers.credible(candidate, request):
                poor += range(start, end)
        add(f"{name}, not credible computed", placed, poor)
    return made


def _second_layer(prompt: Prompt, pieces: Sequence[Piece]) -> Tensor:
    """Deviation of each document token from its true KV, in the second layer."""
    layer = min(1, len(prompt.truth.key) - 1)
    stale_key = torch.cat([p.key[layer] for p in pieces])
    stale_value = torch.cat([p.value[layer] for p in pieces])
    begin = len(prompt.prefix)
    return deviation(
        stale_key, stale_value, prompt.truth.key[layer][begin:], prompt.truth.value[layer][begin:]
    )
