"""Learning rates by step of the loop, whatever optimizer, however many updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from perl_jax.errors import UserError
from perl_jax.models.lora import LoraSpec
from perl_jax.optim import schedules, train_state
from perl_jax.optim.tuning import Tuning
from perl_jax.rl.algorithms.reinforce import Reinforce
from perl_jax.rl.algorithms.rloo import RLOO
from perl_jax.rl.objective import Objective
from perl_jax.rl.sampling import SamplingConfig
from perl_jax.train import policy
from perl_jax.types import TrainState

TEN = jnp.arange(10)


def test_warm_up_and_decay_are_multiplied():
    rise, fall = np.minimum(np.arange(10) / 4, 1), 1 - np.arange(10) / 10
    np.testing.assert_allclose(schedules.linear(4)(TEN), rise)
    np.testing.assert_allclose(schedules.linear(0, 10)(TEN), fall, rtol=1e-6)
    np.testing.assert_allclose(schedules.linear(4, 10)(TEN), rise * fall, rtol=1e-6)
    np.testing.assert_array_equal(schedules.linear()(TEN), 1)
    np.testing.assert_array_equal(schedules.constant(TEN), 1)
    assert float(schedules.linear(0, 10)(12)) == 0  # and not below


@pytest.mark.parametrize('setting', [{'warmup_steps': -1}, {'warmup_steps': 2.5}, {'decay_steps': 0}])
def test_steps_that_make_no_sense_are_refused(setting):
    with pytest.raises(UserError, match='_steps = '):
        schedules.linear(**setting)


def test_the_values_schedule_is_logged_where_a_value_is_learned():
    tuning = Tuning(LoraSpec(), optax.sgd(0.1), schedule=schedules.linear(4))
    for algorithm, value in (Reinforce(), {'schedule/value': 0.25}), (RLOO(), {}):
        objective = Objective(algorithm, sampling=SamplingConfig(num_samples=2), value=tuning)
        assert policy._schedules(objective, tuning, 1) == {'schedule/policy': 0.25} | value


def walk(tx, n):
    """What each of n updates changed."""
    params = {'w': jnp.float32([1.0, -2.0])}
    state = TrainState(jnp.int32(0), params, tx.init(params))
    changes, step = [], jax.jit(lambda state, grads: train_state.update(state, grads, tx))
    for i in range(n):
        after = step(state, {'w': jnp.float32([0.3 * i + 0.1, 1.0])})
        changes.append(after.adapter['w'] - state.adapter['w'])
        state = after
    return np.array(changes)


OPTIMIZERS = {
    'adafactor': lambda rate: optax.adafactor(rate, multiply_by_parameter_scale=False),
    'adam': optax.adam,
    'adamw': lambda rate: optax.adamw(rate, weight_decay=0.1),
    'sgd': lambda rate: optax.sgd(rate, momentum=0.9),
}


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_a_scheduled_optimizer_is_that_with_a_scheduled_rate(optimizer):
    tx, decay = OPTIMIZERS[optimizer], optax.linear_schedule(1.0, 0.0, 8)
    inside = walk(tx(lambda step: 0.1 * decay(step)), 8)
    np.testing.assert_allclose(walk(schedules.scheduled('X', tx(0.1), decay), 8), inside, rtol=1e-5, atol=1e-7)


def test_several_updates_of_a_step_are_at_one_rate():
    changes = walk(schedules.scheduled('X', optax.sgd(1.0), schedules.linear(0, 3), updates=4), 12)
    np.testing.assert_allclose(changes[:, 1], -np.repeat([1, 2 / 3, 1 / 3], 4), rtol=1e-6)


def test_the_state_is_the_optimizers_own_so_that_a_schedule_may_change():
    tx, params = optax.adam(0.1), {'w': jnp.zeros(2)}
    scheduled = schedules.scheduled('X', tx, schedules.linear(3, 10))
    assert jax.tree.structure(scheduled.init(params)) == jax.tree.structure(tx.init(params))


INSIDE = {
    'optax schedule': optax.adafactor(optax.linear_schedule(1.0, 0.0, 5)),
    'in a chain': optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1.0, 5))),
    'injected': optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(1.0, 0.0, 5)),
}


@pytest.mark.parametrize('kind', INSIDE)
def test_a_schedule_that_counts_updates_is_refused_where_a_step_makes_several(kind):
    schedules.scheduled('OPTIMIZER', INSIDE[kind], schedules.constant)
    with pytest.raises(UserError, match='VALUE_OPTIMIZER has a schedule .* 4 a step .*VALUE_SCHEDULE'):
        schedules.scheduled('VALUE_OPTIMIZER', INSIDE[kind], schedules.constant, 4)


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(UserError, match='OPTIMIZER is builtins.dict, no optimizer of optax'):
        schedules.scheduled('OPTIMIZER', {}, schedules.constant)
