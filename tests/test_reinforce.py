import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import EOS

from perl_jax import losses, reinforce, types
from perl_jax.logprobs import token_logprobs
from perl_jax.lora import Adapter, FullSpec
from perl_jax.sampling import SamplingConfig, sample

# A table of 4 tokens, and every response of at most 2 tokens to the prompt '2'.
VOCAB = 4
TABLE = tiny.table(VOCAB)
RNG = np.random.default_rng(0)
ANCHOR, NOISE = RNG.standard_normal((2, VOCAB, VOCAB)).astype(np.float32)
BASE, POLICY = {'table': jnp.array(ANCHOR)}, Adapter(params={'table': jnp.array(ANCHOR + 0.5 * NOISE)})
EVERY = [(EOS, 0)] + [(a, b) for a in (0, 2, 3) for b in range(VOCAB)]
N = len(EVERY)
SCORES = RNG.standard_normal((1, N)).astype(np.float32)


def responses(tokens, prompt=2):
    """One prompt and all of these responses, which end at EOS or where there is no room."""
    targets = np.array(tokens, np.int32)[None]
    before = np.cumsum(targets == EOS, axis=-1) - (targets == EOS)
    return types.Responses(np.full((1, 1), prompt, np.int32), np.ones((1, 1), bool), targets, before == 0)


def logprobs(adapter, batch, temperature=1.0):
    """Of each token under a table, by hand."""
    table = BASE['table'] if adapter is None else adapter.params['table']
    whole = jax.nn.log_softmax(table / temperature)
    first = jnp.broadcast_to(batch.inputs[:, :1, None], (*batch.targets.shape[:2], 1))
    return whole[jnp.concatenate([first, batch.targets[..., :-1]], -1), batch.targets]


def rollout(batch, temperature=1.0):
    return types.Rollout(**vars(batch), logprobs=logprobs(POLICY, batch, temperature))


def judge(batch, scores, beta=0.25, sampling=SamplingConfig()):  # noqa: B008 (frozen)
    run = functools.partial(reinforce.experience, TABLE, beta=beta, sampling=sampling)
    return jax.jit(run)(BASE, POLICY, rollout(batch, sampling.temperature), scores)


def total(x, mask):
    return jnp.where(mask, x, 0).sum(-1)


# Experience.


def test_a_float_reward_stays_a_float():
    exp, metrics = judge(responses([(2, 3)]), np.array([[0.204]], np.float32), beta=0.0)
    assert float(metrics['reward/score']) == np.float32(0.204)
    assert exp.returns[0, 0].tolist() == [np.float32(0.204)] * 2
    assert exp.returns.dtype == jnp.float32


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_returns_are_score_and_kl_to_the_anchor(temperature):
    batch, beta = responses(EVERY), 0.25
    exp, metrics = judge(batch, SCORES, beta, SamplingConfig(temperature=temperature))
    kl = np.asarray(logprobs(POLICY, batch, temperature) - logprobs(None, batch, temperature))
    for k, (tokens, score) in enumerate(zip(EVERY, SCORES[0])):
        n = 1 if tokens[0] == EOS else 2
        want = [(1 - beta) * score - beta * kl[0, k, t:n].sum() for t in range(n)]
        np.testing.assert_allclose(exp.returns[0, k, :n], want, atol=1e-5)
    kl = total(kl, batch.targets_mask)
    assert float(metrics['kl/anchor']) == pytest.approx(float(kl.mean()), abs=1e-5)
    assert float(metrics['reward/total']) == pytest.approx(float(((1 - beta) * SCORES - beta * kl).mean()), abs=1e-5)
    assert float(metrics['reward/score']) == pytest.approx(float(SCORES.mean()), abs=1e-6)
    assert float(metrics['length/mean']) == pytest.approx((1 + 2 * 12) / 13)
    assert int(metrics['tokens']) == 25
    assert tiny.same(batch, types.Responses(*(getattr(exp, f.name) for f in dataclasses.fields(batch))))


def test_the_anchor_of_a_fresh_policy_is_the_policy():
    fresh = FullSpec().init(jax.random.key(0), BASE)
    batch = responses(EVERY)
    given = types.Rollout(**vars(batch), logprobs=logprobs(None, batch))
    _, metrics = reinforce.experience(TABLE, BASE, fresh, given, SCORES, 0.25, SamplingConfig())
    assert float(metrics['kl/anchor']) == pytest.approx(0, abs=1e-6)


