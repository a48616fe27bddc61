import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.rl import advantages

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
    got = advantages.token_rewards(SCORES, LOGPROBS - ANCHOR, MASK, beta)
    kl = np.where(MASK, LOGPROBS - ANCHOR, 0).sum(-1)
    np.testing.assert_allclose(got.sum(-1), (1 - beta) * SCORES - beta * kl, atol=1e-5)


def test_each_token_pays_its_kl_and_the_last_gets_the_score():
    got, beta = advantages.token_rewards(SCORES, LOGPROBS - ANCHOR, MASK, 0.25), 0.25
    want = np.zeros((B, K, R))
    for b, k in np.ndindex(B, K):
        n = MASK[b, k].sum()
        want[b, k, :n] = -beta * (LOGPROBS[b, k, :n] - ANCHOR[b, k, :n])
        want[b, k, n - 1] += (1 - beta) * SCORES[b, k]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_padding_gets_nothing():
    got = advantages.token_rewards(SCORES, jnp.where(MASK, LOGPROBS - ANCHOR, jnp.nan), MASK, 0.25)
    assert not got[~MASK].any()
    np.testing.assert_array_equal(got, advantages.token_rewards(SCORES, LOGPROBS - ANCHOR, MASK, 0.25))


def test_the_first_return_is_the_whole_objective():
    z = advantages.returns(advantages.token_rewards(SCORES, LOGPROBS - ANCHOR, MASK, 0.25))
    kl = np.where(MASK, LOGPROBS - ANCHOR, 0).sum(-1)
    np.testing.assert_allclose(z[..., 0], 0.75 * SCORES - 0.25 * kl, atol=1e-5)
    assert z.dtype == jnp.float32


def test_leave_one_out_is_against_the_mean_of_the_others():
    got = advantages.leave_one_out(SCORES)
    for b, k in np.ndindex(B, K):
        others = [SCORES[b, j] for j in range(K) if j != k]
        assert got[b, k] == pytest.approx(SCORES[b, k] - np.mean(others), abs=1e-5)


def test_standardize_is_within_each_prompt():
    got = advantages.standardize(SCORES, eps=0.0)
    for b in range(B):
        np.testing.assert_allclose(got[b], (SCORES[b] - SCORES[b].mean()) / SCORES[b].std(ddof=1), rtol=1e-4)
    assert not np.asarray(advantages.standardize(np.full((2, 3), 0.7, np.float32))).any()  # all alike: nothing to learn


@pytest.mark.parametrize('size', [2, 3, 5, 6, 7, 12])
@pytest.mark.parametrize('score', [1.0, 0.1, 1 / 3, -1e4])
def test_equal_scores_teach_exactly_nothing(size, score):
    """Whether or not a mean of `size` of them is rounded."""
    totals = jnp.full((2, size), score, jnp.float32).at[1, 0].add(1.0)
    for advantage in advantages.leave_one_out, advantages.standardize:
        equal, other = np.asarray(jax.jit(advantage)(totals))
        assert not equal.any() and other.all()
    assert np.asarray(advantages.equal(totals)).tolist() == [True, False]
    whitened = jax.jit(advantages.whiten)(jnp.full((1, size, 3), score, jnp.float32), np.ones((1, size, 3), bool))
    assert not np.asarray(whitened).any()


@pytest.mark.parametrize(('gamma', 'lam'), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.9, 0.0)])
def test_gae_is_the_sum_of_discounted_surprises(gamma, lam):
    rewards, values = np.where(MASK, LOGPROBS, 0), ANCHOR
    got = np.asarray(advantages.gae(rewards, np.where(MASK, values, np.nan), MASK, gamma, lam))
    for b, k in np.ndindex(B, K):
        n = MASK[b, k].sum()
        v = np.append(values[b, k, :n], 0.0)
        delta = [rewards[b, k, t] + gamma * v[t + 1] - v[t] for t in range(n)]
        want = [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]
        np.testing.assert_allclose(got[b, k, :n], want, atol=1e-5)


def test_gae_of_gamma_and_lam_one_is_the_return_less_the_value():
    rewards = np.where(MASK, LOGPROBS, 0)
    got = advantages.gae(rewards, ANCHOR, MASK, 1.0, 1.0)
    np.testing.assert_allclose(
        np.where(MASK, got, 0), np.where(MASK, advantages.returns(rewards) - ANCHOR, 0), atol=1e-5
    )


def test_whiten_is_over_the_real_tokens():
    got = np.asarray(advantages.whiten(jnp.where(MASK, LOGPROBS, jnp.nan), MASK))
    real = LOGPROBS[MASK]
    np.testing.assert_allclose(got[MASK], (real - real.mean()) / real.std(), atol=1e-4)
