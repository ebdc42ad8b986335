"""Win rate: how often one policy's answer scores above another's to the same prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class WinRate(NamedTuple):
    """``rate`` in [0, 1] with ties counted half; ``low`` and ``high`` bound it with the asked confidence."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int


def win_rate(scores_a: Sequence[float], scores_b: Sequence[float], *, z: float = 1.96) -> WinRate:
    """How often a beats b.

    Args:
        scores_a, scores_b: scores of both answers to prompt 0, 1, ..., higher better.
        z: width of the interval in standard deviations; 1.96 is 95 %.

    Returns:
        The rate with Wilson's score interval (Wilson 1927). Ties count as half a win, which makes the interval wide
        rather than narrow: a tie varies less than a win or a loss.

    Raises:
        ValueError: no scores, unequal numbers, or a score that is NaN.
    """
    if len(scores_a) != len(scores_b) or not len(scores_a):
        raise ValueError(f"scores: expected two lists of one length > 0, found {len(scores_a)} and {len(scores_b)}")
    pairs = [(float(a), float(b)) for a, b in zip(scores_a, scores_b)]
    if bad := [i for i, pair in enumerate(pairs) if any(map(math.isnan, pair))]:
        raise ValueError(f"scores: expected numbers, found NaN at {bad[:5]}")
    wins, ties = sum(a > b for a, b in pairs), sum(a == b for a, b in pairs)
    n = len(pairs)
    rate = (wins + 0.5 * ties) / n
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return WinRate(rate, max(0.0, middle - half), min(1.0, middle + half), wins, ties, n - wins - ties)
