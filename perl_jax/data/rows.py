"""What becomes of a task's rows on their way into a data set: prompts cut to their end, texts as Python has them."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np

from perl_jax.tokenizers.chat import controls
from perl_jax.tokenizers.chat.controls import OPEN, unmark

Example = dict[str, Any]

_PROMPTS = 'put prompts into a format with perl_jax.tasks.chat or preprocessors.chat'
_RESPONSES = 'the EOS that ends an answer is put there without being written: take it out of the texts'


def spread(groups: Sequence[Any], n: int) -> np.ndarray:
    """Choose n rows that stand for all of them: in proportion from every group, and the same each time.

    The first rows of a split are often of a few sessions. Here groups stand in a drawn order, the rows of each in a
    drawn order too, and every (N / n)-th is taken.

    Args:
      groups: of each of the N rows.
      n: how many; all where there are no more.

    Returns:
      Their indices [min(n, N)], ascending.
    """
    if n >= len(groups):
        return np.arange(len(groups))
    rng = np.random.default_rng(0)
    names, of = np.unique([str(name) for name in groups], return_inverse=True)
    order = np.lexsort((rng.permutation(len(groups)), rng.permutation(len(names))[of]))
    return np.sort(order[((np.arange(n) + 0.5) * len(groups) / n).astype(int)])


def look_for_controls(rows: Sequence[Example], features: Sequence[str], vocabulary: Any, name: str) -> None:
    """Say so where texts spell control tokens that no chat format put there: they are read as text.

    `features` are inputs and the responses. A BOS that opens a prompt is one, whoever wrote it.
    """
    for feature in features:
        raw = [row[key] for row in rows if (key := f'{feature}_pretokenized') in row]
        texts = [plain(text) for text in raw if OPEN.encode() not in text]
        if feature == 'inputs' and getattr(vocabulary, 'reads_marks', False) and vocabulary.bos_id is not None:
            texts = [text.removeprefix(piece(vocabulary, vocabulary.bos_id)) for text in texts]
        if tokens := [token for text in texts if (token := _spelled(vocabulary, text))]:
            what, hint = ('prompts', _PROMPTS) if feature == 'inputs' else (feature, _RESPONSES)
            logging.getLogger('perl_jax').warning(
                f"{name}: {len(tokens)} of {len(rows)} {what} spell '{tokens[0]}', which is read as text and not as "
                f'the control token; {hint}'
            )


def check_controls(text: str, vocabulary: Any) -> None:
    """Look whether a vocabulary has the control tokens that a chat format has marked in a text.

    Where it does not tell a format's tokens from words (bytes, sentencepiece), those that it has not are only named: a
    model may be trained to read them as the letters they are.

    Raises:
      UserError: of one that does, where it has no such token.
    """
    if getattr(vocabulary, 'reads_marks', False):
        vocabulary.encode(text)
        return
    has = getattr(getattr(vocabulary, 'tokenizer', None), 'piece_to_id', lambda token: None)
    if lacks := [token for token in controls.tokens(text) if has(token) not in vocabulary.encode(token)]:
        logging.getLogger('perl_jax').warning(
            f"the chat format's {', '.join(map(repr, lacks))} are no tokens of the vocabulary "
            f'{getattr(vocabulary, "sentencepiece_model_file", type(vocabulary).__name__)}: they are read as letters'
        )


def piece(vocabulary: Any, i: int) -> str:
    """How a vocabulary spells a token."""
    model, own = getattr(vocabulary, 'tokenizer', None), getattr(vocabulary, 'piece', None)
    spell = own or getattr(model, 'id_to_token', None) or getattr(model, 'id_to_piece', None) or str
    return spell(i)


def _spelled(vocabulary: Any, text: str) -> str | None:
    """A control token whose name stands in a text. Of sentencepiece it is BOS or EOS: it finds others by itself."""
    if hasattr(vocabulary, 'spelled'):
        return vocabulary.spelled(text)
    if not hasattr(getattr(vocabulary, 'tokenizer', None), 'id_to_piece'):
        return None
    ids = [i for i in (vocabulary.bos_id, vocabulary.eos_id) if i is not None and i >= 0]
    return next((token for i in ids if (token := piece(vocabulary, i)) in text), None)


def fit(ds: Any, keep: np.ndarray, length: int, bos_id: int | None) -> Any:
    """Only the admitted rows, with the end of a prompt that is too long, behind BOS."""
    import tensorflow as tf

    head = [] if bos_id is None else [bos_id]
    room = length - len(head)
    admitted: Any = lambda _, ok: ok  # noqa: E731 (TensorFlow hands on the parts of a pair)
    ds = tf.data.Dataset.zip(ds, tf.data.Dataset.from_tensor_slices(keep)).filter(admitted)

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
