"""Tasks as SeqIO's users write them: preprocessors with lengths and seeds, caches, slices, mixtures with gaps."""

import functools
import importlib
import itertools
import json
import logging
import pathlib

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds
from toy_runs import perl, quoted, toy

from perl_jax.data import datasets
from perl_jax.data.datasets import DatasetConfig
from perl_jax.errors import UserError
from perl_jax.tasks import registration

BYTES = seqio.ByteVocabulary()  # a byte is itself plus 3; 1 is the EOS
LENGTHS = {'inputs': 6, 'targets': 4}
TOKENIZE, APPEND_EOS = seqio.preprocessors.tokenize, seqio.preprocessors.append_eos
_numbers = itertools.count()


def ids(text):
    return [b + 3 for b in text.encode()]


def rows(n=5, targets='yes'):
    return [{'inputs': f'{i:03d}', 'targets': targets} for i in range(n)]


def source(texts, splits=('train',)):
    def dataset(split, shuffle_files):  # as most write it: without a seed
        return tf.data.Dataset.from_tensor_slices({key: [row[key] for row in texts] for key in texts[0]})

    return seqio.FunctionDataSource(dataset, splits)


def seeded(texts):
    """As SeqIO's writer of caches asks for it."""
    read = source(texts).get_dataset
    return seqio.FunctionDataSource(lambda split, shuffle_files, seed=None: read(split, shuffle_files), ['train'])


def add(texts, *preprocessors, splits=('train',), features=('inputs', 'targets'), name=None, **options):
    """Registers a task in SeqIO's own way; without preprocessors it tokenizes and appends EOS."""
    preprocessors = preprocessors or (TOKENIZE, APPEND_EOS)
    output = {key: seqio.Feature(BYTES, add_eos=key != 'inputs') for key in features}
    where = texts if isinstance(texts, seqio.DataSource) else source(texts, splits)
    name = name or f'providers_{next(_numbers)}'
    return seqio.TaskRegistry.add(name, where, preprocessors=preprocessors, output_features=output, **options).name


def load(name, kind='sft', lengths=LENGTHS, **options):
    return datasets.load(DatasetConfig(name, lengths, 2, **options), kind)


@pytest.fixture
def said(caplog, monkeypatch):
    """What the library warned of."""
    monkeypatch.setattr(logging.getLogger('perl_jax'), 'propagate', True)
    return caplog


# Preprocessors.


def test_a_preprocessor_gets_the_lengths():
    def crop(dataset, sequence_length):
        keep = lambda row: row | {'targets': row['targets'][: sequence_length['targets'] - 1]}  # noqa: E731
        return dataset.map(keep)

    name = add(rows(targets='longer than four'), TOKENIZE, crop, APPEND_EOS)
    assert load(name).arrays['targets'][0, 0].tolist() == [*ids('lon'), 1]
    wider = load(name, lengths={'inputs': 6, 'targets': 6}).arrays['targets']
    assert wider[0, 0].tolist() == [*ids('longe'), 1]


def test_seqios_own_preprocessors_get_them_too_and_nothing_else_is_trimmed():
    name = add(rows(targets='longer than four'), TOKENIZE, seqio.preprocessors.append_eos_after_trim)
    assert load(name).arrays['targets'][0, 0].tolist() == [*ids('lon'), 1]
    with pytest.raises(UserError, match='13 tokens of targets, more than the 4'):  # dropped as ever, not trimmed
        load(add(rows(targets='untrimmed...')))
    (prompt, *_) = load(add([{'inputs': 'abcdefgh', 'targets': 'yes'}])).arrays['inputs']
    assert prompt.tolist() == ids('cdefgh')


def test_pairs_have_their_own_lengths_or_those_of_the_targets():
    def crop(dataset, sequence_length):
        return dataset.map(lambda row: row | {k: row[k][: sequence_length[k] - 1] for k in ('chosen', 'rejected')})

    pairs = [{'inputs': 'q', 'chosen': 'abcdef', 'rejected': 'ghijkl'}]
    name = add(pairs, TOKENIZE, crop, APPEND_EOS, features=('inputs', 'chosen', 'rejected'))
    assert load(name, 'pairs').arrays['targets'][0].tolist() == [[*ids('abc'), 1], [*ids('ghi'), 1]]
    own = load(name, 'pairs', {**LENGTHS, 'rejected': 2}).arrays['targets'][0]
    assert own.tolist() == [[*ids('abc'), 1], [*ids('g'), 1, 0, 0]]


def test_a_length_that_is_not_given_is_named():
    def crop(dataset, sequence_length):
        return dataset.map(lambda row: row | {'inputs': row['inputs'][: sequence_length['answers']]})

    with pytest.raises(UserError, match="has no 'answers', which a preprocessor reads"):
        load(add(rows(), TOKENIZE, crop, APPEND_EOS))


