import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import R

from perl_jax import types
from perl_jax.errors import UserError
from perl_jax.models import lora
from perl_jax.models.lora import FullSpec, LoraSpec
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rewards import ensembles, scoring, text_functions
from perl_jax.rewards.sources import LearnedReward, TextReward, scorer
from perl_jax.runs import checkpoints
from perl_jax.runs.base import BaseConfig
from perl_jax.runs.base import load as load_base

BATCH = tiny.responses(B=3, K=2)
EXAMPLES = [{'inputs_pretokenized': f'question {b}', 'reference': f'{b}'} for b in range(3)]


@jax.jit
def score(base, adapter, batch):
    return scoring.score(tiny.NETWORK, lora.bind(base, adapter), batch)


@pytest.mark.parametrize('name', ['lora', 'full'])
def test_reward_reads_the_state_behind_the_last_token(name):
    """The empty response is judged by its prompt alone, the full one by its very last token."""
    base = tiny.base()
    adapter = tiny.adapter(tiny.SPECS[name], base)
    hidden = tiny.hidden(base, adapter, BATCH)
    got = score(base, adapter, BATCH)
    lengths = BATCH.targets_mask.sum(-1)
    assert {0, R} <= set(lengths.ravel().tolist())
    for b, k in np.ndindex(3, 2):
        want = float(hidden[b, k, lengths[b, k]] @ adapter.head['kernel'])
        assert float(got[b, k]) == pytest.approx(want, abs=1e-5)
    assert got.shape == (3, 2) and got.dtype == np.float32


def test_padding_does_not_matter():
    adapter = tiny.adapter(tiny.SPECS['lora'], tiny.base())
    other = dataclasses.replace(
        BATCH,
        inputs=np.where(BATCH.inputs_mask, BATCH.inputs, 7),
        targets=np.where(BATCH.targets_mask, BATCH.targets, 9),
    )
    np.testing.assert_array_equal(score(tiny.base(), adapter, BATCH), score(tiny.base(), adapter, other))


def test_the_last_token_matters():
    adapter = tiny.adapter(tiny.SPECS['lora'], tiny.base())
    targets, lengths = BATCH.targets.copy(), BATCH.targets_mask.sum(-1)
    for b, k in np.argwhere(lengths):
        targets[b, k, lengths[b, k] - 1] += 1
    one, two = (score(tiny.base(), adapter, dataclasses.replace(BATCH, targets=x)) for x in (BATCH.targets, targets))
    assert ((np.abs(one - two) > 1e-3) == (lengths > 0)).all()


# Sources of reward.


class Digits:
    """A vocabulary whose text is the numbers of its tokens."""

    def decode(self, ids):
        return ' '.join(map(str, ids))


def length_of(prompt, response, example):
    """What a text function is told, in one number."""
    assert prompt == example['inputs_pretokenized']
    return len(response.split()) + 0.25 * int(example['reference'])


def text_scores():
    return BATCH.targets_mask.sum(-1) + 0.25 * np.arange(3)[:, None]


def total(sources, base=None, network=tiny.NETWORK):
    return np.asarray(judged(sources, base, network)[0])


def judged(sources, base=None, network=tiny.NETWORK):
    judge = scorer(sources, network, base or random_base(0), Partitioner(), Digits())
    return judge(Partitioner().batch(BATCH), EXAMPLES)


@pytest.mark.parametrize('function', [length_of, 'test_rewards.length_of'], ids=['function', 'name'])
def test_reward_from_text(function):
    got = total([TextReward(function)])
    np.testing.assert_array_equal(got, np.float32(text_scores()))
    assert got.dtype == np.float32


def test_text_rewards_stay_float():
    np.testing.assert_array_equal(total([TextReward(lambda *_: 0.204)]), np.full((3, 2), np.float32(0.204)))


def test_sources_add_up_by_their_weights():
    got = total([TextReward(length_of, weight=0.5), TextReward(lambda *_: 1.0, weight=-2.0)])
    np.testing.assert_allclose(got, 0.5 * text_scores() - 2)


@pytest.mark.parametrize('name', ['test_rewards.nothing', 'no_such_module.f', 'not a name', 'tiny', 'tiny.V'])
def test_what_is_no_function_is_named(name):
    with pytest.raises(UserError, match=name):
        text_functions.resolve_function(name)


# A reward that a run has learned.


@functools.cache
def random_base(seed):
    return load_base(BaseConfig(tiny.NETWORK), Partitioner(), seed)


