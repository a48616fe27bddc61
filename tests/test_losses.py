import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax import losses

RNG = np.random.default_rng(0)
MASK = np.arange(4) < np.array([[4, 2], [0, 1], [3, 4]])[..., None]
X, Y = RNG.standard_normal((2, *MASK.shape)).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


def test_nll_is_the_mean_over_tokens():
    assert losses.nll(X, MASK) == pytest.approx(-X[MASK].sum() / 14, rel=1e-6)


def test_pairwise_is_bradley_terry():
    rewards = RNG.standard_normal((5, 2)).astype(np.float32)
    want = np.mean([-np.log(sigmoid(chosen - rejected)) for chosen, rejected in rewards])
    assert losses.pairwise(rewards) == pytest.approx(want, rel=1e-6)


def test_pairwise_prefers_the_first():
    gradient = jax.grad(losses.pairwise)(jnp.zeros((1, 2)))
    assert gradient.tolist() == [[-0.5, 0.5]]


def test_pointwise_is_cross_entropy_on_the_logit():
    rewards = RNG.standard_normal((5, 1)).astype(np.float32)
    labels = np.array([[0.0], [1.0], [1.0], [0.0], [0.25]], np.float32)
    p = sigmoid(rewards)
    want = np.mean(-labels * np.log(p) - (1 - labels) * np.log(1 - p))
    assert losses.pointwise(rewards, labels) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize('size', [1e2, 1e4])
def test_losses_of_a_reward_stay_finite_far_out(size):
    wrong = np.array([[-size, size]], np.float32)
    assert losses.pairwise(wrong) == pytest.approx(2 * size)
    assert losses.pointwise(wrong, np.array([[1.0, 0.0]], np.float32)) == pytest.approx(size)
    assert np.isfinite(jax.grad(losses.pairwise)(wrong)).all()


def test_reinforce_sums_over_tokens_and_averages_over_episodes():
    want = np.mean([-sum(x * y for x, y, real in zip(*row) if real) for row in zip(*_flat(X, Y, MASK))])
    assert losses.reinforce(X, Y, MASK) == pytest.approx(want, rel=1e-5)


def test_value_sums_over_tokens_and_averages_over_episodes():
    want = np.mean([sum((x - y) ** 2 for x, y, real in zip(*row) if real) for row in zip(*_flat(X, Y, MASK))])
    assert losses.value(X, Y, MASK) == pytest.approx(want, rel=1e-5)


def test_advantages_and_returns_are_constants():
    assert not jax.grad(losses.reinforce, argnums=1)(X, Y, MASK).any()
    assert not jax.grad(losses.value, argnums=1)(X, Y, MASK).any()
    np.testing.assert_allclose(jax.grad(losses.reinforce)(X, Y, MASK), -np.where(MASK, Y, 0) / 6, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(losses.value)(X, Y, MASK), np.where(MASK, 2 * (X - Y), 0) / 6, rtol=1e-5)


@pytest.mark.parametrize('loss', [losses.reinforce, losses.value], ids=['reinforce', 'value'])
def test_padding_does_not_matter(loss):
    bad = np.where(MASK, X, 1e9), np.where(MASK, Y, -1e9), MASK
    assert loss(X, Y, MASK) == loss(*map(np.float32, bad[:2]), MASK)
    assert losses.nll(X, MASK) == losses.nll(np.where(MASK, X, np.nan), MASK)


def _flat(*arrays):
    return [x.reshape(-1, x.shape[-1]) for x in arrays]
