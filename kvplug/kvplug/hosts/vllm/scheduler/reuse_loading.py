"""Orders workers to load the run a request takes."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvplug.hosts.vllm.messages import LoadOrder, PieceOrder
from kvplug.hosts.vllm.scheduler.reuse_requests import ReusingRequest
from kvplug.reuse.plan import ReusePlan


def take_run(
    reusing: ReusingRequest, plan: ReusePlan, blocks: Any, number: int, awaited: bool
) -> LoadOrder:
    """Give a request its run; returns the order that writes it into the request's blocks.

    Args:
        reusing: The request.
        plan: Its run.
        blocks: vLLM's ``KVCacheBlocks`` of the request.
        number: Number of the order.
        awaited: True if vLLM waits for the run before it schedules the request.
    """
    reusing.taken, reusing.loading = plan, number
    approximate = [p for p in plan.pieces if not p.verdict.exact]
    if approximate:
        reusing.ancestry = 1 + max(p.segment.fingerprint.ancestry for p in approximate)
    return LoadOrder(
        reusing.request.request_id,
        np.array(blocks.get_block_ids()[0], dtype=np.int64),
        reusing.tokens[: plan.end].copy(),
        tuple(
            PieceOrder(
                p.segment.id,
                p.offset,
                p.length,
                p.start,
                p.verdict.exact,
                p.verdict.shift,
                p.verdict.confidence,
            )
            for p in plan.pieces
        ),
        tuple(plan.spans),
        number,
        awaited,
    )
