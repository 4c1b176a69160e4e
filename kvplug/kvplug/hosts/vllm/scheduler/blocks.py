"""Facts about blocks for policies that ask: the request, the position in it, and the parent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kvplug.client_names import request_name, session_of, tenant_of
from kvplug.contract import RequestView
from kvplug.request_options import ParsedOptions, RequestOptions


class BlockTracker:
    """Owner, index and parent of each block, as of what the scheduler sends each step.

    A block that several requests share belongs to the latest one that was given it.
    """

    def __init__(self, num_blocks: int):
        self._position = np.full(num_blocks, -1, dtype=np.int32)
        self._parent = np.full(num_blocks, -1, dtype=np.int32)
        self._owner: list[RequestView | None] = [None] * num_blocks
        self._lengths: dict[str, list[int]] = {}
        self._last: dict[str, list[int]] = {}
        self._requests: dict[str, RequestView] = {}

    def positions(self, ids: Sequence[int]) -> list[int]:
        """Index of each block in its request's text, -1 where unknown."""
        return self._position[list(ids)].tolist()

    def parents(self, ids: Sequence[int]) -> list[int]:
        """Block before each block in its request's text, -1 for the first or where unknown."""
        return self._parent[list(ids)].tolist()

    def owner(self, block: int) -> RequestView | None:
        """The latest request that was given the block."""
        return self._owner[block]

    def add(self, request: RequestView) -> None:
        """Add a request that arrived."""
        self._requests[request.request_id] = request

    def update(self, output: Any) -> None:
        """Take in one ``SchedulerOutput``."""
        for request in output.scheduled_new_reqs:
            self._start(request.req_id, len(request.block_ids))
            self._extend(request.req_id, request.block_ids)
        cached = output.scheduled_cached_reqs
        for request_id, block_ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if block_ids is None:
                continue
            if request_id in cached.resumed_req_ids:
                self._start(request_id, len(block_ids))
            self._extend(request_id, block_ids)
        for request_id in output.finished_req_ids:
            self._lengths.pop(request_id, None)
            self._last.pop(request_id, None)
            self._requests.pop(request_name(request_id), None)

    def _start(self, request_id: str, groups: int) -> None:
        self._lengths[request_id] = [0] * groups
        self._last[request_id] = [-1] * groups

    def _extend(self, request_id: str, groups: Sequence[Sequence[int]]) -> None:
        lengths = self._lengths.get(request_id)
        if lengths is None:
            return
        request = self._requests.get(request_name(request_id))
        last = self._last[request_id]
        for group, ids in enumerate(groups):
            if not ids:
                continue
            known = lengths[group]
            self._position[list(ids)] = np.arange(known, known + len(ids), dtype=np.int32)
            self._parent[list(ids)] = [last[group], *ids[:-1]]
            for block in ids:
                self._owner[block] = request
            lengths[group] += len(ids)
            last[group] = ids[-1]


def parse_options(request: Any) -> ParsedOptions:
    """Parse what a new vLLM ``Request`` asks of kvplug; its session goes by its digest.

    Args:
        request: The request; its cache salt is still the user's own.
    """
    parsed = RequestOptions.parse(
        request.kv_transfer_params,
        num_prompt_tokens=request.num_prompt_tokens,
        session_id=request.session_id,
    )
    if parsed.options.session_id is None:
        return parsed
    session = session_of(tenant_of(getattr(request, "cache_salt", None)), parsed.options.session_id)
    return replace(parsed, options=parsed.options.model_copy(update={"session_id": session}))


def request_view(request: Any, options: RequestOptions | None = None) -> RequestView:
    """Describe a vLLM ``Request`` for policies.

    Args:
        request: The request.
        options: Its options, from `parse_options`; parsed here if None.
    """
    if options is None:
        options = parse_options(request).options
    return RequestView(
        request_id=request_name(request.request_id),
        num_prompt_tokens=request.num_prompt_tokens,
        priority=request.priority,
        session_id=options.session_id,
        arrival=request.arrival_time,
    )


def computed_keys(request: Any, hash_block_size: int, block_size: int) -> list[bytes]:
    """Content identity of each full block of a vLLM ``Request`` that was computed, in text order.

    Args:
        request: The request; the KV of its last sampled token was never computed.
        hash_block_size: Tokens per hash the engine keeps; divides ``block_size``.
        block_size: Tokens per block.
    """
    computed = min(request.num_computed_tokens, request.num_tokens - 1)
    per_block = block_size // hash_block_size
    # Each hash covers all before it, so a block's last one stands for the block.
    ends = request.block_hashes[per_block - 1 :: per_block]
    return [bytes(key) for key in ends[: max(0, computed) // block_size]]
