"""`perl_jax inspect --data`: what a user's rows are taken for, before `inspect_task` shows them."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence

from perl_jax.printing import printable
from perl_jax.tasks.user_files import recognition, schemas, task
from perl_jax.tasks.user_files.form import Form, Kind

KINDS: tuple[Kind, ...] = typing.get_args(Kind)
PHASES = {'sft': 'sft', 'pairs': 'reward', 'thumbs': 'reward', 'prompts': 'policy'}  # by the kind of rows they read


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
    for line in lines(summary):
        print(printable(line))
    return task.task(paths, kind or typing.cast(Kind, summary.schema.kind), columns=columns, model=model)


def lines(summary: recognition.Summary) -> list[str]:
    """Return the summary as text, a line for each of: the form, further forms, columns that are not read."""
    schema, uses = summary.schema, schemas.USES[summary.schema.kind]
    read = ', '.join(f'{name} = {column}' if name != column else name for name, column in summary.columns.items())
    phases = ', '.join(phase for phase in ('sft', 'reward', 'policy') if phase in {PHASES[use] for use in uses})
    text = [f'recognised: {schema.name} ({read}) in {summary.counts[schema.name]:,} rows; they serve {phases}']
    text += [f'also: {n:,} rows of {name}' for name, n in summary.counts.items() if name != schema.name]
    text += [f'not read: {", ".join(summary.unused)}'] if summary.unused else []
    return text + ([f'not recognised: {summary.reason}'] if summary.reason else [])
