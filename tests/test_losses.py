import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.rl import losses

RNG = np.random.default_rng(0)
MASK = np.arange(4) < np.array([[4, 2], [0, 1], [3, 4]])[..., None]
X, Y, Z = RNG.standard_normal((3, *MASK.shape)).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


def test_pairwise_is_bradley_terry():
    rewards = RNG.standard_normal((5, 2)).astype(np.float32)
    want = [-np.log(sigmoid(chosen - rejected)) for chosen, rejected in rewards]
    assert losses.pairwise(rewards) == pytest.approx(want, rel=1e-6)


def test_pairwise_prefers_the_first():
    gradient = jax.grad(lambda r: losses.pairwise(r).sum())(jnp.zeros((1, 2)))
    assert gradient.tolist() == [[-0.5, 0.5]]


def test_pointwise_is_cross_entropy_on_the_logit():
    rewards = RNG.standard_normal((5, 1)).astype(np.float32)
    labels = np.array([[0.0], [1.0], [1.0], [0.0], [0.25]], np.float32)
    p = sigmoid(rewards)
    want = -labels * np.log(p) - (1 - labels) * np.log(1 - p)
    assert losses.pointwise(rewards, labels) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize('size', [1e2, 1e4])
def test_losses_of_a_reward_stay_finite_far_out(size):
    wrong = np.array([[-size, size]], np.float32)
    assert losses.pairwise(wrong) == pytest.approx(2 * size)
    assert losses.pointwise(wrong, np.array([[1.0, 0.0]], np.float32)).tolist() == [[size, size]]
    assert np.isfinite(jax.grad(lambda r: losses.pairwise(r).sum())(wrong)).all()


def every(f, *arrays):
    """`f` of each token's numbers, one token at a time."""
    return np.array([f(*map(float, x)) for x in zip(*map(np.ravel, arrays))]).reshape(X.shape)


def test_reinforce_of_each_token():
    np.testing.assert_allclose(losses.reinforce(X, Y), every(lambda x, y: -x * y, X, Y), rtol=1e-6)


def test_value_of_each_token():
    np.testing.assert_allclose(losses.value(X, Y), every(lambda x, y: (y - x) ** 2, X, Y), rtol=1e-5)


@pytest.mark.parametrize('clip', [0.2, 0.5, 10.0])
def test_clipped_takes_the_worse_of_ratio_and_clipped_ratio(clip):
    def want(new, old, a):
        ratio = np.exp(new - old)
        return -min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a)

    np.testing.assert_allclose(losses.clipped(X, Y, Z, clip), every(want, X, Y, Z), rtol=1e-5)


def test_clipped_has_no_gradient_beyond_the_clip_in_the_direction_of_the_advantage():
    new, old = np.log(np.float32([[[1.5, 1.5, 0.5, 0.5]]])), np.zeros((1, 1, 4), np.float32)
    advantages = np.float32([[[1.0, -1.0, 1.0, -1.0]]])
    got = jax.grad(lambda x: losses.clipped(x, old, advantages, 0.2).sum())(new)
    np.testing.assert_allclose(got, [[[0.0, 1.5, -0.5, 0.0]]], rtol=1e-6)


@pytest.mark.parametrize('log_ratio', [21.0, 90.0, 100.0, 1000.0])
@pytest.mark.parametrize('advantage', [1.0, 0.0, -1.0])
def test_ratios_stay_finite_far_out(log_ratio, advantage):
    """And go on pulling: an answer that is judged bad becomes less likely again."""
    token = lambda x: jnp.full((1, 1, 1), x, jnp.float32)  # noqa: E731
    loss = lambda x: losses.clipped(token(x), token(0), token(advantage), 0.2).sum()  # noqa: E731
    for sign in 1, -1:
        value, slope = jax.value_and_grad(loss)(jnp.float32(sign * log_ratio))
        assert np.isfinite([value, slope]).all()
    slope = jax.grad(loss)(jnp.float32(log_ratio))
    assert float(slope) == pytest.approx(np.exp(20) * (advantage < 0), rel=1e-5)


def test_ratios_are_exact_below_the_cap():
    log_ratios = np.linspace(-30, 20, 101, dtype=np.float32)
    np.testing.assert_array_equal(losses.ratio(log_ratios), jnp.exp(log_ratios))


def test_at_ratio_one_the_clipped_gradient_is_reinforces():
    one = jax.grad(lambda x: losses.clipped(x, X, Y, 0.2).sum())(X)
    np.testing.assert_allclose(one, jax.grad(lambda x: losses.reinforce(x, Y).sum())(X), rtol=1e-6)


def test_clipped_value_takes_the_larger_error():
    def want(value, old, target):
        near = old + min(max(value - old, -0.3), 0.3)
        return max((value - target) ** 2, (near - target) ** 2)

    np.testing.assert_allclose(losses.clipped_value(X, Y, Z, 0.3), every(want, X, Y, Z), rtol=1e-5)


def test_advantages_and_returns_are_constants():
    total = lambda loss, *args: loss(*args).sum()  # noqa: E731
    for loss in (losses.reinforce, losses.value):
        assert not jax.grad(total, argnums=2)(loss, X, Y).any()
        assert jax.grad(total, argnums=1)(loss, X, Y).all()
    assert not jax.grad(total, argnums=3)(losses.clipped, X, Y, Z, 0.2).any()
    assert not jax.grad(total, argnums=3)(losses.clipped_value, X, Y, Z, 0.2).any()
