"""The worked examples in the docstrings of features.py, integer by integer: P = 4, R = 3, and 1 is the EOS."""

import numpy as np
import pytest
import seqio
import tensorflow as tf

from perl_jax.data import features

PROMPT = {'inputs': [7, 8, 0, 0], 'inputs_mask': [1, 1, 0, 0]}
CASES = {
    features.PromptsFeatureConverter: ({'inputs': [7, 8]}, PROMPT),
    features.SftFeatureConverter: (
        {'inputs': [7, 8], 'targets': [5, 1]},
        PROMPT | {'targets': [[5, 1, 0]], 'targets_mask': [[1, 1, 0]]},
    ),
    features.PairsFeatureConverter: (
        {'inputs': [7, 8], 'chosen': [5, 1], 'rejected': [6, 9, 1]},
        PROMPT | {'targets': [[5, 1, 0], [6, 9, 1]], 'targets_mask': [[1, 1, 0], [1, 1, 1]]},
    ),
    features.ThumbsFeatureConverter: (
        {'inputs': [7, 8], 'targets': [5, 1], 'label': 1.0},
        PROMPT | {'targets': [[5, 1, 0]], 'targets_mask': [[1, 1, 0]], 'labels': [1.0]},
    ),
}
DTYPES = {'inputs': np.int32, 'targets': np.int32, 'inputs_mask': bool, 'targets_mask': bool, 'labels': np.float32}
cases = pytest.mark.parametrize(
    ('converter', 'example', 'want'), [(c, *case) for c, case in CASES.items()], ids=[c.__name__ for c in CASES]
)


def convert(converter, example):
    lengths = {name: {'inputs': 4, 'label': 1}.get(name, 3) for name in example}
    dtypes = {name: tf.float32 if name == 'label' else tf.int32 for name in example}
    rows = {name: tf.constant([value], dtypes[name]) for name, value in example.items()}
    (row,) = converter()(tf.data.Dataset.from_tensor_slices(rows), lengths).as_numpy_iterator()
    return row


@cases
def test_integers_of_the_docstring(converter, example, want):
    row = convert(converter, example)
    assert {name: x.tolist() for name, x in row.items()} == want
    assert {name: x.dtype for name, x in row.items()} == {name: np.dtype(DTYPES[name]) for name in want}
    for integers in example.values():
        assert str(integers) in converter.__doc__


@cases
def test_a_full_row_has_no_padding(converter, example, want):
    full = {name: {'inputs': [7, 8, 9, 6], 'label': 0.5}.get(name, [5, 6, 1]) for name in example}
    row = convert(converter, full)
    assert all(x.all() for x in row.values())
    assert {name: x.shape for name, x in row.items()} == {name: np.shape(x) for name, x in want.items()}


@cases
def test_token_zero_is_a_token(converter, example, want):
    row = convert(converter, example | {'inputs': [0, 8]})
    assert row['inputs_mask'].tolist() == [True, True, False, False]


def test_too_long_is_an_error_and_never_cut():
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        convert(features.PromptsFeatureConverter, {'inputs': [1, 2, 3, 4, 5]})


def test_lengths_are_those_of_the_batch():
    lengths = {'inputs': 4, 'chosen': 3, 'rejected': 3}
    got = features.PairsFeatureConverter().get_model_feature_lengths(lengths)
    assert got == {'inputs': 4, 'inputs_mask': 4, 'targets': 3, 'targets_mask': 3}
    assert issubclass(features.PairsFeatureConverter, seqio.FeatureConverter)
