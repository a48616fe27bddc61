"""Python functions of a vocabulary as TensorFlow ops, since SeqIO tokenizes in TensorFlow's graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tensorflow as tf


def encode(ids_of: Callable[[bytes], Sequence[int]], s: tf.Tensor) -> tf.Tensor | tf.RaggedTensor:
    """Returns ids: string scalar -> int32 [length]; strings [n] -> ragged int32 [n, length]. Not for a saved graph."""
    import tensorflow as tf

    if s.shape.rank not in (0, 1):
        raise ValueError(f'encode_tf takes a string or a vector of strings, not rank {s.shape.rank}')

    def encode_rows(texts: np.ndarray | bytes) -> tuple[np.ndarray, np.ndarray]:
        ids = [ids_of(text) for text in np.atleast_1d(np.asarray(texts, object))]
        return np.concatenate([np.zeros(0), *ids]).astype(np.int32), np.array([len(i) for i in ids], np.int64)

    ids, lengths = tf.numpy_function(encode_rows, [s], (tf.int32, tf.int64), stateful=False)
    ids.set_shape([None])
    lengths.set_shape([None])
    ragged: Any = tf.RaggedTensor  # its constructors are added at run time
    return ids if s.shape.rank == 0 else ragged.from_row_lengths(ids, lengths)


def decode(text_of: Callable[[Sequence[int]], str], ids: tf.Tensor) -> tf.Tensor:
    """Returns texts: ids [..., length] -> strings [...]."""
    import tensorflow as tf

    def decode_rows(ids: np.ndarray) -> np.ndarray:
        flat_texts = [text_of(row.tolist()).encode() for row in ids.reshape(-1, ids.shape[-1])]
        return np.array(flat_texts, object).reshape(ids.shape[:-1])

    text = tf.numpy_function(decode_rows, [ids], tf.string, stateful=False)
    text.set_shape(ids.shape[:-1])
    return text
