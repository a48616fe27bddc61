import collections
import dataclasses
import itertools
import logging
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import seqio
import tiny

from perl_jax import types
from perl_jax.data import datasets, providers
from perl_jax.data.batches import order, streams
from perl_jax.data.batches.dataset import Dataset
from perl_jax.data.datasets import DatasetConfig
from perl_jax.errors import UserError
from perl_jax.tasks import registration, toy

BYTES = seqio.ByteVocabulary()  # a byte is itself plus 3; 1 is the EOS; no BOS
LENGTHS = {'inputs': 6, 'targets': 4}
_numbers = itertools.count()


class WithBos(seqio.ByteVocabulary):
    bos_id = 2


def task(kind, rows, **options):
    """Registers these examples as the train split, under a name of its own."""
    rows = [{'inputs': row} if isinstance(row, str) else row for row in rows]
    return registration.add(
        f'data_{next(_numbers):03d}_{kind}', kind, lambda split: rows, splits=['train'], **options
    ).name


def load(kind, rows, vocabulary=None, **options):
    config = DatasetConfig(task(kind, rows), LENGTHS, 2, vocabulary=vocabulary, **options)
    return datasets.load(config, kind)


def ids(text):
    return [b + 3 for b in text.encode()]


def sft(n):
    """n examples that differ in their inputs."""
    return [{'inputs': f'{i:03d}', 'targets': 'yes'} for i in range(n)]


@pytest.fixture
def warnings(caplog, monkeypatch):
    """What the user is told; a command line in this process may have turned propagation off."""
    monkeypatch.setattr(logging.getLogger('perl_jax'), 'propagate', True)
    caplog.set_level(logging.WARNING, 'perl_jax')
    return caplog


# Reading.


def test_a_row_of_each_kind():
    pairs = load('pairs', [{'inputs': 'ab', 'chosen': 'c', 'rejected': 'def'}])
    batch, examples = pairs.rows(np.array([0]))
    assert type(batch) is types.Responses
    assert batch.inputs.tolist() == [[*ids('ab'), 0, 0, 0, 0]]
    assert batch.inputs_mask.tolist() == [[True, True, False, False, False, False]]
    assert batch.targets.tolist() == [[[*ids('c'), 1, 0, 0], [*ids('def'), 1]]]
    assert batch.targets_mask.tolist() == [[[True, True, False, False], [True] * 4]]
    assert (batch.inputs.dtype, batch.targets.dtype, batch.targets_mask.dtype) == (np.int32, np.int32, bool)
    assert examples == [{'inputs_pretokenized': 'ab', 'chosen_pretokenized': 'c', 'rejected_pretokenized': 'def'}]

    batch, examples = load('thumbs', [{'inputs': 'ab', 'targets': 'c', 'label': 0.25}]).rows(np.array([0]))
    assert type(batch) is types.Thumbs
    assert batch.labels.tolist() == [[0.25]] and batch.labels.dtype == np.float32
    assert examples[0]['label'] == 0.25

    batch, _ = load('sft', [{'inputs': 'ab', 'targets': 'c'}]).rows(np.array([0]))
    assert type(batch) is types.Responses and batch.targets.shape == (1, 1, 4)

    batch, examples = load('prompts', [{'inputs': 'ab', 'reference': 'é', 'count': 3}]).rows(np.array([0]))
    assert type(batch) is types.Prompts
    assert examples == [{'inputs_pretokenized': 'ab', 'reference': 'é', 'count': 3}]


def test_the_end_of_a_long_prompt_is_kept():
    (row,) = load('prompts', ['abcdefgh']).arrays['inputs']
    assert row.tolist() == ids('cdefgh')


def test_bos_stands_in_front_of_every_prompt():
    both = load('prompts', ['abcdefgh', 'ab'], WithBos())
    assert both.arrays['inputs'].tolist() == [[2, *ids('defgh')], [2, *ids('ab'), 0, 0, 0]]
    assert both.arrays['inputs_mask'].sum(-1).tolist() == [6, 3]
    responses = load('sft', [{'inputs': 'ab', 'targets': 'c'}], WithBos()).arrays['targets']
    assert responses.tolist() == [[[*ids('c'), 1, 0, 0]]]


def test_prompts_of_one_token_with_bos():
    config = DatasetConfig(task('prompts', ['abc']), {'inputs': 1, 'targets': 4}, 1, vocabulary=WithBos())
    row = datasets.load(config, 'prompts').arrays
    assert row['inputs'].shape == (1, 1)
    assert row['inputs'].tolist() == [[2]]


