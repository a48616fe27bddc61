"""Rows on disk are the rows in memory, batch for batch, and are written once."""
# ruff: noqa: F811 (a fixture is shared by importing it)

import dataclasses
import json
import logging

import numpy as np
import pytest
import seqio
from test_providers import add, rows, said  # noqa: F401
from toy_runs import perl, quoted, ran, state, toy
from toy_runs import rows as logged

from perl_jax.data import datasets, token_files
from perl_jax.data.datasets import DatasetConfig
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


def test_rows_that_do_not_fit_leave_nothing(tmp_path, said):
    long = 'much longer than a hundred tokens ' * 4
    bad = add(rows(10, long))
    with pytest.raises(UserError, match='10 of 10 examples dropped; example 0 has'):
        datasets.stream(config(bad, tmp_path), 'sft', 0)
    assert list(tmp_path.iterdir()) == []
    few = datasets.stream(config(add([*rows(30), {'inputs': 'x', 'targets': long}]), tmp_path), 'sft', 0)
    assert len(few.datasets[0]) == 30 and '1 of 31 examples dropped; example 30 has' in said.text
    with pytest.raises(UserError, match="TOKENS_DIR = 'gs://x/y': name a folder of this machine"):
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
