"""Texts that no task holds, as a data set: what somebody typed in, what a judge is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from perl_jax.data.datasets import Dataset
from perl_jax.data.lexicon import bos_id, continuing, eos_ids
from perl_jax.tokenizers.chat.controls import unmark

Text = str | Sequence[int]  # or its tokens, which are taken as they are


def dataset(
    vocabulary: Any, prompts: Sequence[Text], length: int | None, responses: Sequence[Sequence[Text]] = ()
) -> Dataset:
    """Make a data set of texts.

    Args:
      vocabulary: of `load_tokenizer`, or any of SeqIO.
      prompts: N texts, read as a task's are: behind BOS if there is one. One given as tokens is taken as it is.
      length: P in tokens, of a longer text the END is kept; None cuts none.
      responses: K texts for each prompt, which then get an EOS; none by default.

    Returns:
      A Dataset: `rows(index)` is a batch of these rows (Prompts, or with `responses` Responses, R being the longest's)
      and their examples, which say the prompt as 'inputs_pretokenized'; `vocabulary` and `eos_ids`.
    """
    bos = bos_id(vocabulary)
    head = [] if bos is None else [bos]

    def read(prompt: Text) -> list[int]:
        if not isinstance(prompt, str):
            return [*prompt]
        ids = list(vocabulary.encode(prompt))
        ids = ids[1:] if head and ids[:1] == head else ids  # a template may have put BOS there itself
        return head + (ids if length is None else ids[-(length - len(head)) :])

    ids = [read(prompt) for prompt in prompts]
    arrays: dict[str, np.ndarray] = dict(zip(('inputs', 'inputs_mask'), _padded(ids, max(length or 1, *map(len, ids)))))
    if responses:
        words = continuing(vocabulary)
        flat = [text for row in responses for text in row]
        ids = [[*words.encode(x), vocabulary.eos_id] if isinstance(x, str) else [*x] for x in flat]
        both = _padded(ids, max(1, *map(len, ids)))
        arrays |= {k: x.reshape(len(prompts), -1, x.shape[-1]) for k, x in zip(('targets', 'targets_mask'), both)}
    shown = [unmark(text if isinstance(text, str) else vocabulary.decode(text)) for text in prompts]
    return Dataset(arrays, [{'inputs_pretokenized': text} for text in shown], vocabulary, eos_ids(vocabulary))


def _padded(ids: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.array([[*row, *[0] * (length - len(row))] for row in ids], np.int32)
    return tokens, np.arange(length) < np.array([len(row) for row in ids])[:, None]
