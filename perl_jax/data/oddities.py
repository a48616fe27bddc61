"""Counts of suspicious rows of a task: pairs with equal responses, repeats, contradictions, leaks between splits.

    statistics = oddities.SplitStatistics()
    for row in rows:
        statistics.add(row)
    print(statistics.lines('train', {'test': test_statistics}))
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

SIZE = 16  # bytes of a hash
_ANSWERS = ('targets', 'chosen', 'rejected')


class SplitStatistics:
    """Counts over the rows of one split; only hashes of the rows are kept in memory."""

    def __init__(self) -> None:
        self.count = self.repeats = self.equal = 0
        self.empty: collections.Counter[str] = collections.Counter()  # rows by answer
        self.blank: collections.Counter[str] = collections.Counter()
        self.prompts: collections.Counter[bytes] = collections.Counter()
        self.groups: set[bytes] = set()
        self._rows: set[bytes] = set()
        self._pairs: set[bytes] = set()
        self._thumbs: dict[bytes, set[float]] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a row as SeqIO yields it: features [T] of tokens, answers with their EOS, `label` and `group`."""
        self.count += 1
        hashes = {name: _hash(row[name]) for name in ('inputs', *_ANSWERS) if name in row}
        row_hash = b''.join(hashes.values()) + _hash([row.get('label', 0)])
        self.repeats += row_hash in self._rows
        self._rows.add(row_hash)
        self.prompts[hashes['inputs']] += 1
        for name in _ANSWERS:
            if name in row and len(row[name]) <= 1:  # the EOS alone
                self.empty[name] += 1
            elif name in row and not bytes(row.get(f'{name}_pretokenized', b'text')).strip():
                self.blank[name] += 1
        if 'chosen' in hashes:
            self.equal += hashes['chosen'] == hashes['rejected']
            self._pairs.add(hashes['inputs'] + hashes['chosen'] + hashes['rejected'])
        if 'label' in row:
            self._thumbs.setdefault(hashes['inputs'] + hashes['targets'], set()).add(float(row['label']))
        if 'group' in row:
            self.groups.add(_hash(row['group']))

    def lines(self, split: str, others: Mapping[str, SplitStatistics]) -> list[str]:
        """Returns one warning for each kind of suspicious row that occurs, out of all rows, distinct answers or groups.

        Args:
          split: the name of this split.
          others: the statistics of other splits, by name.
        """
        pairs = [(pair[:SIZE], pair[SIZE:-SIZE], pair[-SIZE:]) for pair in self._pairs]
        reversals = [x != y and inputs + y + x in self._pairs for inputs, x, y in pairs]
        rows, contradictions = self.count, sum(len(labels) > 1 for labels in self._thumbs.values())
        counts = [
            (self.equal, rows, 'pairs whose chosen and rejected are one text: they prefer nothing'),
            (sum(reversals) // 2, len(pairs), 'distinct pairs that are there in both directions'),
            (contradictions, len(self._thumbs), 'distinct answers with thumbs of both kinds'),
            (self.repeats, rows, 'rows that repeat another one'),
            *((n, rows, f'rows whose {name} is empty: a run drops them') for name, n in self.empty.items()),
            *(
                (n, rows, f'rows whose {name} is white space alone: a run learns from them')
                for name, n in self.blank.items()
            ),
        ]
        for name, other in others.items():
            prompts = sum(n for prompt, n in self.prompts.items() if prompt in other.prompts)
            counts.append((prompts, rows, f"rows whose inputs are in '{name}' too"))
            counts.append((len(self.groups & other.groups), len(self.groups), f"groups that are in '{name}' too"))
        return [f'warning: {split}: {n:,} of {total:,} {description}' for n, total, description in counts if n]


def _hash(value: Any) -> bytes:
    data = value if isinstance(value, bytes) else np.asarray(value).tobytes()
    return hashlib.blake2b(data, digest_size=SIZE).digest()
