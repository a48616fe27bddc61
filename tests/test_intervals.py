"""How often an interval holds the truth, for figures over 40 groups of rows whose truth is known."""

import numpy as np
import pytest
from scipy import special

from perl_jax.evals import intervals

G, DRAWS, TIMES = 40, 600, 500


def equal(rng):
    return rng.standard_normal(G), np.ones(G)


def skewed(rng):
    """One group in a hundred is ten times the median one: 40 groups rarely see enough of these."""
    return rng.lognormal(size=G) - np.exp(0.5), np.ones(G)


def sizes(rng):
    """Groups of very different sizes, which say nothing of their rates."""
    n = np.ceil(rng.lognormal(1, 1, G))
    return rng.binomial(n.astype(int), rng.beta(2, 1, G)) - n * 2 / 3, n


def rare(rng):
    """One row in ten is a hit, and hits come together."""
    n = rng.geometric(0.2, G)
    return rng.binomial(n, rng.beta(0.5, 4.5, G)) - 0.1 * n, n.astype(float)


def telling(rng):
    """The larger a group, the higher its rate; its mean, by quadrature, is subtracted."""
    n = np.ceil(rng.lognormal(1, 1, G))
    return rng.binomial(n.astype(int), _rate(n)) - TELLING * n, n


def _rate(n):
    return 1 / (1 + np.exp(1 - np.log(n)))


SIZES = np.ceil(np.random.default_rng(0).lognormal(1, 1, 1_000_000))
TELLING = (SIZES * _rate(SIZES)).sum() / SIZES.sum()


def coverage(world):
    """The shares of intervals that hold 0: of `bca`, and of the draws' plain quantiles."""
    hits, weights = np.zeros(2), 1 - np.eye(G)
    for seed in range(TIMES):
        rng = np.random.default_rng(seed)
        total, rows = world(rng)
        count = rng.multinomial(G, np.ones(G) / G, size=DRAWS)
        draws, without = count @ total / (count @ rows), weights @ total / (weights @ rows)
        for i, (low, high) in enumerate(
            (intervals.bca(total.sum() / rows.sum(), draws, without), np.quantile(draws, [0.025, 0.975]))
        ):
            hits[i] += low <= 0 <= high
    return hits / TIMES


def test_intervals_of_forty_groups_cover_about_what_they_say():
    least = {equal: 0.935, sizes: 0.935, rare: 0.925, telling: 0.915, skewed: 0.89}
    found = np.array([coverage(world) for world in least])
    ours, plain = found.T
    assert (ours >= list(least.values())).all() and (ours <= 0.97).all(), found
    assert ours.mean() >= 0.93 and (ours - plain)[-2:].min() >= 0.02 and (ours >= plain).all(), found


def test_by_hand():
    """No bias and no skew: Student's quantile times the jackknife's error, in the draws' own spread."""
    values = np.array([-3.0, -2, -1, 1, 2, 3])
    without = (values.sum() - values) / 5
    draws = np.linspace(-4, 4, 8001)
    low, high = intervals.bca(0.0, draws, without)
    error = np.sqrt(5 / 6 * (without**2).sum())
    z = 2.5705818366 * max(error / draws.std(), np.sqrt(6 / 5))
    assert [low, high] == pytest.approx([-8 * (special.ndtr(z) - 0.5), 8 * (special.ndtr(z) - 0.5)], abs=2e-3)


def test_what_never_differs_has_no_width():
    assert intervals.bca(0.5, np.full(9, 0.5), np.full(3, 0.5)) == (0.5, 0.5)
    assert intervals.bca(0.5, np.full(9, 0.5), np.array([])) == (0.5, 0.5)


@pytest.mark.parametrize('whole', [0.0, 1.0])
def test_intervals_stay_among_the_draws(whole):
    draws = np.random.default_rng(0).uniform(size=100)
    low, high = intervals.bca(whole, draws, np.array([0.0, 0.1, 5.0]))
    assert draws.min() <= low <= high <= draws.max()
