"""The KL estimators, and which gradient each gives where: over every response of the table policy, nothing sampled."""


import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import table_policy as table
import tiny
from table_policy import BASE, EVERY, POLICY, TABLE, N, logprobs, responses, total

from perl_jax.errors import UserError
from perl_jax.rl import kl, steps
from perl_jax.rl.kl import KLConfig
from perl_jax.rl.objective import Objective

BATCH = responses(EVERY)
MASK = BATCH.targets_mask
X, Y = -np.random.default_rng(0).exponential(size=(2, 3, 2, 4)).astype(np.float32)


@pytest.mark.parametrize('name', ['k1', 'k2', 'k3'])
def test_estimators_of_each_token(name):
    want = {
        'k1': lambda p, q: p - q,
        'k2': lambda p, q: (p - q) ** 2 / 2,
        'k3': lambda p, q: np.exp(q - p) - 1 - (q - p),
    }
    every = np.array([want[name](float(p), float(q)) for p, q in zip(X.ravel(), Y.ravel())]).reshape(X.shape)
    np.testing.assert_allclose(kl.ESTIMATORS[name](X, Y), every, rtol=1e-5, atol=1e-6)


def expected(estimate):
    """The estimate's expectation under the policy, over whole responses."""
    logp = logprobs(POLICY, BATCH)
    return float((jnp.exp(total(logp, MASK)) * total(estimate(logp, logprobs(None, BATCH)), MASK)).sum())


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    truth = expected(kl.k1)  # which is the definition
    assert truth > 0.1
    assert expected(kl.k3) == pytest.approx(truth, rel=1e-4)
    assert abs(expected(kl.k2) / truth - 1) > 0.05


def true_gradients():
    """Of KL(policy || anchor) of whole responses; and of it, and of KL(anchor || policy), at each state held fixed."""
    held = jnp.exp(total(logprobs(POLICY, BATCH), MASK))  # how often each response, and so each state, is seen
    before = jnp.concatenate([jnp.full((1, N, 1), 2), BATCH.targets[..., :1]], -1)
    anchor = jax.nn.log_softmax(BASE['table'])

    def whole(adapter):
        logp = logprobs(adapter, BATCH)
        return (jnp.exp(total(logp, MASK)) * total(logp - logprobs(None, BATCH), MASK)).sum()

    def at_each_state(adapter, forward):
        policy = jax.nn.log_softmax(adapter.params['table'])
        p, q = (anchor, policy) if forward else (policy, anchor)
        return (held * total((jnp.exp(p) * (p - q)).sum(-1)[before], MASK)).sum()

    return {
        'whole': jax.grad(whole)(POLICY).params['table'],
        'state': jax.grad(at_each_state)(POLICY, False).params['table'],
        'forward': jax.grad(at_each_state)(POLICY, True).params['table'],
        'none': jnp.zeros_like(anchor),
    }


class Weighted:
    """REINFORCE without a baseline over every response, each weighted by how often it is drawn."""

    has_value, min_samples, clip, whole_batch = False, 1, None, False
    epochs = minibatches = 1

    def advantages(self, rewards, values, mask):
        return jnp.flip(jnp.cumsum(jnp.flip(rewards, -1), -1), -1)

    def policy_loss(self, logprobs, old_logprobs, advantages):
        return -logprobs * advantages

    def weights(self, mask):
        return jnp.exp(total(logprobs(POLICY, BATCH), MASK))[..., None] * mask


# An optimizer that hands the gradient out.
DESCEND = optax.GradientTransformation(lambda params: (), lambda grads, state, params=None: (grads, state))


def gradient(config):
    """What policy_step descends by when there is only a KL to descend: beta 1, no score."""
    after, _ = step(Objective(Weighted(), kl=config), beta=1.0)
    return after.adapter.params['table'] - POLICY.params['table']