class Shifted(seqio.ByteVocabulary):
    def _encode_tf(self, s):
        return super()._encode_tf(s) + 1


def test_the_models_vocabulary_takes_the_tasks_place():
    swapped = load('thumbs', [{'inputs': 'a', 'targets': 'b', 'label': 1}], Shifted())
    assert swapped.arrays['inputs'][0, 0] == ids('a')[0] + 1
    assert swapped.arrays['targets'][0, 0].tolist() == [ids('b')[0] + 1, 1, 0, 0]
    assert swapped.arrays['labels'].tolist() == [[1.0]]
    assert isinstance(swapped.vocabulary, Shifted)


def test_too_long_and_empty_examples_are_dropped_and_counted(warnings):
    rows = sft(38) + [{'inputs': 'long', 'targets': 'four'}, {'inputs': 'void', 'targets': ''}]
    rows = rows[5:] + rows[:5]  # not at the end
    dataset = load('sft', rows)
    assert len(dataset) == 38
    assert {e['inputs_pretokenized'] for e in dataset.examples} == {f'{i:03d}' for i in range(38)}
    got = [bytes(t - 3 for t in row[row > 0]).decode() for row in dataset.arrays['inputs']]
    assert got == [e['inputs_pretokenized'] for e in dataset.examples]  # texts stay beside their tokens
    (said,) = [r.getMessage() for r in warnings.records]
    assert '2 of 40 examples dropped' in said
    assert 'example 33 has 5 tokens of targets, more than the 4 allowed' in said


@pytest.mark.parametrize('bad', [
    {'inputs': 'x', 'targets': 'four'}, {'inputs': 'x', 'targets': ''}, {'inputs': '', 'targets': 'yes'},
], ids=['long', 'empty-response', 'empty-prompt'])  # fmt: skip
def test_too_many_dropped_examples_stop_the_run(bad, warnings):
    assert len(load('sft', [*sft(19), bad])) == 19  # 5%
    with pytest.raises(UserError, match='2 of 39 examples dropped; example 37 .*fix the data, or raise ') as caught:
        load('sft', [*sft(37), bad, bad])
    is_long = bad['targets'] == 'four'  # more room helps none that is empty
    assert ('TASK_FEATURE_LENGTHS' in str(caught.value)) == ('VOCABULARY' in str(caught.value)) == is_long
    assert 'MAX_DROPPED' in str(caught.value)


def test_no_examples_at_all():
    with pytest.raises(UserError, match='no examples'):
        load('prompts', [])


def test_limit_is_a_sample_of_the_first_rows():
    """The same one each time, from 16 times as many."""
    few = [load('sft', sft(100), limit=3) for _ in range(2)]
    read, again = ([int(e['inputs_pretokenized']) for e in one.examples] for one in few)
    assert read == again == sorted(set(read)) and len(read) == 3 and read[-1] < 48
    assert read != [0, 1, 2]


def test_more_than_the_share_that_may_be_dropped_stops_a_run():
    rows = [*sft(9), {'inputs': 'x', 'targets': ''}]
    with pytest.raises(UserError, match=r'1 of 10 examples dropped.*over 5%.*MAX_DROPPED'):
        load('sft', rows)
    assert len(load('sft', rows, max_dropped=0.1)) == 9
    with pytest.raises(UserError, match='DatasetConfig.max_dropped = 1.5'):
        load('sft', rows, max_dropped=1.5)


@pytest.mark.parametrize(('limit', 'read'), [(5, 'aaabb'), (1, 'a'), (2, 'ab'), (50, 'a' * 9 + 'b' * 9)])
def test_limit_is_of_a_mixture_and_its_tasks_alike(limit, read):
    members = [task('prompts', [name] * 9) for name in 'ab']
    seqio.MixtureRegistry.add(name := f'data_{next(_numbers)}_prompts', members, default_rate=1.0)
    dataset = datasets.load(DatasetConfig(name, LENGTHS, 2, limit=limit), 'prompts')
    assert ''.join(e['inputs_pretokenized'] for e in dataset.examples) == read


def test_take():
    dataset = load('sft', sft(5)).take(np.array([3, 1]))
    assert [e['inputs_pretokenized'] for e in dataset.examples] == ['003', '001']
    assert dataset.arrays['inputs'][:, :3].tolist() == [ids('003'), ids('001')]


