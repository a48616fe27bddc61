import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import table_policy as table
import tiny
from table_policy import ANCHOR, BASE, EVERY, POLICY, SCORES, TABLE, VOCAB, N, logprobs, responses, rollout, total
from tiny import EOS

from perl_jax import types
from perl_jax.models.logprobs import token_logprobs
from perl_jax.models.lora import FullSpec
from perl_jax.rl import advantages as adv
from perl_jax.rl import losses, shaping, steps
from perl_jax.rl.algorithms.grpo import GRPO
from perl_jax.rl.algorithms.ppo import PPO
from perl_jax.rl.algorithms.reinforce import Reinforce
from perl_jax.rl.algorithms.rloo import RLOO
from perl_jax.rl.kl import KLConfig
from perl_jax.rl.objective import Objective
from perl_jax.rl.sampling import SamplingConfig, sample

BETA = 0.25


def judge(batch, scores, beta=BETA, sampling=SamplingConfig(), kl=KLConfig(), shaping=(), given=None):  # noqa: B008
    objective = Objective(kl=kl, shaping=shaping, sampling=sampling)
    run = functools.partial(steps.experience, TABLE, objective, eos_ids=EOS, policy=(BASE, POLICY), anchor=(BASE, None))
    given = rollout(batch, sampling.temperature) if given is None else given
    return jax.jit(run)(rollout=given, scores=scores, beta=beta)


# Experience.


def test_a_float_reward_stays_a_float():
    exp, metrics = judge(responses([(2, 3)]), np.array([[0.204]], np.float32), beta=0.0)
    assert float(metrics['reward/score']) == np.float32(0.204)
    assert exp.rewards[0, 0].tolist() == [0, np.float32(0.204)]
    assert exp.rewards.dtype == jnp.float32


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_rewards_are_score_and_kl_to_the_anchor(temperature):
    batch, beta = responses(EVERY), BETA
    exp, metrics = judge(batch, SCORES, beta, SamplingConfig(temperature=temperature))
    kl = np.asarray(logprobs(POLICY, batch, temperature) - logprobs(None, batch, temperature))
    for k, (tokens, score) in enumerate(zip(EVERY, SCORES[0])):
        n = 1 if tokens[0] == EOS else 2
        want = [-beta * kl[0, k, t] + (1 - beta) * score * (t == n - 1) for t in range(n)]
        np.testing.assert_allclose(exp.rewards[0, k, :n], want, atol=1e-5)
    kl = total(kl, batch.targets_mask)
    assert float(metrics['kl/anchor']) == pytest.approx(float(kl.mean()), abs=1e-5)
    assert float(metrics['reward/total']) == pytest.approx(float(((1 - beta) * SCORES - beta * kl).mean()), abs=1e-5)
    assert float(metrics['reward/score']) == pytest.approx(float(SCORES.mean()), abs=1e-6)
    assert float(metrics['length/mean']) == pytest.approx((1 + 2 * 12) / 13)
    assert int(metrics['tokens']) == 25
    assert tiny.same(batch, types.Responses(**{f.name: getattr(exp, f.name) for f in dataclasses.fields(batch)}))
    assert exp.values is None


def test_the_anchor_of_a_fresh_policy_is_the_policy():
    fresh = FullSpec().init(jax.random.key(0), BASE)
    batch = responses(EVERY)
    given = jax.tree.map(jnp.asarray, types.Rollout(**vars(batch), logprobs=logprobs(None, batch)))
    _, metrics = steps.experience(
        TABLE, Objective(), policy=(BASE, fresh), anchor=(BASE, None), rollout=given, scores=jnp.asarray(SCORES),
        beta=jnp.float32(BETA), eos_ids=EOS,
    )  # fmt: skip
    assert float(metrics['kl/anchor']) == pytest.approx(0, abs=1e-6)


