"""Batches of rows that are about equally long, and no wider than those need: less padding, the same gradients.

    4 batches of 2, lengths of their rows      9 2   7 3   8 8   2 1     as drawn
    sorted and dealt out                       1 2   2 3   7 8   8 9
    in shuffled order, of widths 5 or 10       8 7   1 2   8 9   3 2

What stands at the padding changes nothing (tests/test_decoder.py), so a batch's gradients are those at full width.
But rows stand in other batches. A loss that takes each row by itself does not mind, such as a reward's. A mean over a
batch's tokens does: those of the first row of 2 would count 1/3 among their like, and count 1/11 beside a 9. So SFT
divides by the tokens of the batch that a row was drawn in (`Stream.tokens_as_drawn`). Then the gradients of the batches
that are dealt out together add up to those of the batches as drawn, at the same weights of the model: exactly, at any
batch size, and so in expectation. What looks over a batch in other ways (PPO whitens) gets its batches as drawn.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

WINDOW = 16  # batches that are sorted together: enough for rows of like length, far less than an epoch


def level(longest: Any, full: int, buckets: int) -> Any:
    """Which of `buckets` widths, equally far apart up to `full`, is the least that holds `longest`: 1 or more."""
    return np.maximum(1, -(-longest // -(-full // buckets)))


def widths(level: int, full: Mapping[str, int], buckets: int) -> dict[str, int]:
    """The widths of a level, of inputs and targets: one level for both, so that few shapes come up (`most_shapes`)."""
    return {name: min(each, level * -(-each // buckets)) for name, each in full.items()}


def most_shapes(buckets: int, phase: str) -> int:
    """How many shapes the batches of a run have at most.

    At level m of the widths 1 to m of m parts are real. A policy's answers come after their prompts are cut: of these,
    whatever their level, 1 to `buckets` parts are real.
    """
    return buckets**2 if phase == 'policy' else buckets * (buckets + 1) // 2


def announce(buckets: int, phase: str) -> None:
    """Say ahead how many shapes will be compiled at most."""
    if buckets > 1:
        most = most_shapes(buckets, phase)
        logging.getLogger('perl_jax').info(f'LENGTH_BUCKETS = {buckets}: at most {most} shapes of a batch are compiled')


def deal(
    longest: Mapping[str, np.ndarray], full: int, buckets: int, batch_size: int, rng: np.random.Generator
) -> np.ndarray:
    """In which order batches shall take these rows, int [n]: by the width of the prompt, then the longest response.

    `longest` is of the rows, {'inputs': [n], 'targets': [n]}; `full` of the prompts.
    """
    last = longest.get('targets', longest['inputs'])
    order = np.lexsort([last, level(longest['inputs'], full, buckets)])  # the last key counts first
    batches = rng.permutation(order.reshape(-1, batch_size))
    return rng.permuted(batches, axis=1).ravel()  # no data partition has the longest rows of each batch


def longest(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The real tokens of each row, of its longest response: {'inputs': [N], 'targets': [N]}; masks are [N, (K,) T]."""
    counts = {name: arrays[f'{name}_mask'].sum(-1) for name in ('inputs', 'targets') if f'{name}_mask' in arrays}
    return {name: count.reshape(len(count), -1).max(-1) for name, count in counts.items()}


def cut(batch: Any, widths: Mapping[str, int]) -> Any:
    """A batch (types.py) with its tokens and masks [..., T] cut to the widths of their kind."""
    fields = {name: getattr(batch, name) for kind in widths for name in (kind, f'{kind}_mask')}
    return batch.replace(**{name: x[..., : widths[name.removesuffix('_mask')]] for name, x in fields.items()})
