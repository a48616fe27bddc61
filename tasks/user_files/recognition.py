"""What the rows of files are, before a task is made of them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

from perl_jax.errors import UserError
from perl_jax.tasks import sources
from perl_jax.tasks.sources import files
from perl_jax.tasks.user_files import schemas
from perl_jax.tasks.user_files.form import Form

PHASES = {'sft': 'sft', 'pairs': 'reward', 'thumbs': 'reward', 'prompts': 'policy'}  # by the kind of rows they read
HINT = 'name a file, a folder, a pattern, hf:OWNER/NAME or tfds:NAME'


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the rows of all splits are.

    Attributes:
      schema: that of most rows.
      columns: {our name: the rows'} of the columns that it reads.
      unused: other columns.
      counts: rows of each form, by its name.
      reason: why the first unrecognised row is of none, if there is one.
    """

    schema: schemas.Schema
    columns: Mapping[str, str]
    unused: tuple[str, ...]
    counts: Mapping[str, int]
    reason: str | None


def source(form: Form) -> sources.Source:
    """Returns the source that reads rows as a form says; a row's split does not depend on the form."""
    return sources.Source('PATHS', None, HINT, form, files=(*files.READERS, *files.TABLES), split=_split)


def _split(row: Mapping[str, Any]) -> str | None:
    if (value := row.get('split')) is None:
        return None
    if (split := sources.split_named(str(value))) is None:
        raise ValueError(f'split is {value!r}; known are train.., validation.. (valid, val, dev, eval) and test..')
    return split


def summarise(place: sources.Place, form: Form) -> Summary:
    """Look at the columns of all rows.

    Raises:
      UserError: there are none, or none is of a known form.
    """
    recognised, names, reason = collections.Counter(), set(), None
    for rows in sources.rows_by_split(source(form), place).values():
        for where, row in rows():
            try:
                if not isinstance(row, Mapping):
                    raise ValueError(f'not an object but {str(row)[:40]!r}')
                form_of_row = form.recognise(form.with_prompt(row))
                recognised[form_of_row.schema, tuple(form_of_row.columns.items())] += 1
                names |= row.keys()
            except (KeyError, ValueError) as error:
                reason = reason or f'{where}: {error}'
    if not recognised:
        raise UserError(f'PATHS={place}: {reason or "no rows"}')
    (schema, columns), _ = recognised.most_common(1)[0]
    counts = collections.Counter()
    for (other_schema, _), count in recognised.items():
        counts[other_schema.name] += count
    read = {column for _, columns_of_form in recognised for _, column in columns_of_form}
    return Summary(schema, dict(columns), tuple(sorted(map(str, names - read - {'split'}))), counts, reason)


def lines(summary: Summary) -> list[str]:
    """Returns the summary as text, a line for each of: the form, further forms, columns that are not read."""
    schema, uses = summary.schema, schemas.USES[summary.schema.kind]
    read = ', '.join(f'{name} = {column}' if name != column else name for name, column in summary.columns.items())
    phases = ', '.join(phase for phase in ('sft', 'reward', 'policy') if phase in {PHASES[use] for use in uses})
    text = [f'recognised: {schema.name} ({read}) in {summary.counts[schema.name]:,} rows; they serve {phases}']
    text += [f'also: {n:,} rows of {name}' for name, n in summary.counts.items() if name != schema.name]
    text += [f'not read: {", ".join(map(repr, summary.unused))}'] if summary.unused else []
    return text + ([f'not recognised: {summary.reason}'] if summary.reason else [])
