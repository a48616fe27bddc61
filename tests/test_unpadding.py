"""A batch without its padding equals the batch with it: values, gradients, learning steps. And it computes less."""

import dataclasses
import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import CONFIG, NETWORK, UNTIED, P, R

from perl_jax.models import logprobs, lora, unpadding
from perl_jax.models.decoder import Decoder
from perl_jax.optim.tuning import Tuning
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rewards.scoring import score
from perl_jax.rl import steps
from perl_jax.rl.algorithms.grpo import GRPO
from perl_jax.rl.algorithms.ppo import PPO
from perl_jax.rl.kl import KLConfig
from perl_jax.rl.learner import make_learner
from perl_jax.rl.objective import Objective
from perl_jax.rl.sampling import SamplingConfig
from perl_jax.tools.plan import flops
from perl_jax.train.reward import reward_step
from perl_jax.train.sft import sft_step
from perl_jax.types import Rollout

BATCH = tiny.responses(B=4, K=3, lengths=np.array([[0, 5, 1], [1, 2, 1], [3, 0, 0], [1, 1, 4]]))
BATCH = BATCH.replace(inputs_mask=BATCH.inputs_mask & (np.arange(4) != 2)[:, None])  # an empty prompt
EXPERIENCE = tiny.experience(B=4)
KEY, TX = jax.random.key(0), optax.adam(1e-2, eps=1e-4)
NETWORKS = {
    'looped': NETWORK,
    'remat': Decoder(dataclasses.replace(UNTIED.config, remat='full')),
    'windows': Decoder(dataclasses.replace(CONFIG, sliding_window=3, global_every=2, local_rope_theta=50.0)),
}
networks = pytest.mark.parametrize('network', NETWORKS.values(), ids=NETWORKS)


def test_there_and_back():
    mask = BATCH.targets_mask
    tokens = unpadding.real_tokens(tiny.without_padding(BATCH)).targets
    x = np.random.default_rng(0).standard_normal((*mask.shape, 2)).astype(np.float32)
    got = tokens.unpad(jnp.asarray(x))
    assert got.shape == (1, 23, 2) and mask.sum() == 19  # 6 sixteenths of 60
    np.testing.assert_array_equal(got[0, :19], x[mask])
    assert not got[0, 19:].any()
    np.testing.assert_array_equal(tokens.pad(got), np.where(mask[..., None], x, 0))


def test_the_gradient_of_each_way_is_the_other():
    tokens = unpadding.real_tokens(tiny.without_padding(BATCH)).targets
    x, y = jnp.ones(BATCH.targets.shape), jnp.arange(1.0, 24.0)[None]
    (back,), (there,) = jax.vjp(tokens.unpad, x)[1](y), jax.vjp(tokens.pad, y)[1](x)
    np.testing.assert_array_equal(back, tokens.pad(y))
    np.testing.assert_array_equal(there, tokens.unpad(x))
    assert back.sum() == np.arange(1, 20).sum() and there.sum() == 19


