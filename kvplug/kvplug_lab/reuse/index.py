"""Costs of finding stored segments in a request, and the recall of near-equal ones.

    python -m kvplug_lab.reuse.index
    python -m kvplug_lab.reuse.index --sizes 1000 10000 --graph

Segments are pieces of Shakespeare in SmolLM2's tokens as far as the plays reach; beyond that,
their tokens are drawn one by one as often as they occur there, which gives texts that have frequent
tokens in common and nothing else. A request is made of stored segments with new text between them.
Requests for near-equal text are stored segments of which a share of the tokens is redrawn.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from usearch.compiled import MetricKind, ScalarKind
from usearch.index import Index

from kvplug.errors import KVPlugError
from kvplug.reuse.hashing import SimHash
from kvplug.reuse.index import SegmentIndex
from kvplug_lab.spread import Spread

__all__ = ["MatchCost", "NearCost", "measure", "tables"]

Tokens = NDArray[np.int32]

SIZES = (100, 1_000, 10_000, 100_000)
REPLACED = (0.01, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class MatchCost:
    """Costs of finding equal text.

    Attributes:
        segments: In the index.
        tokens: Of a request.
        found: Matches in a request, mean.
        match: Of one `SegmentIndex.match`.
        add: Of one `SegmentIndex.add`.
    """

    segments: int
    tokens: int
    found: float
    match: Spread
    add: Spread


@dataclass(frozen=True)
class NearCost:
    """Costs of finding near-equal text, and its recall.

    Attributes:
        segments: In the index.
        way: ``exact``, as the product does it, or ``graph``: HNSW of the same library.
        replaced: Share of a query's tokens that were redrawn.
        near: Of one search for ten, the query's hash included.
        add: Of adding one, its hash included; for ``exact`` that is all of `SegmentIndex.add`.
        recall_1: Share of queries of which the nearest of all hashes came first.
        recall_10: Share of the ten nearest of all hashes among the ten found.
        source_1: Share of queries of which the segment they were made of came first.
        source_10: The same, among the ten found.
    """

    segments: int
    way: str
    replaced: float
    near: Spread
    add: Spread
    recall_1: float
    recall_10: float
    source_1: float
    source_10: float


class _Texts:
    """Segments of real tokens, and then of drawn ones."""

    def __init__(self, length: int, seed: int) -> None:
        from transformers import AutoTokenizer

        from kvplug_lab.models import smollm2
        from kvplug_lab.texts import shakespeare

        tokenizer = AutoTokenizer.from_pretrained(smollm2())
        text = tokenizer.encode(shakespeare(), add_special_tokens=False, verbose=False)
        self._real = np.asarray(text, np.int32)
        self._length = length
        self._source = np.random.default_rng(seed)

    @property
    def real(self) -> int:
        """Number of segments that are pieces of the plays."""
        return len(self._real) // self._length

    def drawn(self, *shape: int) -> Tokens:
        """Tokens by how often they occur in the plays."""
        drawn: Tokens = self._real[self._source.integers(0, len(self._real), shape)]
        return drawn

    def segments(self, count: int) -> Tokens:
        """``[count, length]``."""
        real = min(count, self.real)
        pieces = self._real[: real * self._length].reshape(real, self._length)
        return np.concatenate([pieces, self.drawn(count - real, self._length)])

    def request(self, stored: Tokens, tokens: int) -> Tokens:
        """Stored segments and as much new text between them, as long as there is room."""
        parts, room = [], tokens
        while room > 0:
            piece = stored[self._source.integers(len(stored))]
            parts += [piece, self.drawn(self._length)]
            room -= 2 * self._length
        made: Tokens = np.concatenate(parts)[:tokens]
        return made

    def chosen(self, of: int, count: int) -> list[int]:
        """Numbers below `of`."""
        return [int(n) for n in self._source.integers(0, of, count)]

    def changed(self, segment: Tokens, share: float) -> Tokens:
        """The segment with a share of its tokens redrawn."""
        places = self._source.permutation(len(segment))[: round(share * len(segment))]
        changed = segment.copy()
        changed[places] = self.drawn(len(places))
        return changed


def measure(
    sizes: Sequence[int] = SIZES,
    *,
    tokens: int = 2000,
    length: int = 256,
    repeats: int = 300,
    queries: int = 50,
    replaced: Sequence[float] = REPLACED,
    near: Sequence[int] | None = None,
    graph: bool = False,
    seed: int = 0,
) -> tuple[list[MatchCost], list[NearCost]]:
    """Measure both indexes, one after the other, in this process.

    Args:
        sizes: Segments in the index.
        tokens: Of a request.
        length: Tokens of a segment.
        repeats: Requests that are matched.
        queries: Searches for near-equal text, for each share.
        replaced: Shares of a query's tokens that are redrawn.
        near: Sizes at which near-equal text is searched; the largest of `sizes` if None.
        graph: Measure HNSW beside it; adding 100,000 segments to it takes a minute or more.
        seed: Of segments, requests and hashes; times are what they are.

    Returns:
        Costs of equal text by size, and of near-equal text by size and share.

    Raises:
        KVPlugError: The model or the text is not installed.
    """
    texts = _Texts(length, seed)
    stored = texts.segments(max([*sizes, *(near or ())]))
    near = (max(sizes),) if near is None else near
    found = [_match(texts, stored[:size], tokens, repeats, seed) for size in sizes]
    likely = [
        cost
        for size in near
        for cost in _near(texts, stored[:size], queries, replaced, graph, seed)
    ]
    return found, likely


def _microseconds(seconds: Sequence[float]) -> Spread:
    """Microseconds of many calls: their median, and the range from 5 % to 95 % of them."""
    return Spread.of([1e6 * s for s in seconds], tail=0.05)


def _fill(index: SegmentIndex, stored: Tokens) -> Spread:
    seconds = []
    for number, segment in enumerate(stored):
        name = f"{number:032x}"
        before = time.perf_counter()
        index.add(name, segment, "", float(number), f"request-{number // 8}")
        seconds.append(time.perf_counter() - before)
    return _microseconds(seconds)


def _match(texts: _Texts, stored: Tokens, tokens: int, repeats: int, seed: int) -> MatchCost:
    index = SegmentIndex(seed=seed)
    added = _fill(index, stored)
    requests = [texts.request(stored, tokens) for _ in range(repeats)]
    seconds, matches = [], 0
    for request in requests:
        before = time.perf_counter()
        found = index.match(request, "")
        seconds.append(time.perf_counter() - before)
        matches += len(found)
    return MatchCost(len(stored), tokens, matches / repeats, _microseconds(seconds), added)


def _near(
    texts: _Texts,
    stored: Tokens,
    queries: int,
    replaced: Sequence[float],
    graph: bool,
    seed: int,
) -> Iterator[NearCost]:
    index = SegmentIndex(near_duplicates=True, seed=seed)
    adds = {"exact": _fill(index, stored)}
    simhash = SimHash(seed=seed)
    hashes = np.stack([simhash(segment) for segment in stored])

    def exact(query: Tokens) -> list[int]:
        return [int(name, 16) for name, _ in index.nearest(query, "", 10)]

    ways = {"exact": exact}
    if graph:
        world = Index(
            ndim=simhash.bits,
            metric=MetricKind.Hamming,
            dtype=ScalarKind.B1,
            connectivity=32,
            expansion_add=128,
            expansion_search=64,
        )
        seconds = []
        for number, segment in enumerate(stored):
            before = time.perf_counter()
            world.add(number, simhash(segment), threads=1)
            seconds.append(time.perf_counter() - before)
        adds["graph"] = _microseconds(seconds)

        def walked(query: Tokens) -> list[int]:
            found: list[int] = world.search(simhash(query), 10, threads=1).keys.tolist()
            return found

        ways["graph"] = walked
    sources = texts.chosen(len(stored), queries)
    for share in replaced:
        asked = [texts.changed(stored[source], share) for source in sources]
        distances = [np.bitwise_count(hashes ^ simhash(query)).sum(axis=1) for query in asked]
        for way, search in ways.items():
            search(asked[0])
            seconds, hits = [], np.zeros(4)
            for query, source, distance in zip(asked, sources, distances, strict=True):
                before = time.perf_counter()
                found = search(query)
                seconds.append(time.perf_counter() - before)
                count = min(10, len(stored))
                # Of equally near ones any will do.
                last = np.partition(distance, count - 1)[count - 1]
                hits += (
                    bool(found) and distance[found[0]] == distance.min(),
                    sum(distance[number] <= last for number in found) / count,
                    found[:1] == [source],
                    source in found,
                )
            first, ten, own, among = (hits / queries).tolist()
            times = _microseconds(seconds)
            yield NearCost(len(stored), way, share, times, adds[way], first, ten, own, among)


def tables(found: Sequence[MatchCost], likely: Sequence[NearCost]) -> str:
    """Both results in Markdown."""

    def times(spread: Spread) -> str:
        return f"{spread.median:,.0f} | {spread.low:,.0f} to {spread.high:,.0f}"

    lines = [
        "| segments | tokens | found | match, us | 5% to 95% | add, us | 5% to 95% |",
        "| --: | --: | --: | --: | --: | --: | --: |",
        *(
            f"| {c.segments:,} | {c.tokens:,} | {c.found:.1f} | {times(c.match)} | {times(c.add)} |"
            for c in found
        ),
    ]
    if likely:
        lines += [
            "",
            "| segments | search | replaced | near, us | 5% to 95% | add, us "
            "| recall@1 | recall@10 | source@1 | source@10 |",
            "| --: | --- | --: | --: | --: | --: | --: | --: | --: | --: |",
            *(
                f"| {c.segments:,} | {c.way} | {c.replaced:.0%} | {times(c.near)} "
                f"| {c.add.median:,.0f} "
                f"| {c.recall_1:.2f} | {c.recall_10:.2f} | {c.source_1:.2f} | {c.source_10:.2f} |"
                for c in likely
            ),
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, in Markdown."""
    parser = argparse.ArgumentParser(prog="python -m kvplug_lab.reuse.index", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="segments")
    parser.add_argument(
        "--near", type=int, nargs="+", help="segments for near-equal text; the largest of --sizes"
    )
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of a request")
    parser.add_argument("--length", type=int, default=256, help="tokens of a segment")
    parser.add_argument("--repeats", type=int, default=300, help="requests")
    parser.add_argument("--queries", type=int, default=50, help="searches for each share")
    parser.add_argument("--graph", action="store_true", help="also search a graph (HNSW)")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    if (
        min(
            [
                *asked.sizes,
                *(asked.near or ()),
                asked.tokens,
                asked.length,
                asked.repeats,
                asked.queries,
            ]
        )
        < 1
    ):
        parser.error("all numbers must be positive")
    try:
        found, likely = measure(
            asked.sizes,
            tokens=asked.tokens,
            length=asked.length,
            repeats=asked.repeats,
            queries=asked.queries,
            near=asked.near,
            graph=asked.graph,
            seed=asked.seed,
        )
    except (KVPlugError, ImportError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(tables(found, likely))
    return 0


if __name__ == "__main__":
    sys.exit(main())
