import contextlib
import dataclasses
import functools
import gc
import json
import os
import pathlib
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import SPECS, D, specs

from perl_jax.errors import UserError
from perl_jax.models.lora import FullSpec, LoraSpec
from perl_jax.optim import train_state
from perl_jax.runs import checkpoints, rundir
from perl_jax.runs.checkpoints import Checkpoints
from perl_jax.runs.fingerprints import fingerprint
from perl_jax.runs.finished import read_adapter

# Orbax abandons its other reads where one fails; Python tells of that as it throws them away.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
TX = optax.adafactor(1e-2, multiply_by_parameter_scale=False)


@functools.cache
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


def test_what_the_caller_does_with_its_lists_afterwards_is_not_saved(tmp_path):
    """Metadata are written while the loop goes on, and their checksum is that of the moment of saving."""
    state = make(SPECS['lora'])
    given = about(state) | {'window': []}
    run = Checkpoints(str(tmp_path))
    write = run.manager.save

    def save_later(step, args, metrics):  # than what the caller does next, as a busy machine may
        given['window'].append({'loss': 1.0})
        return write(step, args=args, metrics=metrics)

    run.manager.save = save_later
    run.save(10, {'reward': state}, given)
    run.close()
    assert Checkpoints(str(tmp_path), read_only=True).about(10)['window'] == []


def test_a_window_of_metrics_is_the_callers_own(tmp_path):
    folder = rundir.RunDir(str(tmp_path), {'phase': 'sft'}, first=0, total=9, log_period=5, config='')
    folder.log(1, {'loss/nll': jnp.float32(2), 'tokens': jnp.float32(1)}, 1)
    window = folder.settle(flush=False)
    folder.log(2, {'loss/nll': jnp.float32(3), 'tokens': jnp.float32(1)}, 1)
    folder.settle(flush=False)
    folder.close(finished=False)
    assert window == [{'loss/nll': 2.0}]


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    run = Checkpoints(str(tmp_path))
    assert run.latest() is None and run.best() is None
    run.close()


def kept(folder):
    return sorted(int(p.name) for p in pathlib.Path(folder, 'checkpoints').iterdir() if p.name.isdigit())


def test_the_latest_two_are_kept(tmp_path):
    save(tmp_path, [make(LoraSpec(), seed) for seed in range(3)], [{'auc': 0.9}, {'auc': 0.5}, {'auc': 0.7}])
    assert kept(tmp_path) == [20, 30]


@pytest.mark.parametrize(('values', 'best', 'left'), [
    ((0.5, 0.9, 0.7), 20, [20, 30]), ((0.9, 0.5, 0.7), 10, [10, 20, 30]), ((0.5, 0.7, 0.9), 30, [20, 30]),
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


@pytest.mark.parametrize('content', ['[' * 10**5 + ']' * 10**5, '"x"', 'NaN', '{"a": 1'])
@pytest.mark.parametrize('name', ['about/metadata', 'state/_METADATA', 'state/_sharding'])
def test_what_is_no_json_is_named_before_orbax_reads_it(name, content, tmp_path):
    """TensorStore, which reads the last of them, dies of 100,000 brackets."""
    state = make(LoraSpec())
    save(tmp_path, [state, state])
    path = tmp_path / 'checkpoints' / '20' / name
    path.write_text(content)
    like = {'reward': jax.tree.map(jnp.zeros_like, state)}
    for read in lambda run: run.restore(20, like), lambda run: run.adapters(20), lambda run: run.restore_adapters(20):
        run = Checkpoints(str(tmp_path), read_only=True)
        with pytest.raises(UserError, match=rf'^{path}: not .*; checkpoint .*/20 cannot be .* and step 10 is used$'):
            read(run)
        assert tiny.same(run.restore(10, like)['reward'], state)
        run.close()


def test_metadata_that_lack_a_field_are_named(tmp_path):
    save(tmp_path, [make(LoraSpec())])
    path = tmp_path / 'checkpoints' / '10' / 'about' / 'metadata'
    path.write_text('{"base": {}}')
    with pytest.raises(UserError, match=f'^{path}: phase'):
        Checkpoints(str(tmp_path), read_only=True).about(10)


@pytest.mark.parametrize('value', ['1' * 400, '[' * 10**5 + ']' * 10**5, '"x"'])
def test_the_times_of_a_checkpoint_may_be_anything_but_a_traceback(value, tmp_path):
    state = make(LoraSpec())
    save(tmp_path, [state])
    path = tmp_path / 'checkpoints' / '10' / '_CHECKPOINT_METADATA'
    fields = {name: 0 for name in json.loads(path.read_text())}
    path.write_text(json.dumps(fields | {'commit_timestamp_nsecs': 'TIME'}).replace('"TIME"', value))
    try:
        run = Checkpoints(str(tmp_path), read_only=True)
        assert tiny.same(run.restore(10, {'reward': jax.tree.map(jnp.zeros_like, state)})['reward'], state)
    except UserError as error:
        assert '_CHECKPOINT_METADATA of a step cannot be read' in str(error)


def test_threads_of_a_read_that_failed_say_nothing_later(tmp_path, monkeypatch):
    """TensorStore's threads end after Orbax has closed the event loop that they would call."""
    lines = []
    monkeypatch.setattr(sys, 'unraisablehook', lambda unraisable: lines.append(str(unraisable.exc_value)))
    save(tmp_path, [make(LoraSpec())])
    Checkpoints(str(tmp_path), read_only=True).about(10)
    for message in 'Event loop is closed', 'another error':
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(message)))
    assert lines == ['another error']