def test_inspect_tells_preprocessors_that_there_is_room(capsys):
    def crop(dataset, sequence_length):
        return dataset.map(lambda row: row | {'targets': row['targets'][: sequence_length['targets']]})

    from perl_jax.tools import inspect_task

    inspect_task.show(add(rows(targets='t' * 300), TOKENIZE, crop), [], 'train', 1, None)
    assert 'targets: tokens p50 300' in capsys.readouterr().out


def test_what_preprocessors_draw_is_the_same_after_a_restart():
    @functools.partial(seqio.map_over_dataset, num_seeds=1)
    def rotate(row, seed):
        shift = tf.random.stateless_uniform([], seed, 0, 26, tf.int32)
        return row | {'inputs': tf.fill([6], shift + 50)}

    for texts in (rows(20), registration.add(f'providers_{next(_numbers)}', 'sft', lambda split: rows(20)).source):
        name = add(texts, TOKENIZE, rotate, APPEND_EOS)
        one, two = (load(name).arrays['inputs'] for _ in range(2))
        np.testing.assert_array_equal(one, two)
        assert len(set(one[:, 0])) > 3


def test_what_seqio_says_of_a_task_is_one_line():
    with pytest.raises(UserError, match="task 'providers_.*': .*missing expected output feature.* targets"):
        load(add(rows(), TOKENIZE, lambda dataset: dataset.map(lambda row: {'inputs': row['inputs']})))


# Prompts without a text.


def test_prompts_that_are_stored_as_tokens_are_read():
    bare = functools.partial(TOKENIZE, copy_pretokenized=False)
    name = add([{'inputs': 'é?'}, {'inputs': 'abcdefgh'}], bare, features=('inputs',))
    assert [row['inputs_pretokenized'] for row in load(name, 'prompts').examples] == ['é?', 'abcdefgh']
    stored = add([{'inputs': ids('hi')}, {'inputs': ids('yo')}], _int32, features=('inputs',))
    assert [row['inputs_pretokenized'] for row in load(stored, 'prompts').examples] == ['hi', 'yo']


def _int32(dataset):
    return dataset.map(lambda row: {key: tf.cast(value, tf.int32) for key, value in row.items()})


# Splits.


def test_a_mixture_skips_members_that_lack_the_split(said):
    both, other = add(rows(3), splits=('train', 'validation')), add(rows(2, 'no'), splits=('train',))
    name = f'providers_{next(_numbers)}'
    seqio.MixtureRegistry.add(name, [(both, 3.0), (other, 1.0)])
    held_out = load(name, split='validation')
    assert [row['targets_pretokenized'] for row in held_out.examples] == ['yes'] * 3
    assert f"tasks without a split 'validation' are skipped: {other}" in said.text
    stream = datasets.stream(DatasetConfig(name, LENGTHS, 2, split='validation'), 'sft', 0)
    assert len(stream.datasets) == 1
    with pytest.raises(UserError, match="no split 'test'; it has train"):
        load(name, split='test')


def test_a_split_that_nobody_has_offers_a_run_without_evaluation_data():
    with pytest.raises(UserError, match="no split 'validation'; it has train; .*EVAL_DATASET = None"):
        load(add(rows()), split='validation')


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """A data set of TFDS, as its own tools write it: 10 rows of train, 3 of validation."""
    folder = tmp_path_factory.mktemp('tfds')
    of = lambda n: tf.data.Dataset.from_tensor_slices({key: [r[key] for r in rows(n)] for key in rows(1)[0]})  # noqa: E731
    text = tfds.features.Text()
    tfds.dataset_builders.store_as_tfds_dataset(
        'perl_rows', '1.0.0', split_datasets={'train': of(10), 'validation': of(3)}, data_dir=folder,
        features=tfds.features.FeaturesDict({'inputs': text, 'targets': text}), disable_shuffling=True,
    )  # fmt: skip
    return folder


def test_slices_of_tfds_splits(prepared):
    name = add(seqio.TfdsDataSource('perl_rows:1.0.0', tfds_data_dir=str(prepared)))
    texts = lambda split: [row['inputs_pretokenized'] for row in load(name, split=split).examples]  # noqa: E731
    assert texts('train[:90%]') == [f'{i:03d}' for i in range(9)]
    assert texts('train[-2:]') == ['008', '009'] and len(texts('train+validation')) == 13
    for split in ('train[:', 'trian[:90%]', 'train[:0]'):
        with pytest.raises(UserError, match='no split .*; it has train, validation'):
            load(name, split=split)
    mapped = add(seqio.TfdsDataSource('perl_rows:1.0.0', str(prepared), splits={'dev': 'train[:20%]'}))
    assert len(load(mapped, split='dev')) == 2
    with pytest.raises(UserError, match="no split 'train'; it has dev"):
        load(mapped)