def test_where_the_sampler_truncates_log_probs_are_the_whole_policys():
    batch = responses(EVERY)
    given = dataclasses.replace(rollout(batch), logprobs=jnp.zeros((1, N, 2)))  # what a cut distribution would say
    whole, _ = judge(batch, SCORES)
    for sampling in (SamplingConfig(top_k=2), SamplingConfig(top_p=0.5)):
        exp, _ = judge(batch, SCORES, sampling=sampling, given=given)
        np.testing.assert_allclose(exp.rewards, whole.rewards, atol=1e-5)
        real = batch.targets_mask
        np.testing.assert_allclose(exp.logprobs[real], whole.logprobs[real], atol=1e-5)
    assert np.abs(judge(batch, SCORES, given=given)[0].rewards - whole.rewards).max() > 0.1


@pytest.mark.parametrize('estimator', ['k1', 'k2', 'k3', 'full'])
def test_the_kl_in_the_reward_is_the_estimators(estimator):
    batch = responses(EVERY)
    exp, metrics = judge(batch, SCORES, kl=KLConfig(estimator=estimator))
    d = np.asarray(logprobs(POLICY, batch) - logprobs(None, batch))
    want = {'k1': d, 'k2': d**2 / 2, 'k3': np.exp(-d) - 1 + d}.get(estimator)
    if want is None:
        pi, anchor = (np.exp(t) / np.exp(t).sum(-1, keepdims=True) for t in (POLICY.params['table'], ANCHOR))
        before = np.concatenate([np.full((1, N, 1), 2), batch.targets[..., :1]], -1)
        want = (pi * np.log(pi / anchor)).sum(-1)[before]
    mask = batch.targets_mask
    scores = (1 - BETA) * SCORES
    np.testing.assert_allclose(total(exp.rewards, mask), scores - BETA * total(want, mask), atol=1e-5)
    assert float(metrics['kl/anchor']) == pytest.approx(float(total(d, mask).mean()), abs=1e-5)  # k1, whatever is used


def test_with_the_kl_in_the_loss_the_reward_is_the_score_alone():
    batch = responses(EVERY)
    exp, metrics = judge(batch, SCORES, kl=KLConfig(estimator='k3', place='loss'))
    np.testing.assert_allclose(total(exp.rewards, batch.targets_mask), (1 - BETA) * SCORES, atol=1e-6)
    assert float(metrics['kl/anchor']) != 0
    want = np.where(batch.targets_mask, logprobs(None, batch), 0)
    np.testing.assert_allclose(exp.anchor_logprobs, want, atol=1e-5)


def test_scores_are_shaped_in_turn_and_logged_raw():
    batch = responses(EVERY)
    double = lambda scores, responses, eos_id: 2 * scores  # noqa: E731
    exp, metrics = judge(batch, SCORES, 0.0, shaping=(double, functools.partial(shaping.clip, limit=0.5)))
    want = np.clip(2 * SCORES, -0.5, 0.5)
    np.testing.assert_allclose(total(exp.rewards, batch.targets_mask), want, atol=1e-6)
    assert float(metrics['reward/score']) == pytest.approx(float(SCORES.mean()), abs=1e-6)
    assert float(metrics['reward/shaped']) == pytest.approx(float(want.mean()), abs=1e-6)
    assert 'reward/shaped' not in judge(batch, SCORES)[1]


# The gradient.