def test_where_the_sampler_truncates_log_probs_are_the_whole_policys():
    batch = responses(EVERY)
    given = dataclasses.replace(rollout(batch), logprobs=jnp.zeros((1, N, 2)))  # what a cut distribution would say
    run = functools.partial(reinforce.experience, TABLE, BASE, POLICY, given, SCORES, 0.25)
    whole, _ = judge(batch, SCORES)
    for sampling in (SamplingConfig(top_k=2), SamplingConfig(top_p=0.5)):
        exp, _ = run(sampling)
        np.testing.assert_allclose(exp.returns, whole.returns, atol=1e-5)
    assert np.abs(run(SamplingConfig())[0].returns - whole.returns).max() > 0.1


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
    advantages = exp.returns - baseline * before

    def loss(adapter):
        hidden = TABLE.apply({'params': adapter.params}, batch.inputs, batch.inputs_mask, batch.targets)[..., :-1, :]
        got = token_logprobs(TABLE, {'params': adapter.params}, hidden, batch.targets)
        return losses.reinforce(got, N * p[..., None] * advantages, mask)

    got, want = -jax.grad(loss)(POLICY).params['table'], jax.grad(objective)(POLICY).params['table']
    assert np.abs(want).max() > 0.05
    np.testing.assert_allclose(got, want, atol=1e-5)


def value_head(kernel):
    return Adapter(params=BASE, head={'kernel': jnp.array(kernel, jnp.float32)})


@pytest.mark.parametrize('temperature', [1.0, 0.5])
def test_a_step_is_the_one_done_by_hand(temperature):
    tx, batch = optax.sgd(0.5), responses([(2, 3), (3, 1), (1, 0)])
    kernel = np.array([0.5, -1.0, 2.0, 1.0])
    returns = np.array([[[1.0, -2.0], [0.5, 3.0], [4.0, 0.0]]], np.float32)
    exp = types.Experience(**vars(rollout(batch)), returns=returns)
    value = value_head(kernel)
    state = types.PolicyState(
        types.TrainState(jnp.int32(0), POLICY, tx.init(POLICY)), types.TrainState(jnp.int32(0), value, tx.init(value))
    )
    step = functools.partial(reinforce.policy_step, TABLE, (tx, tx), temperature)
    after, metrics = jax.jit(step)(BASE, state, exp, jax.random.key(0))

    table = np.float64(POLICY.params['table'])
    new_table, new_kernel, policy_loss, value_loss = table.copy(), kernel.copy(), 0.0, 0.0
    pi = np.exp(table / temperature) / np.exp(table / temperature).sum(-1, keepdims=True)
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


def test_explained_is_one_for_a_perfect_baseline_and_zero_for_the_mean():
    batch = responses([(2, 3), (3, 1), (0, 1)])
    tx = optax.sgd(0.0)

    def explained(kernel, returns):
        value = value_head(kernel)
        state = types.PolicyState(*[types.TrainState(jnp.int32(0), x, tx.init(x)) for x in (POLICY, value)])
        exp = types.Experience(**vars(rollout(batch)), returns=returns)
        _, metrics = reinforce.policy_step(TABLE, (tx, tx), 1.0, BASE, state, exp, jax.random.key(0))
        return float(metrics['value/explained'])

    kernel = np.array([1.0, 0.0, 2.0, -3.0], np.float32)
    returns = kernel[np.array([[[2, 2], [2, 3], [2, 0]]])]
    assert explained(kernel, returns) == pytest.approx(1, abs=1e-5)
    assert explained(np.full(VOCAB, returns.mean()), returns) == pytest.approx(0, abs=1e-5)


def test_reinforce_learns_the_best_response():
    """The loop itself, on the table: sampled responses, and a score for one of them."""
    sampling, txs = SamplingConfig(num_samples=16, max_decode_length=2), (optax.adam(0.1), optax.adam(0.1))
    prompts = types.Prompts(np.full((4, 1), 2), np.ones((4, 1), bool))
    value = value_head(np.zeros(VOCAB))
    state = types.PolicyState(
        types.TrainState(jnp.int32(0), POLICY, txs[0].init(POLICY)),
        types.TrainState(jnp.int32(0), value, txs[1].init(value)),
    )

    @jax.jit
    def loop(state, key):
        drawn = sample(TABLE, {'params': state.policy.adapter.params}, prompts, key, EOS, sampling)
        scores = ((drawn.targets[..., 0] == 3) & (drawn.targets[..., 1] == EOS)).astype(jnp.float32)
        exp, metrics = reinforce.experience(TABLE, BASE, state.policy.adapter, drawn, scores, 0.01, sampling)
        return reinforce.policy_step(TABLE, txs, 1.0, BASE, state, exp, key)[0], metrics['reward/score']

    first = None
    for step in range(60):
        state, score = loop(state, jax.random.fold_in(jax.random.key(0), step))
        first = float(score) if first is None else first
    assert first < 0.5
    assert float(score) > 0.9