def save(folder, spec, base):
    """What a reward run leaves behind; returns its adapter."""
    adapter = tiny.adapter(spec, base.params)
    save_members(folder, {'reward': adapter}, base)
    return adapter


def save_members(folder, adapters, base):
    states = {
        role: types.TrainState(step=jnp.int32(1), adapter=adapter, opt_state=())
        for role, adapter in adapters.items()
    }
    settings = {role: {'scale': adapter.scale, 'dropout': adapter.dropout} for role, adapter in adapters.items()}
    run = checkpoints.Checkpoints(str(folder))
    run.save(1, states, {'phase': 'reward', 'base': base.name, 'adapters': settings})
    run.close()


@pytest.mark.parametrize(('name', 'seed'), [('lora', 0), ('lora', 1), ('full', 1)])
def test_learned_reward_on_the_policys_base_and_on_its_own(tmp_path, name, seed):
    with Partitioner().scope():
        adapter = save(tmp_path, tiny.SPECS[name], random_base(0))
        got = total([LearnedReward(str(tmp_path), weight=2.0), TextReward(length_of, weight=0.1)], random_base(seed))
        want = np.asarray(score(random_base(0).params, adapter, BATCH))
        np.testing.assert_allclose(got, 2 * want + 0.1 * text_scores(), rtol=1e-5, atol=1e-5)
        assert np.abs(want).max() > 0.1


MIXED = [LoraSpec(rank=4), LoraSpec(rank=2, targets=lora.ALL_LINEAR), FullSpec()]


@pytest.mark.parametrize('aggregate', [ensembles.mean, ensembles.minimum, ensembles.lower_bound])
def test_an_ensemble_trained_apart_and_together(tmp_path, aggregate):
    """Members of other ranks, targets and tuning; the first two of one run, the third of another."""
    with Partitioner().scope():
        base = random_base(0)
        members = [tiny.adapter(spec, base.params, seed=i) for i, spec in enumerate(MIXED)]
        save_members(tmp_path / 'one', {'reward_0': members[0], 'reward_1': members[1]}, base)
        save_members(tmp_path / 'two', {'reward': members[2]}, base)
        folders = (str(tmp_path / 'one'), str(tmp_path / 'two'))
        got, metrics = judged([LearnedReward(folders, aggregate=aggregate)], base)
        every = np.stack([score(base.params, member, BATCH) for member in members])
    np.testing.assert_allclose(got, aggregate(jnp.asarray(every)), rtol=1e-4, atol=1e-5)
    assert float(metrics['reward/disagreement']) == pytest.approx(every.std(0).mean(), rel=1e-4)
    assert float(metrics['reward/disagreement']) > 0.1


@pytest.mark.parametrize('name', ['lora', 'full'])
def test_a_reward_of_another_network_is_refused(tmp_path, name):
    network = tiny.NETWORK.clone(config=dataclasses.replace(tiny.NETWORK.config, rope_theta=5e3))
    with Partitioner().scope():
        save(tmp_path, tiny.SPECS[name], random_base(0))
        with pytest.raises(UserError, match='LearnedReward.model_dir: .*rope_theta is 100.0 there and 5000.0 here'):
            total([LearnedReward(str(tmp_path))], random_base(0), network)


def test_one_member_is_no_ensemble(tmp_path):
    with Partitioner().scope():
        save(tmp_path, tiny.SPECS['lora'], random_base(0))
        assert judged([LearnedReward(str(tmp_path))], random_base(0))[1] == {}


def test_members_share_one_base(tmp_path):
    with Partitioner().scope():
        for seed in (0, 1):
            save(tmp_path / str(seed), tiny.SPECS['lora'], random_base(seed))
        folders = [str(tmp_path / '0'), str(tmp_path / '1')]
        for seed in (0, 1, 2):
            with pytest.raises(UserError, match='trained on another base'):
                total([LearnedReward(folders)], random_base(seed))
        folders = [str(tmp_path / '1')] * 2  # not the policy's, but one for both
        both, one = (total([LearnedReward(folder)], random_base(0)) for folder in (folders, folders[0]))
        np.testing.assert_allclose(both, one, rtol=1e-6)


def test_learned_reward_needs_a_run(tmp_path):
    with pytest.raises(UserError, match='LearnedReward.model_dir.*has no checkpoints'):
        LearnedReward(str(tmp_path)).scorer(tiny.NETWORK, random_base(0), Partitioner(), None)
