"""What every reader of a data set does with rows that it cannot read: counts and names them, and stops at too many."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

from perl_jax.errors import UserError

OTHER_SPLIT = object()  # what `read` gives for a row that says it is of another split
MAX_BAD_ROWS = 0.01  # the share of unreadable rows beyond which loading stops


def parse(
    name: str,
    rows: Iterable[tuple[str, Any]],
    read: Callable[[Any], Any],
    unique: Callable[[list], list] = list,
    most: float = MAX_BAD_ROWS,
) -> list:
    """Reads the rows [(place, content)]; those that cannot be read are counted and named, and a few are let pass.

    Args:
      name: what the rows are of, for messages: a file, a pattern, a data set.
      read: from a row's content to what is kept; None for a good row that is not asked for, OTHER_SPLIT for one that
        is not even counted. A KeyError, TypeError or ValueError says what is wrong with a row.
      unique: drops duplicates among what was read.
      most: the share of unreadable rows that is let pass.

    Raises:
      UserError: more than `most` of the rows cannot be read.
    """
    good, bad = [], []
    for place, row in rows:
        try:
            good.append(read(row))
        except KeyError as error:
            bad.append((place, f'it lacks {error}'))
        except (TypeError, ValueError, AttributeError) as error:
            bad.append((place, str(error)))
    good = [row for row in good if row is not OTHER_SPLIT]
    total = len(good) + len(bad)
    good = [row for row in good if row is not None]
    unique_rows = unique(good)
    if bad:
        places = ', '.join(place for place, _ in bad[:20]) + (', ...' if len(bad) > 20 else '')
        report = f'{name}: {len(bad)} of {total} rows cannot be read: {places} (the first: {bad[0][1]})'
        if len(bad) > most * total:
            raise UserError(f'{report}; more than {most:.0%} is too many: mend the data or get it again')
        print(f'warning: {report}; left out, as are {len(good) - len(unique_rows)} duplicates', file=sys.stderr)
    return unique_rows
