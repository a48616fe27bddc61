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
    """One split of one task, in memory: arrays with N rows each, and each row's texts and other fields."""

    arrays: dict[str, np.ndarray]
    examples: list[Example]
    vocabulary: Any  # seqio.Vocabulary
    eos_ids: tuple[int, ...]  # any of them ends a response

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def eos_id(self) -> int:
        """The token that training targets end with."""
        return self.eos_ids[0]

    @functools.cached_property
    def longest(self) -> dict[str, np.ndarray]:
        """See bucketing.py: {'inputs': [N], 'targets': [N]}."""
        return bucketing.longest(self.arrays)

    @functools.cached_property
    def real(self) -> dict[str, np.ndarray]:
        """The real tokens of each row's prompt, and of all of its responses: {'inputs': [N], 'targets': [N]}."""
        masks = {name: self.arrays[f'{name}_mask'] for name in self.longest}
        return {name: mask.reshape(len(mask), -1).sum(-1) for name, mask in masks.items()}

    @property
    def is_weighted(self) -> bool:
        """Whether the rows are pairs that do not all count alike."""
        return 'weights' in self.arrays

    def weighted(self) -> Dataset:
        """With the weights of its pairs, which are 1 where they have none."""
        return dataclasses.replace(self, arrays={'weights': np.ones(len(self), np.float32)} | self.arrays)

    @property
    def widths(self) -> dict[str, int]:
        """How wide the arrays are: {'inputs': P, 'targets': R}."""
        return {name: self.arrays[name].shape[-1] for name in ('inputs', 'targets') if name in self.arrays}

    @property
    def K(self) -> int:
        """Responses to a prompt."""
        return self.arrays['targets'].shape[1]

    def rows(self, index: np.ndarray) -> tuple[Any, list[Example]]:
        """The batch (types.py) of these rows, and their examples."""
        kind = next(k for fields, k in _BATCHES if fields == self.arrays.keys())
        arrays: dict[str, Any] = {k: v[index] for k, v in self.arrays.items()}  # NumPy's, until they are on the mesh
        return kind(**arrays), [self.examples[i] for i in index]

    def take(self, index: np.ndarray) -> Dataset:
        """These rows alone."""
        arrays = {k: v[index] for k, v in self.arrays.items()}
        return dataclasses.replace(self, arrays=arrays, examples=[self.examples[i] for i in index])

    def batches(
        self, batch_size: int, rows: np.ndarray | None = None
    ) -> Iterator[tuple[Any, list[Example], int]]:
        """Every row once, in order: batch, examples, how many are real. The last batch is filled up with its last.

        With `rows` (Partitioner.rows) only those of each batch; what is real is still said of the whole batch.
        """
        rows = np.arange(batch_size) if rows is None else rows
        for start in range(0, len(self), batch_size):
            yield *self.rows(np.minimum(start + rows, len(self) - 1)), min(batch_size, len(self) - start)


def _arrays(kind: type) -> set[str]:
    """The fields of a batch that hold arrays."""
    return {field.name for field in dataclasses.fields(kind) if field.metadata.get('pytree_node', True)}


_BATCHES = [(_arrays(kind), kind) for kind in (types.Prompts, types.Responses, types.WeightedPairs, types.Thumbs)]


