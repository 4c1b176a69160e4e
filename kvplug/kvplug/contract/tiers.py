"""Tiers: where chunks of KV are stored outside the engine's pool."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from kvplug.contract.policy import Kind, Policy, PolicyOptions

_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([kKMGTP]i?)?B?")
_UNITS = {"": 1} | {
    prefix + binary: base**power
    for power, prefix in enumerate("kMGTP", 1)
    for binary, base in (("", 1000), ("i", 1024))
}
_UNITS |= {"K": 1000, "Ki": 1024}


def _size(value: object) -> object:
    if not isinstance(value, str):
        return value
    found = _SIZE.fullmatch(value.strip())
    if found is None:
        raise ValueError("must be a size such as 8GiB, 500MB or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2] or ""])


Size = Annotated[int, BeforeValidator(_size)]
"""Bytes in an option of a tier: a whole number, or a text with a unit, of 1000 (``kB``, ``MB``,
``GB``, ``TB``) or of 1024 (``KiB``, ``MiB``, ``GiB``, ``TiB``)."""


class TierError(OSError):
    """A tier that could not do what it was asked: unreachable, refused, full or too slow.

    Attributes:
        cause: A few words, the same for the same cause; counted.
    """

    def __init__(self, cause: str, detail: str = "") -> None:
        self.cause = cause
        super().__init__(f"{cause}: {detail}" if detail else cause)


@dataclass(frozen=True, slots=True)
class TierPlace:
    """Where a tier object is opened.

    Attributes:
        identity: Digest of everything that all KV of the engine depends on, hexadecimal.
        rank: Rank of the worker, or -1 in the scheduler, which only asks what is there.
        world: Workers of the engine; each stores its own layers and heads of a chunk.
        engine: Data-parallel rank of the engine.
        device: The accelerator's name, e.g. ``"cuda:0"``.
    """

    identity: str
    rank: int
    world: int
    engine: int = 0
    device: str = "cpu"

    @property
    def ranks(self) -> range:
        """The ranks whose parts this place reads."""
        return range(self.world) if self.rank < 0 else range(self.rank, self.rank + 1)


@dataclass(frozen=True, slots=True)
class TierUsage:
    """What a tier holds for one rank.

    Attributes:
        entries: Chunks.
        size: Bytes.
        capacity: Bytes it may hold; 0 if nobody here decides that.
    """

    entries: int
    size: int
    capacity: int


class TierOptions(PolicyOptions):
    """Options that every tier has.

    Attributes:
        transfer: Codec of what is stored here, written as the ``transfer`` key; empty for that.
        order: Prefix-cache policy that says which chunk goes first.
    """

    transfer: str | dict[str, Any] = Field(
        default="", description="codec of what is stored here; empty for the `transfer` section's"
    )
    order: str | dict[str, Any] = Field(
        default="lru", description="prefix_cache policy whose order chunks leave in"
    )

    @property
    def places(self) -> frozenset[str]:
        """What the tier stores in, by names that are equal where two tiers would meet; empty for
        memory of its own."""
        return frozenset()


class Tier(Policy):
    """Stores payloads by key: immutable bytes whose key says all they depend on.

    Every method but `open` and `close` may be called by several threads at once and may block; none
    may block for longer than the tier's own time limit. A tier never retries for longer than that,
    and never raises anything but `TierError` for what its medium does. A payload that it returns is
    checked by the host, so a tier need not look inside; but what it knows to be torn it drops.

    Attributes:
        shared: True if other engines see what is stored.
        durable: True if what is stored outlives the process.
        on_device: True if it holds tensors in the accelerator's memory: `put` is then given device
            tensors, in the worker's own thread.
    """

    kind: ClassVar[Kind] = Kind.TIERS
    exact: ClassVar[bool] = True
    shared: ClassVar[bool] = False
    durable: ClassVar[bool] = False
    on_device: ClassVar[bool] = False

    class Options(TierOptions):
        """Options of every tier."""

    @abstractmethod
    def open(self, place: TierPlace) -> None:
        """Connect, or make ready. Called once, before anything else.

        Raises:
            TierError: It cannot serve at all: the deployment is refused at start with the message,
                which must say what to change. A server that is only down now is no such case.
        """

    @abstractmethod
    def put(self, items: Sequence[tuple[bytes, Any]]) -> list[str]:
        """Store payloads; what is there already is left alone.

        Args:
            items: Keys of 32 bytes and payloads, bytes-like. One that is read only is never changed
                by its giver, so it may be kept as it is; any other is copied.

        Returns:
            For each, the empty string once `get` would find it, or a few words on why not.

        Raises:
            TierError: None of them was stored.
        """

    @abstractmethod
    def get(self, keys: Sequence[bytes]) -> list[Any]:
        """Read payloads: bytes-like, or None for what is not there.

        Raises:
            TierError: The tier could not be asked.
        """

    @abstractmethod
    def has(self, keys: Sequence[bytes]) -> list[bool]:
        """Tell which keys are there, for all of the place's ranks.

        Raises:
            TierError: The tier could not be asked.
        """

    @abstractmethod
    def remove(self, keys: Sequence[bytes]) -> None:
        """Remove payloads, those that are there."""

    @abstractmethod
    def usage(self) -> TierUsage:
        """What it holds, of this place's rank, as far as it knows without asking a server."""

    def stored(self) -> Iterator[tuple[bytes, int, float]]:
        """Go through what is there already when a durable tier is opened.

        Yields:
            Key, bytes, and time of last use in seconds since the epoch.
        """
        return iter(())

    def close(self) -> None:
        """Finish what was accepted, and release what is held. Idempotent."""

    def described(self) -> Mapping[str, str]:
        """What it found out about its medium, for the log at start: one short text by name."""
        return {}
