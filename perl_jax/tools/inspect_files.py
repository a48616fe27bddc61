"""`perl_jax inspect --data`: what a user's rows are taken for, before `inspect_task` shows them."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence

from perl_jax.printing import printable
from perl_jax.tasks.user_files import recognition, task
from perl_jax.tasks.user_files.form import Form, Kind

KINDS: tuple[Kind, ...] = typing.get_args(Kind)


def show(paths: str | Sequence[str], columns: Mapping[str, str], kind: Kind | None, model: str | None) -> str:
    """Print what the rows are, and register them as a task.

    Args:
      paths, columns: as in `task.task`.
      kind: as what to show the rows; None: as the most that they can train.
      model: whose chat template to write prompts in, if it has one.

    Returns:
      The task's name.
    """
    summary = recognition.summarise(task.to_place(paths), Form('prompts', task.to_columns(columns)))
    for line in recognition.lines(summary):
        print(printable(line))
    return task.task(paths, kind or typing.cast(Kind, summary.schema.kind), columns=columns, model=model)
