"""Requests under way, as reuse follows them."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvplug.contract import Fingerprint
from kvplug.hosts.vllm.scheduler.kind import Answer
from kvplug.request_options import RequestOptions
from kvplug.reuse.file import digest
from kvplug.reuse.plan import ReusePlan
from kvplug.reuse.splitting import Splitter


class PrefixDigests:
    """Digests of the text before a position, each computed once."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._at = 0
        self._digests: dict[int, bytes] = {0: self._hash.digest()}

    def at(self, tokens: npt.NDArray[np.int32], position: int) -> bytes:
        """Digest of ``tokens[:position]``."""
        found = self._digests.get(position)
        if found is None:
            if position < self._at:
                found = digest(tokens[:position])
            else:
                self._hash.update(tokens[self._at : position].tobytes())
                self._at = position
                found = self._hash.digest()
            self._digests[position] = found
        return found


@dataclass
class ReusingRequest:
    """A request under way that may take stored tokens and leave some.

    Attributes:
        request: vLLM's ``Request``.
        options: Its options.
        approximate: True if the deployment and the request allow approximate reuse.
        tenant: Its cache salt; segments are never shared between tenants.
        lora: Name of its LoRA adapter, or the empty string.
        spans: Segments of its prompt, ``(start, end)``.
        plan: Run it may take once it is allocated.
        taken: Run it took.
        approximate_from: First token whose KV is not exactly what its text gives, or None.
        ancestry: Approximate reuses behind its KV.
        next_span: Index of the first span that is not stored yet.
        waiting_since: Monotonic time it was first asked to wait, or None.
        families: Families of segments the guard watches it for.
        refused: Candidates that were not taken, by cause.
    """

    request: Any
    options: RequestOptions
    approximate: bool
    tenant: str
    lora: str
    spans: list[tuple[int, int]]
    plan: ReusePlan | None = None
    taken: ReusePlan | None = None
    approximate_from: int | None = None
    ancestry: int = 0
    next_span: int = 0
    waiting_since: float | None = None
    families: tuple[str, ...] = ()
    refused: Counter[str] = field(default_factory=Counter)
    prefixes: PrefixDigests = field(default_factory=PrefixDigests)

    @classmethod
    def of(
        cls, request: Any, options: RequestOptions, splitter: Splitter, approximate: bool
    ) -> ReusingRequest | None:
        """Take in a new vLLM ``Request``; None for one that is not plain text.

        Args:
            request: The request; its cache salt is still the user's own.
            options: Its options.
            splitter: Splits its prompt into segments.
            approximate: True if the deployment allows approximate reuse.
        """
        if request.prompt_token_ids is None or request.mm_features or request.pooling_params:
            return None
        lora = request.lora_request
        lengths = list(options.segments) if options.segments is not None else None
        return cls(
            request,
            options,
            approximate=approximate and options.reuse == "approximate",
            tenant=request.cache_salt or "",
            lora=lora.lora_name if lora is not None else "",
            spans=splitter.split(_tokens(request), lengths),
        )

    def describe(self, answer: Answer) -> None:
        """Add what the request reused, and what it could not, to its answer."""
        run = self.taken
        if run is not None:
            answer.exact &= run.approximate_from is None
            answer.fields["reused"] = run.length - run.recomputed
            answer.fields["recomputed"] = run.recomputed
            answer.fields["segments"] = len(run.pieces)
            answer.fields["shifted"] = sum(p.length for p in run.pieces if p.verdict.shift)
        if self.refused:
            answer.fields["not_reused"] = dict(self.refused)

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """Its token ids so far."""
        return _tokens(self.request)

    def fingerprint(
        self,
        identity: Mapping[str, Any],
        tokens: npt.NDArray[np.int32],
        start: int,
        end: int,
    ) -> Fingerprint:
        """Describe the KV that the request has, or would have, of ``tokens[start:end]``.

        Args:
            identity: Fields that all segments of the engine have in common.
            tokens: Its token ids.
            start: First token.
            end: Token after the last.
        """
        return Fingerprint(
            **identity,
            lora=self.lora,
            tenant=self.tenant,
            mask="causal",
            start=start,
            length=end - start,
            context=self.prefixes.at(tokens, start),
            tokens=digest(tokens[start:end]),
            created=time.time(),
            request_id=self.request.request_id,
            ancestry=self.ancestry,
        )


def _tokens(request: Any) -> npt.NDArray[np.int32]:
    return np.array(request.all_token_ids, dtype=np.int32)