@pytest.mark.parametrize('baseline', [0.0, 5.0])
@pytest.mark.parametrize('beta', [0.0, 0.25])
def test_gradient_is_that_of_the_papers_objective(beta, baseline):
    """Over every response, each weighted by its probability, against J = (1 - beta) E[R] - beta KL by autodiff."""
    batch = responses(EVERY)
    mask = batch.targets_mask

    def objective(adapter):
        logp = logprobs(adapter, batch)
        p = jnp.exp(total(logp, mask))
        return (p * ((1 - beta) * SCORES - beta * total(logp - logprobs(None, batch), mask))).sum()

    p = jnp.exp(total(logprobs(POLICY, batch), mask))
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    exp, _ = judge(batch, SCORES, beta)
    before = jnp.concatenate([jnp.full((1, N, 1), 2), batch.targets[..., :1]], -1)  # a baseline of the state
    advantages = adv.returns(exp.rewards) - baseline * before

    def loss(adapter):
        hidden = TABLE.apply({'params': adapter.params}, batch.inputs, batch.inputs_mask, batch.targets)[..., :-1, :]
        got = token_logprobs(TABLE, {'params': adapter.params}, hidden, batch)
        return total(p[..., None] * losses.reinforce(got, advantages), mask).sum()

    got, want = -jax.grad(loss)(POLICY).params['table'], jax.grad(objective)(POLICY).params['table']
    assert np.abs(want).max() > 0.05
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize('temperature', [1.0, 0.5])
def test_a_step_is_the_one_done_by_hand(temperature):
    tx, batch = optax.sgd(0.5), responses([(2, 3), (3, 1), (1, 0)])
    kernel = np.array([0.5, -1.0, 2.0, 1.0])
    returns = np.array([[[1.0, -2.0], [0.5, 3.0], [4.0, 0.0]]], np.float32)
    rewards = returns - np.pad(returns[..., 1:], ((0, 0), (0, 0), (0, 1)))
    exp = types.Experience(**vars(rollout(batch, temperature)), rewards=rewards, anchor_logprobs=np.zeros((1, 3, 2)))
    step = tiny.policy_stepper((tx, tx), TABLE, Objective(sampling=SamplingConfig(temperature=temperature)))
    after, metrics = jax.jit(step)(BASE, table.state(tx, kernel), exp, jax.random.key(0))

    start = np.float64(POLICY.params['table'])
    new_table, new_kernel, policy_loss, value_loss = start.copy(), kernel.copy(), 0.0, 0.0
    pi = np.exp(start / temperature) / np.exp(start / temperature).sum(-1, keepdims=True)
    for k, tokens in enumerate(batch.targets[0]):
        before = 2
        for t, token in enumerate(tokens[batch.targets_mask[0, k]]):
            advantage = returns[0, k, t] - kernel[before]
            policy_loss -= np.log(pi[before, token]) * advantage / 3
            value_loss += advantage**2 / 3
            new_table[before] += 0.5 / 3 * advantage * (np.eye(VOCAB)[token] - pi[before]) / temperature
            new_kernel[before] += 0.5 / 3 * 2 * advantage
            before = token
    np.testing.assert_allclose(after.policy.adapter.params['table'], new_table, atol=1e-5)
    np.testing.assert_allclose(after.value.adapter.head['kernel'], new_kernel, atol=1e-5)
    assert float(metrics['loss/policy']) == pytest.approx(policy_loss, abs=1e-4)
    assert float(metrics['loss/value']) == pytest.approx(value_loss, abs=1e-4)
    assert int(after.policy.step) == int(after.value.step) == 1
    assert float(metrics['kl/update']) == pytest.approx(0, abs=1e-6)  # the rollout was drawn by this policy


def test_explained_is_one_for_a_perfect_baseline_and_zero_for_the_mean():
    batch = responses([(2, 3), (3, 1), (0, 1)])  # no padding
    tx = optax.sgd(0.0)

    def explained(kernel, returns):
        rewards = jnp.asarray(returns - np.pad(returns[..., 1:], ((0, 0), (0, 0), (0, 1))))
        exp = types.Experience(**vars(rollout(batch)), rewards=rewards, anchor_logprobs=rewards)
        _, metrics = tiny.policy_stepper((tx, tx), TABLE)(BASE, table.state(tx, kernel), exp, jax.random.key(0))
        return float(metrics['value/explained'])

    kernel = np.array([1.0, 0.0, 2.0, -3.0], np.float32)
    returns = kernel[np.array([[[2, 2], [2, 3], [2, 0]]])]
    assert explained(kernel, returns) == pytest.approx(1, abs=1e-5)
    assert explained(np.full(VOCAB, returns.mean()), returns) == pytest.approx(0, abs=1e-5)


ALGORITHMS = {
    'reinforce': Reinforce(),
    'rloo': RLOO(),
    'grpo': GRPO(epochs=2),
    'ppo': PPO(epochs=2, minibatches=2),
}


