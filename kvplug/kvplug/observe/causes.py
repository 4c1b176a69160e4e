"""Causes that metrics tell apart: closed sets, in which a policy's own phrases are ``other``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from kvplug.observe.metric import OTHER

__all__ = ["OF_REUSE", "OF_SEGMENTS", "OF_TIERS", "counted", "word"]


def word(text: str) -> str:
    """A phrase as the value of a label: lower case, words joined by underscores."""
    return "_".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _words(*phrases: str) -> tuple[str, ...]:
    return (*map(word, phrases), OTHER)


OF_REUSE = _words(
    # The request, and what the host did.
    *("not plain text", "adapter of unknown content", "adapter changed", "load failed"),
    # The chain.
    *("check failed", "approximate not allowed", "breaker open", "nothing checked", "refused"),
    # Checks.
    *("other tenant", "other model", "unknown model", "other tokenizer", "other LoRA adapter"),
    *("other dtype", "other format", "other geometry", "other positions", "other text"),
    *("invalidated", "not whole", "too old", "does not fit", "approximate ancestry not allowed"),
    *("moved too far", "mask unknown", "window cuts its context", "span cut", "other mask"),
    *("not calibrated", "not credible"),
    # Files that an earlier engine left.
    *("not a segment file", "other version", "truncated", "bad checksum", "bad header"),
    *("other rank", "missing", "incomplete", "no memory", "unreadable"),
)
"""Why stored segments, and requests, were not served by reuse."""

OF_SEGMENTS = _words(
    *("not a segment file", "other version", "truncated", "bad checksum", "bad header"),
    *("other rank", "other geometry", "missing", "incomplete", "no memory", "unreadable"),
    *("could not be stored", "weights changed", "no space left on device", "cannot be written"),
    *("load failed", "load not reported"),
)
"""Why segments could not be written or read."""

OF_TIERS = _words(
    *("no text", "adapter of unknown content", "adapter changed", "no answer in time"),
    *("reset", "no time", "weights changed", "could not be ordered", "could not be read"),
    *("no room to copy", "not there", "not exact", "left alone after failures", "closed"),
    *("full", "read only", "too slow", "unreachable", "refused", "not permitted"),
    *("wrong password", "wrong credentials", "no bucket", "unreadable", "bad checksum"),
    *("no space left on device", "truncated"),
)
"""Why requests and chunks took no part in tiers, and tiers failed."""


def counted(counts: Mapping[str, int], known: tuple[str, ...]) -> Counter[str]:
    """Counts by phrase as counts by cause; what is not among the known ones is `OTHER`."""
    found: Counter[str] = Counter()
    for phrase, count in counts.items():
        cause = word(phrase)
        found[cause if cause in known else OTHER] += count
    return found
