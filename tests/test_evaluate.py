import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from perl_jax import types
from perl_jax.data.datasets import Dataset, DatasetConfig
from perl_jax.errors import UserError
from perl_jax.evals import answering, infer, intervals, reward_metrics
from perl_jax.parallel.partitioning import Partitioner


def slow_auc(logits, labels):
    """How often a good one gets more than a bad one; a tie is half."""
    ups, downs = logits[labels == 1], logits[labels == 0]
    wins = [(up > down) + 0.5 * (up == down) for up, down in itertools.product(ups, downs)]
    return sum(wins) / len(wins)


def slow_balanced_accuracy(logits, labels):
    recalls = []
    for kind in (0, 1):
        right = [(logit > 0) == bool(label) for logit, label in zip(logits, labels) if label == kind]
        recalls.append(sum(right) / len(right))
    return sum(recalls) / 2


@pytest.mark.parametrize('levels', [None, 3, 1], ids=['no-ties', 'many-ties', 'all-ties'])
@pytest.mark.parametrize('share', [0.5, 0.1])
def test_classification_equals_the_slow_one(levels, share):
    rng = np.random.default_rng(0)
    labels = (rng.random(60) < share).astype(np.float32)
    logits = rng.standard_normal(60) + labels
    if levels:
        logits = np.round(logits * (levels - 1) / 2)  # 0 is among them: not a thumb up
    got = reward_metrics.classification(logits.astype(np.float32), labels)
    assert got['auc'] == pytest.approx(slow_auc(logits, labels))
    assert got['balanced_accuracy'] == pytest.approx(slow_balanced_accuracy(logits, labels))
    assert got['accuracy'] == pytest.approx(np.mean([(z > 0) == bool(y) for z, y in zip(logits, labels)]))


def test_auc_at_its_ends():
    labels = np.array([0, 0, 1, 1], np.float32)
    for logits, auc in (([1, 2, 3, 4], 1), ([4, 3, 2, 1], 0), ([1, 1, 1, 1], 0.5)):
        assert reward_metrics.classification(np.float32(logits), labels)['auc'] == auc


@pytest.mark.parametrize('label', [0.0, 1.0])
def test_one_class_alone_has_no_auc(label):
    got = reward_metrics.classification(np.array([1.0, -1.0, 2.0]), np.full(3, label))
    assert got == {'accuracy': pytest.approx(2 / 3 if label else 1 / 3)}


def test_ranking_counts_ties_as_half():
    rewards = np.array([[2.0, 1.0], [1.0, 2.0], [3.0, 3.0], [0.5, 0.25]])
    assert reward_metrics.ranking(rewards, np.arange(4)) == {
        'pairwise_accuracy': 2.5 / 4, 'context_accuracy': 2.5 / 4, 'margin': 0.25 / 4
    }  # fmt: skip


def test_a_context_with_many_pairs_counts_once_by_context():
    rewards = np.array([[2.0, 1.0]] * 28 + [[1.0, 2.0], [3.0, 3.0]])
    got = reward_metrics.ranking(rewards, np.array(['a'] * 28 + ['b', 'c']))
    assert got['pairwise_accuracy'] == pytest.approx(28.5 / 30) and got['context_accuracy'] == pytest.approx(1.5 / 3)


def pairs_of(*prompts):
    """A dataset of pairs, whose prompts are these numbers."""
    inputs = np.array(prompts, np.int32).reshape(-1, 1)
    return Dataset({'inputs': inputs, 'inputs_mask': np.ones_like(inputs, bool)}, [{} for _ in prompts], None, 1)


def test_metrics_of_several_tasks_stand_together():
    pairs, thumbs = pairs_of(7), Dataset({'labels': np.array([[1.0], [0.0]])}, [], None, 1)
    got = reward_metrics.measure([pairs, thumbs], [np.array([[2.0, 1.0]]), np.array([[1.0], [-1.0]])])
    ranked = {'pairwise_accuracy': 1, 'context_accuracy': 1, 'margin': 1}
    assert got == ranked | {'accuracy': 1, 'balanced_accuracy': 1, 'auc': 1}


