"""Rows in memory, and the batches made of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from perl_jax import types
from perl_jax.data.batches import bucketing

Example = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One split of one task, in memory.

    Attributes:
      arrays: the fields of a batch class (types.py) as NumPy arrays: `inputs` int32 [rows, P], `targets` int32
        [rows, K, R], `inputs_mask` and `targets_mask` bool, and `labels` float32 [rows, K] or `weights` float32 [rows].
      examples: each row's texts and other fields.
      vocabulary: a seqio.Vocabulary.
      eos_ids: any of these tokens ends a response; the first ends training targets.
    """

    arrays: dict[str, np.ndarray]
    examples: list[Example]
    vocabulary: Any
    eos_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def eos_id(self) -> int:
        """The token that training targets end with."""
        return self.eos_ids[0]

    @functools.cached_property
    def row_lengths(self) -> dict[str, np.ndarray]:
        """Tokens in each row's prompt and longest response (bucketing.py): {'inputs': [rows], 'targets': [rows]}."""
        return bucketing.row_lengths(self.arrays)

    @functools.cached_property
    def token_counts(self) -> dict[str, np.ndarray]:
        """Tokens in each row's prompt and in all of its responses together: {'inputs': [rows], 'targets': [rows]}."""
        masks = {name: self.arrays[f'{name}_mask'] for name in self.row_lengths}
        return {name: mask.reshape(len(mask), -1).sum(-1) for name, mask in masks.items()}

    @property
    def largest_id(self) -> int:
        """The largest token id in the rows; -1 without rows."""
        return max(int(self.arrays[name].max(initial=-1)) for name in ('inputs', 'targets') if name in self.arrays)

    @property
    def is_weighted(self) -> bool:
        """Whether the rows are pairs with different weights in the loss."""
        return 'weights' in self.arrays

    def weighted(self) -> Dataset:
        """Returns the dataset with weights of its pairs; pairs without weights get 1."""
        return dataclasses.replace(self, arrays={'weights': np.ones(len(self), np.float32)} | self.arrays)

    @property
    def widths(self) -> dict[str, int]:
        """The widths of the arrays: {'inputs': P, 'targets': R}."""
        return {name: self.arrays[name].shape[-1] for name in ('inputs', 'targets') if name in self.arrays}

    @property
    def K(self) -> int:
        """The number of responses to a prompt."""
        return self.arrays['targets'].shape[1]

    def rows(self, index: np.ndarray) -> tuple[Any, list[Example]]:
        """Make a batch of some rows.

        Args:
          index: int [B], the rows.

        Returns:
          The batch of NumPy arrays, of a class of types.py, and the rows' examples.
        """
        batch_class = next(k for k in _BATCH_CLASSES if array_names(k) == self.arrays.keys())
        # NumPy arrays, until they are placed on the mesh.
        arrays: dict[str, Any] = {k: v[index] for k, v in self.arrays.items()}
        return batch_class(**arrays), [self.examples[i] for i in index]

    def take(self, index: np.ndarray) -> Dataset:
        """Returns a dataset of some rows.

        Args:
          index: int [n], the rows.

        Returns:
          A Dataset of n rows.
        """
        arrays = {k: v[index] for k, v in self.arrays.items()}
        return dataclasses.replace(self, arrays=arrays, examples=[self.examples[i] for i in index])

    def batches(
        self, batch_size: int, rows: np.ndarray | None = None
    ) -> Iterator[tuple[Any, list[Example], int]]:
        """Yield every row once, in order. The last batch is filled up by repeating the last row.

        Args:
          batch_size: rows of a whole batch.
          rows: which rows of each batch to return (Partitioner.rows); None returns all.

        Yields:
          The batch, its examples, and how many rows of the whole batch are not repeats.
        """
        rows = np.arange(batch_size) if rows is None else rows
        for start in range(0, len(self), batch_size):
            yield *self.rows(np.minimum(start + rows, len(self) - 1)), min(batch_size, len(self) - start)


@functools.cache
def array_names(batch_class: type) -> frozenset[str]:
    """Returns the names of the array fields of a batch class."""
    fields = dataclasses.fields(batch_class)
    return frozenset(field.name for field in fields if field.metadata.get('pytree_node', True))


_BATCH_CLASSES = types.Prompts, types.Responses, types.WeightedPairs, types.Thumbs
