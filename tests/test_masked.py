import jax
import jax.numpy as jnp
import numpy as np

from perl_jax import masked

MASK = np.array([[[1, 1, 0], [0, 0, 0]], [[1, 1, 1], [1, 0, 0]]], bool)
X = np.array([[[1, 2, 4], [8, 16, 32]], [[3, 5, 7], [9, 11, 13]]], np.float32)


def test_lengths():
    lengths = masked.lengths(MASK)
    assert lengths.tolist() == [[2, 0], [3, 1]]
    assert lengths.dtype == jnp.int32


def test_sums_and_means_are_over_the_real_tokens():
    assert masked.total(X, MASK).tolist() == [[3, 0], [15, 9]]
    assert masked.mean(X, MASK) == (3 + 15 + 9) / 6  # over tokens, not over rows of means


def test_mean_of_nothing_is_zero():
    assert masked.mean(X, np.zeros_like(MASK)) == 0


def test_what_stands_at_the_padding_may_be_anything():
    bad = np.where(MASK, X, np.nan)
    assert masked.total(bad, MASK).tolist() == [[3, 0], [15, 9]]
    gradient = jax.grad(lambda x: masked.total(x * x, MASK).sum())(np.where(MASK, X, np.inf))
    assert np.isfinite(gradient[MASK]).all()


def test_weights_below_zero_count_and_hide_nothing():
    x, weights = np.float32([2, 3, np.nan]), np.float32([-1, 0.5, 0])
    assert float(masked.weighted(x, weights)) == -0.5


def test_at_last_puts_it_on_the_last_real_token():
    got = masked.at_last(np.array([[0.25, 0.5], [0.75, 1.5]], np.float32), MASK)
    assert got.tolist() == [[[0, 0.25, 0], [0, 0, 0]], [[0, 0, 0.75], [1.5, 0, 0]]]


def test_shares_make_a_mean_of_a_weighted_sum():
    share = masked.share(MASK)
    assert share.shape == MASK.shape and float(share.sum()) == 1
    assert masked.weighted(X, share) == masked.mean(X, MASK)
    assert masked.weighted(np.where(MASK, X, np.nan), share) == masked.mean(X, MASK)
    assert masked.weighted(X, masked.share(np.zeros_like(MASK))) == 0
