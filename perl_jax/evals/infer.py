"""A finished run, measured again or asked: what `perl_jax eval` and `sample` do, and what `judge` asks a run.

gin calls these with the run's own config.gin, so that base, tasks, lengths and sampling are those it was trained with.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from perl_jax.data import datasets, texts, vocabulary
from perl_jax.data.datasets import DatasetConfig
from perl_jax.errors import UserError
from perl_jax.evals import answering, calibration, intervals, reward_metrics, task_metrics
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rewards.scoring import member_scores
from perl_jax.rewards.text_functions import TextFunction, functions
from perl_jax.rl.sampling import SamplingConfig, make_sampler
from perl_jax.runs import rundir
from perl_jax.runs.base import BaseConfig
from perl_jax.runs.bound import bound, members

TASK_METRIC_DRAWS = 100  # for their intervals: a task's metric may take seconds


def eval_reward(
    model_dir: str,
    base: BaseConfig,
    dataset: DatasetConfig | None,
    *,
    split: str = 'validation',
    group: str | None = None,
    by: str | None = None,
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> dict[str, intervals.Figure]:
    """Score a whole split with a reward's best checkpoint; prints the metrics with 95% intervals.

    Of an ensemble it is the members' mean that is measured; of several tasks of one kind, all their rows together.
    `group` is the field of the examples that are drawn together in the bootstrap, and `by` that whose values are
    measured apart, too (intervals.figures). Writes MODEL_DIR/eval_SPLIT.json, and calibration_SPLIT.json, the bins of a
    reliability diagram for each task.
    """
    with partitioner.scope():
        frozen, adapters = members(model_dir, base, partitioner)
        score_fn = jax.jit(functools.partial(member_scores, base.network))
        words, given = vocabulary.of_run(model_dir, [dataset], base.path), _given(dataset)
        configs = [dataclasses.replace(words.read(config), split=split, limit=None) for config in given.each()]
        kinds = [datasets.reward_kind(config.task_name) for config in configs]
        heldout = [datasets.load(config, kind) for config, kind in zip(configs, kinds)]
        rewards = reward_metrics.scores(
            heldout, given.batch_size, partitioner, lambda batch: score_fn(frozen.params, adapters, batch).mean(0)
        )
    bins = {
        config.task_name: calibration.reliability(*calibration.outcomes(one, values))
        for config, one, values in zip(configs, heldout, rewards, strict=True)
    }
    result: dict[str, intervals.Figure] = {}
    for kind in dict.fromkeys(kinds):
        alike = [i for i, other in enumerate(kinds) if other == kind]
        one, values = datasets.joined([heldout[i] for i in alike]), np.concatenate([rewards[i] for i in alike])

        def measure(rows: np.ndarray, one: datasets.Dataset = one, values: np.ndarray = values) -> dict[str, float]:
            some = one.take(rows)
            return reward_metrics.measure([some], [values[rows]]) | calibration.metrics(some, values[rows])

        result |= intervals.figures(f'{kind} of {split}', one.examples, measure, group, by)
    if jax.process_index() == 0:
        rundir.replace(os.path.join(model_dir, f'calibration_{split}.json'), json.dumps(bins, indent=2))
    return _report(model_dir, split, result)


def eval_policy(
    model_dir: str,
    base: BaseConfig,
    dataset: DatasetConfig | None,
    *,
    sampling: SamplingConfig,
    metric_fns: Mapping[str, TextFunction] | None = None,
    split: str = 'validation',
    group: str | None = None,
    by: str | None = None,
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> dict[str, intervals.Figure]:
    """Answer a whole split once and average what `metric_fns` say, with 95% intervals; `group`, `by` as for a reward.

    Where a task has metric_fns of its own, they are measured too, by TASK/NAME. Writes MODEL_DIR/eval_SPLIT.json.
    """
    config = dataclasses.replace(_given(dataset), split=split, limit=None)
    with partitioner.scope():
        config = vocabulary.of_run(model_dir, [config], base.path).read(config)
        parts = datasets.tasks_with_rows(config, 'prompts')
        prompts = datasets.joined([part for _, part, _ in parts])
        given = {'batch_size': config.batch_size, 'sampling': sampling, 'metric_fns': metric_fns}
        rows = _answers(model_dir, base, prompts, **given, partitioner=partitioner)
    measure = lambda index: answering.means([rows[i] for i in index])  # noqa: E731
    result = intervals.figures(split, prompts.examples, measure, group, by)
    responses = iter([row['response'] for row in rows])
    for task, _, examples in parts:
        own = list(itertools.islice(responses, len(examples)))
        if task_metrics.usable(task):
            measure = functools.partial(_task_metrics, task, examples, own)
            found = intervals.with_intervals(measure, list(map(str, range(len(examples)))), TASK_METRIC_DRAWS)
            result |= {name: intervals.Figure(*figure, len(examples)) for name, figure in found.items()}
    return _report(model_dir, split, result)


def sample_policy(
    model_dir: str,
    base: BaseConfig,
    dataset: DatasetConfig | None,
    *,
    sampling: SamplingConfig,
    metric_fns: Mapping[str, TextFunction] | None = None,
    prompt: str | None = None,
    num: int = 5,
    chat: str | None = None,
    tokenizer: Any = None,
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> None:
    """Print answers to `num` prompts of the task, or to a text, for which no data set is needed.

    Args:
      prompt: the text. Of a longer one than the data set's prompts the END is kept; without data set it is whole.
      chat: the format to put it into (RunVocabulary.format).
      tokenizer: what VOCABULARY is.
    """
    if chat is not None and prompt is None:
        raise UserError("sample: --chat is the format of --prompt, and the task's prompts have theirs; give --prompt")
    sampling = dataclasses.replace(sampling, num_microbatches=1)  # so few prompts need no parts
    with partitioner.scope():
        words = vocabulary.of_run(model_dir, [_given(dataset) if prompt is None else dataset], base.path, tokenizer)
        if prompt is None:
            prompts = datasets.load(dataclasses.replace(words.read(_given(dataset)), limit=num), 'prompts')
        else:
            text = prompt.replace('\\n', '\n')  # a literal \n becomes a line break
            text = text if chat is None else words.format(chat)(text)
            length = dataset and dataset.task_feature_lengths.get('inputs')
            prompts, metric_fns = texts.dataset(words.vocabulary, [text], length), None
        batch_size = partitioner.data_parallelism
        given = {'batch_size': batch_size, 'sampling': sampling, 'metric_fns': metric_fns}
        for row in _answers(model_dir, base, prompts, **given, partitioner=partitioner):
            beside = {k: v for k, v in row.items() if k not in ('prompt', 'response')}
            print(f'{row["prompt"]}{row["response"]}\n  {json.dumps(beside)}\n')


def answer_split(
    model_dir: str,
    base: BaseConfig,
    dataset: DatasetConfig | None,
    *,
    sampling: SamplingConfig,
    split: str = 'validation',
    num: int | None = None,
    group: str | None = None,
    anchor: bool = False,
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> list[dict[str, Any]]:
    """One answer to each of the first `num` prompts of a split, for a judge: prompt, response, reference, group, ids.

    ids: the tokens of prompt and response, the vocabulary that they are of, and whether the response ended by itself.
    `anchor` answers with the run's base, as it was before the run. `group` as in intervals.groups.
    """
    config = dataclasses.replace(_given(dataset), split=split, limit=num)
    with partitioner.scope():
        words = vocabulary.of_run(model_dir, [config], base.path)
        config = words.read(config)
        prompts = datasets.load(config, 'prompts')
        rows = _answers(
            model_dir, base, prompts, batch_size=config.batch_size, sampling=sampling, metric_fns=None,
            partitioner=partitioner, anchor=anchor, ids=True,
        )  # fmt: skip
    for row, name in zip(rows, intervals.groups(split, prompts.examples, group), strict=True):
        row['group'] = name
        row['ids'] |= {'vocabulary': words.name, 'ended': row['ids']['response'][-1] in prompts.eos_ids}
    return rows


def _answers(
    model_dir: str,
    base: BaseConfig,
    prompts: datasets.Dataset,
    *,
    batch_size: int,
    sampling: SamplingConfig,
    metric_fns: Mapping[str, TextFunction] | None,
    partitioner: Partitioner,
    anchor: bool = False,
    ids: bool = False,
) -> list[dict[str, Any]]:
    frozen, adapter = bound(model_dir, 'policy', base, partitioner)
    adapter = None if anchor else adapter
    sampling, sample_fn = dataclasses.replace(sampling, num_samples=1), make_sampler(base.network, prompts.eos_ids)
    respond = lambda batch, _, i: (  # noqa: E731
        sample_fn(frozen.params, adapter, batch, jax.random.key(i), sampling), {})  # fmt: skip
    return answering.answer_all(prompts, batch_size, partitioner, respond, functions(metric_fns), ids)


def _task_metrics(task: Any, rows: Sequence[Any], responses: Sequence[str], index: np.ndarray) -> dict[str, float]:
    return task_metrics.measure(task, [rows[i] for i in index], [responses[i] for i in map(int, index)])


def _given(dataset: DatasetConfig | None) -> DatasetConfig:
    """An SFT run need not have sampled at its evaluations, and no run need have had data for them."""
    if dataset is None:
        raise UserError(
            'this run names no data to ask it with; add --gin.EVAL_DATASET=@eval/data.DatasetConfig(), '
            'or for a run of SFT --gin.PROMPTS_DATASET=@eval/data.DatasetConfig(); an imported model needs '
            'MIXTURE_OR_TASK_NAME and TASK_FEATURE_LENGTHS with it'
        )
    return dataset


def _report(model_dir: str, split: str, result: dict[str, intervals.Figure]) -> dict[str, intervals.Figure]:
    if jax.process_index() != 0:
        return result
    for name, (value, low, high, rows) in result.items():
        print(f'{split}  {name:20s} {value:8.4f}   95% [{low:.4f}, {high:.4f}]   {rows:,} rows')
    path = os.path.join(model_dir, f'eval_{split}.json')
    values = {name: figure._asdict() for name, figure in result.items()}
    rundir.replace(path, json.dumps(values, indent=2) + '\n')  # its presence tells that the run is measured
    print(path)
    return result
