"""Batches of rows of similar lengths, no wider than their longest rows: less padding, the same gradients.

    4 batches of 2, lengths of their rows      9 2   7 3   8 8   2 1     as drawn
    sorted and split again                     1 2   2 3   7 8   8 9
    in shuffled order, of widths 5 or 10       8 7   1 2   8 9   3 2

Padding changes no result (tests/test_decoder.py), so a batch has the same gradients at any width. But sorting moves
rows to other batches. That does not affect a loss that treats each row separately, such as a reward's. It does affect a
mean over the tokens of a batch: a token of the first row of length 2 would weigh 1/3 beside a row of length 1, and 1/11
beside one of length 9, as drawn. So SFT divides by the number of tokens in the batch that a row was drawn in
(`Stream.tokens_as_drawn`). The gradients of the batches that were sorted together then add up to exactly those of the
batches as drawn, at the same model weights and any batch size. Algorithms with other statistics over a batch (PPO
whitens advantages) get their batches as drawn.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

WINDOW = 16  # batches that are sorted together: enough rows to find similar lengths, far fewer than an epoch


def bucket_level(length: Any, full_width: int, buckets: int) -> Any:
    """Returns the smallest of `buckets` equally spaced widths that holds so many tokens.

    Args:
      length: tokens, a number or an array.
      full_width: the largest of the widths.
      buckets: their number.

    Returns:
      Its index, from 1.
    """
    return np.maximum(1, -(-length // -(-full_width // buckets)))


def widths(level: int, full_widths: Mapping[str, int], buckets: int) -> dict[str, int]:
    """Returns the widths of inputs and targets at a level.

    Both use one level, which limits the number of shapes (`max_shapes`).

    Args:
      level: 1 to `buckets`.
      full_widths: {'inputs': P, 'targets': R}.
      buckets: the number of levels.

    Returns:
      Widths in tokens, by the same names.
    """
    return {name: min(width, level * -(-width // buckets)) for name, width in full_widths.items()}


def max_shapes(buckets: int, phase: str) -> int:
    """Returns an upper bound on the number of batch shapes of a run, each of which compiles a program.

    At level m the share of real tokens is 1/m to m/m. A policy's answers are sampled after their prompts are truncated:
    at every level their share of real tokens is 1/`buckets` to 1.

    Args:
      buckets: the number of levels.
      phase: 'sft', 'reward' or 'policy'.
    """
    return buckets**2 if phase == 'policy' else buckets * (buckets + 1) // 2


def log_shape_limit(buckets: int, phase: str) -> None:
    """Log the upper bound on the number of compiled shapes before the run begins."""
    if buckets > 1:
        shape_limit = max_shapes(buckets, phase)
        text = f'LENGTH_BUCKETS = {buckets}: at most {shape_limit} shapes of a batch are compiled'
        logging.getLogger('perl_jax').info(text)


def batched_order(
    row_lengths: Mapping[str, np.ndarray], prompt_width: int, buckets: int, batch_size: int, rng: np.random.Generator
) -> np.ndarray:
    """Returns the order in which batches take a window of n rows, int [n]: similar lengths share a batch.

    Rows are sorted by the bucket of their prompt, then by their longest response; the batches are shuffled.

    Args:
      row_lengths: token counts of the rows (the function below), {'inputs': [n], 'targets': [n]}.
      prompt_width: P, the width of prompts that are not truncated.
      buckets: the number of levels.
      batch_size: rows of a batch, a divisor of n.
      rng: shuffles the batches, and the rows within each.
    """
    response_lengths = row_lengths.get('targets', row_lengths['inputs'])
    prompt_levels = bucket_level(row_lengths['inputs'], prompt_width, buckets)
    order = np.lexsort([response_lengths, prompt_levels])  # the last key is the primary one
    batches = rng.permutation(order.reshape(-1, batch_size))
    return rng.permuted(batches, axis=1).ravel()  # so that no data partition always gets the longest rows


def row_lengths(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tokens in each row's prompt and longest response, {'inputs': [rows], 'targets': [rows]}."""
    # Masks are [rows, T], or [rows, K, T] for responses.
    counts = {name: arrays[f'{name}_mask'].sum(-1) for name in ('inputs', 'targets') if f'{name}_mask' in arrays}
    return {name: count.reshape(len(count), -1).max(-1) for name, count in counts.items()}


def truncate(batch: Any, widths: Mapping[str, int]) -> Any:
    """Truncate the tokens and masks of a batch.

    Args:
      batch: of a class of types.py.
      widths: {'inputs': P, 'targets': R}, those of its level.

    Returns:
      The batch, [..., P] and [..., R].
    """
    fields = {name: getattr(batch, name) for kind in widths for name in (kind, f'{kind}_mask')}
    return batch.replace(**{name: x[..., : widths[name.removesuffix('_mask')]] for name, x in fields.items()})
