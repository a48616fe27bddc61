"""Rows on disk are the rows in memory, batch for batch, and are written once."""
# ruff: noqa: F811 (a fixture is shared by importing it)

import dataclasses
import functools
import json
import logging
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import seqio
import tensorflow as tf
from test_providers import add, rows, said  # noqa: F401
from toy_runs import perl, quoted, ran, state, toy
from toy_runs import rows as logged

from perl_jax.data import datasets, providers, token_files
from perl_jax.data.datasets import DatasetConfig
from perl_jax.data.user_code import fingerprints
from perl_jax.errors import UserError
from perl_jax.tasks import registration  # noqa: F401

LENGTHS = {'inputs': 30, 'targets': 100}  # room for bytes; some prompts are cut


class WithBos(seqio.ByteVocabulary):
    bos_id = 2


def config(name, folder=None, **options):
    return DatasetConfig(name, LENGTHS, 8, tokens_dir=folder and str(folder), **{'limit': 60, **options})


def same(one, two):
    (batch, examples), (other, others) = one, two
    assert type(batch) is type(other) and examples == others
    for field in dataclasses.fields(batch):
        mine, theirs = getattr(batch, field.name), getattr(other, field.name)
        np.testing.assert_array_equal(mine, theirs)
        assert getattr(mine, 'dtype', None) == getattr(theirs, 'dtype', None)


@pytest.mark.parametrize('options', [{}, {'vocabulary': WithBos()}, {'length_buckets': 4}], ids=['', 'bos', 'buckets'])
@pytest.mark.parametrize('kind', ['sft', 'pairs', 'thumbs', 'prompts'])
def test_batches_are_those_of_rows_in_memory(kind, options, tmp_path):
    held = datasets.stream(config(f'toy_{kind}', **options), kind, 3)
    for _ in range(2):  # written, and found
        mapped = datasets.stream(config(f'toy_{kind}', tmp_path, **options), kind, 3)
        assert isinstance(mapped.datasets[0], token_files.TokenFiles)
        for step in (0, 7, 19, 400):
            same(mapped(step), held(step))
        assert (mapped.eos_id, mapped.eos_ids) == (held.eos_id, held.eos_ids)
        assert mapped.datasets[0].largest_id == held.datasets[0].largest_id
    assert len(list(tmp_path.iterdir())) == 1



@pytest.mark.parametrize('processes', [2, 4])
@pytest.mark.parametrize('buckets', [1, 4])
def test_processes_read_their_own_rows_of_the_same_batches(processes, buckets, tmp_path):
    made = config('toy_pairs', tmp_path, length_buckets=buckets)
    whole = datasets.stream(made, 'pairs', 0)
    parts = [datasets.stream(made, 'pairs', 0, places) for places in np.array_split(np.arange(8), processes)]
    for step in (0, 5, 33):
        batch, examples = whole(step)
        found = [part(step) for part in parts]
        assert [example for _, mine in found for example in mine] == examples
        np.testing.assert_array_equal(np.concatenate([part.targets for part, _ in found]), batch.targets)
        np.testing.assert_array_equal(np.concatenate([part.inputs for part, _ in found]), batch.inputs)


def test_what_is_written_is_not_read_from_its_source_again(tmp_path, said):
    said.set_level(logging.INFO, logger='perl_jax')
    asked = []

    def examples(split):
        asked.append(split)
        return [{'inputs': f'{i:03d}', 'targets': 'yes', 'count': i, 'weight': 0.5} for i in range(30)]

    name = registration.add('token_files_once', 'sft', examples).name
    first = datasets.stream(config(name, tmp_path, limit=None), 'sft', 0)(2)
    same(datasets.stream(config(name, tmp_path, limit=None), 'sft', 0)(2), first)
    assert asked == ['train']
    assert 'wrote 30 rows of tokens' in said.text and 'if the data has changed since, delete' in said.text
    (folder,) = tmp_path.iterdir()
    about = json.loads((folder / 'about.json').read_text())
    assert (about['rows'], about['task'], about['lengths']) == (30, name, LENGTHS)