def test_the_folder_of_tfds_is_a_flag(prepared, tmp_path):
    (tmp_path / 'mine_tfds.py').write_text(
        'import seqio\nfrom perl_jax.tasks import registration\n'
        "registration.add('mine_tfds', 'sft', seqio.TfdsDataSource('perl_rows:1.0.0'))\n"
    )
    command = ['inspect', '--task=mine_tfds', '--module=mine_tfds', '--split=train[:50%]']
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        assert 'train[:50%]: 5 examples' in perl(*command, f'--tfds_data_dir={prepared}').out
        assert "--tfds_data_dir: there is no folder 'nowhere'" in perl(*command, '--tfds_data_dir=nowhere').line
    assert seqio.utils._TFDS_DATA_DIR_OVERRIDE is None


def test_a_rate_that_cannot_be_computed_is_one_line():
    """A source of a function does not know how many rows it has, and SeqIO multiplies None."""
    names = [add(rows(2)), add(rows(2))]
    mixture = f'providers_{next(_numbers)}'
    seqio.MixtureRegistry.add(mixture, names, default_rate=seqio.mixing_rate_num_examples)
    with pytest.raises(UserError, match=f"'{mixture}': no rate of '{names[0]}' can be computed .*a number as its rate"):
        datasets.stream(DatasetConfig(mixture, LENGTHS, 2), 'sft', 0)


# Mixtures of mixtures.


def test_rates_are_those_that_seqio_computes():
    names = [add(rows(4, targets)) for targets in ('a', 'b', 'c')]
    inner, outer = (f'providers_{next(_numbers)}' for _ in range(2))
    seqio.MixtureRegistry.add(inner, [(names[0], 1.0), (names[1], 3.0)])
    seqio.MixtureRegistry.add(outer, [(inner, 2.0), (names[0], 1.0), (names[2], 1.0)])
    stream = datasets.stream(DatasetConfig(outer, LENGTHS, 100), 'sft', 0)
    texts = [row['targets_pretokenized'] for step in range(10) for row in stream(step)[1]]
    assert [texts.count(x) for x in 'abc'] == [375, 375, 250]  # a: 2 * 1/4 + 1, b: 2 * 3/4, c: 1; of 4


@pytest.mark.parametrize(('rate', 'counts'), [(0.0, [0]), (1e-4, [1, 2])])
def test_small_rates_are_kept(rate, counts):
    names = [add(rows(4, targets)) for targets in ('a', 'b')]
    mixture = f'providers_{next(_numbers)}'
    seqio.MixtureRegistry.add(mixture, [(names[0], 1.0), (names[1], rate)])
    stream = datasets.stream(DatasetConfig(mixture, LENGTHS, 15_000), 'sft', 0)
    assert [row['targets_pretokenized'] for row in stream(0)[1]].count('b') in counts


# Caches.


TOKENS_CACHED = TOKENIZE, seqio.CacheDatasetPlaceholder(required=True), APPEND_EOS


def write_cache(folder, task, split='train'):
    """What seqio_cache_tasks writes, for which it needs Apache Beam: two shards, info, stats and COMPLETED."""
    out = pathlib.Path(folder, seqio.get_task_dir_from_name(task.name))
    out.mkdir(parents=True, exist_ok=True)
    dataset = task.preprocess_precache(task.source.get_dataset(split, shuffle=False))
    examples = list(dataset.as_numpy_iterator())
    prefix = seqio.utils.get_cached_tfrecord_prefix(str(out), split)
    for shard in range(2):
        with tf.io.TFRecordWriter(f'{prefix}-{shard:05d}-of-00002') as writer:
            for row in examples[shard::2]:
                writer.write(seqio.utils.dict_to_tfexample(row).SerializeToString())
    features = {
        key: {'dtype': spec.dtype.name, 'shape': spec.shape.as_list()} for key, spec in dataset.element_spec.items()
    }
    info = {'num_shards': 2, 'features': features, 'seqio_version': seqio.__version__}
    pathlib.Path(seqio.utils.get_cached_info_path(str(out), split)).write_text(json.dumps(info))
    pathlib.Path(seqio.utils.get_cached_stats_path(str(out), split)).write_text(json.dumps({'examples': len(examples)}))
    (out / 'COMPLETED').write_text('COMPLETED')


