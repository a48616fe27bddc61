"""A task's own `metric_fns` and `postprocess_fn`, called as SeqIO's Evaluator calls them: by `perl_jax eval`."""

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
    """Says of tasks with metrics where those are measured, since training calls none."""
    for name in (each.task_name for each in config.each()):
        if having := [task.name for task in providers.members(providers.find(name)) if _names(task)]:
            where = '`perl_jax eval` does' if phase != 'reward' else 'nor does eval: they are of answers'
            logging.getLogger('perl_jax').info(f'training does not call the metric_fns of {", ".join(having)}; {where}')


def usable(task: Any) -> bool:
    """Whether the task has functions of targets and predictions; its other metrics are named as not used."""
    _names(task)
    objects = task.metric_objs[: len(task.metric_objs) - len(task.metric_fns)]  # its own come before its functions
    unused = [f.__name__ for f in (*task.score_metric_fns, *task.predict_with_aux_metric_fns)]
    unused += [type(x).__name__ if not isinstance(x, type) else x.__name__ for x in objects]
    found = task.predict_metric_fns
    if found and not {'targets', 'targets_pretokenized'} & task.output_features.keys():
        unused, found = unused + [f'{_name(f)} (the task has no targets)' for f in found], []
    if unused:
        said = f"task '{task.name}': not used are {', '.join(unused)}: only functions of targets and predictions are"
        logging.getLogger('perl_jax').warning(said)
    return bool(found)


def measure(task: Any, rows: Sequence[Row], responses: Sequence[str]) -> dict[str, float]:
    """What the task's functions of targets and predictions say of one response to each of its rows.

    Args:
      rows: as SeqIO gives them, texts as bytes.
      responses: decoded; like the targets they go through postprocess_fn, with `example` and `is_target`.

    Returns:
      Every metric that is a number, by TASK/NAME.
    """
    targets = [task.postprocess_fn(_target(task, row), example=row, is_target=True) for row in rows]
    predictions = [
        task.postprocess_fn(text, example=row, is_target=False) for text, row in zip(responses, rows, strict=True)
    ]
    found = [item for f in task.predict_metric_fns for item in f(targets=targets, predictions=predictions).items()]
    values = {f'{task.name}/{name}': getattr(value, 'value', value) for name, value in found}
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
    except ValueError as error:  # of functions with other arguments than SeqIO's
        raise UserError(f"task '{task.name}': {' '.join(str(error).split())}") from error


def _name(function: Any) -> str:
    return getattr(function, '__name__', type(function).__name__)