def test_whatever_changes_the_rows_has_its_own_files(tmp_path):
    base = config('toy_sft', tmp_path)
    changes = [
        {}, {'limit': 50}, {'task_feature_lengths': {'inputs': 31, 'targets': 100}}, {'vocabulary': WithBos()},
        {'vocabulary': seqio.ByteVocabulary()}, {'split': 'validation'},
    ]  # fmt: skip
    for number, change in enumerate(changes, start=1):
        datasets.stream(dataclasses.replace(base, **change), 'sft', 0)
        assert len(list(tmp_path.iterdir())) == number
    datasets.stream(base, 'prompts', 0)
    assert len(list(tmp_path.iterdir())) == len(changes) + 1
    datasets.stream(dataclasses.replace(base, batch_size=4, length_buckets=2), 'sft', 9)  # these change no row
    assert len(list(tmp_path.iterdir())) == len(changes) + 1


def suffixed(dataset, suffix='A'):
    return dataset.map(lambda row: row | {'targets': row['targets'] + suffix})


def cut_at(n):
    return seqio.map_over_dataset(lambda row: row | {'targets': tf.strings.substr(row['targets'], 0, n)})


class Suffix:
    def __init__(self, suffix):
        self.suffix = suffix

    def __call__(self, dataset):
        return suffixed(dataset, self.suffix)

    def of_method(self, dataset):
        return suffixed(dataset, self.suffix)


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    suffix: str

    def __call__(self, dataset):
        return suffixed(dataset, self.suffix)


def of_module(constant):
    """A preprocessor of a user's module that reads a constant of the module."""
    module = {'suffixed': suffixed, 'SUFFIX': constant}
    exec('def step(dataset):\n    return suffixed(dataset, SUFFIX)\n', module)
    return module['step']


@pytest.mark.parametrize(('first', 'second'), [
    (Suffix('A'), Suffix('B')),
    (Suffix('A').of_method, Suffix('B').of_method),
    (Slotted('A'), Slotted('B')),
    (functools.partial(suffixed, suffix=np.array(['A', 'B'])[0]), functools.partial(suffixed, suffix='B')),
    (of_module('A'), of_module('B')),
    (functools.partial(suffixed, suffix='A'), functools.partial(suffixed, suffix='B')),
    (functools.partial(suffixed), functools.partial(suffixed, suffix='B')),
    (cut_at(2), cut_at(1)),
    (lambda dataset: dataset, lambda dataset: dataset.take(2)),
], ids=['object', 'method', 'slots', 'array', 'module', 'partial', 'default', 'closure', 'code'])  # fmt: skip
def test_preprocessors_that_differ_have_files_of_their_own(first, second, tmp_path, request):
    """By their arguments, closures and code, and not by their names alone."""
    found = []
    for number, step in enumerate((first, second, first)):
        name = f'token_files_{request.node.callspec.id}_{number}'
        words = {key: seqio.Feature(seqio.ByteVocabulary(), add_eos=key == 'targets') for key in ('inputs', 'targets')}
        rows = {'inputs': ['a', 'b', 'c'], 'targets': ['one', 'two', 'three']}
        source = lambda split, shuffle_files=False, seed=None: tf.data.Dataset.from_tensor_slices(rows)  # noqa: E731, B023
        steps = (step, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos)
        task = seqio.Task(name, seqio.FunctionDataSource(source, ('train',)), words, preprocessors=steps)
        found.append(providers.identity(task)['preprocessors'])
    assert found[0] != found[1] and found[0] == found[2]


def test_an_equal_object_of_another_process_has_the_same_fingerprint():
    assert fingerprints.fingerprint(Suffix('A')) == fingerprints.fingerprint(Suffix('A'))
    assert fingerprints.fingerprint(Suffix('A')) != fingerprints.fingerprint(type('Suffix', (Suffix,), {})('A'))


