"""LENGTH_BUCKETS changes which rows stand together, and no objective: gradients, shares of short rows, whole runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from perl_jax import masked
from perl_jax.data.batches import bucketing, streams
from perl_jax.data.batches.dataset import Dataset
from perl_jax.models.lora import FullSpec
from perl_jax.rl import shaping
from perl_jax.rl.algorithms.grpo import GRPO
from perl_jax.rl.algorithms.ppo import PPO
from perl_jax.rl.algorithms.reinforce import Reinforce
from perl_jax.rl.algorithms.rloo import RLOO
from perl_jax.rl.objective import Objective
from perl_jax.rl.sampling import SamplingConfig
from perl_jax.train.sft import sft_step

WINDOW = bucketing.WINDOW


def bimodal(buckets, batch_size, rows=None, widths=(tiny.P, tiny.R), short=1, seed=0, n=None):
    """A stream of prompts and demonstrations of two lengths: every other demonstration is `short`, with its prompt."""
    rng, n = np.random.default_rng(seed), n or WINDOW * batch_size
    lengths = np.where(np.arange(n) % 2, widths[1], short)
    prompts = np.where(np.arange(n) % 2, widths[0], rng.integers(1, 4, n))
    (inputs, inputs_mask), (targets, targets_mask) = (
        tiny.ragged(rng, x, width) for x, width in zip((prompts, lengths[:, None]), widths)
    )
    arrays = {'inputs': inputs, 'inputs_mask': inputs_mask, 'targets': targets, 'targets_mask': targets_mask}
    rows = np.arange(batch_size) if rows is None else np.array(rows)
    dataset = Dataset(arrays, [{'row': i} for i in range(n)], None, (1,))
    return streams.Stream([dataset], [1.0], batch_size, seed, rows, buckets)


def table(n):
    """A state of a policy that is a table, and its step in `n` microbatches: SGD adds a gradient to the adapter."""
    base = {'table': np.random.default_rng(0).standard_normal((tiny.V, tiny.V)).astype(np.float32)}
    tx = optax.sgd(1.0)
    step = jax.jit(functools.partial(sft_step, tiny.table(tiny.V), tx, num_microbatches=n))
    state = tiny.create('sft', FullSpec(), jax.tree.map(jnp.asarray, base), tx)
    return state, lambda state, batch, tokens: step(None, state, batch, jax.random.key(0), tokens=tokens)


def weights(stream, step):
    """What each target token counts in SFT's loss."""
    mask, tokens = stream(step)[0].targets_mask, stream.tokens_as_drawn(step)
    return np.asarray(masked.share(mask)) if tokens is None else mask / tokens[:, None, None]


def share_of_short(buckets, batch_size, windows=1, short=2):
    """Of all that counts over whole windows, the part of the short rows."""
    stream, counts = bimodal(buckets, batch_size, widths=(40, 20), short=short, n=977), np.zeros(2)
    for step in range(windows * WINDOW):
        of_rows, lengths = weights(stream, step).sum((1, 2)), stream(step)[0].targets_mask.sum((1, 2))
        counts += of_rows[lengths == short].sum(), of_rows[lengths > short].sum()
    return counts[0] / counts.sum()


@pytest.mark.parametrize('batch_size', [1, 2, 8, 16])
def test_short_rows_count_as_much_as_without_buckets(batch_size):
    """Where a mean over each dealt batch would give them nearly half."""
    plain = share_of_short(1, batch_size, 8)
    for buckets in (2, 8):
        assert share_of_short(buckets, batch_size, 8) == pytest.approx(plain, rel=1e-5)
    assert batch_size == 1 or plain < 0.35
    stream = bimodal(8, batch_size, widths=(40, 20), short=2)
    means = [np.asarray(masked.share(stream(step)[0].targets_mask)).sum((1, 2)) for step in range(WINDOW)]
    lengths = [stream(step)[0].targets_mask.sum((1, 2)) for step in range(WINDOW)]
    assert sum(x[n == 2].sum() for x, n in zip(means, lengths)) / WINDOW > 0.45


@pytest.mark.parametrize('n', [1, 2])
def test_gradients_of_sft_are_those_without_buckets(n):
    """Over all batches of two windows at one state."""
    state, step = table(n)
    total, shapes = {}, set()
    for buckets in (1, 2):
        stream = dataclasses.replace(bimodal(buckets, 4), parts=n)
        grads = []
        for i in range(2 * WINDOW):
            batch, tokens = stream(i)[0].replace(fill=None), stream.tokens_as_drawn(i)
            shapes.add((buckets, batch.targets.shape))
            after, metrics = step(state, batch, tokens)
            grads.append(jax.tree.map(lambda x, y: np.asarray(x, np.float64) - y, state.adapter, after.adapter))
            assert metrics['tokens'] == batch.targets_mask.sum()
        total[buckets] = jax.tree.map(lambda *x: sum(x) / len(x), *grads)
    assert len(shapes) > 2
    tiny.assert_close(total[2], total[1], rtol=1e-4, atol=1e-6)
    assert max(np.abs(x).max() for x in jax.tree.leaves(total[1])) > 1e-2


