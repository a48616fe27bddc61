"""Microbatches: their gradients add up to the whole batch's in every step that learns, whatever their lengths are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import NETWORK

from perl_jax.errors import UserError
from perl_jax.models.lora import LoraSpec
from perl_jax.optim import accumulate
from perl_jax.optim.tuning import Tuning
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rl import steps
from perl_jax.rl.algorithms.grpo import GRPO
from perl_jax.rl.algorithms.ppo import PPO
from perl_jax.rl.algorithms.reinforce import Reinforce
from perl_jax.rl.algorithms.rloo import RLOO
from perl_jax.rl.kl import KLConfig
from perl_jax.rl.objective import Objective
from perl_jax.rl.sampling import SamplingConfig
from perl_jax.train.reward import reward_step
from perl_jax.train.sft import sft_step
from perl_jax.types import Thumbs

B, K, KEY = 8, 2, jax.random.key(0)
SGD = optax.sgd(1.0)  # what it adds to an adapter is its gradient
RAGGED, EXPERIENCE = jax.tree.map(jnp.asarray, (tiny.responses(B, K), tiny.experience(B, K)))
BETA = jnp.float32(0.1)
LORA = LoraSpec(rank=4)
NUMBERS = pytest.mark.parametrize('n', [2, 8])


def test_a_sum_over_rows_by_hand():
    """Rows 0, 2, 4 are the first part and 1, 3, 5 the second; what is said of rows comes back in their order."""
    seen = []

    def loss(w, part, rng):
        jax.debug.callback(lambda x: seen.append(np.array(x).tolist()), part, ordered=True)
        return (w * part).sum(), ({'n': jnp.float32(part.size)}, 10 * part)

    x = jnp.arange(6.0)
    value, grads, sums, rows = accumulate.value_and_grad(loss, jnp.float32(3), x, 2, KEY)
    assert (value, grads, sums['n'], rows.tolist()) == (45, 15, 6, [0, 10, 20, 30, 40, 50])
    assert seen == [[0, 2, 4], [1, 3, 5]]


def ragged(mask):
    """Very different lengths: a mean of the parts' means would be another number."""
    lengths = np.array([1, 5, 1, 5, 2, 5, 1, 4])[:, None, None]
    return mask & (np.arange(mask.shape[-1]) < lengths)


def assert_same_step(step, kind, n):
    """One step (base, state, num_microbatches) -> state, metrics; `kind` is 'sft', or 'reward' for one with a head."""
    base = tiny.base()
    state = tiny.create(kind, LORA, base, SGD)
    state = state.replace(adapter=tiny.stir(state.adapter))
    one, metrics = jax.jit(functools.partial(step, num_microbatches=1))(base, state)
    many, parts = jax.jit(functools.partial(step, num_microbatches=n))(base, state)
    tiny.assert_close(many.adapter, one.adapter, rtol=1e-4, atol=1e-5)
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), one.adapter, state.adapter)
    assert max(jax.tree.leaves(moved)) > 1e-3
    assert metrics.keys() == parts.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@NUMBERS
def test_sft(n):
    batch = RAGGED.replace(targets_mask=ragged(RAGGED.targets_mask))
    step = lambda base, state, **kw: sft_step(NETWORK, SGD, base, state, batch, KEY, **kw)  # noqa: E731
    assert_same_step(step, 'sft', n)


@NUMBERS
def test_reward(n):
    labels = (jnp.arange(B * K).reshape(B, K) % 3 == 0).astype(jnp.float32)
    batches = RAGGED, Thumbs(**vars(RAGGED), labels=labels)
    step = lambda base, state, **kw: reward_step(NETWORK, SGD, base, state, batches, KEY, **kw)  # noqa: E731
    assert_same_step(step, 'reward', n)


FULL = KLConfig(estimator='full', place='loss')


@pytest.mark.parametrize(('algorithm', 'kl'), [
    (Reinforce(), KLConfig()), (RLOO(), FULL), (GRPO(), KLConfig()), (PPO(), KLConfig()),
], ids=lambda x: type(x).__name__)  # fmt: skip
def test_policy(algorithm, kl):
    batch = EXPERIENCE.replace(targets_mask=ragged(EXPERIENCE.targets_mask))
    values = 0.3 * batch.rewards[:, ::-1] if algorithm.has_value else None

    def step(base, state, **kw):
        objective = Objective(algorithm, kl, SamplingConfig(num_samples=2, temperature=0.7), entropy_bonus=0.01)
        return steps.policy_step(
            NETWORK, objective, SGD, base=base, anchor=(base, None), state=state, batch=batch, values=values, beta=BETA,
            rng=KEY, **kw,
        )  # fmt: skip

    assert_same_step(step, 'sft', 4)


@pytest.mark.parametrize(('algorithm', 'known'), [(Reinforce(), False), (PPO(), True)], ids=['Reinforce', 'PPO'])
def test_value(algorithm, known):
    batch = EXPERIENCE.replace(targets_mask=ragged(EXPERIENCE.targets_mask))
    if known:
        batch = batch.replace(values=0.3 * batch.rewards[:, ::-1])

    def step(base, state, **kw):
        after, old, metrics = steps.value_step(
            NETWORK, Objective(algorithm), SGD, base=base, state=state, batch=batch, rng=KEY, **kw
        )
        return after, metrics | {'old': jnp.where(batch.targets_mask, old, 0)}

    assert_same_step(step, 'reward', 4)


def test_dropout_differs_between_the_parts():
    spec = dataclasses.replace(LORA, dropout=0.5)
    same = jax.tree.map(lambda x: jnp.repeat(x[:1], 2, axis=0), RAGGED)
    state = tiny.stir(tiny.create('sft', spec, tiny.base(), SGD))
    half = sft_step(NETWORK, SGD, tiny.base(), state, jax.tree.map(lambda x: x[:1], same), KEY)[0]
    both = sft_step(NETWORK, SGD, tiny.base(), state, same, KEY, num_microbatches=2)[0]
    assert not np.allclose(*(jax.tree.leaves(x.adapter)[0] for x in (half, both)))


def test_microbatches_must_divide_the_batch():
    Partitioner().check_batch('BATCH_SIZE', 8 * jax.device_count(), 4)
    with pytest.raises(UserError, match=r'BATCH_SIZE = 8 is not divisible by the data-parallel size \d+ times 3 micro'):
        Partitioner().check_batch('BATCH_SIZE', 8, 3)
    with pytest.raises(UserError, match='Tuning.num_microbatches = 0: give a number of at least 1'):
        Tuning(LoraSpec(), SGD, num_microbatches=0)
