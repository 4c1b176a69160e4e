"""Tiers without bytes: what each chunk holds, when it arrives, and what goes wrong on the way."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from vllm.v1.outputs import KVConnectorOutput

from kvplug.hosts.vllm.messages import ChunkLoad, ChunkStore, TiersDirectives, TiersReport

SIZE = 1000
"""Bytes of a chunk."""


class Pages(Protocol):
    """The worker's side: its pages, and the text that a request's slots should hold."""

    def read_block(self, block: int) -> list[Any]:
        """Slots of a block."""

    def write_block(self, block: int, values: Sequence[Any], request: str, exact: bool) -> None:
        """Fill a block."""

    def text_of(self, request: str, end: int) -> list[int] | None:
        """Digests of a request's first tokens; None for one that ended."""


class SimulatedTiers:
    """Tiers of one worker.

    Args:
        pages: The worker's pages.
        choose: Source of randomness.
        failures: Part of the loads and stores that fail.
        exact: Tiers that give back what was stored.
        require: Raises for what must never happen.
        counts: What happened.
    """

    def __init__(
        self,
        pages: Pages,
        choose: random.Random,
        failures: float,
        exact: Mapping[str, bool],
        require: Callable[[bool, str], None],
        counts: Counter[str],
    ):
        self._pages, self._choose, self._failures = pages, choose, failures
        self._exact, self._require, self._counts = exact, require, counts
        self._held: dict[tuple[str, bytes], list[Any]] = {}
        self._means: dict[bytes, list[Any]] = {}
        self._coming: list[tuple[str, bytes, list[Any]]] = []
        self._loading: list[ChunkLoad] = []
        self._generation = 0

    def step(self, orders: TiersDirectives | None, sent: KVConnectorOutput) -> TiersReport:
        """Do the part of a step that comes before its forward."""
        report = TiersReport()
        if orders is not None:
            if orders.generation > self._generation:
                self._generation = orders.generation
                for load in self._loading:
                    self._end(load, report, sent, "reset")
                self._loading.clear()
            for move in orders.moves:
                for key in move.keys:
                    if move.target is None:
                        self._held.pop((move.source, key), None)
                        self._coming = [
                            one for one in self._coming if one[:2] != (move.source, key)
                        ]
                    elif (move.source, key) in self._held:
                        self._coming.append((move.target, key, self._held[move.source, key]))
                    else:
                        report.failed[move.target, key] = "not there"
                        report.gone[move.source, key] = "not there"
            for store in orders.stores:
                self._store(store)
            self._loading += orders.loads
        self._arrive(report)
        loading, self._loading = self._loading, []
        for load in loading:
            if load.seconds and self._choose.random() < 0.5:
                self._loading.append(load)
            else:
                self._load(load, report, sent)
        return report

    def _store(self, order: ChunkStore) -> None:
        (block,) = order.blocks
        values = list(self._pages.read_block(block))
        self._require(None not in values, "a chunk is stored before it is filled")
        self._require(
            all(isinstance(value, int) for value in values),
            "what is approximate is stored as exact",
        )
        known = self._means.setdefault(order.key, values)
        self._require(known == values, "one key stands for two texts")
        self._counts["chunks stored"] += 1
        self._coming.append((order.tier, order.key, values))

    def _arrive(self, report: TiersReport) -> None:
        coming, self._coming = self._coming, []
        for tier, key, values in coming:
            chance = self._choose.random()
            if chance < 0.4:
                self._coming.append((tier, key, values))
            elif chance < 0.4 + 0.3 * self._failures:
                report.failed[tier, key] = "as chosen"
            else:
                self._held[tier, key] = values
                report.stored[tier, key] = 1, SIZE

    def _load(self, order: ChunkLoad, report: TiersReport, sent: KVConnectorOutput) -> None:
        per = len(order.blocks) // len(order.keys)
        end = order.start + 16 * len(order.blocks)
        digests = self._pages.text_of(order.request, end)
        failed = "" if order.seconds else "no time"
        if self._choose.random() < self._failures:
            failed = "as chosen"
        for i, (key, tier) in enumerate(zip(order.keys, order.tiers, strict=True)):
            values = self._held.get((tier, key))
            if values is None:
                # Its store failed, or it was dropped on the way: books lag behind.
                report.gone[tier, key] = failed = failed or "not there"
                continue
            first = order.start + 16 * per * i
            if digests is not None:
                self._require(
                    values == digests[first : first + 16], f"{order.request} loads another text"
                )
            torn = bool(failed) and self._choose.random() < 0.5
            self._pages.write_block(
                int(order.blocks[i]),
                [None] * 16 if torn else values,
                order.request,
                self._exact[tier],
            )
        self._end(order, report, sent, failed)

    def _end(
        self, order: ChunkLoad, report: TiersReport, sent: KVConnectorOutput, failed: str
    ) -> None:
        self._counts["failed chunk loads" if failed else "chunk loads"] += 1
        sent.finished_recving = (sent.finished_recving or set()) | {order.request}
        if failed:
            sent.failed_recving = (sent.failed_recving or set()) | {order.request}
            report.unloaded[order.number] = failed
        else:
            report.loaded[order.number] = 1