def test_the_loss_that_is_logged_is_the_batchs_own_mean():
    (state, step), batch = table(1), tiny.responses(4, 1)
    plain, other = (step(state, batch, tokens) for tokens in (None, np.array([3, 30, 7, 9], np.float32)))
    assert float(other[1]['loss/nll']) == pytest.approx(float(plain[1]['loss/nll']), rel=1e-6)
    assert float(other[1]['grad_norm']) != pytest.approx(float(plain[1]['grad_norm']), rel=0.05)
    same, _ = step(state, batch, np.full(4, batch.targets_mask.sum(), np.float32))
    tiny.assert_close(same.adapter, plain[0].adapter, rtol=1e-5, atol=1e-7)


def test_processes_weigh_their_rows_of_a_batch_alike():
    whole, parts = bimodal(4, 8), [bimodal(4, 8, rows) for rows in ([0, 1, 2, 3], [4, 5, 6, 7])]
    for step in range(2 * WINDOW):
        mine = [part.tokens_as_drawn(step) for part in parts]
        np.testing.assert_array_equal(np.concatenate(mine), whole.tokens_as_drawn(step))
    assert bimodal(1, 8).tokens_as_drawn(0) is None


def test_a_mixtures_rows_are_weighed_by_the_batch_they_were_drawn_in():
    a, b = bimodal(4, 8, seed=1), bimodal(4, 8, seed=2, short=3)
    stream = streams.Stream([*a.datasets, *b.datasets], [3.0, 1.0], 8, 5, np.arange(8), 4)
    plain = dataclasses.replace(stream, buckets=1)
    drawn = [int(plain(step)[0].targets_mask.sum()) for step in range(WINDOW)]
    found = np.concatenate([stream.tokens_as_drawn(step) for step in range(WINDOW)])
    assert sorted(found) == sorted(np.repeat(drawn, 8))


@pytest.mark.parametrize(('change', 'apart'), [
    ({}, True), ({'entropy_bonus': 0.01}, False), ({'shaping': (shaping.whiten,)}, False),
    ({'algorithm': PPO()}, False),
], ids=['plain', 'entropy', 'shaping', 'PPO'])  # fmt: skip
def test_prompts_are_dealt_by_length_where_the_objective_takes_each_by_itself(change, apart):
    """An entropy bonus is a mean over a batch's tokens: in batches of their own short answers would count more."""
    assert Objective(**{'sampling': SamplingConfig(num_samples=2)} | change).prompts_are_independent is apart


def test_batches_that_are_not_dealt_are_those_without_buckets():
    plain, cut = bimodal(1, 8), dataclasses.replace(bimodal(4, 8), sort_by_length=False)
    for step in range(WINDOW):
        (want, examples), (got, same) = plain(step), cut(step)
        assert examples == same and cut.tokens_as_drawn(step) is None
        np.testing.assert_array_equal(got.targets, want.targets[..., : got.targets.shape[-1]])
        assert got.targets_mask.sum() == want.targets_mask.sum() and got.inputs_mask.sum() == want.inputs_mask.sum()
    few = dataclasses.replace(bimodal(4, 1), sort_by_length=False)
    assert {few(step)[0].inputs.shape[-1] for step in range(WINDOW)} > {tiny.P}


@pytest.mark.parametrize('buckets', [2, 3, 8])
@pytest.mark.parametrize('members', [1, 2])
def test_shapes_are_few_and_as_many_as_said_at_most(buckets, members):
    """Also of two streams that one program takes, each in an order of its own: lengths of all kinds, 800 batches."""
    rng, n, (P, R) = np.random.default_rng(0), 400, (40, 24)
    made = []
    for K in range(1, members + 1):
        arrays = {}
        for name, shape in {'inputs': (n, P), 'targets': (n, K, R)}.items():
            lengths = rng.integers(1, shape[-1] + 1, shape[:-1])
            arrays[name], arrays[f'{name}_mask'] = tiny.ragged(rng, lengths, shape[-1])
        dataset = Dataset(arrays, [{}] * n, None, (1,))
        made.append(streams.Stream([dataset], [1.0], 2, K, np.arange(2), buckets))
    shapes = set()
    for step in range(800):
        shape = streams.common_shape(made, step)
        batches = [stream(step, shape)[0] for stream in made]
        shapes.add(tuple((x.inputs.shape, x.targets.shape, x.fill) for x in batches))
    assert buckets < len(shapes) <= bucketing.max_shapes(buckets, 'reward') == buckets * (buckets + 1) // 2


@pytest.mark.parametrize('algorithm', [Reinforce(), RLOO(), GRPO(), PPO()], ids=lambda x: type(x).__name__)
def test_algorithms_say_whether_prompts_are_learned_from_apart(algorithm):
    """Apart is: what a batch's token counts times its advantage is half of that in the batch of its half alone."""
    rng, (B, K, R) = np.random.default_rng(0), (6, 3, 5)
    mask = np.arange(R) < np.where(np.arange(B) % 2, R, 2)[:, None, None] * np.ones((B, K, 1))
    rewards, values = np.where(mask, rng.standard_normal((2, B, K, R)), 0).astype(np.float32)

    def counts(rows):
        old = values[rows] if algorithm.has_value else None
        return np.asarray(algorithm.advantages(rewards[rows], old, mask[rows]) * algorithm.weights(mask[rows]))

    halves = np.zeros((B, K, R), np.float32)
    for rows in (np.arange(0, B, 2), np.arange(1, B, 2)):  # the short ones, the long ones
        halves[rows] = counts(rows) / 2
    apart = np.allclose(np.where(mask, halves, 0), np.where(mask, counts(np.arange(B)), 0), rtol=1e-4, atol=1e-6)
    assert apart == (not algorithm.whole_batch)