def flip_bit(path, position, bit):
    with open(path, 'r+b') as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def test_a_flipped_bit_is_named_or_changes_nothing(tmp_path):
    """At seeded places of every file, as storage and copies may do it: the saved state, or an error with its step."""
    state, whole, rng = make(LoraSpec()), tmp_path / 'whole', np.random.default_rng(0)
    save(whole, [make(LoraSpec(), 1), state])
    files = [p.relative_to(whole) for p in (whole / 'checkpoints' / '20').rglob('*') if p.is_file()]
    sizes = [os.path.getsize(whole / name) for name in files]
    large = files[int(np.argmax(sizes))]
    places = [(name, int(rng.integers(size))) for name, size in zip(files, sizes) if size]
    places += [(large, int(x)) for x in rng.integers(max(sizes), size=8)]
    like, named = {'reward': jax.tree.map(jnp.zeros_like, state)}, 0
    for i, (name, position) in enumerate(places):
        folder = tmp_path / str(i)
        shutil.copytree(whole, folder)
        flip_bit(folder / name, position, int(rng.integers(8)))
        run = Checkpoints(str(folder), read_only=True)
        for read in (
            lambda run: run.restore(20, like)['reward'],
            lambda run: dataclasses.replace(state, adapter=run.restore_adapters(20)['reward']),
        ):
            try:
                assert tiny.same(read(run), state), (name, position)
                assert run.about(20) == about(state)
            except UserError as error:
                line = str(error)
                assert str(folder / 'checkpoints' / '20') in line and '\n' not in line
                assert line.endswith('or move it elsewhere, and step 10 is used')
                named += 'the numbers of reward/' in line
        run.close()
    assert named  # at least one was in the numbers themselves


def test_a_full_adapter_is_checked_in_the_dtype_that_it_is_read_in(tmp_path):
    state = make(FullSpec())
    save(tmp_path, [state])
    run = Checkpoints(str(tmp_path), read_only=True)
    shapes = run.adapters(10)['reward']
    narrow = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=HERE), shapes.params)
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=HERE), shapes)
    back = run.restore_adapters(10, {'reward': whole.replace(params=narrow)})['reward']
    assert tiny.same(back.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.adapter.params))
    run.close()


def test_a_checkpoint_without_checksums_is_read(tmp_path, monkeypatch):
    """As perl_jax 0.1 wrote them."""
    state = make(LoraSpec())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, '_checksums', lambda saved: None)
        save(tmp_path, [state])
    path = tmp_path / 'checkpoints' / '10' / 'about' / 'metadata'
    old = {k: v for k, v in json.loads(path.read_text()).items() if k not in ('checksums', 'crc32', 'metrics')}
    path.write_text(json.dumps(old))
    adapter, said = read_adapter(str(tmp_path), 'reward', phase='reward', flag='X')
    assert tiny.same(adapter, state.adapter) and said == about(state)


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


adafactor = functools.partial(optax.adafactor, 1e-2, multiply_by_parameter_scale=False)
CHANGED_STATES = {  # the optimizers of two starts, whose states differ
    'momentum': (adafactor(), adafactor(momentum=0.9)),
    'dtype_momentum': (adafactor(momentum=0.9), adafactor(momentum=0.9, dtype_momentum=jnp.bfloat16)),
    'min_dim_size_to_factor': (adafactor(), adafactor(min_dim_size_to_factor=2)),
    'factored': (adafactor(min_dim_size_to_factor=2), adafactor(min_dim_size_to_factor=2, factored=False)),
    'clipping_threshold': (adafactor(), adafactor(clipping_threshold=None)),
    'weight_decay_rate': (adafactor(), adafactor(weight_decay_rate=0.1)),
    'multiply_by_parameter_scale': (adafactor(), optax.adafactor(1e-2)),
    'learning_rate': (adafactor(), optax.adafactor(lambda step: 1e-3)),
    'mu_dtype': (optax.adam(1e-3), optax.adam(1e-3, mu_dtype=jnp.bfloat16)),
    'sgd': (optax.sgd(1e-3), optax.sgd(1e-3, momentum=0.9)),
}
SAME_STATES = {
    'momentum': (adafactor(momentum=0.8), adafactor(momentum=0.9)),
    'clipping_threshold': (adafactor(), adafactor(clipping_threshold=2.0)),
    'weight_decay_rate': (adafactor(weight_decay_rate=0.2), adafactor(weight_decay_rate=0.1)),
    'b1': (optax.adam(1e-3), optax.adam(2e-3, b1=0.8, b2=0.99, eps=1e-6, nesterov=True)),
}
BOTH_WAYS = [(name, *pair[::way]) for name, pair in CHANGED_STATES.items() for way in (1, -1)]


def restored(folder, before, after, suspects=()):
    """The state that an optimizer of another start reads."""
    state = make(LoraSpec())
    save(folder, [dataclasses.replace(state, opt_state=before.init(state.adapter))])
    target = dataclasses.replace(state, opt_state=after.init(state.adapter))
    with contextlib.closing(Checkpoints(str(folder), read_only=True)) as run:
        return run.restore(10, {'reward': target}, suspects)['reward']


@pytest.mark.parametrize(('name', 'before', 'after'), BOTH_WAYS)
def test_a_setting_that_needs_another_state_is_named(name, before, after, tmp_path):
    line = f'adafactor.{name} = 1, and was 2 so far'
    with pytest.raises(UserError, match='checkpoints/10 is of another optimizer state: reward/opt_state/') as error:
        restored(tmp_path, before, after, [line])
    assert str(error.value).endswith(f'{line}: put it back, or name another MODEL_DIR')


@pytest.mark.parametrize('name', SAME_STATES)
def test_a_setting_that_needs_no_other_state_is_taken(name, tmp_path):
    before, after = SAME_STATES[name]
    state = make(LoraSpec())
    assert tiny.same(restored(tmp_path, before, after).opt_state, before.init(state.adapter))


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
