"""Evaluation and sampling of a finished run: `perl_jax eval`, `sample`, and the answers that `judge` compares.

gin calls these functions with the run's config.gin, so that base, tasks, lengths and sampling match its training.
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

from perl_jax.data import datasets, lexicon, texts, vocabulary
from perl_jax.data.datasets import DatasetConfig
from perl_jax.errors import UserError
from perl_jax.evals import answering, calibration, intervals, reward_metrics, task_metrics
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.printing import printable
from perl_jax.rewards.scoring import member_scores
from perl_jax.rewards.text_functions import TextFunction, resolve_functions
from perl_jax.rl.sampling import SamplingConfig, make_sampler
from perl_jax.runs import logs
from perl_jax.runs.base import BaseConfig
from perl_jax.runs.bound import load_members, load_role

TASK_METRIC_DRAWS = 100  # bootstrap draws for a task's metrics, fewer than usual: one evaluation may take seconds


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
    """Score a whole split with a reward's best checkpoint and print the metrics with 95% intervals.

    An ensemble is scored by the mean of its members. The rows of several tasks of one kind (pairs or thumbs) are
    measured together. Writes MODEL_DIR/eval_SPLIT.json, and MODEL_DIR/calibration_SPLIT.json with the bins of a
    reliability diagram for each task.

    Args:
      model_dir: the MODEL_DIR of the reward run.
      base: the base of the run.
      dataset: the evaluation data of the run.
      split: the split to score.
      group: the field by which examples are grouped in the bootstrap (intervals.groups).
      by: the field whose values are also measured separately (intervals.figures).
      partitioner: the devices.

    Returns:
      {metric: Figure}.
    """
    with partitioner.scope():
        frozen_base, adapters = load_members(model_dir, base, partitioner)
        score_fn = jax.jit(functools.partial(member_scores, base.network))
        run_vocabulary, required = vocabulary.of_run(model_dir, [dataset], base.path), _required_dataset(dataset)
        configs = [
            dataclasses.replace(run_vocabulary.apply_to(config), split=split, limit=None) for config in required.each()
        ]
        task_kinds = [datasets.reward_kind(config.task_name) for config in configs]
        eval_datasets = [datasets.load(config, kind) for config, kind in zip(configs, task_kinds)]
        for kind, eval_dataset in zip(task_kinds, eval_datasets):
            intervals.check_fields(f'{kind} of {split}', eval_dataset.examples, group, by)
        rewards = reward_metrics.scores(
            eval_datasets,
            required.batch_size,
            partitioner,
            lambda batch: score_fn(frozen_base.params, adapters, batch).mean(0),
        )
    bins = {
        config.task_name: calibration.reliability(*calibration.outcomes(joined_dataset, values))
        for config, joined_dataset, values in zip(configs, eval_datasets, rewards, strict=True)
    }
    result: dict[str, intervals.Figure] = {}
    for kind in dict.fromkeys(task_kinds):
        indices = [i for i, other in enumerate(task_kinds) if other == kind]
        joined_dataset, values = (
            datasets.concatenate([eval_datasets[i] for i in indices]),
            np.concatenate([rewards[i] for i in indices]),
        )

        def measure(
            rows: np.ndarray, joined_dataset: datasets.Dataset = joined_dataset, values: np.ndarray = values
        ) -> dict[str, float]:
            sampled_rows = joined_dataset.take(rows)
            return reward_metrics.measure([sampled_rows], [values[rows]]) | calibration.metrics(
                sampled_rows, values[rows]
            )

        contexts = {'context_accuracy': reward_metrics.contexts_of(joined_dataset).tolist()}
        result |= intervals.figures(
            f'{kind} of {split}', joined_dataset.examples, measure, group=group, by=by, contexts=contexts,
            rates=reward_metrics.RATES,
        )  # fmt: skip
    if jax.process_index() == 0:
        logs.replace(os.path.join(model_dir, f'calibration_{split}.json'), json.dumps(bins, indent=2))
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
    """Sample one answer to each prompt of a split and report the mean of each metric with a 95% interval.

    The SeqIO metric_fns of a task are reported as TASK/NAME. Writes MODEL_DIR/eval_SPLIT.json.

    Args:
      model_dir: the MODEL_DIR of the SFT run or the policy.
      base: the base of the run.
      dataset: the prompts of the run's evaluations.
      sampling: how answers are drawn, one to a prompt.
      metric_fns: {name: function(prompt, response, example)}.
      split: the split to answer.
      group: the field by which examples are grouped in the bootstrap (intervals.groups).
      by: the field whose values are also measured separately (intervals.figures).
      partitioner: the devices.

    Returns:
      {metric: Figure}.
    """
    config = dataclasses.replace(_required_dataset(dataset), split=split, limit=None)
    with partitioner.scope():
        config = vocabulary.of_run(model_dir, [config], base.path).apply_to(config)
        tasks = datasets.tasks_with_rows(config, 'prompts')
        prompts = datasets.concatenate([task_dataset for _, task_dataset, _ in tasks])
        intervals.check_fields(split, prompts.examples, group, by)
        answer_options = {'batch_size': config.batch_size, 'sampling': sampling, 'metric_fns': metric_fns}
        rows = _answers(model_dir, base, prompts, **answer_options, partitioner=partitioner)
    measure = lambda index: answering.means([rows[i] for i in index])  # noqa: E731
    result = intervals.figures(split, prompts.examples, measure, group=group, by=by)
    responses = iter([row['response'] for row in rows])
    for task, task_dataset, examples in tasks:
        task_responses = list(itertools.islice(responses, len(examples)))
        if task_metrics.has_predict_metrics(task):
            measure = functools.partial(_task_metrics, task, examples, task_responses)
            name = f'{split}, metrics of {task.name}'
            result |= intervals.row_figures(
                name, task_dataset.examples, measure, group=group, draws=TASK_METRIC_DRAWS
            )
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
    """Print answers to `num` prompts of the task, or to the text `prompt`, which needs no dataset.

    Args:
      prompt: the text. If it is longer than the dataset's prompts, its START is cut off; without a dataset nothing is.
      chat: the chat format to apply to the text (RunVocabulary.format).
      tokenizer: the value of VOCABULARY.
    """
    if chat is not None and prompt is None:
        raise UserError("sample: --chat is the format of --prompt, and the task's prompts have theirs; give --prompt")
    sampling = dataclasses.replace(sampling, num_microbatches=1)  # a few prompts fit into memory at once
    with partitioner.scope():
        run_vocabulary = vocabulary.of_run(
            model_dir, [_required_dataset(dataset) if prompt is None else dataset], base.path, tokenizer
        )
        if prompt is None:
            prompts = datasets.load(
                dataclasses.replace(run_vocabulary.apply_to(_required_dataset(dataset)), limit=num), 'prompts'
            )
        else:
            text = prompt.replace('\\n', '\n')  # a literal \n becomes a line break
            text = text if chat is None else run_vocabulary.format(chat)(text)
            prompt_length = dataset and dataset.task_feature_lengths.get('inputs')
            prompts, metric_fns = texts.dataset(run_vocabulary.vocabulary, [text], prompt_length), None
        batch_size = partitioner.data_parallel_size
        answer_options = {'batch_size': batch_size, 'sampling': sampling, 'metric_fns': metric_fns}
        for row in _answers(model_dir, base, prompts, **answer_options, partitioner=partitioner):
            columns = {k: v for k, v in row.items() if k not in ('prompt', 'response')}
            print(f'{printable(row["prompt"] + row["response"])}\n  {json.dumps(columns)}\n')


def answer_split(
    model_dir: str,
    base: BaseConfig,
    dataset: DatasetConfig | None,
    *,
    sampling: SamplingConfig,
    split: str = 'validation',
    num: int | None = None,
    group: str | None = None,
    by: str | None = None,
    anchor: bool = False,
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> list[dict[str, Any]]:
    """Sample one answer to each of the first `num` prompts of a split, as rows for a judge.

    Args:
      num: the number of prompts; None is all.
      group: the field by which examples are grouped (intervals.groups).
      by: the field whose values are also judged separately (intervals.subset_field).
      anchor: whether the base of the run answers, without the run's adapter.

    Returns:
      Rows with prompt, response, reference, group, `subset` (the value of the field `by`, if there is one), and `ids`:
      the token ids of prompt and response, the name of their vocabulary, and whether the response ended with EOS.
    """
    config = dataclasses.replace(_required_dataset(dataset), split=split, limit=num)
    with partitioner.scope():
        run_vocabulary = vocabulary.of_run(model_dir, [config], base.path)
        config = run_vocabulary.apply_to(config)
        prompts = datasets.load(config, 'prompts')
        group_names = intervals.groups(split, prompts.examples, group)
        subset_field = intervals.subset_field(split, prompts.examples, by)
        rows = _answers(
            model_dir, base, prompts, batch_size=config.batch_size, sampling=sampling, metric_fns=None,
            partitioner=partitioner, anchor=anchor, include_token_ids=True,
        )  # fmt: skip
    for row, example, group_name in zip(rows, prompts.examples, group_names, strict=True):
        row |= {'group': group_name} | ({} if subset_field is None else {'subset': str(example[subset_field])})
        row['ids'] |= {'vocabulary': run_vocabulary.name, 'ended': row['ids']['response'][-1] in prompts.eos_ids}
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
    include_token_ids: bool = False,
) -> list[dict[str, Any]]:
    lexicon.check_vocabulary(prompts.vocabulary, base.network.config.vocab_size, [prompts])
    frozen_base, adapter = load_role(model_dir, 'policy', base, partitioner)
    adapter = None if anchor else adapter
    sampling, sample_fn = dataclasses.replace(sampling, num_samples=1), make_sampler(base.network, prompts.eos_ids)
    respond = lambda batch, _, i: (  # noqa: E731
        sample_fn(frozen_base.params, adapter, batch, jax.random.key(i), sampling), {})  # fmt: skip
    return answering.answer_all(
        prompts, batch_size, partitioner, respond, resolve_functions(metric_fns), include_token_ids
    )


def _task_metrics(task: Any, rows: Sequence[Any], responses: Sequence[str], index: np.ndarray) -> dict[str, float]:
    return task_metrics.measure(task, [rows[i] for i in index], [responses[i] for i in map(int, index)])


def _required_dataset(dataset: DatasetConfig | None) -> DatasetConfig:
    """Return the dataset or raise: evaluation data are optional in every run, and prompts to sample for in SFT."""
    if dataset is None:
        raise UserError(
            'the run has no evaluation data; add --gin.EVAL_DATASET=@eval/data.DatasetConfig(), '
            'or for an SFT run --gin.PROMPTS_DATASET=@eval/data.DatasetConfig(); an imported model also needs '
            'MIXTURE_OR_TASK_NAME and TASK_FEATURE_LENGTHS'
        )
    return dataset


def _report(model_dir: str, split: str, result: dict[str, intervals.Figure]) -> dict[str, intervals.Figure]:
    if jax.process_index() != 0:
        return result
    width = max(20, *map(len, result))
    for name, figure in result.items():
        count = f'{figure.rows:,} rows' if figure.contexts is None else f'{figure.contexts:,} contexts'
        interval = intervals.describe(figure.low, figure.high)
        print(f'{split}  {name:{width}s} {figure.value:8.4f}   {interval}   {count}')
    path = os.path.join(model_dir, f'eval_{split}.json')
    values = {name: figure._asdict() for name, figure in result.items()}
    logs.replace(path, json.dumps(values, indent=2) + '\n')  # a sweep takes its presence as: evaluated
    print(path)
    return result