@pytest.mark.parametrize(('groups', 'parts'), [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_what_is_needed_holds_the_fullest_part(groups, parts):
    """A partition has consecutive rows and takes every n-th of them at a time."""
    rng, buckets = np.random.default_rng(0), 8
    for _ in range(50):
        prompts, responses = rng.integers(1, 8, 12), rng.integers(0, 21, 12)
        split = {'groups': groups, 'num_microbatches': parts, 'buckets': buckets}
        run, targets = unpadding.count_buckets(prompts, responses, 7, 20, **split)
        rows = [np.arange(12).reshape(groups, -1)[g][i::parts] for g in range(groups) for i in range(parts)]
        full = max((prompts + responses)[r].sum() / (27 * len(r)) for r in rows)
        assert full <= run / buckets < full + 1 / buckets
        full = max(responses[r].sum() / (20 * len(r)) for r in rows)
        assert full <= targets / buckets < full + 1 / buckets


def test_a_rollouts_fill_holds_every_minibatch_to_come():
    """Shuffled ones too, of the longest answers together, and the whole rollout, which is judged at once."""
    on, tuning, fills = Partitioner(), Tuning(tiny.SPECS['lora'], TX, num_microbatches=2), set()
    objective = Objective(PPO(epochs=3, minibatches=2), value=tuning)
    with on.scope():
        programs = make_learner(
            network=NETWORK, objective=objective, tuning=tuning, eos_ids=(1,), partitioner=on, length_buckets=8,
        )  # fmt: skip
        for step in range(12):
            exp, indices = tiny.experience(8, 2, seed=step), steps.minibatch_indices(objective, 8, 0, step)
            rollout = Rollout(exp.inputs, exp.inputs_mask, exp.targets, exp.targets_mask, exp.logprobs)
            whole = programs.with_fill(rollout, indices).fill or (1, 1)
            each = [tiny.without_padding(rollout, buckets=8).fill or (1, 1)]
            for prompts in indices:
                part = jax.tree.map(lambda x, prompts=prompts: np.asarray(x)[prompts], rollout)
                each.append(tiny.without_padding(part, parts=2, buckets=8).fill or (1, 1))
            assert whole == (max(max(x) for x in each),) * 2  # one for both, so that few programs are compiled
            fills.add(whole)
    assert len(fills) > 2


def test_a_full_batch_stays_as_it_is():
    full = tiny.responses(B=2, K=2, lengths=np.full((2, 2), R))
    full = full.replace(inputs_mask=np.ones((2, P), bool))
    assert tiny.without_padding(full).fill is None and unpadding.real_tokens(full) is None
    empty = full.replace(targets_mask=np.zeros_like(full.targets_mask))
    assert tiny.without_padding(empty, buckets=4).fill == (Fraction(2, 4), Fraction(1, 4))


def test_where_only_the_answers_have_padding_only_logits_are_of_less():
    batch = tiny.responses(B=2, K=2, lengths=np.array([[R, 0], [1, R - 1]]))
    batch = tiny.without_padding(batch.replace(inputs_mask=np.ones((2, P), bool)), buckets=4)
    nearly = batch.replace(fill=(Fraction(1), batch.fill[1]))  # as with 2 buckets, for one
    read = jax.jit(lambda batch: logprobs.response_logprobs(NETWORK, {'params': tiny.base()}, batch))
    want = np.where(batch.targets_mask, read(batch.replace(fill=None)), 0)
    assert batch.fill == (Fraction(3, 4), Fraction(1, 2)) and unpadding.real_tokens(nearly).packed is None
    for each in (batch, nearly):
        np.testing.assert_allclose(read(each), want, atol=1e-4)


def test_a_token_that_is_lost_is_nan():
    """Nobody trains on a batch whose fill is too small."""
    small = BATCH.replace(fill=(Fraction(1), Fraction(1, 4)))  # 15 of 19
    got = logprobs.response_logprobs(NETWORK, {'params': tiny.base()}, small)
    assert np.isnan(got).sum() == 4 and not np.isnan(got[~BATCH.targets_mask]).any()


@networks
def test_logprobs_and_scores_equal_values_and_gradients(network):
    params = tiny.base(network)
    adapter = tiny.adapter(tiny.SPECS['lora'], params)
    weights = np.random.default_rng(0).standard_normal((2, *BATCH.targets.shape)).astype(np.float32)

    def both(adapter, params, batch):
        variables = lora.bind(params, adapter, train=True)
        logps = jnp.where(batch.targets_mask, logprobs.response_logprobs(network, variables, batch, 0.7), 0)
        scores = score(network, variables, batch)
        return (logps * weights[0]).sum() + (scores * weights[1, ..., 0]).sum(), (logps, scores)

    run = jax.jit(jax.value_and_grad(both, (0, 1), has_aux=True))
    (_, want), want_gradients = run(adapter, params, BATCH)
    (_, got), gradients = run(adapter, params, tiny.without_padding(BATCH))
    tiny.assert_close(got, want, atol=1e-4)
    tiny.assert_close(gradients, want_gradients, atol=2e-4)


def policy_step(state, batch, parts, **settings):
    objective = Objective(sampling=SamplingConfig(num_samples=2, temperature=0.7), **settings)
    return tiny.policy_stepper((TX, TX), NETWORK, objective, num_microbatches=parts)(tiny.base(), state, batch, KEY)


def of_sft(state, batch, parts):
    return sft_step(NETWORK, TX, tiny.base(), state, batch, KEY, num_microbatches=parts)


def of_rewards(state, batch, parts):
    return reward_step(NETWORK, TX, tiny.base(), state, (batch,), KEY, num_microbatches=parts)


PAIRS = tiny.responses(B=4, K=2, lengths=np.array([[1, 3], [2, 1], [1, 5], [1, 2]]))
WHOLE_KL = {'kl': KLConfig(estimator='full', place='loss'), 'algorithm': GRPO()}
STEPS = {
    'sft': ('sft', of_sft, BATCH, 1),
    'pairs': ('reward', of_rewards, PAIRS, 2),
    'thumbs': ('reward', of_rewards, tiny.thumbs(4), 1),
    'policy': ('policy', policy_step, EXPERIENCE, 2),
    'policy, entropy': ('policy', functools.partial(policy_step, entropy_bonus=0.1), EXPERIENCE, 1),
    'policy, whole KL': ('policy', functools.partial(policy_step, **WHOLE_KL), EXPERIENCE, 1),
}


@pytest.mark.parametrize(('kind', 'step', 'batch', 'parts'), STEPS.values(), ids=STEPS)
def test_learning_steps_equal(kind, step, batch, parts):
    state, run = tiny.create(kind, tiny.SPECS['lora'], tiny.base(), TX), jax.jit(step, static_argnums=2)
    without = tiny.without_padding(batch, parts=parts)
    assert without.fill is not None
    (want, want_metrics), (got, metrics) = run(state, batch, parts), run(state, without, parts)
    tiny.assert_close(metrics, want_metrics, atol=1e-4)
    tiny.assert_close(tiny.adapters(got), tiny.adapters(want), atol=1e-4)


def test_judging_a_rollout_equals():
    base, sampling = tiny.base(), SamplingConfig(num_samples=2, max_decode_length=R, temperature=0.7, top_k=5)
    objective = Objective(kl=KLConfig(estimator='full'), sampling=sampling)
    policy = base, tiny.adapter(tiny.SPECS['lora'], base, head=False)

    def judge(rollout):
        return steps.experience(
            NETWORK, objective, policy=policy, anchor=(base, None), rollout=rollout, scores=jnp.ones((4, 2)),
            beta=jnp.float32(0.1), eos_ids=tiny.EOS,
        )  # fmt: skip

    names = ('inputs', 'inputs_mask', 'targets', 'targets_mask', 'logprobs')
    rollout = steps.Rollout(**{name: getattr(EXPERIENCE, name) for name in names})
    want, (judged, metrics) = (jax.jit(judge)(x) for x in (rollout, tiny.without_padding(rollout)))
    assert judged.fill is not None  # the learning steps go on without padding
    tiny.assert_close((judged.replace(fill=None), metrics), want, atol=1e-4)


def test_it_computes_less():
    """Dense layers and logits are of real tokens; attention is of rows, as before."""
    params = tiny.base()

    def count(batch):
        read = jax.make_jaxpr(lambda batch: logprobs.response_logprobs(NETWORK, {'params': params}, batch))
        return flops.count(read(batch).jaxpr, 0).total

    real = BATCH.inputs_mask.sum() + BATCH.targets_mask.sum()
    assert real < 0.5 * (BATCH.inputs_mask.size + BATCH.targets_mask.size)
    assert count(tiny.without_padding(BATCH)) < 0.6 * count(BATCH)
