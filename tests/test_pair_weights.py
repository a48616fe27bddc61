"""Pairs that do not all count alike: from a task's `weight` to the gradients, in memory, in files and in parts."""

import collections
import dataclasses
import functools
import itertools

import jax
import numpy as np
import optax
import pytest
import seqio
import tiny
from test_taskmaster import needs_data, real  # noqa: F401

from perl_jax import types
from perl_jax.data import datasets, pair_weights
from perl_jax.data.datasets import DatasetConfig
from perl_jax.errors import UserError
from perl_jax.models import lora
from perl_jax.optim import accumulate
from perl_jax.rewards.scoring import score
from perl_jax.rl import losses
from perl_jax.tasks import registration, taskmaster
from perl_jax.train.reward import ensemble_step, reward_step

KEY, SGD = jax.random.key(0), optax.sgd(1.0)  # what it adds to an adapter is its gradient
PAIRS = tiny.responses(4, 2, lengths=np.array([[5, 3], [2, 4], [1, 5], [3, 3]]))
WEIGHTS = np.array([2.0, 0.25, 0.5, 1.25], np.float32)
LENGTHS = {'inputs': 6, 'targets': 6}
_numbers = itertools.count()


def weighted(batch, weights):
    return types.WeightedPairs(**vars(batch), weights=np.asarray(weights, np.float32))


def task(weights, name='a'):
    """Pairs of so many weights; without them where None."""
    rows = [{'inputs': f'{name} {i}', 'chosen': 'yes', 'rejected': 'no'} for i in range(len(weights))]
    rows = [row if weight is None else row | {'weight': weight} for row, weight in zip(rows, weights)]
    name = f'pair_weights_{next(_numbers):03d}_pairs'
    return registration.add(name, 'pairs', lambda split: rows, splits=['train']).name


def config(name, **options):
    return DatasetConfig(name, LENGTHS, 4, **options)


# The data.


def test_weights_by_hand():
    given = np.array([1, 1 / 2, 1 / 2, *[1 / 4] * 4])  # contexts of 1, 2 and 4 pairs: 3 / 7 on average
    want = [7 / 3, 7 / 6, 7 / 6, *[7 / 12] * 4]
    np.testing.assert_allclose(pair_weights.normalized(given, 'mine'), want, rtol=1e-6)
    np.testing.assert_allclose(pair_weights.normalized(10 * given, 'mine'), want, rtol=1e-6)


def test_rows_with_a_weight_are_weighted_pairs():
    dataset = datasets.load(config(task([1.0, 0.5, 0.5])), 'pairs')
    batch, examples = dataset.rows(np.array([0, 2]))
    assert type(batch) is types.WeightedPairs and batch.weights.dtype == np.float32
    np.testing.assert_allclose(batch.weights, [1.5, 0.75])
    assert [example['weight'] for example in examples] == [1.0, 0.5]
    assert type(datasets.load(config(task([None] * 3)), 'pairs').rows(np.array([0]))[0]) is types.Responses
    np.testing.assert_allclose(datasets.load(config(task([3, 1])), 'pairs').arrays['weights'], [1.5, 0.5])
    (last, *_), *_ = dataset.batches(4)  # of an evaluation, filled up
    assert last.weights.shape == (4,)


@pytest.mark.parametrize('options', [{}, {'length_buckets': 3}], ids=['', 'buckets'])
@pytest.mark.parametrize('mixed', [False, True], ids=['task', 'mixture'])
def test_batches_from_files_and_on_several_processes(mixed, options, tmp_path):
    name = task([1.0, 0.5, 0.5, 0.25, 3.0, 2.0])
    if mixed:  # with pairs that have none, and count 1 then
        seqio.MixtureRegistry.add(mixture := f'{name}_mixed', [name, task([None] * 9, 'b')], default_rate=1.0)
        name = mixture
    held = datasets.stream(config(name, **options), 'pairs', 3)
    mapped = datasets.stream(config(name, tokens_dir=str(tmp_path), **options), 'pairs', 3)
    halves = [datasets.stream(config(name, **options), 'pairs', 3, places) for places in np.arange(4).reshape(2, 2)]
    for step in range(6):
        batch, examples = held(step)
        want = [example.get('weight', 7.25 / 6) * 6 / 7.25 for example in examples]
        np.testing.assert_allclose(batch.weights, want, rtol=1e-6)
        np.testing.assert_array_equal(mapped(step)[0].weights, batch.weights)
        np.testing.assert_array_equal(np.concatenate([half(step)[0].weights for half in halves]), batch.weights)
    whole = datasets.load(config(name), 'pairs')
    assert whole.arrays['weights'].mean() == pytest.approx(1)


@pytest.mark.parametrize(('weights', 'said'), [
    ([1.0, -0.5], r'pairs \(train\): example 1: weight is -0.5; give the weight'),
    ([float('nan'), 1.0], 'example 0: weight is nan'),
    ([0.0, 0.0], 'every weight is 0'),
    (['1', '2'], 'one number; here it is of type string'),
])  # fmt: skip
@pytest.mark.parametrize('files', [False, True], ids=['memory', 'files'])
def test_what_is_no_weight_is_refused(weights, said, files, tmp_path):
    with pytest.raises(UserError, match=said):
        datasets.stream(config(task(weights), tokens_dir=str(tmp_path) if files else None), 'pairs', 0)


