"""Requests under way, as tiers follow them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.kv_cache_utils import resolve_block_hashes

from kvplug.client_names import request_name
from kvplug.contract import RequestView
from kvplug.hosts.vllm.scheduler.kind import Answer
from kvplug.request_options import RequestOptions
from kvplug.tiers.keys import KeyChain


@dataclass
class Run:
    """Chunks that a request takes from tiers, right after what the pool holds of its text.

    Attributes:
        first: Index of the first chunk in the request's text.
        keys: Keys of the chunks.
        tiers: Tier of each.
        sizes: Bytes of each.
        exact: False if one of them was stored by a codec that changes KV.
        seconds: Estimated time to load it; 0 if nothing was measured yet.
    """

    first: int
    keys: tuple[bytes, ...]
    tiers: tuple[str, ...]
    sizes: tuple[int, ...]
    exact: bool
    seconds: float = 0.0


@dataclass
class TieredRequest:
    """A request whose KV tiers may hold, or get.

    Attributes:
        request: vLLM's ``Request``.
        chain: Keys of its text.
        inputs: Its multimodal inputs, as `KeyChain.extend` takes them.
        stores: False if nothing of its text may be stored.
        lora: Digest of its adapter, or the empty string.
        session: The session it belongs to, or None.
        scheduled: Tokens that were computed when the latest step it was scheduled in had ended.
        keeps: False once its KV may not be what its keys say: it takes and leaves nothing.
        run: Run it may take once it is allocated.
        loading: Number of the order that loads its run, or None.
        taken: Run that is being loaded, or was.
        failures: Runs of it that could not be loaded.
        asked: True once its misses were counted, since it last started.
        approximate_from: First token whose KV is not exactly what its text gives, or None.
        approximated: True once tokens of its answer came after approximate KV.
        loaded: Tokens loaded; of all runs it took.
        causes: Why runs of it were not loaded.
        estimated: Seconds to its first token with the run that tiers held, and without, as they
            were estimated when that was decided; None where nothing was measured yet.
    """

    request: Any
    chain: KeyChain
    inputs: Sequence[tuple[str, int, int]]
    stores: bool
    lora: str
    session: str | None
    scheduled: int = 0
    keeps: bool = True
    run: Run | None = None
    loading: int | None = None
    taken: Run | None = None
    failures: int = 0
    asked: bool = False
    approximate_from: int | None = None
    approximated: bool = False
    loaded: int = 0
    causes: list[str] = field(default_factory=list)
    estimated: tuple[float | None, float | None] = (None, None)

    @classmethod
    def of(
        cls, request: Any, options: RequestOptions, chain: KeyChain, lora: str
    ) -> TieredRequest | None:
        """Take in a new vLLM ``Request``; None for one whose KV no key can stand for.

        Args:
            request: The request; its cache salt is still the user's own.
            options: Its options.
            chain: Makes its keys.
            lora: Digest of its adapter, or the empty string.
        """
        # A session of vLLM's takes tokens back and gets inputs later; keys never change.
        if request.resumable:
            return None
        # A prompt of embeddings has token ids that say nothing about its KV.
        if request.prompt_token_ids is None or request.prompt_embeds is not None:
            return None
        if request.pooling_params is not None:
            return None
        inputs = []
        for one in request.mm_features or ():
            if not one.identifier:
                return None
            inputs.append(
                (str(one.identifier), int(one.mm_position.offset), int(one.mm_position.length))
            )
        return cls(request, chain, inputs, options.store, lora, options.session_id)

    @property
    def view(self) -> RequestView:
        """The request as orders and lifecycle policies know it."""
        request = self.request
        return RequestView(
            request_name(request.request_id),
            request.num_prompt_tokens,
            request.priority,
            self.session,
            request.arrival_time,
        )

    def extend(self) -> list[bytes]:
        """Keys of all full chunks of its text so far."""
        self.chain.extend(self.request.all_token_ids, self.inputs)
        return self.chain.keys

    def computed(self) -> int:
        """Tokens that were computed before the step that preempted it."""
        # Drafted tokens were scheduled and may have been rejected; the last token never was.
        return min(self.scheduled, self.request.num_tokens - 1)

    def hashes(self, hash_size: int, block_size: int) -> Sequence[bytes]:
        """The engine's own hash of each full block of its text so far."""
        found: Sequence[bytes] = resolve_block_hashes(
            self.request.block_hashes, hash_size, block_size
        )
        return found

    def describe(self, answer: Answer) -> None:
        """Add what was loaded, and what could not be, to its answer."""
        answer.exact &= not self.approximated and self.approximate_from is None
        if self.loaded:
            answer.fields["loaded"] = self.loaded
        if self.causes:
            answer.fields["not_loaded"] = self.causes
        estimated = {
            name: round(seconds, 6)
            for name, seconds in zip(("load", "compute"), self.estimated, strict=True)
            if seconds is not None and math.isfinite(seconds)
        }
        if estimated:
            answer.fields["estimated_seconds"] = estimated
