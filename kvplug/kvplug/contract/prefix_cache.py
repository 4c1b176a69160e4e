"""Prefix-cache policies: which cached, unreferenced block to give up. Exact by nature."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from kvplug.contract.policy import Feature, Kind, Policy


class BlockFact(StrEnum):
    """What a policy may ask to know about a block besides its id; each costs the host something.

    ``REQUEST``: the request that let go of the block. ``POSITION``: the block's index in that
    request's text. ``KEY``: the identity of its content (equal keys, equal prefix). ``PARENT``: the
    block before it in that text. ``FINISHED`` is about whole requests: their ends, through
    `PrefixCachePolicy.on_finished`.
    """

    REQUEST = "request"
    POSITION = "position"
    KEY = "key"
    PARENT = "parent"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class RequestView:
    """A request as policies see it.

    Attributes:
        request_id: The engine's id.
        num_prompt_tokens: Tokens of its prompt.
        priority: The engine's priority, lower is more urgent.
        session_id: Conversation the request belongs to, when it names one.
        arrival: Arrival time in seconds, on the engine's clock.
    """

    request_id: str
    num_prompt_tokens: int
    priority: int = 0
    session_id: str | None = None
    arrival: float = 0.0


@dataclass(frozen=True, slots=True)
class Released:
    """Blocks that one request let go of, tail first, all evictable from now on.

    Attributes:
        ids: Block ids, deepest block of the prefix first.
        positions: Index of each block in its request's text, or None if not asked for.
        keys: Content identity of each block, or None if not asked for.
        request: The request, or None if not asked for or not known (a preempted request).
        parents: Block before each block in its request's text, -1 for the first or where unknown,
            or None if not asked for. The parent's own content may have been evicted since.
    """

    ids: Sequence[int]
    positions: Sequence[int] | None = None
    keys: Sequence[bytes] | None = None
    request: RequestView | None = None
    parents: Sequence[int] | None = None


class PrefixCachePolicy(Policy):
    """Orders the eviction of cached blocks that no request holds.

    Life of a block as the policy sees it: ``on_release`` makes it a candidate; ``on_hit`` takes
    it out of the candidates while requests use it; a later ``on_release`` puts it back;
    ``on_remove`` says its content is gone (evicted, or the cache was reset). ``on_hit`` may name
    a block that was never released: a second request uses what a first is still computing.

    Runs in the scheduler, one object per engine. Blocks without cached content never reach it:
    the host always hands those out first.
    """

    kind: ClassVar[Kind] = Kind.PREFIX_CACHE
    exact: ClassVar[bool] = True
    changes: ClassVar[str] = "which cached block is evicted first; outputs stay the same"
    requires: ClassVar[frozenset[Feature]] = frozenset({Feature.PREFIX_CACHING})
    needs: frozenset[BlockFact] = frozenset()
    """What the host is asked to tell; an object may ask for more than its class."""

    @abstractmethod
    def on_release(self, released: Released) -> None:
        """Blocks became candidates: newly cached content, or content used again and let go."""

    @abstractmethod
    def on_hit(self, ids: Sequence[int]) -> None:
        """Cached blocks were matched by a request; they are no candidates until released."""

    @abstractmethod
    def on_remove(self, ids: Sequence[int]) -> None:
        """The content of these blocks is gone. Ids may be unknown to the policy."""

    @abstractmethod
    def victims(self, n: int) -> Sequence[int]:
        """The ``n`` candidates to give up, first victim first. Changes nothing.

        ``n`` never exceeds the number of candidates. The host evicts exactly the blocks
        returned and reports them through `on_remove`.
        """

    def on_finished(
        self, request: RequestView, keys: Sequence[bytes], num_output_tokens: int
    ) -> None:
        """A request ended; told only to a policy that needs ``FINISHED``, before the release.

        Args:
            request: The request.
            keys: Content identity of each full block of its text that was computed, prompt and
                output, in text order, whether or not the block is still cached.
            num_output_tokens: Tokens it generated.
        """

    def on_stop(self) -> None:
        """The engine stops and nothing follows. Told to a policy that was retired, too."""
