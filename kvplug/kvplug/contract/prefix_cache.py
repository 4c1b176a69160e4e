"""Prefix-cache policies: which cached, unreferenced block to evict. Exact by nature."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from kvplug.contract.policy import Feature, Kind, Policy


class BlockFact(StrEnum):
    """Facts about a block, besides its id, that a policy may ask for; each has a cost in the host.

    ``REQUEST``: the request that released the block. ``POSITION``: the block's index in that
    request's text. ``KEY``: the identity of its content (equal keys, equal prefix). ``PARENT``: the
    block before it in that text. ``FINISHED``: the end of each request, through
    `PrefixCachePolicy.on_finished`.
    """

    REQUEST = "request"
    POSITION = "position"
    KEY = "key"
    PARENT = "parent"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class RequestView:
    """View of a request.

    Attributes:
        request_id: The engine's id; of a longer one than 128 characters its beginning and a digest.
        num_prompt_tokens: Tokens of its prompt.
        priority: The engine's priority, lower is more urgent.
        session_id: Conversation the request belongs to, if it names one: a digest of the client's
            name for it and of the tenant, so that two tenants' sessions of one name are two.
        arrival: Arrival time in seconds, on the engine's clock.
    """

    request_id: str
    num_prompt_tokens: int
    priority: int = 0
    session_id: str | None = None
    arrival: float = 0.0


@dataclass(frozen=True, slots=True)
class Released:
    """Blocks that one request released, last block first, all evictable from now on.

    Attributes:
        ids: Block ids, last block of the prefix first.
        positions: Index of each block in its request's text, or None if not asked for.
        keys: Content identity of each block, or None if not asked for.
        request: The request, or None if not asked for or unknown (a preempted request).
        parents: Block before each block in its request's text, -1 for the first block or if
            unknown, or None if not asked for. The parent's own content may be evicted since.
    """

    ids: Sequence[int]
    positions: Sequence[int] | None = None
    keys: Sequence[bytes] | None = None
    request: RequestView | None = None
    parents: Sequence[int] | None = None


class PrefixCachePolicy(Policy):
    """Orders the eviction of cached blocks that no request holds.

    Life of a block: ``on_release`` makes it a candidate; ``on_hit`` takes it out of the candidates
    while requests use it; a later ``on_release`` puts it back; ``on_remove`` reports that its
    content is gone (evicted, or the cache was reset). ``on_hit`` may name a block that was never
    released: a second request uses what a first is still computing.

    Runs in the scheduler, one object per engine. Blocks without cached content never reach it:
    the host allocates those first.

    Attributes:
        needs: Facts the host must report; an object may ask for more than its class.
    """

    kind: ClassVar[Kind] = Kind.PREFIX_CACHE
    exact: ClassVar[bool] = True
    changes: ClassVar[str] = "which cached block is evicted first; outputs stay the same"
    requires: ClassVar[frozenset[Feature]] = frozenset({Feature.PREFIX_CACHING})
    needs: frozenset[BlockFact] = frozenset()

    @abstractmethod
    def on_release(self, released: Released) -> None:
        """Add candidates: newly cached blocks, or blocks released after another use."""

    @abstractmethod
    def on_hit(self, ids: Sequence[int]) -> None:
        """Remove blocks that a request matched from the candidates, until they are released."""

    @abstractmethod
    def on_remove(self, ids: Sequence[int]) -> None:
        """Forget blocks whose content is gone. Ids may be unknown to the policy."""

    @abstractmethod
    def victims(self, n: int) -> Sequence[int]:
        """Choose the ``n`` candidates to evict, first victim first. Changes nothing.

        ``n`` never exceeds the number of candidates. The host evicts exactly the blocks
        returned and reports them through `on_remove`.
        """

    def on_finished(
        self, request: RequestView, keys: Sequence[bytes], num_output_tokens: int
    ) -> None:
        """Take note of a request's end, before its release; only for ``FINISHED`` in `needs`.

        Args:
            request: The request.
            keys: Content identity of each full block of its text that was computed, prompt and
                output, in text order, whether or not the block is still cached.
            num_output_tokens: Tokens it generated.
        """

    def on_stop(self) -> None:
        """Finish up as the engine stops; called last, even after a failure of the policy."""
