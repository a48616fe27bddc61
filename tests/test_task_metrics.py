"""What `perl_jax eval` measures by a task's own functions, against SeqIO's own Evaluator conventions."""
# ruff: noqa: F811 (a fixture is shared by importing it)

import functools
import json
import types

import numpy as np
import pytest
import seqio
from test_providers import BYTES, TOKENIZE, add, rows, said  # noqa: F401
from toy_runs import perl, quoted, ran, toy, toys  # noqa: F401

from perl_jax.data.datasets import DatasetConfig
from perl_jax.errors import UserError
from perl_jax.evals import infer, task_metrics


def exact(targets, predictions):
    return {'exact': np.mean([t == p for t, p in zip(targets, predictions, strict=True)])}


def scored(targets, scores):
    return {'mean': np.mean(scores)}


def post(text, example=None, is_target=False):
    """Upper case, and behind a prediction its prompt: so that what was called with what can be told."""
    assert isinstance(example['inputs_pretokenized'], bytes)
    return text.upper() if is_target else f'{text}'.upper().strip()


def measured(name, responses):
    task = seqio.TaskRegistry.get(name)
    examples = list(task.get_dataset(None, 'train', shuffle=False).as_numpy_iterator())
    return task_metrics.measure(task, examples, responses)


def test_targets_and_answers_are_postprocessed_as_by_seqio():
    name = add(rows(4), postprocess_fn=post, metric_fns=[exact])
    assert measured(name, ['yes ', 'YES', 'no', 'y']) == {f'{name}/exact': 0.5}
    task = seqio.TaskRegistry.get(name)
    examples = list(task.get_dataset(None, 'train', shuffle=False).as_numpy_iterator())
    metric = seqio.metrics.PassthroughLegacyMetric.from_metric_fn(exact, task.postprocess_fn)
    answers = ['yes', 'no', 'YES', 'y']
    tokens = np.array([[*BYTES.encode(x.ljust(4)), 1] for x in answers])
    made = metric.from_model_output(tokens, tokens, task.output_features)
    own, _ = made.actual_compute(examples, task.output_features)
    assert own['exact'] == measured(name, answers)[f'{name}/exact'] == 0.5


def test_targets_without_a_text_are_decoded_and_numbers_alone_are_kept():
    def kinds(targets, predictions):
        return {'n': len(targets), 'same': seqio.metrics.Scalar(targets == predictions), 'text': 'x', 'row': [1, 2]}

    bare = functools.partial(TOKENIZE, copy_pretokenized=False)
    name = add(rows(2), bare, seqio.preprocessors.append_eos, metric_fns=[kinds])
    assert measured(name, ['yes', 'yes']) == {f'{name}/n': 2, f'{name}/same': 1}


def test_what_cannot_be_used_is_named(said):
    assert not task_metrics.has_predict_metrics(seqio.TaskRegistry.get(add(rows(2), metric_fns=[scored])))
    assert 'not used are scored' in said.text
    bare = seqio.TaskRegistry.get(add(rows(2), metric_fns=[exact], features=('inputs',)))
    assert not task_metrics.has_predict_metrics(bare) and 'exact (the task has no targets)' in said.text
    assert not task_metrics.has_predict_metrics(seqio.TaskRegistry.get(add(rows(2))))
    odd = seqio.TaskRegistry.get(add(rows(2), metric_fns=[lambda a, b: {}]))
    with pytest.raises(UserError, match=f"task '{odd.name}': Metric functions must have positional arguments"):
        task_metrics.has_predict_metrics(odd)


def test_their_intervals_are_over_groups_too(monkeypatch, tmp_path):
    """Twenty groups of twenty equal rows: METRIC_FNS and the task's own metric say the same, and as uncertainly."""
    fields = [{'inputs': f'q{i}', 'targets_pretokenized': b'%d' % (g % 2), 'group': f'g{g}'}
              for g in range(20) for i in range(20)]  # fmt: skip

    def ones(targets, predictions):
        return {'ones': sum(target == '1' for target in targets) / len(targets)}

    task = seqio.TaskRegistry.get(add(rows(2), metric_fns=[ones]))
    answers = [{'prompt': '', 'response': '', 'ones': float(row['targets_pretokenized'] == b'1')} for row in fields]
    part = types.SimpleNamespace(examples=[{'group': row['group']} for row in fields])
    monkeypatch.setattr(infer.vocabulary, 'of_run', lambda *args: types.SimpleNamespace(apply_to=lambda config: config))
    monkeypatch.setattr(infer.datasets, 'tasks_with_rows', lambda *args: [(task, part, fields)])
    monkeypatch.setattr(infer.datasets, 'concatenate', lambda parts: parts[0])
    monkeypatch.setattr(infer, '_answers', lambda *args, **kwargs: answers)
    config = DatasetConfig(task.name, {'inputs': 8, 'targets': 8}, 4)
    figures = infer.eval_policy(str(tmp_path), types.SimpleNamespace(path=None), config, sampling=None)
    want, got = figures['ones'], figures[f'{task.name}/ones']
    assert got.value == want.value == 0.5 and want.high - want.low > 0.3
    np.testing.assert_allclose([got.low, got.high], [want.low, want.high], atol=0.06)  # fewer draws


def first_word(text, example=None, is_target=False):
    return text.split(' ')[0]


def test_eval_measures_them_of_a_finished_run(toys, tmp_path):
    task = seqio.TaskRegistry.get('toy_sft')
    if 'metrics_toy' not in seqio.TaskRegistry.names():
        seqio.TaskRegistry.add(
            'metrics_toy', task.source, task.output_features, task.preprocessors, first_word, [exact]
        )
        seqio.MixtureRegistry.add('metrics_mixture', [('metrics_toy', 1.0), ('toy_sft', 1.0)])
    named = quoted('eval/data.DatasetConfig.mixture_or_task_name', 'metrics_mixture')
    flags = '--gin.PROMPTS_DATASET=@eval/data.DatasetConfig()', '--gin.METRIC_FNS=None', named
    result = ran('eval', f'--model_dir={toys.sft}', *flags)
    found = json.loads((toys.sft / 'eval_validation.json').read_text())['metrics_toy/exact']
    assert 'metrics_toy/exact' in result.out and found['low'] <= found['value'] <= found['high']
    argv = toy('sft', tmp_path / 'run', '--gin.TRAIN_STEPS=1', '--gin.PROMPTS_DATASET=None', '--gin.EVAL_DATASET=None')
    run = perl(*argv, quoted('MIXTURE_OR_TASK_NAME', 'metrics_mixture'))
    assert 'training does not call the metric_fns of metrics_toy; `perl_jax eval` does' in run.err
