"""Conversions of a task's rows for a data set: prompts truncated to their end, texts as Python strings."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np

from perl_jax.tokenizers.chat import controls
from perl_jax.tokenizers.chat.controls import OPEN, unmark

Example = dict[str, Any]

_PROMPT_HINT = 'format prompts with perl_jax.tasks.chat or preprocessors.chat'
_RESPONSE_HINT = 'the EOS of a response is added automatically: remove it from the texts'


def spread_indices(groups: Sequence[Any], n: int) -> np.ndarray:
    """Choose n rows that represent all of them: in proportion from every group, and the same ones each time.

    The first rows of a split often come from a few sessions. So groups are shuffled, the rows within each too (with a
    fixed seed), and rows at equal distances are taken.

    Args:
      groups: the group of each row.
      n: the number to choose; all are taken if there are not more.

    Returns:
      The indices of the rows, int [min(n, rows)], ascending.
    """
    if n >= len(groups):
        return np.arange(len(groups))
    rng = np.random.default_rng(0)
    names, group_index = np.unique([str(name) for name in groups], return_inverse=True)
    order = np.lexsort((rng.permutation(len(groups)), rng.permutation(len(names))[group_index]))
    return np.sort(order[((np.arange(n) + 0.5) * len(groups) / n).astype(int)])


def warn_about_controls(rows: Sequence[Example], features: Sequence[str], vocabulary: Any, name: str) -> None:
    """Warn of texts that contain the names of control tokens where no chat format put them: they are read as text.

    A BOS at the start of a prompt counts as one, whoever wrote it.

    Args:
      rows: rows as SeqIO yields them, or a sample of them.
      features: 'inputs' and the names of the responses.
      vocabulary: that reads them.
      name: of the data set, in messages.
    """
    for feature in features:
        raw_texts = [row[key] for row in rows if (key := f'{feature}_pretokenized') in row]
        texts = [to_python(text) for text in raw_texts if OPEN.encode() not in text]
        if feature == 'inputs' and getattr(vocabulary, 'reads_marks', False) and vocabulary.bos_id is not None:
            texts = [text.removeprefix(token_text(vocabulary, vocabulary.bos_id)) for text in texts]
        if tokens := [token for text in texts if (token := _find_control(vocabulary, text))]:
            field, hint = ('prompts', _PROMPT_HINT) if feature == 'inputs' else (feature, _RESPONSE_HINT)
            logging.getLogger('perl_jax').warning(
                f"{name}: {len(tokens)} of {len(rows)} {field} spell '{tokens[0]}', which is read as text and not as "
                f'the control token; {hint}'
            )


def check_controls(text: str, vocabulary: Any) -> None:
    """Check that a vocabulary has the control tokens that a chat format has marked in a text.

    Vocabularies that do not read marks (bytes, sentencepiece) only cause a warning: a model may be trained to read the
    names of the tokens as plain text.

    Raises:
      UserError: the vocabulary reads marks and lacks one of the tokens.
    """
    if getattr(vocabulary, 'reads_marks', False):
        vocabulary.encode(text)
        return
    find_id = getattr(getattr(vocabulary, 'tokenizer', None), 'piece_to_id', lambda token: None)
    if missing := [token for token in controls.tokens(text) if find_id(token) not in vocabulary.encode(token)]:
        logging.getLogger('perl_jax').warning(
            f"the chat format's {', '.join(map(repr, missing))} are no tokens of the vocabulary "
            f'{getattr(vocabulary, "sentencepiece_model_file", type(vocabulary).__name__)}: they are read as letters'
        )


def token_text(vocabulary: Any, i: int) -> str:
    """Returns the text of one token, as the vocabulary spells it."""
    model, vocabulary_piece = getattr(vocabulary, 'tokenizer', None), getattr(vocabulary, 'piece', None)
    spelling = vocabulary_piece or getattr(model, 'id_to_token', None) or getattr(model, 'id_to_piece', None) or str
    return spelling(i)


def _find_control(vocabulary: Any, text: str) -> str | None:
    """Returns a control token whose name occurs in a text, or None; for sentencepiece only BOS and EOS."""
    if hasattr(vocabulary, 'spelled'):
        return vocabulary.spelled(text)
    if not hasattr(getattr(vocabulary, 'tokenizer', None), 'id_to_piece'):
        return None
    ids = [i for i in (vocabulary.bos_id, vocabulary.eos_id) if i is not None and i >= 0]
    return next((token for i in ids if (token := token_text(vocabulary, i)) in text), None)


def truncate_prompts(ds: Any, is_usable: np.ndarray, length: int, bos_id: int | None) -> Any:
    """Returns the usable rows, with BOS before prompts, and of prompts that are too long the end.

    Args:
      ds: a tf.data.Dataset of rows.
      is_usable: bool [rows].
      length: P, the most tokens of a prompt, BOS included.
      bos_id: None adds none.
    """
    import tensorflow as tf

    bos_tokens = [] if bos_id is None else [bos_id]
    max_tokens = length - len(bos_tokens)
    admitted: Any = lambda _, usable: usable  # noqa: E731 (TensorFlow unpacks the pair into two arguments)
    ds = tf.data.Dataset.zip(ds, tf.data.Dataset.from_tensor_slices(is_usable)).filter(admitted)

    def cut(row: Any, _: Any) -> Any:
        tokens = row['inputs']
        if bos_tokens:  # a text that starts with BOS, as some templates do, gets no second one
            tokens = tokens[tf.cast(tf.reduce_any(tokens[:1] == bos_id), tf.int32) :]
        tail = tokens[tf.maximum(0, tf.size(tokens) - max_tokens) :]
        return row | {'inputs': tf.concat([tf.constant(bos_tokens, tf.int32), tail], axis=0)}

    return ds.map(cut, num_parallel_calls=tf.data.AUTOTUNE)


def to_example(row: Mapping[str, Any], token_features: Container[str], kind: str, vocabulary: Any) -> Example:
    """Returns the texts and other fields of a row; a prompt that was stored only as tokens is decoded."""
    fields = {k: to_python(v) for k, v in row.items() if k not in token_features}
    if kind == 'prompts' and 'inputs_pretokenized' not in fields:
        fields['inputs_pretokenized'] = vocabulary.decode([int(token) for token in row['inputs']])
    return fields


def to_python(value: Any) -> Any:
    """Returns TensorFlow's bytes and scalars as Python's str and numbers."""
    if isinstance(value, bytes):
        return unmark(value.decode('utf-8'))
    if isinstance(value, np.ndarray) and value.dtype.kind == 'O':  # several texts
        return [to_python(element) for element in value]
    return value.item() if getattr(value, 'ndim', None) == 0 else value
