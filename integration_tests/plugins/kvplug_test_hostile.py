"""One policy of each kind that works in no way a policy may work."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvplug import hookimpl
from kvplug.contract import (
    AttendBatch,
    AttentionPolicy,
    Candidate,
    DecodeRows,
    EngineView,
    LayerView,
    Placement,
    PolicyOptions,
    Released,
    ResidentView,
    ReuseCheck,
    ReuseRequest,
    ScoringPolicy,
    Verdict,
)
from kvplug.registry import PolicyRegistry
from kvplug_policies.format.plain import Plain
from kvplug_policies.prefix_cache.lru import Lru

FORGED = "a\nERROR 01-01 00:00:00 [forged.py:1] forged\x1b[2J\ud800" + "x" * 100_000


class Unspeakable(Exception):
    """Has no text."""

    def __str__(self) -> str:
        raise SystemExit(1)


def nonsense() -> Any:
    """Counters of every wrong kind, by other names each time."""
    nonsense.calls += 1  # type: ignore[attr-defined]
    return {
        **{"hits: warm": 3, "inf": float("inf"), "nan": float("nan"), "less": -1, "text": "1"},
        **{f"{nonsense.calls}-{i}": 1.0 for i in range(50)},  # type: ignore[attr-defined]
        FORGED: 1.0,
    }


nonsense.calls = 0  # type: ignore[attr-defined]


def unsettle() -> None:
    """Change what every other computation of the process depends on."""
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(True)
    torch.set_num_threads(3)


class HostileCache(Lru):
    """Empties what it is handed, and exits in the fourth call of `victims`."""

    name = "hostile_cache"

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self._answers = 3

    def on_release(self, released: Released) -> None:
        super().on_release(released)
        released.ids.clear()  # type: ignore[attr-defined]
        unsettle()

    def on_remove(self, ids: Sequence[int]) -> None:
        super().on_remove(ids)
        ids.clear()  # type: ignore[attr-defined]

    def victims(self, n: int) -> list[int]:
        self._answers -= 1
        if self._answers < 0:
            sys.exit(FORGED)
        return super().victims(n)

    def counters(self) -> Any:
        return nonsense()

    def on_stop(self) -> None:
        raise asyncio.CancelledError


class HostileCheck(ReuseCheck):
    """Gives odd verdicts, and cannot correct what it allows."""

    name = "hostile_check"
    changes = "nothing"
    calls = 0

    def check(self, candidate: Candidate, request: ReuseRequest) -> Verdict:
        self.calls += 1
        odd: list[Any] = [
            Verdict(True),
            Verdict(False, f"too far: {self.calls}\nforged"),
            Verdict(True, shift=10**30),
            Verdict(True, exact=None),  # type: ignore[arg-type]
            Verdict(False, ["list"]),  # type: ignore[arg-type]
            Unspeakable,
        ]
        answer = odd[self.calls % len(odd)]
        if answer is Unspeakable:
            raise Unspeakable
        found: Verdict = answer
        return found

    def adapts(self, placement: Placement) -> bool:
        return True

    def adapt(
        self, layer: LayerView, placement: Placement, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        key.zero_()
        value.fill_(float("nan"))
        raise KeyboardInterrupt

    def counters(self) -> Any:
        raise SystemExit(2)


class HostileScores(ScoringPolicy):
    """Moves the positions it is shown, scores with NaN, and exits in the end."""

    name = "hostile_scores"
    changes = "what a request sees"
    calls = 0

    def score(self, resident: ResidentView) -> Tensor:
        self.calls += 1
        unsettle()
        if self.calls > 5:
            sys.exit(FORGED)
        resident.positions.neg_()
        resident.num_tokens.add_(100)
        return torch.full(resident.positions.shape, float("nan"), dtype=torch.float64)

    def measure(self, resident: ResidentView, scores: Tensor) -> Tensor:
        resident.positions.zero_()
        return torch.full((len(scores), 1), float("inf"), requires_grad=True)

    def resize(self, measured: Sequence[float], budget: int, num_tokens: int) -> int:
        return budget * float("nan")  # type: ignore[return-value]

    def counters(self) -> Any:
        return nonsense()


class HostileFormat(Plain):
    """Stores K and V as they are, and attends nothing."""

    name = "hostile_format"

    def attend(self, layer: LayerView, batch: AttendBatch, cache: Tensor, out: Tensor) -> None:
        unsettle()
        out.fill_(float("nan"))
        sys.exit(FORGED)

    def signals(self) -> Sequence[float]:
        return [float("nan")] * 1_000_000

    def counters(self) -> Any:
        return nonsense()


class HostileAttention(AttentionPolicy):
    """Attends with NaN."""

    name = "hostile_attention"

    def attend(self, layer: LayerView, rows: DecodeRows) -> Tensor:
        unsettle()
        rows.query.zero_()
        return torch.full(rows.query.shape, float("nan"), dtype=torch.float64, requires_grad=True)

    def counters(self) -> Any:
        return nonsense()


@hookimpl
def kvplug_register_policies(registry: PolicyRegistry) -> None:
    for policy in (HostileCache, HostileCheck, HostileScores, HostileFormat, HostileAttention):
        registry.add(policy)