def test_batches_hold_every_row_once_and_are_filled_up():
    dataset, seen = load('sft', sft(7)), []
    for batch, examples, real in dataset.batches(3):
        assert batch.inputs.shape == (3, 6) and len(examples) == 3
        seen += [e['inputs_pretokenized'] for e in examples[:real]]
    assert seen == [f'{i:03d}' for i in range(7)]
    assert real == 1 and batch.inputs[:, :3].tolist() == [ids('006')] * 3


def test_processes_read_their_own_rows_of_the_same_batches():
    dataset = load('sft', sft(7))
    for (whole, _, n), *parts in zip(dataset.batches(4), *(dataset.batches(4, np.array(r)) for r in ([0, 3], [1, 2]))):
        assert [part[2] for part in parts] == [n, n]
        mine = np.concatenate([part[0].inputs for part in parts])
        np.testing.assert_array_equal(mine, whole.inputs[[0, 3, 1, 2]])


def test_decode_leaves_out_eos_and_padding():
    (batch, *_), *_ = load('pairs', [{'inputs': 'ab', 'chosen': 'c', 'rejected': 'def'}]).batches(1)
    batch.targets[0, 0, 2:] = ids('xy')  # padding may be anything
    assert datasets.decode(BYTES, batch) == [['c', 'def']]


# Names.


def test_unknown_task_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"no task or mixture is called 'toy_pear'; nearest: .*toy_pairs"):
        providers.find('toy_pear')


def test_unknown_split():
    with pytest.raises(UserError, match="no split 'tset'; it has test, train, validation"):
        datasets.load(DatasetConfig('toy_sft', LENGTHS, 2, split='tset'), 'sft')


def test_features_that_do_not_fit_the_kind():
    with pytest.raises(UserError, match="task 'toy_sft' has no feature chosen, rejected, which pairs needs"):
        datasets.load(DatasetConfig('toy_sft', LENGTHS, 2), 'pairs')


def test_kinds_of_reward():
    assert (datasets.reward_kind('toy_pairs'), datasets.reward_kind('toy_thumbs')) == ('pairs', 'thumbs')
    with pytest.raises(UserError, match="'toy_sft' cannot train a reward"):
        datasets.reward_kind('toy_sft')


def test_several_names():
    both = DatasetConfig(('a', 'b'), LENGTHS, 2, limit=7).each()
    assert [c.mixture_or_task_name for c in both] == ['a', 'b'] and both[1].limit == 7
    assert [c.mixture_or_task_name for c in DatasetConfig('a', LENGTHS, 2).each()] == ['a']


# Streams.


def stream(rows, batch_size=5, seed=0):
    dataset = load('sft', sft(rows) if isinstance(rows, int) else rows)
    return datasets.Stream([dataset], [1.0], batch_size, seed, np.arange(batch_size))


def names(stream, steps):
    """The inputs of these batches, in order; tokens must be those of the texts beside them."""
    out = []
    for step in steps:
        batch, examples = stream(step)
        assert [row[:3].tolist() for row in batch.inputs] == [ids(e['inputs_pretokenized']) for e in examples]
        out += [e['inputs_pretokenized'] for e in examples]
    return out


def test_a_stream_gives_each_process_its_own_rows():
    whole = stream(37)
    first, second = (dataclasses.replace(whole, rows=np.array(rows)) for rows in ([0, 1, 4], [2, 3]))
    for n in (0, 7, 20):
        batch, examples = whole(n)
        for part, rows in (first, [0, 1, 4]), (second, [2, 3]):
            mine, theirs = part(n)
            np.testing.assert_array_equal(mine.targets, batch.targets[rows])
            assert theirs == [examples[i] for i in rows]


def test_an_epoch_visits_each_row_once_and_the_next_in_another_order():
    seen = names(stream(37), range(37 * 2))
    epochs = [seen[i : i + 37] for i in range(0, len(seen), 37)]
    assert len(epochs) == 10
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 37 for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 10


