import dataclasses
import gc
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import D, specs

from perl_jax.errors import UserError
from perl_jax.models.lora import LoraSpec
from perl_jax.optim import train_state
from perl_jax.runs.checkpoints import Checkpoints
from perl_jax.runs.fingerprints import fingerprint
from perl_jax.runs.finished import read_adapter

# Orbax abandons its other reads where one fails; Python tells of that as it throws them away.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
TX = optax.adafactor(1e-2, multiply_by_parameter_scale=False)


def make(spec, seed=0, step=3):
    """A role's state in the middle of its training."""
    state = jax.jit(lambda: train_state.create(jax.random.key(seed), tiny.base(), spec, TX, head=(D, 1.0)))()
    noisy = tiny.stir((state.adapter, [x for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.float32]), seed)
    floats = iter(noisy[1])
    opt_state = jax.tree.map(lambda x: next(floats) if x.dtype == jnp.float32 else x, state.opt_state)
    return dataclasses.replace(state, step=jnp.int32(step), adapter=noisy[0], opt_state=opt_state)


def about(state, phase='reward'):
    adapter = {'scale': state.adapter.scale, 'dropout': state.adapter.dropout}
    return {'phase': phase, 'base': {'path': 'random:0', 'fingerprint': 'f'}, 'adapters': {'reward': adapter}}


def save(folder, states, metrics=None, best=None):
    """Checkpoints at steps 10, 20 .. of one run."""
    run = Checkpoints(str(folder), best)
    for i, state in enumerate(states):
        run.save(10 * (i + 1), {'reward': state}, about(state), metrics and metrics[i])
    run.close()


@pytest.fixture(autouse=True)
def abandoned():
    yield
    gc.collect()  # here and now, not in another test


# Saving and restoring.


@specs
def test_what_was_saved_comes_back(tmp_path, spec):
    state = make(spec)
    save(tmp_path, [state])
    run = Checkpoints(str(tmp_path))
    like = {'reward': jax.tree.map(jnp.zeros_like, state)}
    back = run.restore(run.latest(), like)
    assert jax.tree.structure(back) == jax.tree.structure({'reward': state})
    assert tiny.same(back, {'reward': state})
    assert run.about(10) == about(state)
    run.close()


@specs
def test_an_adapter_can_be_read_without_knowing_how_it_was_made(tmp_path, spec):
    state = make(spec)
    save(tmp_path, [state])
    run = Checkpoints(str(tmp_path), read_only=True)
    adapter = run.restore_adapters(10)['reward']
    run.close()
    assert jax.tree.structure(adapter) == jax.tree.structure(state.adapter)  # scale and dropout are part of it
    assert tiny.same(adapter, state.adapter)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(adapter))


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    run = Checkpoints(str(tmp_path))
    assert run.latest() is None and run.best() is None
    run.close()


def kept(folder):
    return sorted(int(p.name) for p in pathlib.Path(folder, 'checkpoints').iterdir() if p.name.isdigit())


def test_the_latest_alone_is_kept(tmp_path):
    save(tmp_path, [make(LoraSpec(), seed) for seed in range(3)], [{'auc': 0.9}, {'auc': 0.5}, {'auc': 0.7}])
    assert kept(tmp_path) == [30]


@pytest.mark.parametrize(('values', 'best', 'left'), [
    ((0.5, 0.9, 0.7), 20, [20, 30]), ((0.9, 0.5, 0.7), 10, [10, 30]), ((0.5, 0.7, 0.9), 30, [30]),
])  # fmt: skip
def test_the_best_is_kept_beside_the_latest(tmp_path, values, best, left):
    states = [make(LoraSpec(), seed) for seed in range(3)]
    save(tmp_path, states, [{'auc': x, 'accuracy': -x} for x in values], best='auc')
    assert kept(tmp_path) == left
    run = Checkpoints(str(tmp_path), 'auc')
    assert (run.best(), run.latest()) == (best, 30)
    run.close()


def test_a_reader_gets_the_best_without_knowing_the_metric(tmp_path):
    """As a policy's run does with the reward's folder."""
    states = [make(LoraSpec(), seed) for seed in range(3)]
    save(tmp_path, states, [{'auc': 0.5}, {'auc': 0.9}, {'auc': 0.7}], best='auc')
    adapter, _ = read_adapter(str(tmp_path), 'reward', phase='reward', flag='X')
    assert not tiny.same(adapter, states[2].adapter)
    assert tiny.same(adapter, states[1].adapter)


def test_of_a_run_that_was_stopped_before_it_was_measured_the_latest_is_read(tmp_path):
    states = [make(LoraSpec(), seed) for seed in range(2)]
    save(tmp_path, states, [None, None], best='auc')
    adapter, _ = read_adapter(str(tmp_path), 'reward', phase='reward', flag='X')
    assert tiny.same(adapter, states[1].adapter)


def test_reading_writes_nothing(tmp_path):
    save(tmp_path, [make(LoraSpec())])
    tree = lambda: {(p, p.stat().st_mtime_ns) for p in tmp_path.rglob('*')}  # noqa: E731
    before = tree()
    read_adapter(str(tmp_path), 'reward', phase='reward', flag='X')
    assert tree() == before


# What cannot be read.


