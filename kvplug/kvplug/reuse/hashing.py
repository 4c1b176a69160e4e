"""Hashes of token windows, and of the sets of n-grams of token runs."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["GOLDEN", "Hasher", "Hashes", "RollingHash", "SimHash", "Tokens"]

Tokens = NDArray[np.int32]
Hashes = NDArray[np.uint64]
Hasher = Callable[[Tokens, int], Hashes]
"""Token ids ``[n]`` and a width ``w`` to a hash of each window, ``[n - w + 1]``."""

GOLDEN = 0x9E3779B97F4A7C15
"""2**64 over the golden ratio: a multiplier that spreads hashes (Knuth, TAOCP 3, 6.4)."""

_WORD = 1 << 64


def _mixed(words: Hashes) -> Hashes:
    """SplitMix64's finalizer: every input bit affects every output bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class RollingHash:
    """Polynomial hash of every window of a text, modulo 2**64, over scrambled token ids.

    Args:
        seed: Seed of its base and its scrambling; random if None, so that nobody can prepare texts
            that collide.
    """

    def __init__(self, seed: int | None = None) -> None:
        source = np.random.default_rng(secrets.randbits(128) if seed is None else seed)
        self._base = int(source.integers(1 << 62, _WORD, dtype=np.uint64)) | 1
        self._salt = np.uint64(source.integers(0, _WORD, dtype=np.uint64))

    def __call__(self, tokens: Tokens, width: int) -> Hashes:
        """Hash every window of `width` tokens: ``[max(n - width + 1, 0)]`` uint64."""
        places = len(tokens) - width + 1
        if places < 1:
            return np.empty(0, np.uint64)
        # Windows of 1, 2, 4, ... tokens are combined to one of `width`.
        power = _mixed(tokens.view(np.uint32).astype(np.uint64) + self._salt)
        size, done = 1, 0
        result: Hashes | None = None
        while True:
            if width & size:
                part = power[done : done + places]
                result = part if result is None else result * np.uint64(self._weight(size)) + part
                done += size
            if done == width:
                assert result is not None
                return result
            power = power[:-size] * np.uint64(self._weight(size)) + power[size:]
            size *= 2

    def _weight(self, size: int) -> int:
        return pow(self._base, size, _WORD)


class SimHash:
    """A hash that differs in few bits for texts with many n-grams in common.

    Args:
        bits: Bits of a hash, a multiple of 64.
        grams: Tokens per n-gram.
        seed: Seed of the n-grams' hashes.
    """

    def __init__(self, bits: int = 512, grams: int = 2, seed: int | None = None) -> None:
        if bits < 64 or bits % 64:
            raise ValueError(f"bits must be a positive multiple of 64, got {bits}")
        self.bits = bits
        self.grams = grams
        self._rolling = RollingHash(seed)
        self._steps = np.arange(1, bits // 64 + 1, dtype=np.uint64) * np.uint64(GOLDEN)

    def __call__(self, tokens: Tokens) -> NDArray[np.uint8]:
        """Hash a text of at least one token: ``[bits / 8]`` uint8."""
        found = np.unique(self._rolling(tokens, min(self.grams, len(tokens))))
        words = _mixed(found[:, None] + self._steps)
        wide = np.uint16 if len(found) < 1 << 16 else np.uint32
        ones = np.unpackbits(words.view(np.uint8), axis=1).sum(axis=0, dtype=wide)
        return np.packbits(ones > len(found) // 2)
