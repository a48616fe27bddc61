"""The `metric_fns` and `postprocess_fn` of SeqIO tasks, called by `perl_jax eval` as SeqIO's Evaluator calls them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perl_jax.data import providers
from perl_jax.data.datasets import DatasetConfig
from perl_jax.errors import UserError
from perl_jax.tokenizers.chat.controls import unmark

Row = Mapping[str, Any]


def announce(config: DatasetConfig, phase: str) -> None:
    """Log that training does not compute the metric_fns of these tasks, and which command does."""
    for name in (each.task_name for each in config.each()):
        if task_names := [task.name for task in providers.members(providers.find(name)) if _names(task)]:
            where = '`perl_jax eval` does' if phase != 'reward' else 'nor does eval: they are of answers'
            logging.getLogger('perl_jax').info(
                f'training does not call the metric_fns of {", ".join(task_names)}; {where}'
            )


def has_predict_metrics(task: Any) -> bool:
    """Tell whether the task has functions of targets and predictions; logs a warning that names unused metrics."""
    _names(task)
    metric_objs = task.metric_objs[
        : len(task.metric_objs) - len(task.metric_fns)
    ]  # SeqIO appends the wrapped functions
    unused = [f.__name__ for f in (*task.score_metric_fns, *task.predict_with_aux_metric_fns)]
    unused += [type(x).__name__ if not isinstance(x, type) else x.__name__ for x in metric_objs]
    metric_fns = task.predict_metric_fns
    if metric_fns and not {'targets', 'targets_pretokenized'} & task.output_features.keys():
        unused, metric_fns = unused + [f'{_name(f)} (the task has no targets)' for f in metric_fns], []
    if unused:
        warning = f"task '{task.name}': not used are {', '.join(unused)}: only functions of targets and predictions are"
        logging.getLogger('perl_jax').warning(warning)
    return bool(metric_fns)


def measure(task: Any, rows: Sequence[Row], responses: Sequence[str]) -> dict[str, float]:
    """Compute the task's functions of targets and predictions on one response to each row.

    Args:
      task: a SeqIO task.
      rows: as SeqIO yields them, texts as bytes.
      responses: decoded texts. Responses and targets go through the task's postprocess_fn, which receives `example` and
        `is_target`.

    Returns:
      {TASK/NAME: value} for every metric that is a number.
    """
    targets = [task.postprocess_fn(_target(task, row), example=row, is_target=True) for row in rows]
    predictions = [
        task.postprocess_fn(text, example=row, is_target=False) for text, row in zip(responses, rows, strict=True)
    ]
    results = [item for f in task.predict_metric_fns for item in f(targets=targets, predictions=predictions).items()]
    values = {f'{task.name}/{name}': getattr(value, 'value', value) for name, value in results}
    return {name: float(value) for name, value in values.items() if _is_number(value)}


def _target(task: Any, row: Row) -> str:
    if 'targets_pretokenized' in row:
        return unmark(row['targets_pretokenized'].decode())
    return task.output_features['targets'].vocabulary.decode([int(token) for token in row['targets']])


def _is_number(value: Any) -> bool:
    return np.ndim(value) == 0 and np.asarray(value).dtype.kind in 'biuf'


def _names(task: Any) -> list[str]:
    try:
        return [_name(f) for f in task.metric_fns] + [type(x).__name__ for x in task.metric_objs]
    except ValueError as error:  # SeqIO refuses functions whose arguments it does not know
        raise UserError(f"task '{task.name}': {' '.join(str(error).split())}") from error


def _name(function: Any) -> str:
    return getattr(function, '__name__', type(function).__name__)
