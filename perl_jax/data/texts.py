"""Data sets from texts that no task holds: typed prompts, questions to a judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from perl_jax.data.datasets import Dataset
from perl_jax.data.lexicon import bos_id, continuing, eos_ids
from perl_jax.tokenizers.chat.controls import unmark

Text = str | Sequence[int]  # a text, or its tokens, which are used unchanged


def dataset(
    vocabulary: Any, prompts: Sequence[Text], length: int | None, responses: Sequence[Sequence[Text]] = ()
) -> Dataset:
    """Make a data set of texts.

    Args:
      vocabulary: of `load_tokenizer`, or any of SeqIO.
      prompts: texts, tokenized as a task's are, with BOS if the vocabulary has one; or lists of tokens.
      length: P in tokens, of a longer text the END is kept; None truncates none.
      responses: K texts for each prompt, to which EOS is added; none by default.

    Returns:
      A Dataset: `rows(index)` returns a batch of these rows (Prompts, or with `responses` Responses, R being the length
      of the longest) and their examples, whose 'inputs_pretokenized' is the prompt; `vocabulary` and `eos_ids`.
    """
    bos = bos_id(vocabulary)
    bos_tokens = [] if bos is None else [bos]

    def read(prompt: Text) -> list[int]:
        if not isinstance(prompt, str):
            return [*prompt]
        token_ids = list(vocabulary.encode(prompt))
        if bos_tokens and token_ids[:1] == bos_tokens:  # some templates add BOS themselves
            token_ids = token_ids[1:]
        return bos_tokens + (token_ids if length is None else token_ids[-(length - len(bos_tokens)) :])

    token_ids = [read(prompt) for prompt in prompts]
    tokens, mask = _padded(token_ids, max(length or 1, *map(len, token_ids)))
    arrays: dict[str, np.ndarray] = {'inputs': tokens, 'inputs_mask': mask}
    if responses:
        response_vocabulary = continuing(vocabulary)
        flat = [text for row in responses for text in row]
        encode = lambda text: [*response_vocabulary.encode(text), vocabulary.eos_id]  # noqa: E731
        token_ids = [encode(text) if isinstance(text, str) else [*text] for text in flat]
        padded = _padded(token_ids, max(1, *map(len, token_ids)))
        for name, x in zip(('targets', 'targets_mask'), padded, strict=True):
            arrays[name] = x.reshape(len(prompts), -1, x.shape[-1])
    prompt_texts = [unmark(text if isinstance(text, str) else vocabulary.decode(text)) for text in prompts]
    return Dataset(arrays, [{'inputs_pretokenized': text} for text in prompt_texts], vocabulary, eos_ids(vocabulary))


def _padded(token_ids: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.array([[*row, *[0] * (length - len(row))] for row in token_ids], np.int32)
    return tokens, np.arange(length) < np.array([len(row) for row in token_ids])[:, None]
