import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax import advantages

B, K, R = 4, 3, 6
RNG = np.random.default_rng(0)
MASK = np.arange(R) < np.concatenate([[1, R], RNG.integers(1, R + 1, B * K - 2)]).reshape(B, K, 1)
SCORES = RNG.standard_normal((B, K)).astype(np.float32)
LOGPROBS, ANCHOR = -RNG.exponential(size=(2, B, K, R)).astype(np.float32)


@pytest.mark.parametrize('gamma', [1.0, 0.9, 0.0])
def test_returns_by_scan_equal_a_loop(gamma):
    rewards = np.where(MASK, LOGPROBS, 0)
    want = np.zeros_like(rewards)
    for row in np.ndindex(B, K):
        ahead = 0.0
        for t in reversed(range(R)):
            ahead = want[*row, t] = rewards[*row, t] + gamma * ahead
    np.testing.assert_allclose(jax.jit(advantages.returns, static_argnums=1)(rewards, gamma), want, atol=1e-5)


@pytest.mark.parametrize('beta', [0.0, 0.05, 1.0])
def test_token_rewards_sum_to_the_objective(beta):
    got = advantages.token_rewards(SCORES, LOGPROBS, ANCHOR, MASK, beta)
    kl = np.where(MASK, LOGPROBS - ANCHOR, 0).sum(-1)
    np.testing.assert_allclose(got.sum(-1), (1 - beta) * SCORES - beta * kl, atol=1e-5)


def test_each_token_pays_its_kl_and_the_last_gets_the_score():
    got, beta = advantages.token_rewards(SCORES, LOGPROBS, ANCHOR, MASK, 0.25), 0.25
    want = np.zeros((B, K, R))
    for b, k in np.ndindex(B, K):
        n = MASK[b, k].sum()
        want[b, k, :n] = -beta * (LOGPROBS[b, k, :n] - ANCHOR[b, k, :n])
        want[b, k, n - 1] += (1 - beta) * SCORES[b, k]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_padding_gets_nothing():
    bad = jnp.where(MASK, LOGPROBS, jnp.inf), jnp.where(MASK, ANCHOR, jnp.inf)
    got = advantages.token_rewards(SCORES, *bad, MASK, 0.25)
    assert not got[~MASK].any()
    np.testing.assert_array_equal(got, advantages.token_rewards(SCORES, LOGPROBS, ANCHOR, MASK, 0.25))


def test_the_first_return_is_the_whole_objective():
    z = advantages.returns(advantages.token_rewards(SCORES, LOGPROBS, ANCHOR, MASK, 0.25))
    kl = np.where(MASK, LOGPROBS - ANCHOR, 0).sum(-1)
    np.testing.assert_allclose(z[..., 0], 0.75 * SCORES - 0.25 * kl, atol=1e-5)
    assert z.dtype == jnp.float32