def test_several_tasks_of_a_kind_are_measured_as_one():
    pairs = [pairs_of(7), pairs_of(7, 7, 8)]  # 7 of one task is not 7 of another
    got = reward_metrics.measure(pairs, [np.array([[2.0, 1.0]]), np.array([[1.0, 2.0]] * 3)])
    assert got == {'pairwise_accuracy': 0.25, 'context_accuracy': pytest.approx(1 / 3), 'margin': -0.5}
    up, down = (Dataset({'labels': np.full((2, 1), label)}, [], None, 1) for label in (1.0, 0.0))
    got = reward_metrics.measure([up, down], [np.array([[1.0], [3.0]]), np.array([[-1.0], [2.0]])])
    assert got == {'accuracy': 0.75, 'balanced_accuracy': 0.75, 'auc': 0.75}


def test_labels_between_count_as_the_nearer():
    got = reward_metrics.classification(np.array([3.0, -3.0, 1.0]), np.array([0.9, 0.1, 0.2]))
    assert got == {'accuracy': 2 / 3, 'balanced_accuracy': 0.75, 'auc': 1}


def test_a_metric_that_the_rows_cannot_give_is_refused():
    alike = Dataset({'labels': np.ones((2, 1))}, [{}, {}], None, 1)
    reward_metrics.check_metric('BEST_METRIC', 'accuracy', [alike])
    with pytest.raises(UserError, match="BEST_METRIC = 'auc': the held-out rows give accuracy; name one"):
        reward_metrics.check_metric('BEST_METRIC', 'auc', [alike])


# Intervals.


GROUPED = [{'group': 'a', 'inputs_pretokenized': 'x'}, {'group': 'b', 'opening': 1}, {'group': 'a', 'opening': 1}]


def test_rows_are_drawn_by_group_where_all_have_one(caplog):
    caplog.set_level('INFO', 'perl_jax')
    assert intervals.groups('test', GROUPED) == ['a', 'b', 'a']
    assert 'test: intervals over 3 rows, in 2 groups by `group`' in caplog.text
    assert intervals.groups('test', [*GROUPED, {}]) == ['0', '1', '2', '3']
    assert 'test: intervals over 4 rows, each by itself' in caplog.text
    assert intervals.groups('test', GROUPED[1:], 'opening') == ['1', '1']


def test_a_group_that_a_row_has_not_is_refused():
    with pytest.raises(UserError, match=r'--group=opening: an example of test has no such field; it has group$'):
        intervals.groups('test', GROUPED, 'opening')


