"""What the rows of files are, before a task is made of them."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Mapping

from perl_jax.errors import UserError
from perl_jax.tasks import sources
from perl_jax.tasks.sources import files
from perl_jax.tasks.user_files import schemas
from perl_jax.tasks.user_files.form import Form

HINT = 'name a file, a folder, a pattern, hf:OWNER/NAME or tfds:NAME'
MAX_ROWS = 1000  # of each split, that are looked at


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the first rows of each split are.

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
    return sources.Source('PATHS', None, HINT, form, files=(*files.READERS, *files.TABLES))


def summarise(place: sources.Place, form: Form) -> Summary:
    """Look at the first rows of each split.

    Raises:
      UserError: there are none, or none is of a known form.
    """
    recognised, names, reason = collections.Counter(), set(), None
    for rows in sources.rows_by_split(source(form), place).values():
        for where, row in itertools.islice(rows(), MAX_ROWS):
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
    return Summary(schema, dict(columns), tuple(sorted(names - set(dict(columns).values()))), counts, reason)
