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

from kvplug.client_names import request_name, tenant_of
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
        tenant: Digest of its cache salt; segments are never shared between tenants.
        lora: Identity of its LoRA adapter, or the empty string.
        spans: Segments of its prompt, ``(start, end)``.
        plan: Run it may take once it is allocated.
        taken: Run it took.
        loading: Number of the order that loads its run, until workers have reported it; or None.
        barred: True once a run of it could not be loaded: it takes no other.
        answered_approximately: True once it has generated tokens after an approximate run and was
            preempted: whatever it takes then, its answer is not exact.
        approximate_from: First token whose KV is not exactly what its text gives, or None.
        ancestry: Approximate reuses behind its KV.
        next_span: Index of the first span that is not stored yet.
        waiting_since: Monotonic time it was first asked to wait, or None.
        families: Families of segments the guard watches it for.
        refused: Candidates that were not taken, by cause.
        keeps: False once its KV may not be what its fingerprint says: it takes and leaves nothing.
    """

    request: Any
    options: RequestOptions
    approximate: bool
    tenant: str
    lora: str
    spans: list[tuple[int, int]]
    plan: ReusePlan | None = None
    taken: ReusePlan | None = None
    loading: int | None = None
    barred: bool = False
    answered_approximately: bool = False
    approximate_from: int | None = None
    ancestry: int = 0
    next_span: int = 0
    waiting_since: float | None = None
    families: tuple[str, ...] = ()
    refused: Counter[str] = field(default_factory=Counter)
    keeps: bool = True
    prefixes: PrefixDigests = field(default_factory=PrefixDigests)

    @classmethod
    def of(
        cls,
        request: Any,
        options: RequestOptions,
        splitter: Splitter,
        approximate: bool,
        lora: str = "",
    ) -> ReusingRequest | None:
        """Take in a new vLLM ``Request``; None for one that is not plain text.

        Args:
            request: The request; its cache salt is still the user's own.
            options: Its options.
            splitter: Splits its prompt into segments.
            approximate: True if the deployment allows approximate reuse.
            lora: Identity of its LoRA adapter, or the empty string.
        """
        # Token ids of a prompt mixed with embeddings say nothing about its KV. A session that
        # gets its text in parts takes back the last token of each answer.
        if (
            request.prompt_token_ids is None
            or request.prompt_embeds is not None
            or request.mm_features
            or request.pooling_params
            or request.resumable
        ):
            return None
        lengths = list(options.segments) if options.segments is not None else None
        return cls(
            request,
            options,
            approximate=approximate and options.reuse == "approximate",
            tenant=tenant_of(request.cache_salt),
            lora=lora,
            spans=splitter.split(_tokens(request), lengths),
        )

    def describe(self, answer: Answer) -> None:
        """Add what the request reused, and what it could not, to its answer."""
        run = self.taken
        answer.exact &= not self.answered_approximately
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
            request_id=request_name(self.request.request_id),
            ancestry=self.ancestry,
        )


def _tokens(request: Any) -> npt.NDArray[np.int32]:
    return np.array(request.all_token_ids, dtype=np.int32)