def test_an_object_whose_state_cannot_be_read_is_named(tmp_path):
    name = add(rows(), Suffix(threading.Lock()), seqio.preprocessors.tokenize)
    message = f"TOKENS_DIR: task '{name}': the preprocessor .* holds a _thread.lock, .* give its class __getstate__"
    with pytest.raises(UserError, match=message):
        datasets.stream(config(name, tmp_path), 'sft', 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(('name', 'change'), [
    ('examples.bytes', lambda x: x[: len(x) // 2]),
    ('inputs.tokens', lambda x: x[:-4]),
    ('targets.ends', lambda x: b''),
    ('examples.ends', None),
    ('examples.bytes', lambda x: b'\xc1' * len(x)),  # of the right length, and no msgpack
])  # fmt: skip
def test_a_damaged_file_is_named(name, change, tmp_path):
    task = add(rows())
    datasets.stream(config(task, tmp_path), 'sft', 0)
    (folder,) = tmp_path.iterdir()
    path = folder / name
    data = path.read_bytes()
    path.unlink()
    token_files._mapped.cache_clear()
    if change is not None:
        path.write_bytes(change(data))
    with pytest.raises(UserError) as caught:
        datasets.stream(config(task, tmp_path), 'sft', 0)(0)
    assert str(caught.value).startswith(f'{path}: damaged') and f'delete {folder}' in str(caught.value)


def test_a_preprocessor_is_the_same_in_every_process():
    """Python orders a set's texts by a seed of each process; a run would tokenize its rows anew at each start."""
    code = (
        'from perl_jax.data.user_code import fingerprints\n'
        "def keep(row): return row['kind'] in {'one', 'two', 'three', 'four', 'five'}\n"
        'print(fingerprints.fingerprint(keep))'
    )
    hashes = {
        subprocess.run([sys.executable, '-c', code], env=os.environ | {'PYTHONHASHSEED': seed}, check=True, text=True,
                       stdout=subprocess.PIPE).stdout
        for seed in '123'
    }  # fmt: skip
    assert len(hashes) == 1


def test_rows_that_do_not_fit_leave_nothing(tmp_path, said):
    long = 'much longer than a hundred tokens ' * 4
    bad = add(rows(10, long))
    with pytest.raises(UserError, match='10 of 10 examples dropped; example 0 has'):
        datasets.stream(config(bad, tmp_path), 'sft', 0)
    assert list(tmp_path.iterdir()) == []
    few = datasets.stream(config(add([*rows(30), {'inputs': 'x', 'targets': long}]), tmp_path), 'sft', 0)
    assert len(few.datasets[0]) == 30 and '1 of 31 examples dropped; example 30 has' in said.text
    with pytest.raises(UserError, match="TOKENS_DIR = 'gs://x/y': name a local or mounted folder"):
        datasets.stream(config('toy_sft', 'gs://x/y'), 'sft', 0)


def test_a_mixture_is_files_of_each_member(tmp_path):
    names = [add(rows(5, targets)) for targets in ('a', 'b')]
    mixture = 'token_files_mixture'
    seqio.MixtureRegistry.add(mixture, [(names[0], 1.0), (names[1], 3.0)])
    held, mapped = (datasets.stream(config(mixture, folder), 'sft', 0) for folder in (None, tmp_path))
    for step in range(5):
        same(mapped(step), held(step))


def test_texts_in_lists_and_arrays_come_back(tmp_path):
    texts = [{'inputs': f'{i}', 'targets': 'y', 'answers': ['é', 'b'], 'ids': [i, 2]} for i in range(20)]
    name = add(texts)
    held, mapped = (datasets.stream(config(name, folder), 'sft', 0) for folder in (None, tmp_path))
    (_, mine), (_, others) = mapped(1), held(1)
    assert [row['answers'] for row in mine] == [row['answers'] for row in others] == [['é', 'b']] * 8
    assert [row['ids'].tolist() for row in mine] == [row['ids'].tolist() for row in others]


def test_a_run_on_files_is_the_run_in_memory_and_goes_on_bit_for_bit(tmp_path):
    flags = '--gin.EVAL_DATASET=None', '--gin.PROMPTS_DATASET=None', '--gin.EVAL_PERIOD=2'
    files = quoted('TOKENS_DIR', tmp_path / 'tokens')
    ran(*toy('sft', tmp_path / 'held', *flags))
    ran(*toy('sft', tmp_path / 'mapped', *flags, files, '--gin.TRAIN_STEPS=3'))
    ran(*toy('sft', tmp_path / 'mapped', *flags, files))
    assert logged(tmp_path / 'mapped')[-1] == logged(tmp_path / 'held')[-1]
    one, two = state(tmp_path / 'held'), state(tmp_path / 'mapped')
    assert one.keys() == two.keys() and all(np.array_equal(one[path], two[path]) for path in one)
    assert 'TOKENS_DIR' in perl(*toy('sft', tmp_path / 'x', *flags, quoted('TOKENS_DIR', 'gs://a/b'))).line
