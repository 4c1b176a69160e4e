"""Measured prices of deployments: fidelity and speed, each with model, machine and date.

They are the figures of the documentation, kept in the package by
``python -m kvplug_lab.measured_rows``.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "measured.json"


@dataclass(frozen=True)
class Price:
    """One measurement of a deployment.

    Attributes:
        name: Deployment, as the measurement named it.
        what: ``fidelity`` or ``speed``.
        budget: Part of the context that was kept, or tokens; None where all were.
        values: What was measured, by metric. Of fidelity: ``added``, nats a token over the full
            cache; ``kl``; ``top1``, ``prefix`` and ``agreement`` with it; ``passkey`` and
            ``multikey``, part found. Of speed: ``ratio`` to stock in the same memory,
            ``tokens_per_s``, ``running``.
        model: The model.
        context: Tokens of a text.
        machine: The machine.
        date: The day.
        command: The command that measured it.
    """

    name: str
    what: str
    budget: float | int | None
    values: dict[str, float]
    model: str
    context: int
    machine: str
    date: str
    command: str

    def __str__(self) -> str:
        return f"{self.short} ({self.source})"

    @property
    def short(self) -> str:
        """What was measured, in few words."""
        if self.what == "speed":
            kept = f" keeping {self.budget:,}" if self.budget else ""
            return f"{self.values['ratio']:.2f}x stock's tokens/s{kept}"
        parts = [f"{self.values['added']:+.3f} nats"]
        if "passkey" in self.values:
            parts.append(f"passkey {self.values['passkey']:.2f}")
        return ", ".join(parts) + (f" keeping {self.budget:.0%}" if self.is_part else "")

    @property
    def source(self) -> str:
        """Where it was measured, and what the numbers are of."""
        if self.what == "speed":
            what = "generated tokens per second in the same KV memory, prefill included"
        else:
            what = "nats a token over the full cache, part of pass keys found"
        return (
            f"{what}; {self.model}, texts of {self.context:,} tokens, {self.machine}, {self.date}"
        )

    @property
    def is_part(self) -> bool:
        """True if the budget is a part of the context."""
        return isinstance(self.budget, float)


@functools.cache
def _all() -> tuple[Price, ...]:
    rows: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))["rows"]
    return tuple(Price(**row) for row in rows)


def prices(*names: str) -> list[Price]:
    """Measurements of a deployment, by the names it was measured under; empty for none."""
    return [price for price in _all() if price.name in names]
