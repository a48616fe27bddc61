"""The interval of a figure from its bootstrap: BCa (Efron 1987), as wide as few groups have to make it.

    quantiles of the draws at Phi(z0 + w / (1 - a w)),   w = z0 -+ t s

z0 is the median bias of the draws and a the acceleration, from the skew of the jackknife. The draws' plain quantiles
(z0 = a = 0, t s = 1.96) are too narrow for few groups G. Here t is Student's quantile, and s the jackknife's standard
error over the draws', at least that of a mean, sqrt(G / (G - 1)) (Hesterberg 2015). How often the truth is inside:
tests/test_intervals.py counts.
"""

from __future__ import annotations

import numpy as np
from scipy import special


def bca(whole: float, draws: np.ndarray, without: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """An interval that covers the truth with about the probability `level`; never outside of the draws.

    Args:
      whole: the figure itself.
      draws: the figure of each draw of as many groups, [D].
      without: the figure without each group in turn, or each block of groups, [m]; with fewer than 2 the interval is
        the draws' own quantiles.
    """
    m, tails = len(without), np.array([(1 - level) / 2, (1 + level) / 2])
    u, spread = without.mean() - without if m else without, draws.std()
    if m < 2 or spread == 0 or not u.any():
        return tuple(np.quantile(draws, tails).tolist())
    acceleration = (u**3).sum() / (6 * (u**2).sum() ** 1.5)
    below = ((draws < whole).mean() + (draws <= whole).mean()) / 2
    bias = special.ndtri(np.clip(below, 1 / len(draws), 1 - 1 / len(draws)))
    wider = max(np.sqrt((m - 1) / m * (u**2).sum()) / spread, np.sqrt(m / (m - 1)))
    w = bias + special.stdtrit(m - 1, tails) * wider
    room = 1 - acceleration * w
    z = np.where(room > 0, bias + w / np.where(room > 0, room, 1), np.sign(w) * np.inf)
    return tuple(np.quantile(draws, special.ndtr(z)).tolist())
