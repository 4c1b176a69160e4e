"""The steps of ``kvplug calibrate``, without its printing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvplug.contract import EngineView, FormatPolicy
from kvplug.errors import KVPlugError
from kvplug_lab.calibrate.candidates import Candidate, mixed
from kvplug_lab.calibrate.sensitivity import Loss, Meter
from kvplug_lab.calibrate.solve import assign

WAYS = ("divergence", "perplexity", "error")
"""Criteria of an assignment."""


def windows(
    ids: Sequence[int], prefix: Sequence[int], tokens: int, held_out: int, size: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Windows of a text to learn from, and others to measure on.

    The first come evenly from the first four fifths of the text, the others from the rest.

    Args:
        ids: The text.
        prefix: Tokens that every text begins with.
        tokens: Tokens to learn from.
        held_out: Tokens to measure on.
        size: Tokens of a window, its prefix among them.

    Raises:
        KVPlugError: The text is too short.
    """
    body = size - len(prefix)
    if body < 2:
        raise KVPlugError(f"windows of {size} tokens are too short: use at least {len(prefix) + 2}")
    split = len(ids) * 4 // 5

    def even(part: Sequence[int], wanted: int, what: str) -> list[Tensor]:
        n = max(wanted // size, 1) if wanted else 0
        if n * body > len(part):
            raise KVPlugError(
                f"the text has {len(ids)} tokens, too few for {wanted} to {what} in windows of "
                f"{size}: give a longer text or fewer tokens"
            )
        gap = len(part) // n if n else 0
        return [torch.tensor([*prefix, *part[i * gap : i * gap + body]]) for i in range(n)]

    return even(ids[:split], tokens, "learn from"), even(ids[split:], held_out, "measure on")


@dataclass
class Assignment:
    """One assignment of formats to layers, and what it costs.

    Attributes:
        label: ``chosen``, or the candidate of all layers.
        bytes_per_token: Bytes of K and V, all layers.
        predicted: Sum over the layers of what was measured one layer at a time.
        measured: All layers together.
    """

    label: str
    bytes_per_token: int
    predicted: Loss
    measured: Loss


@dataclass
class AssignmentSearch:
    """Result of a search for formats within a budget.

    Attributes:
        candidates: The formats.
        sizes: Bytes per token, by layer and candidate.
        losses: What each costs, by layer and candidate.
        chosen: Index of each layer's candidate.
        choices: The assignment, and every candidate that fits the budget in all layers.
        nll: Mean negative log-likelihood of the full cache, nats; NaN where not measured.
    """

    candidates: list[Candidate]
    sizes: list[list[int]]
    losses: list[list[Loss]]
    chosen: list[int]
    choices: list[Assignment] = field(default_factory=list)
    nll: float = math.nan

    @property
    def uniform(self) -> Assignment | None:
        """The best candidate for all layers within the budget, as measured."""
        return min(self.choices[1:], key=lambda c: c.measured.divergence, default=None)


def search_assignments(
    model: Any,
    engine: EngineView,
    held_out: Sequence[Tensor],
    candidates: Sequence[Candidate],
    budget: int,
    by: str,
    progress: Callable[[str], None] | None = None,
) -> AssignmentSearch:
    """Measure every candidate in every layer and solve for the best assignment.

    Args:
        model: A Hugging Face ``...ForCausalLM``.
        engine: Its layers, with the type that K and V have in the engine.
        held_out: Windows to measure on.
        candidates: The formats.
        budget: Bytes per token, all layers.
        by: One of `WAYS`; ``error`` measures no perplexity, layer by layer.
        progress: Called once per measurement.

    Raises:
        KVPlugError: A candidate refuses the model, or the budget is too small.
    """
    policies = [candidate.build(engine) for candidate in candidates]
    sizes = [[p.layout(layer).token_bytes(layer) for p in policies] for layer in engine.layers]
    # Too small a budget is refused before minutes are spent.
    assign(sizes, [[0.0] * len(row) for row in sizes], budget)
    meter = Meter(model, engine, held_out)
    errors = meter.errors(policies)
    losses = [[Loss(error) for error in row] for row in errors]
    nll = math.nan
    if by != "error":
        pairs = [(layer.index, p) for layer in engine.layers for p in policies]
        found, nll = meter.measure([{i: p} for i, p in pairs], progress)
        for at, loss in enumerate(found):
            row, column = divmod(at, len(policies))
            losses[row][column] = replace(loss, error=errors[row][column])
    chosen = assign(sizes, [[_cost(loss, by) for loss in row] for row in losses], budget)
    result = AssignmentSearch(list(candidates), sizes, losses, chosen, nll=nll)

    picks = [("chosen", chosen)] + [
        (candidate.label, [c] * len(sizes))
        for c, candidate in enumerate(candidates)
        if sum(row[c] for row in sizes) <= budget
    ]
    # The assignment runs as the format that its section names, every layer at once.
    together: list[dict[int, FormatPolicy]] = []
    for _, pick in picks:
        whole = Candidate("mixed", mixed([candidates[c] for c in pick])).build(engine)
        together.append({layer.index: whole for layer in engine.layers})
    measured, result.nll = meter.measure(together, progress)
    for (label, pick), loss in zip(picks, measured, strict=True):
        parts = [losses[row][c] for row, c in enumerate(pick)]
        predicted = Loss(
            math.sqrt(sum(part.error**2 for part in parts) / len(parts)),
            sum(part.divergence for part in parts),
            sum(part.nll for part in parts),
        )
        size = sum(sizes[row][c] for row, c in enumerate(pick))
        result.choices.append(Assignment(label, size, predicted, loss))
    return result


def _cost(loss: Loss, by: str) -> float:
    return {"divergence": loss.divergence, "perplexity": loss.nll, "error": loss.error**2}[by]
