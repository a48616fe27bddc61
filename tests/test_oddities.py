"""What is odd about a task's rows."""

import numpy as np
import pytest

from perl_jax.data import datasets
from perl_jax.data.oddities import SplitStatistics


def ids(text):
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


EOS = '\x01'


def notes(*rows):
    made = SplitStatistics()
    for row in rows:
        texts = {key: ids(value) for key, value in row.items() if key in ('inputs', 'targets', 'chosen', 'rejected')}
        made.add(row | texts)
    return made


def pair(inputs, chosen, rejected, **more):
    return {'inputs': inputs, 'chosen': chosen + EOS, 'rejected': rejected + EOS} | more


def thumb(inputs, targets, label):
    return {'inputs': inputs, 'targets': targets + EOS, 'label': np.float32(label)}


def lines(*rows, others=None):
    return notes(*rows).lines('train', others or {})


def test_rows_as_they_should_be_are_not_mentioned():
    assert lines(pair('q', 'a', 'b'), pair('q', 'a', 'c'), pair('r', 'b', 'a')) == []
    assert lines(thumb('q', 'a', 1), thumb('q', 'b', 0)) == []


ODD = {
    '1 of 2 pairs whose chosen and rejected are one text: they prefer nothing': [
        pair('q', 'a', 'a'), pair('q', 'a', 'b'),
    ],
    '1 of 3 distinct pairs that are there in both directions': [
        pair('q', 'a', 'b'), pair('q', 'b', 'a'), pair('q', 'a', 'c'),
    ],
    '2 of 4 rows that repeat another one': [pair('q', 'a', 'b')] * 3 + [pair('r', 'a', 'b')],
    '1 of 2 distinct answers with thumbs of both kinds': [thumb('q', 'a', 1), thumb('q', 'a', 0), thumb('r', 'a', 0)],
    '1 of 1 rows whose rejected is empty: a run drops them': [pair('q', 'a', '')],
    '1 of 1 rows whose targets is empty: a run drops them': [{'inputs': 'q', 'targets': EOS}],
}  # fmt: skip


@pytest.mark.parametrize('said', ODD)
def test_what_is_odd_is_counted(said):
    assert lines(*ODD[said]) == [f'warning: train: {said}']


def test_an_eos_alone_is_an_empty_answer():
    row = pair('q', 'a', '', rejected_pretokenized=b' ')
    assert lines(row) == ['warning: train: 1 of 1 rows whose rejected is empty: a run drops them']


def test_white_space_is_no_empty_answer():
    """A run learns from it: it drops only what has no token but its EOS."""
    row = {'inputs': 'q', 'targets': '  \x01', 'targets_pretokenized': b'  '}
    assert lines(row) == ['warning: train: 1 of 1 rows whose targets is white space alone: a run learns from them']
    assert not datasets._rejection_reason(0, {k: ids(v) for k, v in row.items() if k in ('inputs', 'targets')},
                               {'inputs': 9, 'targets': 9}, ['targets'])  # fmt: skip


def test_rows_and_groups_that_another_split_has_too():
    train = pair('q', 'a', 'b', group=b'one'), pair('q', 'c', 'd', group=b'one'), pair('r', 'a', 'b', group=b'two')
    other = notes(pair('q', 'x', 'y', group=b'two'))
    assert lines(*train, others={'test': other, 'validation': notes()}) == [
        "warning: train: 2 of 3 rows whose inputs are in 'test' too",
        "warning: train: 1 of 2 groups that are in 'test' too",
    ]