NEAR = [{'group': 'abcd'[i // 2], 'nearness': 'near' if i < 2 else 'far', 'size': i % 3} for i in range(8)]


def test_rows_of_each_value_are_measured_apart(caplog):
    """Rows 0, 1 are near, and one group; 2 to 7 are far, and three."""
    caplog.set_level('INFO', 'perl_jax')
    values = np.arange(8.0)
    measure = lambda rows: {'mean': float(values[rows].mean())}  # noqa: E731
    got = intervals.figures('test', NEAR, measure)
    assert {name: (figure.value, figure.rows) for name, figure in got.items()} == {
        'mean': (3.5, 8), 'near/mean': (0.5, 2), 'far/mean': (4.5, 6)
    }  # fmt: skip
    assert got['far/mean'][:3] == intervals.with_intervals(lambda rows: measure(2 + rows), list('bbccdd'))['mean']
    assert 'test, nearness far: intervals over 6 rows, in 3 groups by `group`' in caplog.text
    sizes = intervals.figures('test', NEAR, measure, by='size')
    assert {name: figure.rows for name, figure in sizes.items()} == {'mean': 8, '0/mean': 3, '1/mean': 3, '2/mean': 2}
    assert intervals.figures('test', GROUPED, measure).keys() == {'mean'}, 'rows that do not say'
    with pytest.raises(UserError, match=r'--by=near: an example of test has no such field; it has'):
        intervals.figures('test', NEAR, measure, by='near')


def test_a_figure_says_its_groups_and_a_contexts_mean_its_contexts():
    measure = lambda rows: {'mean': float(rows.mean()), 'context_accuracy': 0.5}  # noqa: E731
    result = intervals.figures('test', NEAR, measure, contexts={'context_accuracy': list('aabbbbcc')})
    counts = {name: (figure.rows, figure.groups, figure.contexts) for name, figure in result.items()}
    assert counts == {
        'mean': (8, 4, None), 'context_accuracy': (8, 4, 3), 'near/mean': (2, 1, None),
        'near/context_accuracy': (2, 1, 1), 'far/mean': (6, 3, None), 'far/context_accuracy': (6, 3, 2),
    }  # fmt: skip
    assert {figure.group_field for figure in result.values()} == {'group'}
    (alone,) = intervals.figures('test', [{}, {}], lambda rows: {'mean': 0.0}).values()
    assert (alone.groups, alone.group_field) == (2, None)


def test_eval_prints_its_columns_below_each_other_and_what_each_figure_counts(tmp_path, capsys):
    names = 'auc', 'context_accuracy', 'a_metric_with_a_long_name'
    result = {name: intervals.Figure(0.5, 0.25, 0.75, 108, 34, 'group') for name in names}
    result['context_accuracy'] = result['context_accuracy']._replace(contexts=46)
    infer._report(str(tmp_path), 'test', result)
    *lines, _ = capsys.readouterr().out.splitlines()
    assert len({line.index('95% [') for line in lines}) == 1
    assert [line.rpartition(']   ')[2] for line in lines] == ['108 rows', '46 contexts', '108 rows']
    assert json.loads((tmp_path / 'eval_test.json').read_text())['auc'] == {
        'value': 0.5, 'low': 0.25, 'high': 0.75, 'rows': 108, 'groups': 34, 'group_field': 'group', 'contexts': None
    }  # fmt: skip


def test_eval_says_where_no_interval_can_be_given(tmp_path, capsys):
    figures = intervals.figures('test', [{}, {}], lambda rows: {'margin': 3.0, 'auc': 1.0}, rates=('auc',))
    infer._report(str(tmp_path), 'test', figures)
    margin, auc, _ = capsys.readouterr().out.splitlines()
    assert '3.0000   95% [none, all groups are equal]   2 rows' in margin and '1.0000   95% [0.1581, 1.0000]' in auc
    written = json.loads((tmp_path / 'eval_test.json').read_text())
    assert written['margin']['low'] is None and written['auc']['low'] == pytest.approx(0.025**0.5)


@pytest.mark.parametrize(('by', 'subset'), [(None, ['near', 'far']), ('size', ['1', '2'])])
def test_answers_say_which_rows_are_also_judged_apart(monkeypatch, by, subset):
    examples = [{'group': 'a', 'nearness': 'near', 'size': 1}, {'group': 'b', 'nearness': 'far', 'size': 2}]
    run_vocabulary = SimpleNamespace(apply_to=lambda config: config, name='x')
    answers = [{'ids': {'response': [5, 1]}}, {'ids': {'response': [5]}}]
    monkeypatch.setattr(infer.vocabulary, 'of_run', lambda *args: run_vocabulary)
    monkeypatch.setattr(infer.datasets, 'load', lambda *args: Dataset({}, examples, None, (1,)))
    monkeypatch.setattr(infer, '_answers', lambda *args, **kwargs: answers)
    config = DatasetConfig('x', {'inputs': 8}, 4)
    rows = infer.answer_split('', SimpleNamespace(path=None), config, sampling=None, by=by)
    assert [(row['group'], row['subset']) for row in rows] == list(zip('ab', subset))


@pytest.mark.parametrize('flag', ['group', 'by'])
@pytest.mark.parametrize('command', ['eval_reward', 'eval_policy', 'answer_split'])
def test_a_field_that_rows_lack_is_refused_before_they_are_scored(monkeypatch, tmp_path, command, flag):
    def scored(*args, **kwargs):
        raise AssertionError('scored or answered')

    rows = Dataset({}, [{'group': 'a'}], None, 1)
    run_vocabulary = SimpleNamespace(apply_to=lambda config: config, name='x')
    monkeypatch.setattr(infer.vocabulary, 'of_run', lambda *args: run_vocabulary)
    monkeypatch.setattr(infer.datasets, 'reward_kind', lambda name: 'pairs')
    monkeypatch.setattr(infer.datasets, 'load', lambda *args: rows)
    monkeypatch.setattr(infer.datasets, 'tasks_with_rows', lambda *args: [(None, rows, [])])
    monkeypatch.setattr(infer, 'load_members', lambda *args: (None, None))
    monkeypatch.setattr(infer, '_answers', scored)
    monkeypatch.setattr(infer.reward_metrics, 'scores', scored)
    base, config = SimpleNamespace(path=None, network=None), DatasetConfig('x', {'inputs': 8, 'targets': 8}, 4)
    settings = {} if command == 'eval_reward' else {'sampling': None}
    with pytest.raises(UserError, match=f'--{flag}=other: an example of .*validation has no such field; it has group'):
        getattr(infer, command)(str(tmp_path), base, config, **settings, **{flag: 'other'})


def interval(values, groups, **options):
    measure = lambda rows: {'mean': float(np.mean(values[rows]))}  # noqa: E731
    return intervals.with_intervals(measure, groups, **options)['mean']


def test_intervals_of_a_mean_are_those_of_theory():
    values = np.random.default_rng(0).standard_normal(400)
    mean, low, high = interval(values, [str(i) for i in range(400)])
    assert mean == pytest.approx(values.mean())
    spread = 1.96 * values.std() / 20
    assert [low, high] == pytest.approx([mean - spread, mean + spread], abs=0.02)


def test_whole_groups_are_drawn():
    """20 groups of 20 equal rows know no more than 20 rows."""
    values = np.random.default_rng(0).standard_normal(20)
    _, low, high = interval(values, [str(i) for i in range(20)])
    _, grouped_low, grouped_high = interval(np.repeat(values, 20), [str(i // 20) for i in range(400)])
    assert grouped_high - grouped_low == pytest.approx(high - low, rel=0.1)
    _, apart_low, apart_high = interval(np.repeat(values, 20), [str(i) for i in range(400)])
    assert apart_high - apart_low < 0.4 * (high - low)


def test_intervals_repeat_with_the_seed():
    values, groups = np.random.default_rng(0).standard_normal(30), [str(i) for i in range(30)]
    assert interval(values, groups, draws=50) == interval(values, groups, draws=50)
    assert interval(values, groups, draws=50) != interval(values, groups, draws=50, seed=1)


def test_draws_without_one_class_are_left_out():
    labels, logits = np.array([1.0, 0, 0, 0]), np.array([3.0, 2.0, 1.0, 4.0])
    got = intervals.with_intervals(lambda rows: reward_metrics.classification(logits[rows], labels[rows]), list('abcd'))
    assert got['auc'][0] == pytest.approx(2 / 3)
    assert all(0 <= x <= 1 for x in got['auc'])


# Over a data set.


def dataset(n):
    """Prompts whose first token is their number."""
    inputs, mask = np.zeros((n, 3), np.int32), np.ones((n, 3), bool)
    inputs[:, 0] = np.arange(n)
    examples = [{'inputs_pretokenized': f'question {i}', 'reference': f'answer {i}'} for i in range(n)]
    return Dataset({'inputs': inputs, 'inputs_mask': mask}, examples, Words(), 1)


class Words:
    def decode(self, ids):
        return ' '.join(map(str, ids))


def test_scores_are_those_of_every_row_once():
    got = reward_metrics.scores([dataset(7), dataset(2)], 3, Partitioner(), lambda batch: batch.inputs[:, :2] * 0.5)
    assert [x.shape for x in got] == [(7, 2), (2, 2)]
    np.testing.assert_array_equal(got[0][:, 0], 0.5 * np.arange(7))


def test_answers_are_rows_with_texts_scores_and_judgements():
    seen = []

    def respond(prompts, examples, i):
        seen.append((i, [e['reference'] for e in examples]))
        first = np.asarray(prompts.inputs)[:, 0]
        targets = np.stack([first + 10, [1] * 3, [9] * 3], axis=1)[:, None]
        mask = np.arange(3) < np.where(first == 4, 2, 1)[:, None, None]
        rollout = types.Rollout(prompts.inputs, prompts.inputs_mask, targets, mask, np.zeros(targets.shape))
        return rollout, {'score': prompts.inputs[:, :1] * 0.1}

    judge = lambda prompt, response, example: len(prompt) + (example['reference'][-1] == response[-1])  # noqa: E731
    rows = answering.answer_all(dataset(5), 3, Partitioner(), respond, {'truth': judge})
    assert [i for i, _ in seen] == [0, 1]
    assert rows[3] == {
        'prompt': 'question 3', 'response': '13', 'tokens': 1, 'score': pytest.approx(0.3), 'truth': 11.0,
        'reference': 'answer 3',
    }  # fmt: skip
    assert [row['prompt'] for row in rows] == [f'question {i}' for i in range(5)]
    assert rows[4]['tokens'] == 2
    means = answering.means(rows)
    assert means == {'length': pytest.approx(6 / 5), 'score': pytest.approx(0.2), 'truth': pytest.approx(10 + 4 / 5)}
    assert answering.anchor_columns(rows[3]) == {
        'sft_response': '13', 'sft_tokens': 1, 'sft_score': pytest.approx(0.3), 'sft_truth': 11.0
    }  # fmt: skip
