"""Least squares for measured times: few terms, none of them negative, outliers weighed down."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

ROUNDS = 5
"""Rounds of weighing residuals anew."""

TOLERATED = 1.5
"""Residuals beyond this many standard deviations are outliers (Huber's choice is 1.345)."""


def fit_times(terms: Floats, seconds: Floats) -> Floats:
    """Fit times as sums of terms, each times a coefficient of at least 0.

    What is small is relative: a millisecond counts for more in a short time than in a long one.
    P. J. Huber, Robust estimation of a location parameter, Annals of Mathematical Statistics 35
    (1), 1964, by weighing anew a fixed number of rounds.

    Args:
        terms: (n, k) of at least one row, finite.
        seconds: (n,) above 0.

    Returns:
        (k,) coefficients.
    """
    relative = terms / seconds[:, None]
    weights = np.ones(len(seconds))
    found = _not_negative(relative, weights)
    for _ in range(ROUNDS):
        off = np.abs(relative @ found - 1.0)
        deviation = 1.4826 * float(np.median(off)) + 1e-9
        weights = np.minimum(1.0, TOLERATED * deviation / np.maximum(off, 1e-12))
        found = _not_negative(relative, weights)
    return found


def _not_negative(relative: Floats, weights: Floats) -> Floats:
    """Weighted fit to ones; the most negative coefficient is left out until none is."""
    root = np.sqrt(weights)
    target = root
    scaled = relative * root[:, None]
    size = np.maximum(np.abs(scaled).max(axis=0), 1e-300)
    scaled = scaled / size
    kept = list(range(relative.shape[1]))
    found = np.zeros(relative.shape[1])
    while kept:
        part = np.linalg.lstsq(scaled[:, kept], target, rcond=1e-9)[0]
        worst = int(np.argmin(part))
        if part[worst] >= 0:
            found[kept] = part
            break
        del kept[worst]
    answer: Floats = found / size
    return answer
