import collections

import numpy as np
import pytest

from perl_jax.data import rows
from perl_jax.errors import UserError
from perl_jax.tasks import splits


def test_shares_are_as_asked_and_a_group_stays_where_it_is():
    names = [f'group {n}' for n in range(4000)]
    count = collections.Counter(splits.by_group('data', name) for name in names)
    assert abs(count['train'] - 2800) < 100 and abs(count['validation'] - 600) < 80 and abs(count['test'] - 600) < 80
    assert splits.by_group('data', 'group 7') == splits.by_group('data', 'group 7')
    assert {splits.by_group('data', name, validation=0, test=0) for name in names} == {'train'}
    halves = collections.Counter(splits.by_group('data', name, validation=0, test=50) for name in names)
    assert set(halves) == {'train', 'test'} and abs(halves['test'] - 2000) < 120


@pytest.mark.parametrize(('validation', 'test'), [(60, 60), (-5, 15), (50, 50)])
def test_shares_that_leave_no_train_are_refused(validation, test):
    with pytest.raises(UserError, match=f'validation={validation}, test={test}: give percents'):
        splits.by_group('mine', 'a', validation, test)


def test_where_a_group_lies_is_for_ever():
    assert [splits.bucket('coffee', x) for x in ('', 'a latte', 'é')] == [61, 74, 83]
    assert splits.bucket('coffee', 'a latte') != splits.bucket('ticketing', 'a latte')


def test_near_copies_are_one_group():
    assert {splits.normalised(x) for x in ("I'd like it!", 'i d  like it', ' I_d like IT… ')} == {'i d like it'}
    assert splits.normalised('Größe?') == 'größe'


def test_near_is_what_shares_most_words():
    near = splits.nearest_jaccard
    assert near('a b c d', ['x', 'a b c d e', 'd c b']) == 4 / 5
    assert near('a a b', ['b a']) == 1 and near('a', []) == near('a', ['b']) == near('a', ['']) == 0
    assert near('', ['']) == 1
    assert splits.nearness('a b c d', {'a b c d e'}) == 'near'  # 0.8 is near
    assert splits.nearness('a b c', {'a b c d', 'x'}) == 'far'


def test_a_sample_is_spread_over_groups_and_the_same_each_time():
    groups = [f'g{i // 20}' for i in range(400)]  # 20 groups, one behind the other
    chosen = rows.spread_indices(groups, 40)
    assert len(set(chosen)) == 40 and (np.diff(chosen) > 0).all()
    assert set(collections.Counter(groups[i] for i in chosen).values()) == {2}
    np.testing.assert_array_equal(chosen, rows.spread_indices(groups, 40))
    large = ['a'] * 300 + [f'b{i}' for i in range(100)]  # in proportion: a large group is no smaller in the sample
    assert sum(large[i] == 'a' for i in rows.spread_indices(large, 40)) in (29, 30, 31)
    np.testing.assert_array_equal(rows.spread_indices(groups, 400), np.arange(400))
    np.testing.assert_array_equal(rows.spread_indices(groups[:3], 40), np.arange(3))