def step(objective, beta):
    """One step of the policy on answers that all score 0."""
    exp, _ = steps.experience(
        TABLE, objective, policy=(BASE, POLICY), anchor=(BASE, None), rollout=table.rollout(BATCH),
        scores=jnp.zeros((1, N)), beta=jnp.float32(beta), eos_ids=tiny.EOS,
    )  # fmt: skip
    return steps.policy_step(
        TABLE, objective, DESCEND, base=BASE, anchor=(BASE, None), state=table.state(DESCEND, np.zeros(4)).policy,
        batch=exp, values=None, beta=jnp.float32(beta), rng=jax.random.key(0),
    )  # fmt: skip


@pytest.mark.parametrize(
    ('estimator', 'place', 'what'),
    [('k1', 'reward', 'whole'), ('k2', 'loss', 'state'), ('full', 'loss', 'state'), ('k3', 'loss', 'forward')],
)
def test_which_gradient_it_is(estimator, place, what):
    truths, got = true_gradients(), gradient(KLConfig(estimator=estimator, place=place))
    assert np.abs(got).max() > 0.05
    np.testing.assert_allclose(got, truths[what], atol=1e-5)
    others = [np.abs(got - truth).max() for name, truth in truths.items() if name != what]
    assert min(others) > 5e-3


@pytest.mark.parametrize('estimator', ['k2', 'k3', 'full'])
def test_other_estimators_in_the_reward_are_not_the_true_gradient(estimator):
    got = gradient(KLConfig(estimator=estimator))
    assert min(np.abs(got - truth).max() for truth in true_gradients().values()) > 5e-3


def test_k1_in_the_loss_has_no_gradient_and_is_refused():
    config = KLConfig(estimator='k2', place='loss')
    object.__setattr__(config, 'estimator', 'k1')  # past the check
    np.testing.assert_allclose(gradient(config), 0, atol=1e-6)
    with pytest.raises(UserError, match="KL_ESTIMATOR = 'k1' has no gradient in the loss"):
        KLConfig(estimator='k1', place='loss')


def test_a_bonus_for_entropy_descends_by_minus_its_gradient():
    config = KLConfig(estimator='k2', place='loss')
    after, metrics = step(Objective(Weighted(), kl=config, entropy_bonus=0.3), beta=0.0)
    before = jnp.concatenate([jnp.full((1, N, 1), 2), BATCH.targets[..., :1]], -1)

    def entropies(adapter):
        logp = jax.nn.log_softmax(adapter.params['table'])
        return -(jnp.exp(logp) * logp).sum(-1)[before]

    want = -0.3 * jax.grad(lambda a: entropies(a)[MASK].mean())(POLICY).params['table']  # a token, not a response
    np.testing.assert_allclose(after.adapter.params['table'] - POLICY.params['table'], want, atol=1e-5)
    assert float(metrics['entropy/exact']) == pytest.approx(float(entropies(POLICY)[MASK].mean()), rel=1e-5)


# The coefficient.


def test_beta_is_steered_to_the_target_as_in_ziegler_et_al():
    config = KLConfig(beta=0.1, target=6.0, horizon=1000)
    for measured in (0.0, 5.0, 6.0, 6.5, 60.0):
        error = min(max(measured / 6.0 - 1, -0.2), 0.2)
        got = config.adapt(jnp.float32(0.1), jnp.float32(measured), 100)
        assert float(got) == pytest.approx(0.1 * (1 + error * 100 / 1000), rel=1e-5)
    assert float(config.adapt(jnp.float32(0.999), jnp.float32(60.0), 100)) == 1.0
    assert KLConfig(beta=0.1).adapt(jnp.float32(0.1), jnp.float32(60.0), 100) == jnp.float32(0.1)


@pytest.mark.parametrize(
    ('setting', 'said'),
    [
        ({'estimator': 'k4'}, "estimator = 'k4'"), ({'place': 'both'}, 'place'), ({'beta': 1.5}, 'beta = 1.5'),
        ({'target': 0.0}, 'target = 0.0'), ({'target': 5.0, 'beta': 0.0}, 'with BETA = 0.0'),
    ],  # fmt: skip
)
def test_settings_that_make_no_sense_are_refused(setting, said):
    with pytest.raises(UserError, match=said):
        KLConfig(**setting)
