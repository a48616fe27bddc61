"""What becomes of a task's rows on their way into a data set: prompts cut to their end, texts as Python has them."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np

from perl_jax.controls import OPEN, unmark

Example = dict[str, Any]


def look_for_templates(rows: Sequence[Example], vocabulary: Any, name: str) -> None:
    """Say so where prompts were put into a chat's format by hand: their control tokens are read as text."""
    if not getattr(vocabulary, 'reads_marks', False):
        return
    texts = [plain(row['inputs_pretokenized']) for row in rows if 'inputs_pretokenized' in row]
    marked = [OPEN.encode() in row['inputs_pretokenized'] for row in rows if 'inputs_pretokenized' in row]
    spelled = [vocabulary.spelled(text) for text, by_template in zip(texts, marked) if not by_template]
    if tokens := [token for token in spelled if token]:
        logging.getLogger('perl_jax').warning(
            f"{name}: {len(tokens)} of {len(rows)} prompts spell '{tokens[0]}', which is read as text and not as the "
            'control token; put prompts into a format with perl_jax.tasks.chat or preprocessors.chat'
        )


def fit(ds: Any, keep: np.ndarray, length: int, bos_id: int | None) -> Any:
    """Only the admitted rows, with the end of a prompt that is too long, behind BOS."""
    import tensorflow as tf

    head = [] if bos_id is None else [bos_id]
    room = length - len(head)
    ds = tf.data.Dataset.zip(ds, tf.data.Dataset.from_tensor_slices(keep)).filter(lambda _, ok: ok)

    def cut(row: Any, _: Any) -> Any:
        text = row['inputs']
        if head:  # a text that opens with BOS itself, as some templates do, gets no second one
            text = text[tf.cast(tf.reduce_any(text[:1] == bos_id), tf.int32) :]
        tail = text[tf.maximum(0, tf.size(text) - room) :]
        return row | {'inputs': tf.concat([tf.constant(head, tf.int32), tail], axis=0)}

    return ds.map(cut, num_parallel_calls=tf.data.AUTOTUNE)


def example(row: Mapping[str, Any], tokens: Container[str], kind: str, vocabulary: Any) -> Example:
    """The texts and other fields of a row; a prompt that was stored as tokens alone is read from them."""
    found = {k: plain(v) for k, v in row.items() if k not in tokens}
    if kind == 'prompts' and 'inputs_pretokenized' not in found:
        found['inputs_pretokenized'] = vocabulary.decode([int(token) for token in row['inputs']])
    return found


def plain(value: Any) -> Any:
    """TensorFlow's bytes and scalars as Python's."""
    if isinstance(value, bytes):
        return unmark(value.decode('utf-8'))
    if isinstance(value, np.ndarray) and value.dtype.kind == 'O':  # several texts
        return [plain(each) for each in value]
    return value.item() if getattr(value, 'ndim', None) == 0 else value
