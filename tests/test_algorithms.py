"""Each algorithm's losses against a slow version, response by response and token by token, written from its paper."""

import functools

import numpy as np
import pytest

from perl_jax import masked
from perl_jax.rl import advantages as adv
from perl_jax.rl.algorithms.grpo import GRPO
from perl_jax.rl.algorithms.ppo import PPO
from perl_jax.rl.algorithms.reinforce import Reinforce
from perl_jax.rl.algorithms.rloo import RLOO

B, K, R = 3, 4, 5
RNG = np.random.default_rng(0)
MASK = np.arange(R) < np.concatenate([[1, R], RNG.integers(1, R + 1, B * K - 2)]).reshape(B, K, 1)
REWARDS = np.where(MASK, RNG.standard_normal((B, K, R)), 0).astype(np.float32)
VALUES, NEW_VALUES = RNG.standard_normal((2, B, K, R)).astype(np.float32)
OLD = -RNG.exponential(size=(B, K, R)).astype(np.float32)
NEW = OLD + 0.4 * RNG.standard_normal((B, K, R)).astype(np.float32)
LENGTHS = MASK.sum(-1)


def policy_loss(algorithm, new=NEW, mask=MASK):
    values = VALUES if algorithm.has_value else None
    advantages = algorithm.advantages(REWARDS, values, mask)
    return float(masked.weighted(algorithm.policy_loss(new, OLD, advantages), algorithm.weights(mask)))


def value_loss(algorithm):
    returns = algorithm.returns(REWARDS, VALUES, MASK)
    return float(masked.weighted(algorithm.value_loss(NEW_VALUES, VALUES, returns), algorithm.weights(MASK)))


def to_go(b, k, t):
    return sum(REWARDS[b, k, s] for s in range(t, LENGTHS[b, k]))


def surrogate(new, old, advantage, clip=0.2):
    ratio = np.exp(np.float64(new) - old)
    return min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)


def test_reinforce():
    policy, value = [], []
    for b, k in np.ndindex(B, K):
        tokens = range(LENGTHS[b, k])
        policy.append(-sum(NEW[b, k, t] * (to_go(b, k, t) - VALUES[b, k, t]) for t in tokens))
        value.append(sum((to_go(b, k, t) - NEW_VALUES[b, k, t]) ** 2 for t in tokens))
    assert policy_loss(Reinforce()) == pytest.approx(np.mean(policy), rel=1e-5)
    assert value_loss(Reinforce()) == pytest.approx(np.mean(value), rel=1e-5)


def test_rloo():
    want = []
    for b, k in np.ndindex(B, K):
        others = np.mean([to_go(b, j, 0) for j in range(K) if j != k])
        want.append(-sum(NEW[b, k, t] * (to_go(b, k, 0) - others) for t in range(LENGTHS[b, k])))
    assert policy_loss(RLOO()) == pytest.approx(np.mean(want), rel=1e-4)


def test_rloo_of_two_is_half_the_difference_with_both_signs():
    got = RLOO().advantages(REWARDS[:, :2], None, MASK[:, :2])
    totals = REWARDS[:, :2].sum(-1)
    np.testing.assert_allclose(got[:, 0, 0], totals[:, 0] - totals[:, 1], rtol=1e-5)
    np.testing.assert_allclose(got[:, 1, 0], totals[:, 1] - totals[:, 0], rtol=1e-5)


@pytest.mark.parametrize('clip', [0.2, 0.05])
def test_grpo(clip):
    want = []
    for b, k in np.ndindex(B, K):
        totals = [to_go(b, j, 0) for j in range(K)]
        advantage = (totals[k] - np.mean(totals)) / (np.std(totals, ddof=1) + 1e-4)
        want.append(-np.mean([surrogate(NEW[b, k, t], OLD[b, k, t], advantage, clip) for t in range(LENGTHS[b, k])]))
    assert policy_loss(GRPO(clip=clip)) == pytest.approx(np.mean(want), rel=1e-4)


@functools.cache
def generalised(gamma, lam):
    """GAE by its definition, of every real token: {(b, k, t): advantage}."""
    found = {}
    for b, k in np.ndindex(B, K):
        n = LENGTHS[b, k]
        v = np.append(VALUES[b, k, :n], 0)
        delta = [REWARDS[b, k, t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            found[b, k, t] = sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n))
    return found


@pytest.mark.parametrize(('gamma', 'lam'), [(1.0, 0.95), (0.9, 0.5)])
def test_ppo(gamma, lam):
    algorithm = PPO(gamma=gamma, lam=lam, clip=0.1, value_clip=0.3)
    gae = generalised(gamma, lam)
    mean, std = np.mean(list(gae.values())), np.std(list(gae.values()))
    policy = [-surrogate(NEW[i], OLD[i], (a - mean) / std, 0.1) for i, a in gae.items()]
    assert policy_loss(algorithm) == pytest.approx(np.mean(policy), rel=1e-4)
    value = []
    for i, a in gae.items():
        target = a + VALUES[i]
        near = VALUES[i] + min(max(NEW_VALUES[i] - VALUES[i], -0.3), 0.3)
        value.append(max((NEW_VALUES[i] - target) ** 2, (near - target) ** 2))
    assert value_loss(algorithm) == pytest.approx(np.mean(value), rel=1e-4)


def test_ppo_of_gamma_and_lam_one_has_reinforces_returns():
    got = PPO(gamma=1.0, lam=1.0).returns(REWARDS, VALUES, MASK)
    np.testing.assert_allclose(np.where(MASK, got, 0), np.where(MASK, adv.returns(REWARDS), 0), atol=1e-5)


@pytest.mark.parametrize('algorithm', [Reinforce(), RLOO(), GRPO(), PPO()], ids=lambda a: type(a).__name__)
def test_padding_does_not_matter(algorithm):
    garbage = lambda x: np.where(MASK, x, 5).astype(np.float32)  # noqa: E731
    values = [VALUES, garbage(VALUES)] if algorithm.has_value else [None, None]
    got = []
    for new, old, value in zip((NEW, garbage(NEW)), (OLD, garbage(OLD)), values):
        advantages = algorithm.advantages(REWARDS, value, MASK)
        got.append(float(masked.weighted(algorithm.policy_loss(new, old, advantages), algorithm.weights(MASK))))
    assert got[0] == got[1]
