"""Splits that keep a group together: rows of one session, post or opening are never on two sides.

    split = splits.by_group('my_data', splits.normalised(row['opening']))      70% train, 15% validation, 15% test
"""

import hashlib
import re
from collections.abc import Iterable

from perl_jax.errors import UserError

NEAR = 0.8  # Jaccard index of the words of two texts, from which on they are near


def normalised(text: str) -> str:
    """Lower case, and every run of what is neither letter nor digit as one space: near copies fall into one group."""
    return re.sub(r'[\W_]+', ' ', text.lower()).strip()


def nearest_jaccard(text: str, others: Iterable[str]) -> float:
    """The largest share that the words of a text have in common with another's: |A and B| / |A or B| of their sets.

    Args:
      text: words with spaces between; see `normalised`.
      others: such texts; 0 where there are none.
    """
    words, sets = set(text.split()), (set(other.split()) for other in others)
    return max((len(words & other) / len(words | other) if words or other else 1.0 for other in sets), default=0.0)


def nearness(group: str, train: Iterable[str]) -> str:
    """Say whether a group of validation or test is 'near' to one of train, that models have seen, or 'far' from all."""
    return 'near' if nearest_jaccard(group, train) >= NEAR else 'far'


def bucket(name: str, group: str) -> int:
    """Where a group lies, from 0 to 99: the same on every machine and for ever.

    Args:
      name: of the data set, so that two of them are divided independently.
    """
    digest = hashlib.sha256(f'perl-split-v1:{name}:{group}'.encode()).hexdigest()
    return int(digest[:8], 16) % 100


def by_group(name: str, group: str, validation: int = 15, test: int = 15) -> str:
    """Say which split a group is in.

    Args:
      name: of the data set.
      group: what its rows share; see `normalised`.
      validation, test: percent of the groups; the rest is train.

    Returns:
      'train', 'validation' or 'test'.

    Raises:
      UserError: shares that leave nothing for train, or that are none.
    """
    if min(validation, test) < 0 or validation + test >= 100:
        raise UserError(f'validation={validation}, test={test}: give percents of 0 and more that leave some for train')
    where = bucket(name, group)
    return 'train' if where < 100 - validation - test else 'validation' if where < 100 - test else 'test'
