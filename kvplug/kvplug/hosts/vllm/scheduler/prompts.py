"""Tokens of prompts that were looked up, and where those come from that are not computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvplug.contract import Kind
from kvplug.hosts.vllm.flops import PromptFlops
from kvplug.observe.catalogue import HIT_TOKENS, LOOKUP_TOKENS, SAVED_FLOPS, Source
from kvplug.observe.metric import Sample

SOURCES = {Kind.REUSE: Source.SEGMENT, Kind.TIERS: Source.TIER}


class Prompts:
    """Counts each request's first look-up, as it is let in.

    Args:
        flops: What tokens of a prompt take.
    """

    def __init__(self, flops: PromptFlops):
        self._flops = flops
        self._matched: dict[str, tuple[int, Source | None]] = {}
        self._looked_up = 0
        self._hits = dict.fromkeys(Source, 0)
        self._saved = dict.fromkeys(Source, 0)

    def matched(self, request: Any, num_local: int, kind: Kind | None) -> None:
        """Take note of what was found.

        Args:
            request: vLLM's ``Request``.
            num_local: Tokens in the prefix cache.
            kind: Kind that has the tokens after them, or None.
        """
        if not request.num_preemptions:
            self._matched[request.request_id] = num_local, SOURCES.get(kind) if kind else None

    def allocated(self, request: Any, num_external: int) -> None:
        """Count what was found: the request was let in."""
        found = self._matched.pop(request.request_id, None)
        if found is None:
            return
        num_local, source = found
        self._looked_up += request.num_tokens
        self._count(Source.PREFIX, 0, num_local)
        if source is not None and num_external:
            self._count(source, num_local, num_external)

    def forget(self, request_id: str) -> None:
        """Forget a request that ended."""
        self._matched.pop(request_id, None)

    def _count(self, source: Source, start: int, tokens: int) -> None:
        if tokens:
            self._hits[source] += tokens
            self._saved[source] += self._flops.flops(start, tokens)

    def samples(self) -> Iterator[Sample]:
        """Tokens looked up and found, and what they would have taken."""
        yield LOOKUP_TOKENS.of(self._looked_up)
        for source in Source:
            yield HIT_TOKENS.of(self._hits[source], str(source))
            yield SAVED_FLOPS.of(self._saved[source], str(source))
