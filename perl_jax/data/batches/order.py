"""The endless order of the rows of one task or several: pure functions of the seed.

Tasks follow a fixed shuffled cycle that contains each in proportion to its rate, so the number of a task's rows before
any position is a lookup. Within a task each epoch has its own permutation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np


def rows_at(
    positions: np.ndarray, rates: Sequence[float], sizes: Sequence[int], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns which task, and which of its rows, is at each position of the endless stream.

    Args:
      positions: int [n], from 0.
      rates: of the tasks in the mixture.
      sizes: the number of rows of each task.
      seed: of the order.

    Returns:
      The indices of tasks and of their rows, int [n] each.
    """
    cycle, counts_before = _cycle(tuple(rates), seed)
    cycles, places = np.divmod(positions, len(cycle))
    tasks = cycle[places]
    draws = cycles * counts_before[-1][tasks] + counts_before[places, tasks]
    task_sizes = np.array(sizes)[tasks]
    epochs, offsets = np.divmod(draws, task_sizes)
    permuted = zip(tasks, epochs, task_sizes, offsets, strict=True)
    row_indices = [_permutation(seed, int(t), int(e), int(n))[offset] for t, e, n, offset in permuted]
    return tasks, np.array(row_indices, np.int64)


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
