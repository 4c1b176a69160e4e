"""Watches answers after approximate reuse, and records those that drift."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from vllm.logger import init_logger

from kvplug.contract import Placement
from kvplug.hosts.vllm import compat
from kvplug.hosts.vllm.scheduler.kind import SchedulerContext
from kvplug.hosts.vllm.scheduler.reuse_requests import ReusingRequest
from kvplug.observe.catalogue import DRIFT_ENTROPY, DRIFT_LOGPROB
from kvplug.observe.metric import Sample
from kvplug.reuse.drift_record import DriftRecord, FamilyRecord, PieceRecord
from kvplug.reuse.file import digest
from kvplug.reuse.guard import Drift, Guard
from kvplug.reuse.settings import GuardSettings

logger = init_logger("vllm.kvplug")

MAX_FAMILIES = 16
"""Most families of segments a request is watched for."""


class DriftWatch:
    """Compares answers with those of exact requests over the same segments.

    Args:
        settings: Settings of the guard.
        context: The scheduler's context.

    Attributes:
        guard: Keeps the histories and breakers.
    """

    def __init__(self, settings: GuardSettings, context: SchedulerContext):
        self._distances = DRIFT_ENTROPY.distribution(), DRIFT_LOGPROB.distribution()
        self.guard = Guard(settings, on_compared=self._count)
        self._records = settings.records
        self._model = str(context.vllm_config.model_config.model)
        self._engine_id = str(context.vllm_config.kv_transfer_config.engine_id)
        self._context = context

    def on_new_request(self, reusing: ReusingRequest) -> None:
        """Choose the families the request is watched for, and mark it for the workers."""
        tokens = reusing.tokens
        reusing.families = tuple(
            f"{reusing.tenant}\0{digest(tokens[a:b]).hex()}" for a, b in reusing.spans[1:]
        )[:MAX_FAMILIES]
        if reusing.families:
            compat.mark_request(reusing.request, self._engine_id)

    def started(self, reusing: ReusingRequest) -> None:
        """Start watching an allocated request."""
        if reusing.families:
            request_id = reusing.request.request_id
            approximate = reusing.approximate_from is not None or reusing.answered_approximately
            self.guard.started(request_id, reusing.families, approximate)

    def on_report(self, watched: Iterable[tuple[str, float, float]]) -> None:
        """Take in ``(request, entropy, log-probability)`` of watched tokens."""
        by_request: dict[str, list[tuple[float, float]]] = {}
        for request_id, entropy, logprob in watched:
            by_request.setdefault(request_id, []).append((entropy, logprob))
        for request_id, values in by_request.items():
            table = np.array(values, dtype=np.float32)
            self.guard.observe(request_id, table[:, 0], table[:, 1])

    def finished(self, reusing: ReusingRequest) -> Drift | None:
        """Judge the answer of a request that ended; a drift is recorded where that is on."""
        if not reusing.families:
            return None
        drift = self.guard.finished(reusing.request.request_id)
        if drift is not None and reusing.taken is not None and self._records:
            self._record(reusing, drift)
        return drift

    def samples(self) -> Iterator[Sample]:
        """Distances of compared answers."""
        yield DRIFT_ENTROPY.of(self._distances[0])
        yield DRIFT_LOGPROB.of(self._distances[1])

    def _count(self, entropy: float, logprob: float) -> None:
        self._distances[0].add(entropy)
        self._distances[1].add(logprob)

    def _record(self, reusing: ReusingRequest, drift: Drift) -> None:
        """Write what happened, for ``kvplug reuse explain``."""
        request, plan, view = reusing.request, reusing.taken, self._context.engine
        assert plan is not None
        text: Any = request.all_token_ids
        record = DriftRecord(
            model=self._model,
            fingerprint=view.model,
            dtype=view.layers[0].dtype,
            block_size=view.block_size,
            kvplug=dict(self._context.deployment.section),
            request_id=request.request_id,
            prompt_ids=list(text[: request.num_prompt_tokens]),
            output_ids=list(text[request.num_prompt_tokens :]),
            pieces=[
                PieceRecord.of(
                    p.segment.id,
                    Placement(p.segment.fingerprint, p.offset, p.length, p.start, p.verdict),
                    p.segment.context_ids,
                    p.segment.token_ids,
                )
                for p in plan.pieces
            ],
            computed=list(plan.spans),
            entropies=list(drift.entropies),
            logprobs=list(drift.logprobs),
            families=FamilyRecord.of(drift),
        )
        try:
            path = record.write(self._records)
            logger.warning("kvplug: an answer drifted after reuse: kvplug reuse explain %s", path)
        except OSError as error:
            logger.error("kvplug: the record of a drift could not be written: %s", error)
