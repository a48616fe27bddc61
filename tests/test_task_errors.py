"""Tasks that fail in code or data of their user's: one line with the task, the split and the error, exit code 2."""
# ruff: noqa: F811 (a fixture is shared by importing it)

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import seqio
import tensorflow as tf
from test_providers import APPEND_EOS, LENGTHS, TOKENIZE, add, rows

from perl_jax.data import datasets
from perl_jax.data.datasets import DatasetConfig
from perl_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


def failing(dataset):
    raise KeyError('nothing')


def failing_when_traced(dataset):
    return dataset.map(lambda row: row | {'inputs': row['nothing']})


def failing_when_read(dataset):
    def fail(text):
        raise KeyError('nothing')

    def change(row):
        return row | {'inputs': tf.ensure_shape(tf.py_function(fail, [row['inputs']], tf.string), ())}

    return dataset.map(change)


def generated(split, shuffle_files, seed=None):
    def generate():
        yield {'inputs': 'a', 'targets': 'b'}
        raise OSError('the database is away')

    return tf.data.Dataset.from_generator(generate, output_signature=dict.fromkeys(['inputs', 'targets'], TEXT))


def split_lines(dataset):
    return dataset.map(lambda line: {'inputs': line, 'targets': line})


TEXT = tf.TensorSpec((), tf.string)
BROKEN = {
    'a missing file': (
        seqio.TextLineDataSource({'train': '/nope/x'}), [split_lines], ['NotFoundError: /nope/x; No such file'],
    ),
    'a preprocessor': (rows(), [failing], ["KeyError: 'nothing'", f'{os.path.basename(__file__)}:']),
    'a traced preprocessor': (rows(), [failing_when_traced], ["KeyError: 'nothing'", f'{os.path.basename(__file__)}:']),
    'a function of Python': (rows(), [failing_when_read], ["KeyError: 'nothing'", f'{os.path.basename(__file__)}:']),
    'a generator': (seqio.FunctionDataSource(generated, ['train']), [], ['OSError: the database is away']),
}  # fmt: skip


@pytest.mark.parametrize('streamed', [False, True], ids=['in memory', 'to files'])
@pytest.mark.parametrize('name', BROKEN)
def test_what_a_task_raises_is_one_line(name, streamed, tmp_path):
    source, steps, words = BROKEN[name]
    task = add(source, *steps, TOKENIZE, APPEND_EOS)
    with pytest.raises(UserError) as caught:
        datasets.stream(DatasetConfig(task, LENGTHS, 2, tokens_dir=str(tmp_path) if streamed else None), 'sft', 0)
    line = str(caught.value)
    assert all(word in line for word in [f"task '{task}': split 'train': ", *words]), line
    assert '\n' not in line and 'Traceback' not in line and '{{' not in line and '[Op:' not in line, line
    assert not list(tmp_path.iterdir())


def test_a_command_names_the_task_and_ends_with_2(tmp_path):
    (tmp_path / 'my_tasks.py').write_text(
        'import seqio\n'
        "features = {k: seqio.Feature(seqio.ByteVocabulary()) for k in ('inputs', 'targets')}\n"
        'lines = lambda ds: ds.map(lambda x: {k: x for k in features})\n'
        "source = seqio.TextLineDataSource({'train': '/nope/x', 'validation': '/nope/y'})\n"
        "seqio.TaskRegistry.add('mine', source, preprocessors=[lines, seqio.preprocessors.tokenize],\n"
        '                       output_features=features)\n'
    )
    (tmp_path / 'mine.gin').write_text("import my_tasks\ninclude 'recipes/toy_sft.gin'\n")
    argv = ['sft', f'--gin_file={tmp_path}/mine.gin', f"--gin.MODEL_DIR='{tmp_path}/run'"]
    argv += ['--gin.PROMPTS_DATASET=None', '--gin.decoder.DecoderConfig.vocab_size=300']
    result = subprocess.run(
        [sys.executable, '-m', 'perl_jax', *argv, "--gin.MIXTURE_OR_TASK_NAME='mine'"], cwd=tmp_path, text=True,
        env=os.environ | {'PYTHONPATH': f'{tmp_path}:{ROOT}'}, capture_output=True, check=False,
    )  # fmt: skip
    line = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2, result.stderr
    assert line.startswith("perl_jax: task 'mine': split 'train': NotFoundError: /nope/x; No such file"), line
    assert 'Traceback' not in result.stderr


# Types of features.


def stored(dtype, label_dtype=None):
    """A task of features of these types, two rows."""
    task = f'task_errors_{dtype.name}_{label_dtype and label_dtype.name}'
    names = ['inputs', 'targets'] + ['label'] * (label_dtype is not None)
    features = {
        name: seqio.Feature(seqio.ByteVocabulary(), dtype=label_dtype, rank=0, add_eos=False) if name == 'label'
        else seqio.Feature(seqio.ByteVocabulary(), dtype=dtype, add_eos=False)
        for name in names
    }  # fmt: skip
    arrays = {'inputs': [[5, 6], [7, 8]], 'targets': [[9, 1], [4, 1]], 'label': [0, 1]}

    def source(split, shuffle_files, seed=None):
        return tf.data.Dataset.from_tensor_slices({k: tf.cast(arrays[k], features[k].dtype) for k in names})

    read = seqio.FunctionDataSource(source, ['train'])
    seqio.TaskRegistry.add(task, read, preprocessors=[], output_features=features)
    return DatasetConfig(task, LENGTHS, 2)


@pytest.mark.parametrize('streamed', [False, True], ids=['in memory', 'to files'])
@pytest.mark.parametrize(('dtype', 'label_dtype'), [
    (tf.int64, None), (tf.int16, None), (tf.int64, tf.int64), (tf.int32, tf.float64), (tf.int32, tf.bool),
])  # fmt: skip
def test_features_of_other_types_are_read(dtype, label_dtype, streamed, tmp_path):
    config, kind = stored(dtype, label_dtype), 'thumbs' if label_dtype else 'sft'
    config = DatasetConfig(config.task_name, LENGTHS, 2, tokens_dir=str(tmp_path) if streamed else None)
    batch, _ = datasets.stream(config, kind, 0)(0)
    order = np.argsort(batch.inputs[:, 0])
    np.testing.assert_array_equal(batch.inputs[order, :2], [[5, 6], [7, 8]])
    np.testing.assert_array_equal(batch.targets[order, 0, :2], [[9, 1], [4, 1]])
    assert batch.inputs.dtype == batch.targets.dtype == np.int32
    if label_dtype is not None:
        np.testing.assert_array_equal(batch.labels[order], [[0], [1]])
        assert batch.labels.dtype == np.float32
    seqio.TaskRegistry.remove(config.task_name)


def test_features_that_are_no_tokens_are_named():
    config = stored(tf.float32)
    with pytest.raises(UserError, match="task 'task_errors_float32_None': feature 'inputs' is float32; give integers"):
        datasets.load(config, 'sft')