def test_a_truncated_checkpoint_is_named(tmp_path):
    """Each of its files in turn cut in half: an error that names the folder, never another state."""
    state, whole = make(LoraSpec()), tmp_path / 'whole'
    save(whole, [state])
    files = [p.relative_to(whole) for p in (whole / 'checkpoints' / '10').rglob('*') if p.is_file()]
    assert len(files) > 5
    refused = 0
    for i, name in enumerate(files):
        folder = tmp_path / str(i)
        shutil.copytree(whole, folder)
        os.truncate(folder / name, os.path.getsize(folder / name) // 2)
        like = {'reward': jax.tree.map(jnp.zeros_like, state)}
        for attempt in (
            lambda run, like=like: (run.restore(10, like)['reward'], run.about(10)),
            lambda run: (dataclasses.replace(state, adapter=run.restore_adapters(10)['reward']), run.about(10)),
        ):
            run = Checkpoints(str(folder), read_only=True)
            try:
                back, said = attempt(run)
                assert tiny.same(back, state), name
                assert said == about(state)
            except UserError as error:
                refused += 1
                assert str(folder / 'checkpoints' / '10') in str(error) and '\n' not in str(error)
            run.close()
    assert refused > 5


def test_a_missing_file_is_named(tmp_path):
    state = make(LoraSpec())
    save(tmp_path, [state])
    shutil.rmtree(tmp_path / 'checkpoints' / '10' / 'state' / 'd')
    run = Checkpoints(str(tmp_path), read_only=True)
    with pytest.raises(UserError, match='checkpoints/10 cannot be read'):
        run.restore(10, {'reward': state})
    run.close()


def test_another_shape_is_refused(tmp_path):
    save(tmp_path, [make(LoraSpec(rank=4))])
    run = Checkpoints(str(tmp_path), read_only=True)
    with pytest.raises(UserError, match='checkpoints/10 cannot be read'):
        run.restore(10, {'reward': make(LoraSpec(rank=8))})
    run.close()


def test_another_optimizer_is_named_and_nothing_is_to_be_deleted(tmp_path):
    state = make(LoraSpec())
    save(tmp_path, [state])
    other = dataclasses.replace(state, opt_state=optax.adam(1e-3).init(state.adapter))
    run = Checkpoints(str(tmp_path), read_only=True)
    with pytest.raises(UserError, match='checkpoints/10 is of another OPTIMIZER or TUNING: reward/opt_state/') as error:
        run.restore(10, {'reward': other})
    assert 'delete' not in str(error.value)
    run.close()


def test_read_adapter_says_what_is_wrong_with_a_folder(tmp_path):
    with pytest.raises(UserError, match="REWARD: '.*nowhere' is not the MODEL_DIR of a run"):
        read_adapter(str(tmp_path / 'nowhere'), 'reward', phase='reward', flag='REWARD')
    (tmp_path / 'checkpoints').mkdir()
    with pytest.raises(UserError, match='REWARD: .* has no checkpoint yet'):
        read_adapter(str(tmp_path), 'reward', phase='reward', flag='REWARD')
    save(tmp_path, [make(LoraSpec())])
    with pytest.raises(UserError, match='SFT: .* is a run of reward; name one of sft'):
        read_adapter(str(tmp_path), 'policy', phase='sft', flag='SFT')


# Fingerprints.

TREE = {'a': {'kernel': np.arange(12, dtype=np.float32).reshape(3, 4)}, 'b': np.ones(5, np.float32)}


def changed(path, change):
    tree = jax.tree.map(np.array, TREE)
    if path == 'a':
        tree['a']['kernel'] = change(tree['a']['kernel'])
    else:
        tree['b'] = change(tree['b'])
    return tree


def swap(x):
    x[[0, 2]] = x[[2, 0]]
    return x


def flip(x):
    """The lowest bit of one number."""
    x.reshape(-1).view(np.uint32)[7] ^= 1
    return x


OTHERS = {
    'bit': changed('a', flip),
    'rows': changed('a', swap),
    'signs': changed('a', lambda x: -x),
    'shape': changed('a', lambda x: x.reshape(4, 3)),
    'transposed': changed('a', lambda x: x.T),
    'dtype': changed('a', lambda x: x.astype(jnp.bfloat16)),
    'shorter': changed('b', lambda x: x[:4]),
    'value': changed('b', lambda x: x + 1),
    'name': {'c': TREE['a'], 'b': TREE['b']},
    'fewer': {'a': TREE['a']},
    'swapped': {'a': {'kernel': TREE['b']}, 'b': TREE['a']['kernel']},
}


@pytest.mark.parametrize('other', OTHERS.values(), ids=OTHERS)
def test_fingerprint_tells_trees_apart(other):
    assert fingerprint(TREE) != fingerprint(other)


def test_fingerprint_is_of_the_bits_alone():
    assert fingerprint(TREE) == fingerprint(jax.tree.map(jnp.array, TREE))
    assert fingerprint(TREE) == fingerprint({'b': TREE['b'], 'a': {'kernel': np.asfortranarray(TREE['a']['kernel'])}})
    zeros = np.zeros(3, np.float32)
    assert fingerprint({'x': zeros}) != fingerprint({'x': -zeros})
    assert len(fingerprint(TREE)) == 16


def test_fingerprint_does_not_change_with_the_version():
    """Checkpoints hold it: another number here would orphan every one that was ever written."""
    assert fingerprint(TREE) == '8ef8cd22082d0935'
