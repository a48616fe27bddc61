"""The endless batches of a task or a mixture: batch n is a function of (seed, n)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from perl_jax import types
from perl_jax.data.batches import bucketing, order
from perl_jax.data.batches.dataset import Dataset, Example, array_names
from perl_jax.models import unpadding


@dataclasses.dataclass(frozen=True)
class Stream:
    """Endless shuffled batches of a task, or of a mixture's tasks by their rates: `stream(n)` is batch number n.

    Which examples a batch holds depends only on the seed, n and the position in the batch, not on the number of
    processes; each process reads only its `rows` of the batch.

    Attributes:
      datasets: one per task; Dataset, or a class with its rows and lengths (TokenFiles).
      rates: of the tasks in the mixture.
      batch_size: rows of a batch, of all processes.
      seed: of the order.
      rows: the rows of each batch that this process reads (Partitioner.rows).
      buckets: the number of widths. More than one: rows of similar lengths share a batch, which is truncated to its
        level (bucketing.py) and carries its fill (unpadding.py).
      groups: the number of data partitions a batch is split over, for the fill.
      parts: the number of microbatches of each group, for the fill.
      sort_by_length: whether rows are sorted by length; otherwise batches stay as drawn and are only truncated.
    """

    datasets: Sequence[Dataset]
    rates: Sequence[float]
    batch_size: int
    seed: int
    rows: np.ndarray
    buckets: int = 1
    groups: int = 1
    parts: int = 1
    sort_by_length: bool = True

    @property
    def eos_id(self) -> int:
        """The token that training targets end with."""
        return self.datasets[0].eos_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a response."""
        return self.datasets[0].eos_ids

    @property
    def vocabulary(self) -> Any:
        """The vocabulary of all tasks."""
        return self.datasets[0].vocabulary

    def __call__(self, step: int, shape: tuple[int, int] | None = None) -> tuple[Any, list[Example]]:
        """Returns a batch and its examples; `shape` is (level, parts) of `common_shape`, None the batch's own shape."""
        positions = self._positions(step)
        tasks, row_indices = self._rows_at(positions[self.rows])
        batches = [self.datasets[task].rows(row_indices[tasks == task]) for task in np.unique(tasks)]
        in_order = np.argsort(np.concatenate([np.flatnonzero(tasks == task) for task in np.unique(tasks)]))
        names = array_names(type(batches[0][0]))
        arrays = {name: np.concatenate([getattr(batch, name) for batch, _ in batches])[in_order] for name in names}
        batch, examples = type(batches[0][0])(**arrays), [example for _, rows in batches for example in rows]
        if shape := shape or common_shape([self], step):  # of the whole batch, so that all processes truncate equally
            batch = self._truncated(batch, shape)
        return batch, [examples[i] for i in in_order]

    def tokens_as_drawn(self, step: int) -> np.ndarray | None:
        """Returns the target tokens in the batch that each of this process's rows was drawn in.

        A mean over tokens divides by them (bucketing.py).

        Args:
          step: the number of the batch.

        Returns:
          float32 [rows]; None if rows are not sorted: it is the batch itself.
        """
        if self.buckets == 1 or not self.sort_by_length:
            return None
        batch_numbers, inverse = np.unique(self._positions(step)[self.rows] // self.batch_size, return_inverse=True)
        positions = batch_numbers[:, None] * self.batch_size + np.arange(self.batch_size)
        token_counts = self._row_statistic('token_counts', positions.ravel())['targets']
        return token_counts.reshape(positions.shape).sum(1)[inverse].astype(np.float32)

    def level(self, step: int) -> int:
        """Returns the smallest of `buckets` levels whose widths hold the batch's prompts and responses.

        Args:
          step: the number of the batch.

        Returns:
          The level, 1 to `buckets`.
        """
        widths = self.datasets[0].widths
        lengths = self._row_statistic('row_lengths', self._positions(step))
        return int(max(bucketing.bucket_level(x.max(), widths[name], self.buckets) for name, x in lengths.items()))

    def full_parts(self, step: int, level: int) -> int:
        """Returns how many of `level` equal parts of a batch's tokens hold its real tokens, at the level's widths.

        Args:
          step: the number of the batch.
          level: gives the widths that the batch is truncated to (bucketing.widths).

        Returns:
          The number of parts in the fullest group, at most `level`.
        """
        widths = bucketing.widths(level, self.datasets[0].widths, self.buckets)
        if 'targets' not in widths:
            return level
        counts, K = self._row_statistic('token_counts', self._positions(step)), self.datasets[0].K
        buckets = unpadding.count_buckets(
            counts['inputs'], counts['targets'], widths['inputs'], K * widths['targets'],
            groups=self.groups, num_microbatches=self.parts, buckets=level,
        )  # fmt: skip
        return int(max(buckets))

    def _truncated(self, batch: Any, shape: tuple[int, int]) -> Any:
        """Returns the batch truncated to its level, with its fill."""
        level, parts = shape
        batch = bucketing.truncate(batch, bucketing.widths(level, self.datasets[0].widths, self.buckets))
        return unpadding.with_fill(batch, (parts, parts), level) if isinstance(batch, types.Responses) else batch

    def _positions(self, step: int) -> np.ndarray:
        """Returns the positions in the endless stream of batch `step`, of all processes: int [batch_size]."""
        if self.buckets == 1 or not self.sort_by_length:
            return step * self.batch_size + np.arange(self.batch_size)
        window, place = divmod(step, bucketing.WINDOW)
        size = bucketing.WINDOW * self.batch_size
        positions = window * size + np.arange(size)
        prompt_width, rng = self.datasets[0].widths['inputs'], np.random.default_rng([self.seed, 2**31, window])
        lengths = self._row_statistic('row_lengths', positions)
        by_length = bucketing.batched_order(lengths, prompt_width, self.buckets, self.batch_size, rng)
        return positions[by_length.reshape(-1, self.batch_size)[place]]

    def _row_statistic(self, statistic: str, positions: np.ndarray) -> dict[str, np.ndarray]:
        """Returns `row_lengths` or `token_counts` of the rows at these positions."""
        values = [getattr(dataset, statistic) for dataset in self.datasets]
        rows = list(zip(*self._rows_at(positions), strict=True))
        return {name: np.array([values[task][name][row] for task, row in rows]) for name in values[0]}

    def _rows_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns which dataset, and which of its rows, is at each position of the endless stream."""
        return order.rows_at(positions, self.rates, [len(dataset) for dataset in self.datasets], self.seed)


def fingerprint(streams: Sequence[Stream]) -> str | None:
    """Returns a hash of the rows in memory, by which a resumed run sees that they are not those it began with.

    None where all rows are in files of tokens, which are the same files as long as they are there (token_files.py).
    """
    arrays = [
        (name, dataset.arrays[name])
        for stream in streams
        for dataset in stream.datasets
        if isinstance(dataset, Dataset)
        for name in sorted(dataset.arrays)
    ]
    digest = hashlib.sha256()
    for name, array in arrays:
        digest.update(f'{name} {array.dtype} {array.shape}'.encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16] if arrays else None


def common_shape(streams: Sequence[Stream], step: int) -> tuple[int, int] | None:
    """Returns the common shape of several batches that go into one program (bucketing.max_shapes).

    Args:
      streams: give a batch each.
      step: the number of the batches.

    Returns:
      Their largest level, and their largest fraction of real tokens in parts of 1 / level; None without buckets.
    """
    if streams[0].buckets == 1:
        return None
    level = max(stream.level(step) for stream in streams)
    return level, max(stream.full_parts(step, level) for stream in streams)