@pytest.mark.parametrize('algorithm', ALGORITHMS.values(), ids=ALGORITHMS)
def test_every_algorithm_learns_the_best_response(algorithm):
    """The loop itself, on the table: sampled responses, and a score for one of them."""
    objective = Objective(algorithm, sampling=SamplingConfig(num_samples=16, max_decode_length=2))
    sampling, txs = objective.sampling, (optax.adam(0.1), optax.adam(0.1))
    prompts = types.Prompts(np.full((4, 1), 2), np.ones((4, 1), bool))
    step_fn = jax.jit(tiny.policy_stepper(txs, TABLE, objective))
    state = table.state(txs[0], np.zeros(VOCAB))

    @jax.jit
    def roll(state, key):
        drawn = sample(TABLE, {'params': state.policy.adapter.params}, prompts, key, EOS, sampling)
        scores = ((drawn.targets[..., 0] == 3) & (drawn.targets[..., 1] == EOS)).astype(jnp.float32)
        exp, metrics = steps.experience(
            TABLE, objective, policy=(BASE, state.policy.adapter), anchor=(BASE, None), rollout=drawn, scores=scores,
            beta=jnp.float32(0.01), eos_ids=EOS,
        )  # fmt: skip
        if steps.precomputes_values(objective, 0.0):
            exp = exp.replace(values=steps.values(TABLE, BASE, state.value.adapter, exp))
        return exp, metrics['reward/score']

    first = None
    for step in range(60 // algorithm.epochs):
        key = jax.random.fold_in(jax.random.key(0), step)
        exp, score = roll(state, key)
        for batch in steps.minibatches(exp, steps.minibatch_indices(objective, 4, 0, step)):
            state, _ = step_fn(BASE, state, batch, key)
        first = float(score) if first is None else first
    assert first < 0.5
    assert float(score) > 0.9


def minibatch_indices(size, seed, step, epochs, minibatches):
    return steps.minibatch_indices(Objective(PPO(epochs=epochs, minibatches=minibatches)), size, seed, step)


def test_updates_go_over_every_prompt_once_an_epoch():
    exp = tiny.experience(6, 2)
    parts = list(steps.minibatches(exp, minibatch_indices(6, 0, 0, 2, 3)))
    assert [part.targets.shape[:2] for part in parts] == [(2, 2)] * 6
    for epoch in (parts[:3], parts[3:]):
        rows = np.concatenate([part.inputs for part in epoch])
        np.testing.assert_array_equal(np.sort(rows, axis=0), np.sort(exp.inputs, axis=0))
    assert [part is exp for part in steps.minibatches(exp, minibatch_indices(6, 0, 0, 2, 1))] == [True, True]


def test_each_epochs_minibatches_are_shuffled_by_seed_step_and_epoch():
    shuffled = minibatch_indices(12, 3, 7, 4, 3)
    assert shuffled.shape == (12, 4)
    epochs = shuffled.reshape(4, 12)
    assert (np.sort(epochs) == np.arange(12)).all() and len(set(map(tuple, epochs.tolist()))) == 4
    np.testing.assert_array_equal(minibatch_indices(12, 3, 7, 4, 3), shuffled)
    np.testing.assert_array_equal(minibatch_indices(12, 3, 7, 2, 3), shuffled[:6])  # an epoch hangs on no other
    others = [minibatch_indices(12, seed, step, 4, 3) for seed, step in ((4, 7), (3, 8))]
    assert all((other[:3] != shuffled[:3]).any() for other in others)
    np.testing.assert_array_equal(minibatch_indices(12, 3, 7, 2, 1), np.tile(np.arange(12), (2, 1)))


def test_a_minibatch_keeps_the_rows_of_each_prompt_together():
    exp, halves = tiny.experience(6, 2), minibatch_indices(6, 0, 5, 1, 2)
    for part, prompts in zip(steps.minibatches(exp, halves), halves, strict=True):
        assert tiny.same(part, jax.tree.map(lambda x, prompts=prompts: x[prompts], exp))
