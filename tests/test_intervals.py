"""How often an interval holds the truth, for figures over 40 groups of rows whose truth is known."""

import numpy as np
import pytest
from scipy import special, stats

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


def test_draws_that_never_differ_give_no_interval():
    assert intervals.bca(0.5, np.full(9, 0.5), np.full(3, 0.5)) == (None, None)
    assert intervals.bca(0.5, np.full(9, 0.5), np.array([])) == (None, None)
    assert intervals.bca(0.1, 0.1 + 1e-17 * np.arange(9), np.full(3, 0.1)) == (None, None)


@pytest.mark.parametrize('n', [1, 3, 20, 1000])
def test_a_rate_of_zero_or_one_has_clopper_and_pearsons_interval(n):
    for hits in (0, n):
        exact = stats.binomtest(hits, n).proportion_ci(0.95, method='exact')
        assert intervals.equal_groups(hits / n, n) == pytest.approx((exact.low, exact.high), abs=1e-12)


def test_a_rate_by_hand():
    """0.025^(1/20) is 0.8316; all ties: at least this share of prompts ties, and the others may all win or lose."""
    assert intervals.equal_groups(1.0, 20) == pytest.approx((0.831566, 1.0), abs=1e-6)
    assert intervals.equal_groups(0.5, 20) == pytest.approx((0.415783, 0.584217), abs=1e-6)
    assert intervals.equal_groups(0.0, 1) == pytest.approx((0.0, 0.975))


def figures_of(values, groups, rates=()):
    values = np.array(values)
    return intervals.with_intervals(lambda rows: {'mean': float(values[rows].mean())}, groups, draws=50, rates=rates)


def test_groups_that_are_all_equal_are_as_many_as_they_are():
    """Twenty rows of five groups say what five rows say."""
    names = [str(i // 4) for i in range(20)]
    q = 0.025 ** (1 / 5)
    assert figures_of([1.0] * 20, names, ['mean'])['mean'] == pytest.approx((1.0, q, 1.0))
    assert figures_of([1.0] * 20, names)['mean'] == (1.0, None, None)
    sizes = ['a', 'b', 'b', 'c', 'c', 'c', 'd']
    value, low, high = figures_of([0.1] * 7, sizes, ['mean'])['mean']  # whose mean is 0.1 but for rounding
    assert (value, low, high) == pytest.approx((0.1, 0.1 * 0.025**0.25, 1 - 0.9 * 0.025**0.25))
    assert figures_of([0.1] * 7, sizes)['mean'][1:] == (None, None)
    assert figures_of([1.0, 0.0], ['a', 'a'], ['mean'])['mean'] == pytest.approx((0.5, 0.0125, 0.9875)), 'one group'


@pytest.mark.parametrize('truth', [0.9, 0.97, 0.99])
def test_a_rate_near_one_is_covered(truth):
    """Twenty prompts, most often all of them won: [1, 1] would cover the truth of 0.99 in 18 of 100 cases."""
    hits = 0
    for seed in range(200):
        rows = (np.random.default_rng(seed).random(20) < truth).astype(float)
        _, low, high = figures_of(rows, [str(i) for i in range(20)], ['mean'])['mean']
        hits += low <= truth <= high
    assert hits / 200 >= 0.85 + 0.09 * (truth > 0.9), hits


def test_an_interval_is_printed_or_said_to_be_none():
    assert intervals.describe(0.25, 0.75) == '95% [0.2500, 0.7500]'
    assert intervals.describe(None, None) == '95% [none, all groups are equal]'


@pytest.mark.parametrize('whole', [0.0, 1.0])
def test_intervals_stay_among_the_draws(whole):
    draws = np.random.default_rng(0).uniform(size=100)
    low, high = intervals.bca(whole, draws, np.array([0.0, 0.1, 5.0]))
    assert draws.min() <= low <= high <= draws.max()