def ragged(n=200, buckets=4, batch_size=8, rows=None):
    """A stream of rows whose prompts have 1 to 20 tokens and whose responses, the row's own number of them, 2 to 10."""
    rng = np.random.default_rng(0)
    (inputs, inputs_mask), (targets, targets_mask) = (
        tiny.ragged(rng, rng.integers(low, high + 1, shape), high) for low, high, shape in ((1, 20, n), (2, 10, (n, 2)))
    )
    arrays = {'inputs': inputs, 'inputs_mask': inputs_mask, 'targets': targets, 'targets_mask': targets_mask}
    rows = np.arange(batch_size) if rows is None else np.array(rows)
    dataset = Dataset(arrays, [{'row': i} for i in range(n)], None, 1)
    return dataset, streams.Stream([dataset], [1.0], batch_size, 0, rows, buckets)


def test_buckets_take_every_row_once_and_cut_nothing_that_is_real():
    dataset, stream = ragged()
    shapes, seen = set(), []
    for step in range(25 * 16):  # 16 windows, 16 epochs
        batch, examples = stream(step)
        index = [e['row'] for e in examples]
        P, R = batch.inputs.shape[-1], batch.targets.shape[-1]
        for name in ('inputs', 'targets'):
            whole, width = dataset.arrays[name][index], getattr(batch, name).shape[-1]
            np.testing.assert_array_equal(getattr(batch, name), whole[..., :width])
            mask = dataset.arrays[f'{name}_mask'][index]
            np.testing.assert_array_equal(getattr(batch, f'{name}_mask'), mask[..., :width])
            assert not mask[..., width:].any()
        shapes.add((P, R))
        seen += index
    assert all(P in (5, 10, 15, 20) and R in (3, 6, 9, 10) for P, R in shapes)
    assert len({P for P, _ in shapes}) > 2 and len({R for _, R in shapes}) > 1
    assert np.bincount(seen).tolist() == [16] * 200
    assert seen[:200] != sorted(seen[:200]) and stream(3)[1] != stream(19)[1]


def test_buckets_pad_less():
    """In what attention sees, the widths, and more in what dense layers do, the share that is said to be real."""
    widths, slots = [], []
    for buckets in (1, 4):
        _, stream = ragged(buckets=buckets)
        batches = [stream(step)[0] for step in range(32)]
        sizes = [batch.inputs_mask.size + batch.targets_mask.size for batch in batches]
        real = sum(int(batch.inputs_mask.sum() + batch.targets_mask.sum()) for batch in batches)
        widths.append(sum(sizes) / real)
        slots.append(sum(n * (batch.fill[0] if batch.fill else 1) for n, batch in zip(sizes, batches)) / real)
    assert widths[1] < 0.95 * widths[0]  # one level for both: prompts are cut as the longer of two responses is
    assert slots[1] < 0.8 * slots[0]


def test_processes_cut_their_rows_of_a_batch_alike():
    _, whole = ragged()
    parts = [ragged(rows=rows)[1] for rows in ([0, 1, 2, 3], [4, 5, 6, 7])]
    for step in range(20):
        want, examples = whole(step)
        got = [part(step) for part in parts]
        assert [e for _, mine in got for e in mine] == examples
        np.testing.assert_array_equal(np.concatenate([batch.inputs for batch, _ in got]), want.inputs)
        np.testing.assert_array_equal(np.concatenate([batch.targets for batch, _ in got]), want.targets)
        assert {batch.fill for batch, _ in got} == {want.fill}


@pytest.mark.parametrize(('groups', 'parts'), [(1, 1), (2, 2)])
def test_batches_say_what_share_of_them_is_real(groups, parts):
    stream = dataclasses.replace(ragged(buckets=8)[1], groups=groups, parts=parts)
    fills = set()
    for step in range(32):
        batch, _ = stream(step)
        level, share = streams.common_shape([stream], step)
        each = tiny.without_padding(batch, groups, parts, level).fill or (1, 1)
        assert (batch.fill or (1, 1)) == (max(each),) * 2 == (Fraction(share, level),) * 2
        fills.add(batch.fill)
    assert len(fills) > 3
    assert ragged(buckets=1)[1](0)[0].fill is None


def test_a_batch_is_a_function_of_seed_and_step():
    config = DatasetConfig('toy_pairs', {'inputs': 26, 'targets': 22}, 8)
    config = dataclasses.replace(config, limit=100)
    one, two = (datasets.stream(config, 'pairs', 3) for _ in range(2))
    ahead = [one(step) for step in range(20)]  # one has gone all the way, the other asks for 7 at once
    order._permutation.cache_clear()
    order._cycle.cache_clear()
    (batch, examples), (again, same) = ahead[7], two(7)
    assert all(np.array_equal(getattr(batch, f.name), getattr(again, f.name)) for f in dataclasses.fields(batch))
    assert examples == same
    other, _ = datasets.stream(config, 'pairs', 4)(7)
    assert not np.array_equal(other.inputs, batch.inputs)
    assert not np.array_equal(ahead[8][0].inputs, batch.inputs)
    assert one.eos_id == toy.vocabulary().eos_id and one.eos_ids == (one.eos_id,)


