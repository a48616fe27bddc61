"""Texts that no task holds, as a data set: what somebody typed in, what a judge is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from perl_jax.controls import unmark
from perl_jax.data import Dataset, bos_id, continuing, eos_ids


def dataset(vocabulary: Any, prompts: Sequence[str], length: int, responses: Sequence[Sequence[str]] = ()) -> Dataset:
    """Prompts [N, length] as a task's are read: the END of a longer one, behind BOS if there is one.

    With `responses`, K for each prompt, it has their targets [N, K, R] too, each with its EOS, R being the longest's.
    """
    bos = bos_id(vocabulary)
    head = [] if bos is None else [bos]
    ids = [list(vocabulary.encode(text)) for text in prompts]
    ids = [row[1:] if head and row[:1] == head else row for row in ids]  # a template may have put BOS there itself
    ids = [head + row[-(length - len(head)) :] for row in ids]
    arrays = dict(zip(('inputs', 'inputs_mask'), _padded(ids, length)))
    if responses:
        words = continuing(vocabulary)
        ids = [[*words.encode(text), vocabulary.eos_id] for row in responses for text in row]
        both = _padded(ids, max(map(len, ids)))
        arrays |= {k: x.reshape(len(prompts), -1, x.shape[-1]) for k, x in zip(('targets', 'targets_mask'), both)}
    return Dataset(arrays, [{'inputs_pretokenized': unmark(text)} for text in prompts], vocabulary, eos_ids(vocabulary))


def _padded(ids: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.array([[*row, *[0] * (length - len(row))] for row in ids], np.int32)
    return tokens, np.arange(length) < np.array([len(row) for row in ids])[:, None]
