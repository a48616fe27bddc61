"""What is odd about the rows of a task, counted: pairs that prefer nothing, repeats, contradictions, leaks of splits.

    notes = oddities.Notes();  for row in rows: notes.add(row);  print(notes.lines('train', {'test': other_notes}))
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

SIZE = 16  # bytes of a hash
_ANSWERS = ('targets', 'chosen', 'rejected')


class Notes:
    """Counts over the rows of one split; of each row hashes alone are kept."""

    def __init__(self) -> None:
        self.count = self.repeats = self.equal = 0
        self.empty: collections.Counter[str] = collections.Counter()  # rows by answer
        self.prompts: collections.Counter[bytes] = collections.Counter()
        self.groups: set[bytes] = set()
        self._rows: set[bytes] = set()
        self._pairs: set[bytes] = set()
        self._thumbs: dict[bytes, set[float]] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """Look at a row as SeqIO gives it: features [T] of tokens, `label` and `group`."""
        self.count += 1
        texts = {name: _hash(row[name]) for name in ('inputs', *_ANSWERS) if name in row}
        whole = b''.join(texts.values()) + _hash([row.get('label', 0)])
        self.repeats += whole in self._rows
        self._rows.add(whole)
        self.prompts[texts['inputs']] += 1
        for name in _ANSWERS:
            if name in row and _is_empty(row, name):
                self.empty[name] += 1
        if 'chosen' in texts:
            self.equal += texts['chosen'] == texts['rejected']
            self._pairs.add(texts['inputs'] + texts['chosen'] + texts['rejected'])
        if 'label' in row:
            self._thumbs.setdefault(texts['inputs'] + texts['targets'], set()).add(float(row['label']))
        if 'group' in row:
            self.groups.add(_hash(row['group']))

    def lines(self, split: str, others: Mapping[str, Notes]) -> list[str]:
        """One line for each kind that there is.

        Args:
          split: the name of this split.
          others: the notes of other splits, by their names.
        """
        parts = [(pair[:SIZE], pair[SIZE:-SIZE], pair[-SIZE:]) for pair in self._pairs]
        both = sum(one != other and inputs + other + one in self._pairs for inputs, one, other in parts) // 2
        counts = [
            (self.equal, 'pairs whose chosen and rejected are one text: they prefer nothing'),
            (both, 'pairs that are there in both directions'),
            (sum(len(labels) > 1 for labels in self._thumbs.values()), 'answers with thumbs of both kinds'),
            (self.repeats, 'rows that repeat another one'),
            *((n, f'rows whose {name} is empty: a run drops them') for name, n in self.empty.items()),
        ]
        for name, other in others.items():
            prompts = sum(n for prompt, n in self.prompts.items() if prompt in other.prompts)
            counts.append((prompts, f"rows whose inputs are in '{name}' too"))
            counts.append((len(self.groups & other.groups), f"groups that are in '{name}' too"))
        return [f"warning: {split}: {n:,} of {self.count:,} {what}" for n, what in counts if n]


def _is_empty(row: Mapping[str, Any], name: str) -> bool:
    text = row.get(f'{name}_pretokenized')
    return not len(row[name]) if text is None else not bytes(text).strip()


def _hash(value: Any) -> bytes:
    data = value if isinstance(value, bytes) else np.asarray(value).tobytes()
    return hashlib.blake2b(data, digest_size=SIZE).digest()