def write_by_seqio(folder, task):
    """The same by SeqIO's own writer."""
    beam = pytest.importorskip('apache_beam')
    from absl import flags
    from seqio.scripts import cache_tasks_main

    flags.FLAGS.mark_as_parsed()
    with beam.Pipeline() as pipeline:
        cache_tasks_main.run_pipeline(pipeline, [task.name], str(folder))


@pytest.fixture
def caches():
    """SeqIO's folders of caches, which a test may add to."""
    before = [*seqio.utils.get_global_cache_dirs()]
    yield seqio.add_global_cache_dirs
    seqio.set_global_cache_dirs(before)


@pytest.mark.parametrize('write', [write_cache, write_by_seqio])
def test_a_cached_task_is_read(write, caches, tmp_path):
    name = add(seeded(rows(7)), *TOKENS_CACHED)
    with pytest.raises(UserError, match='USE_CACHED_TASKS = True, and name its folder by --seqio_additional_cache'):
        load(name)
    with pytest.raises(UserError, match=f"task '{name}' is in no cache"):
        load(name, use_cached=True)
    write(tmp_path, seqio.TaskRegistry.get(name))
    caches([str(tmp_path)])
    dataset = load(name, use_cached=True)
    assert sorted(row['inputs_pretokenized'] for row in dataset.examples) == [f'{i:03d}' for i in range(7)]
    assert [row[:3].tolist() for row in dataset.arrays['inputs']] == [
        ids(row['inputs_pretokenized']) for row in dataset.examples
    ]
    assert dataset.arrays['targets'][0, 0].tolist() == [*ids('yes'), 1]
    assert [load(name, use_cached=True).examples for _ in range(2)] == [dataset.examples] * 2  # in one order
    with pytest.raises(UserError, match=f"the cache of task '{name}' has no split 'validation'; it has train"):
        load(name, use_cached=True, split='validation')


def test_a_task_that_cannot_be_cached_is_made_and_says_so(said):
    assert len(load(name := add(rows(5)), use_cached=True)) == 5
    assert f"task '{name}' has no CacheDatasetPlaceholder" in said.text


class Shifted(seqio.ByteVocabulary):
    def _encode_tf(self, s):
        return super()._encode_tf(s) + 1

    def __eq__(self, other):
        return isinstance(other, Shifted)

    __hash__ = None


def test_cached_tokens_of_another_vocabulary_are_refused_and_cached_texts_are_not(caches, tmp_path):
    tokens = add(rows(7), *TOKENS_CACHED)
    texts = add(rows(7), seqio.CacheDatasetPlaceholder(), TOKENIZE, APPEND_EOS)
    for name in (tokens, texts):
        write_cache(tmp_path, seqio.TaskRegistry.get(name))
    caches([str(tmp_path)])
    with pytest.raises(UserError, match=f"cache of task '{tokens}' holds tokens of the task's own vocabulary"):
        load(tokens, use_cached=True, vocabulary=Shifted())
    assert len(load(tokens, use_cached=True, vocabulary=seqio.ByteVocabulary())) == 7  # the same one
    shifted = load(texts, use_cached=True, vocabulary=Shifted())
    assert shifted.arrays['targets'][0, 0].tolist() == [*(i + 1 for i in ids('yes')), 1]


def test_the_names_of_t5x_reach_a_run(tmp_path):
    (tmp_path / 'mine_cached.py').write_text(
        'import seqio\n'
        'from perl_jax.tasks import toy\n'
        'if "mine_cached" not in seqio.TaskRegistry.names():\n'
        '    task = seqio.TaskRegistry.get("toy_sft")\n'
        '    steps = seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder(required=True)\n'
        '    steps = [*steps, seqio.preprocessors.append_eos]\n'
        '    seqio.TaskRegistry.add("mine_cached", task.source, task.output_features, steps)\n'
    )
    argv = [*toy('sft', tmp_path / 'run', '--gin.TRAIN_STEPS=1'), quoted('MIXTURE_OR_TASK_NAME', 'mine_cached')]
    argv += ['--gin.PROMPTS_DATASET=None', f'--gin_file={tmp_path}/mine.gin']
    (tmp_path / 'mine.gin').write_text('import mine_cached\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        importlib.import_module('mine_cached')

        for split in ('train', 'validation'):
            write_cache(tmp_path / 'cache', seqio.TaskRegistry.get('mine_cached'), split)
        cached = '--gin.USE_CACHED_TASKS=True', f'--seqio_additional_cache_dirs={tmp_path}/cache'
        assert 'set USE_CACHED_TASKS = True' in perl(*argv).line
        assert "--seqio_additional_cache_dirs: there is no folder '/nowhere'" in perl(
            *argv, '--seqio_additional_cache_dirs=/nowhere'
        ).line
        assert perl(*argv, *cached).code == 0
    assert seqio.utils.get_global_cache_dirs() == []
