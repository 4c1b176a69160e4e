"""Every full block of a prompt that came from no cache has one cause, and the cause is true:
against a record of everything that the pool and the requests ever did."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from scheduler_fuzz import MODES, SchedulerFuzz
from simulated_worker import BLOCK, require

from kvplug.hosts.vllm.scheduler.misses import MissObserver
from kvplug.observe.misses import Again, Lookup, MissCause, Misses, Source


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class Witness:
    """Remembers everything, without bounds, and looks at what `Misses` says.

    Attributes:
        causes: Blocks by cause that were found to be true.
    """

    def __init__(self, scheduler: Any, observer: MissObserver):
        misses = observer.misses
        assert misses is not None
        self.causes: Counter[str] = Counter()
        self.misses = misses
        self._pool = scheduler.kv_cache_manager.block_pool
        self._requests = scheduler.requests
        self._admitted, self._ended, self._looked_up = (
            misses.admitted,
            misses.ended,
            misses.looked_up,
        )
        self._evicted: set[bytes] = set()
        self._known: set[bytes] = set()
        self._cached_then: set[bytes] = set()
        self._resets = 0
        self._live: set[str] = set()
        self._texts: set[tuple[int, ...]] = set()
        evicted, reset = misses.evicted, misses.reset

        def on_evicted(one: bytes) -> None:
            self._evicted.add(one)
            evicted(one)

        def on_reset() -> None:
            self._resets += 1
            reset()

        for name, ours in (
            ("evicted", on_evicted),
            ("reset", on_reset),
            ("looked_up", self.looked_up),
            ("admitted", self.admitted),
            ("ended", self.ended),
        ):
            setattr(misses, name, ours)

    def looked_up(self) -> int:
        self._cached_then = {key[:-4] for key in self._pool.cached_block_hash_to_block._cache}
        return self._looked_up()

    def admitted(
        self, request_id: str, tokens: Sequence[int], hashes: Sequence[bytes], **facts: Any
    ) -> Lookup:
        before = Counter(self.misses.causes)
        others = {
            one
            for request in self._requests.values()
            if request.request_id != request_id
            for one in request.block_hashes
        }
        found = self._admitted(request_id, tokens, hashes, **facts)
        if found.again is None:
            full = facts["prompt_tokens"] // BLOCK
            have = (facts["served"] + facts["loaded"]) // BLOCK
            require(found.blocks == full, f"{found.blocks} of {full} blocks")
            require(sum(found.sources.values()) == full, f"{found.sources} of {full}")
            missed = found.sources[Source.MISSED]
            require(missed == max(0, full - have), f"{missed} missed")
            require(sum(found.causes.values()) == missed, f"{found.causes} of {missed}")
            require(Counter(self.misses.causes) - before == Counter(found.causes), "not counted")
            require((found.first is None) == (missed == 0), "no first miss")
            block = have
            for run in found.runs:
                require(run.first == block and run.blocks > 0, f"runs {found.runs}")
                for one in hashes[block : block + run.blocks]:
                    self._is_true(run.cause, one, tokens, block, others)
                    self.causes[run.cause] += 1
                    block += 1
            require(block == max(full, have), f"runs end at {block}")
        self._live.add(request_id)
        self._known.update(hashes)
        self._texts.update(_blocks(tokens))
        return found

    def ended(
        self, request_id: str, tokens: Sequence[int], hashes: Sequence[bytes], hashed: int
    ) -> None:
        if request_id in self._live:
            self._live.remove(request_id)
            self._known.update(hashes)
            self._texts.update(_blocks(tokens))
        self._ended(request_id, tokens, hashes, hashed)

    def _is_true(
        self,
        cause: MissCause,
        one: bytes,
        tokens: Sequence[int],
        block: int,
        others: set[bytes],
    ) -> None:
        text = tuple(tokens[block * BLOCK : (block + 1) * BLOCK])
        new = one not in self._known
        cached = one in self._cached_then
        evicted = one in self._evicted
        true = {
            MissCause.NEVER_SEEN: new,
            MissCause.PROMPT_DIFFERS: new,
            MissCause.AFTER_A_DIFFERENCE: new and text in self._texts,
            MissCause.SALT_OR_ADAPTER: new and text in self._texts,
            MissCause.EVICTED: evicted and not cached,
            MissCause.RESET: not new and not cached and self._resets > 0,
            MissCause.AFTER_A_GAP: cached,
            MissCause.LAST_TOKEN: cached and (block + 1) * BLOCK == len(tokens),
            MissCause.NOT_YET_COMPUTED: not cached and one in others,
            MissCause.ABANDONED: not new and not cached,
            MissCause.APPROXIMATE: not new and not cached,
            MissCause.NOT_READ: True,
            MissCause.FORGOTTEN: not cached,
        }[cause]
        require(true, f"block {block} is not {cause}: new {new}, cached {cached}")


def _blocks(tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        yield tuple(tokens[start : start + BLOCK])


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "a step ahead"])
@pytest.mark.parametrize("mode", MODES)
def test_every_missed_block_has_one_true_cause(mode: str, ahead: bool, tiny: Path) -> None:
    causes, again = _fuzzed(mode, ahead, tiny, seeds=[0], steps=400)
    assert causes["never_seen"] and causes["prompt_differs"] and causes["evicted"]
    assert again


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_every_missed_block_has_one_true_cause_for_long(seed: int, tiny: Path) -> None:
    _fuzzed([*MODES][seed % len(MODES)], bool(seed % 2), tiny, seeds=[seed], steps=6000)


def _raised(error: Exception) -> None:
    raise error


def _fuzzed(
    mode: str, ahead: bool, tiny: Path, seeds: Sequence[int], steps: int
) -> tuple[Counter[str], Counter[Again]]:
    causes: Counter[str] = Counter()
    again: Counter[Again] = Counter()
    for seed in seeds:
        fuzz = SchedulerFuzz(mode, seed, ahead, tiny, failures=0.5)
        observer = fuzz.scheduler.connector.scheduler.misses
        assert isinstance(observer, MissObserver) and isinstance(observer.misses, Misses)
        observer._fail = _raised  # type: ignore[method-assign]
        witness = Witness(fuzz.scheduler, observer)
        fuzz.run(steps)
        causes += witness.causes
        again += witness.misses.again
        missed = witness.misses.sources[Source.MISSED]
        assert sum(witness.misses.causes.values()) == missed == sum(witness.causes.values())
    return causes, again
