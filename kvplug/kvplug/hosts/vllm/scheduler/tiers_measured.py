"""What is measured of tiers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvplug.contract import Kind
from kvplug.counts import Causes
from kvplug.observe import catalogue
from kvplug.observe.causes import OF_TIERS, counted
from kvplug.observe.metric import Sample
from kvplug.tiers.hierarchy import Hierarchy

GONE = ("displaced", "dropped", "lost", "failed")
MOVED = {"demote": "demoted", "copy": "copied", "promote": "promoted"}


def samples(
    books: Hierarchy, chunk_bytes: int, codecs: Mapping[str, str], loaded_bytes: Mapping[str, int]
) -> Iterator[Sample]:
    """What the books say.

    Args:
        books: The books.
        chunk_bytes: Bytes of a chunk in the pool.
        codecs: Codec of each tier.
        loaded_bytes: Bytes that requests loaded, by tier.
    """
    counts = books.counters()
    stored: dict[str, list[float]] = {}
    for name, view in books.views().items():

        def of(what: str, tier: str = name) -> float:
            return counts.get(f"{tier}_{what}", 0.0)

        yield catalogue.TIER_DOWN.of(float(books.is_down(name)), name)
        yield catalogue.TIER_BYTES.of(view.used, name)
        yield catalogue.TIER_CAPACITY.of(view.capacity, name)
        yield catalogue.TIER_CHUNKS.of(of("chunks"), name)
        yield catalogue.TIER_STORED.of(of("stored"), name)
        yield catalogue.TIER_STORED_BYTES.of(of("stored_bytes"), name)
        yield catalogue.TIER_LOADED.of(of("used"), name)
        yield catalogue.TIER_LOADED_BYTES.of(loaded_bytes.get(name, 0), name)
        for action, done in MOVED.items():
            yield catalogue.TIER_MOVED.of(of(done), name, action)
            yield catalogue.TIER_MOVED_BYTES.of(of(f"{done}_bytes"), name, action)
        for why in GONE:
            yield catalogue.TIER_GONE.of(of(why), name, why)
        for direction, link in (("read", view.read), ("write", view.write)):
            yield catalogue.TIER_QUEUED.of(link.queued, name, direction)
            yield catalogue.TIER_BANDWIDTH.of(link.bandwidth, name, direction)
        chunks, size = stored.setdefault(codecs[name], [0.0, 0.0])
        stored[codecs[name]] = [chunks + of("stored"), size + of("stored_bytes")]
    for codec, (chunks, size) in stored.items():
        if size:
            ratio = chunks * chunk_bytes / size
            yield catalogue.COMPRESSION.of(ratio, str(Kind.TRANSFER), codec)
    for name, causes in books.causes_by_tier().items():
        for cause, count in counted(causes, OF_TIERS).items():
            yield catalogue.TIER_ERRORS.of(count, name, cause)
    asked, found = counts.get("asked", 0.0), counts.get("found", 0.0)
    yield catalogue.TIER_LOOKUPS.of(found, "found")
    yield catalogue.TIER_LOOKUPS.of(asked - found, "missed")
    yield catalogue.TIER_RETURNED.of(counts.get("returned", 0.0))
    yield catalogue.LIFECYCLE_DECLINED.of(counts.get("declined", 0.0))
    yield catalogue.LIFECYCLE_COMPUTED.of(counts.get("computed_instead", 0.0))


def refusals(refused: Causes) -> Iterator[Sample]:
    """Requests that took no part, and loads that failed, by cause."""
    for cause, count in counted(refused, OF_TIERS).items():
        yield catalogue.TIER_REFUSED.of(count, cause)
