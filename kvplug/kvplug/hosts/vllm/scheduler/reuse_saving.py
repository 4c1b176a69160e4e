"""Orders workers to store segments that requests complete, or leave when they end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kvplug.hosts.vllm.messages import ReuseReport, SaveOrder
from kvplug.hosts.vllm.scheduler.reuse_requests import ReusingRequest
from kvplug.reuse.catalog import Catalog
from kvplug.reuse.settings import ReuseSettings


class SegmentSaver:
    """Orders segments of requests to be stored, and follows the orders.

    Args:
        catalog: Stored segments.
        settings: Settings of reuse.
        identity: Fingerprint fields that all segments of the engine have in common.
        block_size: Tokens per block.
        world: Ranks that each store their part of a segment.
    """

    def __init__(
        self,
        catalog: Catalog,
        settings: ReuseSettings,
        identity: Mapping[str, Any],
        block_size: int,
        world: int,
    ):
        self._catalog = catalog
        self._settings = settings
        self._identity = identity
        self._size = block_size
        self._world = world
        self._ranks: Counter[tuple[str, str]] = Counter()
        self._outputs = settings.store.outputs

    def completes(self, reusing: ReusingRequest, end: int) -> bool:
        """True if a step that ends at token ``end`` completes a span to be stored."""
        spans, nth = reusing.spans, reusing.next_span
        return nth < self._last(reusing) and spans[nth][1] <= end

    def completed(
        self, reusing: ReusingRequest, end: int, blocks: Sequence[int], slot: int
    ) -> list[SaveOrder]:
        """Orders to store the spans that a step completes.

        Args:
            reusing: The request.
            end: Token after the last that the step computes.
            blocks: Ids of its blocks.
            slot: Its slot.
        """
        found = []
        while self.completes(reusing, end):
            span = reusing.spans[reusing.next_span]
            reusing.next_span += 1
            order = self._save(reusing, span, blocks, slot)
            if order is not None:
                found.append(order)
        return found

    def left(self, reusing: ReusingRequest, blocks: Sequence[int]) -> list[SaveOrder]:
        """Orders to store what an ended request leaves, before its blocks are written again."""
        request, spans = reusing.request, reusing.spans
        computed = min(request.num_computed_tokens, request.num_tokens - 1)
        if not blocks or reusing.next_span >= len(spans) or not self._outputs:
            return []
        start = spans[reusing.next_span][0]
        for span in spans[reusing.next_span :]:
            start = span[0]
            if span is spans[-1] or span[1] > computed:
                break
        found = []
        while start < computed:
            end = min(start + self._settings.segments.max_tokens, computed)
            if -(-end // self._size) > len(blocks):
                break
            order = self._save(reusing, (start, end), blocks, -1)
            if order is not None:
                found.append(order)
            start = end
        return found

    def forget(self) -> None:
        """Forget the orders that are under way."""
        self._ranks.clear()

    def saved(self, report: ReuseReport) -> int:
        """Take in what workers stored, wrote and fetched; returns how many segments were stored.

        A segment is there once every rank has reported it.
        """
        stored = 0
        for name, measures in report.saved.items():
            if report.counts.get(name, 0) == self._world:
                self._catalog.saved(name, measures)
                stored += 1
            else:
                self._catalog.failed(name, "could not be stored")
        for done, names, call in (
            ("written", report.written, self._catalog.written),
            ("fetched", report.fetched, self._catalog.fetched),
        ):
            for name in names:
                self._ranks[done, name] += 1
                if self._ranks[done, name] == self._world:
                    del self._ranks[done, name]
                    call(name)
        for name, cause in report.failed.items():
            for done in ("written", "fetched"):
                self._ranks.pop((done, name), None)
            self._catalog.failed(name, cause)
        return stored

    def _last(self, reusing: ReusingRequest) -> int:
        # The last span goes on in the output; it is stored at the end, where outputs are.
        return len(reusing.spans) - (1 if self._outputs else 0)

    def _save(
        self, reusing: ReusingRequest, span: tuple[int, int], blocks: Sequence[int], slot: int
    ) -> SaveOrder | None:
        start, end = span
        taken = reusing.taken
        if (
            not reusing.keeps
            or reusing.options.reuse == "off"
            or end - start < self._settings.segments.min_tokens
        ):
            return None
        if taken is not None and any(
            p.start <= start and end <= p.end and p.offset + start - p.start == 0
            for p in taken.pieces
        ):
            return None
        first = reusing.approximate_from
        approximate = first is not None and end > first
        if approximate and not self._settings.approximate:
            return None
        tokens = reusing.tokens
        fingerprint = reusing.fingerprint(self._identity, tokens, start, end)
        # Another kind may have approximated where nothing was reused.
        ancestry = max(1, fingerprint.ancestry) if approximate else 0
        fingerprint = replace(fingerprint, ancestry=ancestry)
        session = reusing.options.session_id or ""
        segment = self._catalog.plan_save(
            fingerprint, tokens[start:end].copy(), tokens[:start].copy(), session
        )
        if segment is None:
            return None
        return SaveOrder(
            segment.id,
            fingerprint,
            segment.token_ids,
            segment.context_ids,
            np.array(blocks[: -(-end // self._size)], dtype=np.int64),
            slot,
            session,
        )