def test_batches_do_not_depend_on_the_process():
    """Nor on the seed of Python's hashes, which a restart changes."""
    code = """
import numpy as np
from perl_jax.data.batches import order
print([order._permutation(3, 0, 2, 9).tolist(), order._cycle((3.0, 1.0), 5)[0].tolist()])
"""
    here = [order._permutation(3, 0, 2, 9).tolist(), order._cycle((3.0, 1.0), 5)[0].tolist()]
    environment = os.environ | {'PYTHONHASHSEED': '17'}
    there = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str(here)


def test_a_batch_may_be_larger_than_the_data():
    assert collections.Counter(names(stream(3, batch_size=7), range(3))) == dict.fromkeys(['000', '001', '002'], 7)


@pytest.mark.parametrize('rates', [(3, 1), (0.2, 0.5), (1, 999)])
def test_rates_of_a_mixture_hold(rates):
    parts = [[{'inputs': f'{name}{i:02d}', 'targets': 'yes'} for i in range(n)] for name, n in (('a', 10), ('b', 7))]
    members = [task('sft', rows) for rows in parts]
    name = f'data_{next(_numbers)}_mixture'
    seqio.MixtureRegistry.add(name, list(zip(members, rates)))
    mixed = datasets.stream(DatasetConfig(name, LENGTHS, 50), 'sft', 0)
    seen = names(mixed, range(40))
    counts = collections.Counter(x[0] for x in seen)
    for member, rate in zip('ab', rates):
        assert counts[member] == pytest.approx(2000 * rate / sum(rates), abs=2)
        own = [x for x in seen if x[0] == member]
        size = len(set(own))
        for start in range(0, len(own) - size + 1, size):  # each member has its own epochs
            assert len(set(own[start : start + size])) == size
    first = collections.Counter(x[0] for x in seen[:200])['a']
    assert first == pytest.approx(200 * rates[0] / sum(rates), abs=25)  # mixed throughout
    assert names(datasets.stream(DatasetConfig(name, LENGTHS, 50), 'sft', 0), [7]) == seen[350:400]


@pytest.mark.parametrize('vocabulary', [None, BYTES], ids=['own', 'swapped'])
def test_a_mixture_can_be_read_whole(vocabulary):
    """As the evaluation of a run does that trains on one."""
    members = [task('sft', sft(4)), task('sft', sft(4))]
    name = f'data_{next(_numbers)}_mixture'
    seqio.MixtureRegistry.add(name, members, default_rate=1.0)
    dataset = datasets.load(DatasetConfig(name, LENGTHS, 2, vocabulary=vocabulary), 'sft')
    assert collections.Counter(e['inputs_pretokenized'] for e in dataset.examples) == dict.fromkeys(
        ['000', '001', '002', '003'], 2
    )


class TwoEnds(seqio.ByteVocabulary):
    """Bytes whose answers may end with a line break too."""

    eos_ids = (1, ord('\n') + 3)


def test_several_eos_ids_come_with_the_vocabulary_and_the_first_ends_targets():
    dataset = load('sft', [{'inputs': 'ab', 'targets': 'c'}], TwoEnds())
    assert dataset.eos_ids == (1, 13) and dataset.eos_id == 1
    assert dataset.arrays['targets'][0, 0].tolist() == [*ids('c'), 1, 0, 0]
    assert load('sft', [{'inputs': 'ab', 'targets': 'c'}]).eos_ids == (1,)


def test_the_text_of_a_response_ends_before_any_of_its_eos_ids():
    targets = np.array([[[*ids('a'), 13, *ids('b')], [*ids('ab'), 1], [*ids('abc')]]])
    batch = types.Responses(targets[0], targets[0] > 0, targets, targets > 0)
    assert datasets.decode(TwoEnds(), batch) == [['a', 'ab', 'abc']]
    assert datasets.decode(BYTES, batch) == [['a\nb', 'ab', 'abc']]
