"""How far two answers' next-token distributions are apart, from their likeliest tokens.

The measure is the total variation distance: the largest difference of the probabilities that both
give to any set of tokens. It is within ``[0, 1]``, and it is the probability that speculative
decoding would reject a token that one of the two proposes to the other (Leviathan et al., "Fast
Inference from Transformers via Speculative Decoding", ICML 2023). Of each distribution only the
likeliest tokens are known. Others cannot be likelier than the last of them, nor than what all of
them leave; so what is computed is a lower bound, and it is the distance itself where the known
tokens hold all probability.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Likeliest:
    """The likeliest tokens of one next-token distribution.

    Attributes:
        ids: Token ids, ``[k]``, likeliest first.
        logprobs: Their log-probabilities in nats, ``[k]``.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


def total_variation(one: Likeliest, other: Likeliest) -> float:
    """Lower bound of the total variation distance of two distributions.

    Raises:
        ValueError: One has no tokens, or log-probabilities that are not finite.
    """
    p, unlisted_p = _probabilities(one)
    q, unlisted_q = _probabilities(other)
    # Each side by itself is what one gives more to a set of tokens than the other can.
    more_p = sum(max(0.0, x - q.get(token, unlisted_q)) for token, x in p.items())
    more_q = sum(max(0.0, x - p.get(token, unlisted_p)) for token, x in q.items())
    return min(1.0, max(more_p, more_q))


def _probabilities(known: Likeliest) -> tuple[dict[int, float], float]:
    """Probability of each listed token, and the greatest that any other can have."""
    if not known.ids or len(known.ids) != len(known.logprobs):
        raise ValueError("the likeliest tokens need ids and log-probabilities")
    found = dict(zip(known.ids, map(math.exp, known.logprobs), strict=True))
    total = sum(found.values())
    if not math.isfinite(total):
        raise ValueError("log-probabilities must be finite")
    return found, max(0.0, min(min(found.values()), 1 - total))


def divergence(one: Sequence[Likeliest], other: Sequence[Likeliest]) -> float:
    """Mean total variation distance over the positions that both have, from the first on.

    Raises:
        ValueError: They have none.
    """
    pairs = list(zip(one, other, strict=False))
    if not pairs:
        raise ValueError("no position to compare")
    return sum(total_variation(a, b) for a, b in pairs) / len(pairs)
