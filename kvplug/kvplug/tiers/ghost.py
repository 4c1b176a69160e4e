"""What tiers gave up, remembered without its bytes: tells a working set that no tier can hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

REMEMBERED = 1 << 17
"""Chunks remembered by default; about 160 bytes each."""

HALF_LIFE = 4096
"""Missed chunks after which a miss counts half in the measure of thrash."""

SURE = 256
"""Misses below which thrash is understated: a few prove nothing."""

HELD = 1 << 30
"""Bit of a ghost's number: a tier had held it. The rest counts its misses."""


class GhostList:
    """Keys of chunks that are nowhere any more, with how often they were asked for since.

    A chunk becomes a ghost as its last copy is given up (`held`), or as it left the engine's pool
    and was stored nowhere. It stays one while its content comes back and goes again, until newer
    ones push it out.

    Thrash is the share of missed chunks that the list knows and that a tier had held or that had
    been missed before: content that does come back, and that more room would have served. Misses
    of new content count against it, and all misses fade.

    Args:
        limit: Keys remembered at most.
        half_life: Missed chunks after which a miss counts half.
    """

    def __init__(self, limit: int = REMEMBERED, half_life: int = HALF_LIFE):
        self.limit = max(1, limit)
        self._fade = 0.5 ** (1 / max(1, half_life))
        self._ghosts: OrderedDict[int, int] = OrderedDict()
        self._known = 0.0
        self._all = 0.0

    def __len__(self) -> int:
        return len(self._ghosts)

    def add(self, keys: Iterable[bytes], held: bool) -> None:
        """Remember chunks that are gone.

        Args:
            keys: Their keys.
            held: True if a tier gave them up; False if they were never stored.
        """
        ghosts = self._ghosts
        for key in keys:
            name = _name(key)
            ghosts[name] = ghosts.pop(name, 0) | (HELD if held else 0)
        while len(ghosts) > self.limit:
            ghosts.popitem(last=False)

    def missed(self, keys: Sequence[bytes]) -> int:
        """Take note that a request asked for chunks that are nowhere.

        Returns:
            How many of them returned after they had gone.
        """
        ghosts, fade, back = self._ghosts, self._fade, 0
        for key in keys:
            name = _name(key)
            ghost = ghosts.get(name)
            self._all = self._all * fade + 1.0
            self._known *= fade
            if ghost is None:
                continue
            back += 1
            if ghost:
                self._known += 1.0
            ghosts[name] = ghost + 1
        return back

    def misses(self, key: bytes) -> int:
        """Requests that asked for a chunk after it had gone."""
        return self._ghosts.get(_name(key), 0) & (HELD - 1)

    @property
    def thrash(self) -> float:
        """Share of missed chunks that more room would have served; 0 before any miss."""
        return self._known / max(self._all, SURE)


def _name(key: bytes) -> int:
    """Eight bytes of a key: two chunks of one name cost a wrong count and nothing else."""
    return int.from_bytes(key[:8], "little")
