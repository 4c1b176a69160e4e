"""A prompt whose documents are stored, for tests of reuse."""

from __future__ import annotations

import random


def texts(*lengths: int, seed: int) -> list[list[int]]:
    """Random prompts."""
    choose = random.Random(seed)
    return [[choose.randrange(10, 300) for _ in range(n)] for n in lengths]


S, A, B, GAP, Q = texts(40, 70, 90, 10, 20, seed=7)
"""Parts of a prompt: a system prompt, two documents, what stands between them, a question."""
WHOLE = S + B + GAP + A + Q
AT_A = len(S) + len(B) + len(GAP)
"""Where A stands in WHOLE."""