@dataclasses.dataclass(frozen=True)
class Stream:
    """Endless shuffled batches of a task, or of a mixture's tasks by their rates: `stream(n)` is batch number n.

    Of each batch a process reads only its own `rows` (Partitioner.rows); which examples they are hangs on the seed, n
    and the place in the batch alone, however many processes there are. With `buckets` batches are of like lengths, cut
    to what they need (bucketing.py), and say how full they are (unpadding.py) if they are split over so many `groups`,
    the data partitions, and each group is taken in so many `parts`, its microbatches. Batches that are not `dealt` stay
    as drawn and are cut alone.
    """

    datasets: Sequence[Dataset]  # or whatever has its rows and lengths: token_files.py
    rates: Sequence[float]
    batch_size: int
    seed: int
    rows: np.ndarray
    buckets: int = 1
    groups: int = 1
    parts: int = 1
    dealt: bool = True

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
        """What all tasks are read with."""
        return self.datasets[0].vocabulary

    def __call__(self, step: int, shape: tuple[int, int] | None = None) -> tuple[Any, list[Example]]:
        """A batch and its examples; `shape` is (level, parts) of `alike`, by default the batch's own."""
        position = self._positions(step)
        member, index = self._schedule(position[self.rows])
        parts = [self.datasets[m].rows(index[member == m]) for m in np.unique(member)]
        order = np.argsort(np.concatenate([np.flatnonzero(member == m) for m in np.unique(member)]))
        names = _arrays(type(parts[0][0]))
        arrays = {name: np.concatenate([getattr(batch, name) for batch, _ in parts])[order] for name in names}
        batch, examples = type(parts[0][0])(**arrays), [e for _, rows in parts for e in rows]
        if shape := shape or alike([self], step):  # by the whole batch: all processes cut alike
            batch = self._fitted(batch, shape)
        return batch, [examples[i] for i in order]

    def tokens_as_drawn(self, step: int) -> np.ndarray | None:
        """The target tokens of the batch that each of this process's rows was drawn in, float32 [rows].

        None if that is the batch itself. A mean over tokens divides by them: bucketing.py.
        """
        if self.buckets == 1 or not self.dealt:
            return None
        batch, order = np.unique(self._positions(step)[self.rows] // self.batch_size, return_inverse=True)
        drawn = batch[:, None] * self.batch_size + np.arange(self.batch_size)
        tokens = self._of_rows('real', drawn.ravel())['targets'].reshape(drawn.shape).sum(1)
        return tokens[order].astype(np.float32)

    def level(self, step: int) -> int:
        """The least of `buckets` levels whose widths hold the batch's prompts and responses."""
        full, longest = self.datasets[0].widths, self._of_rows('longest', self._positions(step))
        return int(max(bucketing.level(each.max(), full[name], self.buckets) for name, each in longest.items()))

    def full_parts(self, step: int, level: int) -> int:
        """How many of `level` parts of the batch, cut to that level, are real at most."""
        widths = bucketing.widths(level, self.datasets[0].widths, self.buckets)
        if 'targets' not in widths:
            return level
        real, K = self._of_rows('real', self._positions(step)), self.datasets[0].K
        split = self.groups, self.parts, level
        count = unpadding.needed(real['inputs'], real['targets'], widths['inputs'], K * widths['targets'], *split)
        return int(max(count))

    def _fitted(self, batch: Any, shape: tuple[int, int]) -> Any:
        """No wider than its level, and with its fill."""
        level, parts = shape
        batch = bucketing.cut(batch, bucketing.widths(level, self.datasets[0].widths, self.buckets))
        return unpadding.filled(batch, (parts, parts), level) if isinstance(batch, types.Responses) else batch

    def _positions(self, step: int) -> np.ndarray:
        """Which places of the endless stream batch `step` takes, of all processes: int [batch_size]."""
        if self.buckets == 1 or not self.dealt:
            return step * self.batch_size + np.arange(self.batch_size)
        window, place = divmod(step, bucketing.WINDOW)
        size = bucketing.WINDOW * self.batch_size
        positions = window * size + np.arange(size)
        full, rng = self.datasets[0].widths['inputs'], np.random.default_rng([self.seed, 2**31, window])
        order = bucketing.deal(self._of_rows('longest', positions), full, self.buckets, self.batch_size, rng)
        return positions[order.reshape(-1, self.batch_size)[place]]

    def _of_rows(self, what: str, position: np.ndarray) -> dict[str, np.ndarray]:
        """`longest` or `real` of the rows at these positions."""
        (member, index), of = self._schedule(position), [getattr(dataset, what) for dataset in self.datasets]
        return {name: np.array([of[m][name][i] for m, i in zip(member, index)]) for name in of[0]}

    def _schedule(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which dataset, and which row of it, stands at each position of the endless stream.

        Members follow a fixed shuffled cycle that holds each in proportion to its rate, so that how often a member came
        before any position is a lookup; within a member each epoch is a permutation of its own.
        """
        cycle, before = _cycle(tuple(self.rates), self.seed)
        member = cycle[position % len(cycle)]
        count = position // len(cycle) * before[-1][member] + before[position % len(cycle), member]
        sizes = np.array([len(d) for d in self.datasets])[member]
        epoch, offset = np.divmod(count, sizes)
        index = [_permutation(self.seed, int(m), int(e), int(n))[o] for m, e, n, o in zip(member, epoch, sizes, offset)]
        return member, np.array(index, np.int64)


def alike(streams: Sequence[Stream], step: int) -> tuple[int, int] | None:
    """One shape for batches that one program takes: level and real parts (bucketing.most_shapes) that hold each.

    None without buckets.
    """
    if streams[0].buckets == 1:
        return None
    level = max(stream.level(step) for stream in streams)
    return level, max(stream.full_parts(step, level) for stream in streams)


@functools.lru_cache(maxsize=8)
def _cycle(rates: tuple[float, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Members of one cycle [n], and how many of each came before each place [n + 1, members].

    A cycle has 1,000 places, or as many (up to 100,000) as let the rarest member have one; a rate of 0 has none.
    """
    share = np.array(rates) / sum(rates)
    length = min(max(1000, np.ceil(1 / share[share > 0].min())), 100_000)
    counts = np.where(share > 0, np.maximum(1, np.round(share * length)), 0).astype(int)
    counts = counts if len(rates) > 1 else np.array([1])
    cycle = np.random.default_rng([seed, 0]).permutation(np.repeat(np.arange(len(rates)), counts))
    seen = np.cumsum(cycle[:, None] == np.arange(len(rates)), axis=0)
    return cycle, np.concatenate([np.zeros((1, len(rates)), int), seen])


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, member: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, 1 + member, epoch]).permutation(size).astype(np.int32)  # many are remembered