def test_of_other_kinds_it_is_a_field_like_any_other():
    rows = [{'inputs': 'a', 'targets': 'b', 'label': 1.0, 'weight': 'heavy'}]
    name = registration.add('pair_weights_thumbs', 'thumbs', lambda split: rows).name
    assert type(datasets.load(config(name), 'thumbs').rows(np.array([0]))[0]) is types.Thumbs


# The step.


def start():
    state = tiny.create('reward', tiny.SPECS['lora'], tiny.base(), SGD)
    return state.replace(adapter=tiny.stir(state.adapter))


@functools.cache
def stepped(kind, parts=1):
    """One step on the pairs, with the weights of `kind`: after, metrics."""
    batch = {
        'none': PAIRS, 'ones': weighted(PAIRS, np.ones(4)), 'weights': weighted(PAIRS, WEIGHTS),
        'no padding': tiny.without_padding(weighted(PAIRS, WEIGHTS), parts=parts),
    }[kind]  # fmt: skip
    step = functools.partial(reward_step, tiny.NETWORK, SGD, num_microbatches=parts)
    return jax.jit(lambda state: step(tiny.base(), state, (batch,), KEY))(start())


def test_the_loss_by_hand():
    rewards = np.asarray(score(tiny.NETWORK, lora.bind(tiny.base(), start().adapter), PAIRS), np.float64)
    each = np.log1p(np.exp(rewards[:, 1] - rewards[:, 0]))
    _, metrics = stepped('weights')
    assert metrics['loss/reward'] == pytest.approx((WEIGHTS * each).sum() / 4, rel=1e-5)
    assert stepped('none')[1]['loss/reward'] == pytest.approx(each.mean(), rel=1e-5)
    assert metrics['accuracy/pairwise'] == (rewards[:, 0] > rewards[:, 1]).mean(), 'each pair once'


def test_gradients_are_each_pairs_own_times_its_weight():
    base, adapter = tiny.base(), start().adapter

    def loss(adapter, i):
        return losses.pairwise(score(tiny.NETWORK, lora.bind(base, adapter), PAIRS))[i]

    grads = [jax.jit(jax.grad(loss), static_argnums=1)(adapter, i) for i in range(4)]
    want = jax.tree.map(lambda x, *of: x - sum(w * g for w, g in zip(WEIGHTS, of)) / 4, adapter, *grads)
    tiny.assert_close(stepped('weights')[0].adapter, want, atol=1e-5)


def test_weights_of_one_are_no_weights_bit_for_bit():
    assert tiny.same(stepped('ones'), stepped('none'))


@pytest.mark.parametrize(('kind', 'parts'), [('weights', 2), ('no padding', 1), ('no padding', 2)])
def test_in_parts_and_without_padding(kind, parts):
    (after, metrics), (want, want_metrics) = stepped(kind, parts), stepped('weights')
    tiny.assert_close(metrics, want_metrics, atol=1e-4)
    tiny.assert_close(after.adapter, want.adapter, atol=1e-4)


def test_members_of_an_ensemble_have_their_own():
    roles = {'reward_0': 'weights', 'reward_1': 'none'}
    batches = {'reward_0': [weighted(PAIRS, WEIGHTS)], 'reward_1': [PAIRS]}
    states, keys = {role: start() for role in roles}, dict.fromkeys(roles, KEY)
    after, _ = jax.jit(functools.partial(ensemble_step, tiny.NETWORK, SGD))(tiny.base(), states, batches, keys)
    for role, kind in roles.items():
        tiny.assert_close(after[role].adapter, stepped(kind)[0].adapter, atol=1e-5)


def test_a_part_has_the_weights_of_its_rows():
    batch = dataclasses.replace(weighted(PAIRS, WEIGHTS), inputs=np.arange(24).reshape(4, 6))
    seen = lambda _, part, rng: (0.0, ((), (part.inputs[:, 0], part.weights)))  # noqa: E731
    *_, (rows, weights) = accumulate.value_and_grad(seen, np.float32(0), batch, 2, KEY)
    np.testing.assert_array_equal(rows, [0, 6, 12, 18])
    np.testing.assert_array_equal(weights, WEIGHTS)


# Taskmaster.


@needs_data
@pytest.mark.parametrize(('split', 'contexts', 'most'), [('train', 147, 28), ('validation', 46, 15)])
def test_real_contexts_count_alike(real, split, contexts, most):  # noqa: F811
    total, count = collections.Counter(), collections.Counter()
    for pair in taskmaster.pairs('coffee', split):
        total[pair['inputs']] += pair['weight']
        count[pair['inputs']] += 1
    assert (len(total), max(count.values())) == (contexts, most)
    np.testing.assert_allclose(list(total.values()), 1)
