"""Rows in memory, and the endless batches of them: batch n is a function of (seed, n)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from perl_jax import types
from perl_jax.data import bucketing
from perl_jax.models import unpadding

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
        batch_class = next(k for fields, k in _BATCH_CLASSES if fields == self.arrays.keys())
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


def _arrays(kind: type) -> set[str]:
    """Returns the names of the array fields of a batch class."""
    return {field.name for field in dataclasses.fields(kind) if field.metadata.get('pytree_node', True)}


_BATCH_CLASSES = [(_arrays(kind), kind) for kind in (types.Prompts, types.Responses, types.WeightedPairs, types.Thumbs)]


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
        order = np.argsort(np.concatenate([np.flatnonzero(tasks == task) for task in np.unique(tasks)]))
        names = _arrays(type(batches[0][0]))
        arrays = {name: np.concatenate([getattr(batch, name) for batch, _ in batches])[order] for name in names}
        batch, examples = type(batches[0][0])(**arrays), [example for _, rows in batches for example in rows]
        if shape := shape or common_shape([self], step):  # of the whole batch, so that all processes truncate equally
            batch = self._truncated(batch, shape)
        return batch, [examples[i] for i in order]

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
        order = bucketing.batched_order(lengths, prompt_width, self.buckets, self.batch_size, rng)
        return positions[order.reshape(-1, self.batch_size)[place]]

    def _row_statistic(self, statistic: str, positions: np.ndarray) -> dict[str, np.ndarray]:
        """Returns `row_lengths` or `token_counts` of the rows at these positions."""
        values = [getattr(dataset, statistic) for dataset in self.datasets]
        rows = list(zip(*self._rows_at(positions), strict=True))
        return {name: np.array([values[task][name][row] for task, row in rows]) for name in values[0]}

    def _rows_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns which dataset, and which of its rows, is at each position of the endless stream.

        Tasks follow a fixed shuffled cycle that contains each in proportion to its rate, so the number of a task's rows
        before any position is a lookup. Within a task each epoch has its own permutation.
        """
        cycle, counts_before = _cycle(tuple(self.rates), self.seed)
        cycles, places = np.divmod(positions, len(cycle))
        tasks = cycle[places]
        draws = cycles * counts_before[-1][tasks] + counts_before[places, tasks]
        sizes = np.array([len(dataset) for dataset in self.datasets])[tasks]
        epochs, offsets = np.divmod(draws, sizes)
        permuted = zip(tasks, epochs, sizes, offsets, strict=True)
        row_indices = [_permutation(self.seed, int(t), int(e), int(n))[offset] for t, e, n, offset in permuted]
        return tasks, np.array(row_indices, np.int64)


def common_shape(streams: Sequence[Stream], step: int) -> tuple[int, int] | None:
    """Returns the common shape of several batches that go into one program (bucketing.max_shapes).

    It is their largest level, and their largest fraction of real tokens, in parts of 1 / level. None without buckets.
    """
    if streams[0].buckets == 1:
        return None
    level = max(stream.level(step) for stream in streams)
    return level, max(stream.full_parts(step, level) for stream in streams)


@functools.lru_cache(maxsize=8)
def _cycle(rates: tuple[float, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the task indices of one cycle [n], and the count of each task before each place [n + 1, tasks].

    A cycle has 1,000 places, or as many (up to 100,000) as give the rarest task one; a task with rate 0 has none.
    """
    share = np.array(rates) / sum(rates)
    length = min(max(1000, np.ceil(1 / share[share > 0].min())), 100_000)
    counts = np.where(share > 0, np.maximum(1, np.round(share * length)), 0).astype(int)
    counts = counts if len(rates) > 1 else np.array([1])
    cycle = np.random.default_rng([seed, 0]).permutation(np.repeat(np.arange(len(rates)), counts))
    counts_before = np.cumsum(cycle[:, None] == np.arange(len(rates)), axis=0)
    return cycle, np.concatenate([np.zeros((1, len(rates)), int), counts_before])


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, task_index: int, epoch: int, size: int) -> np.ndarray:
    order = np.random.default_rng([seed, 1 + task_index, epoch]).permutation(size)
    return order.astype(np.int32)  # half the memory of int64: up to 64 are cached
