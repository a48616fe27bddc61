"""What each pair counts in the loss, where a task gives its pairs a `weight`.

    weight of the rows  1 1/2 1/2 1/4 1/4 1/4 1/4   ->   weights  7/3 7/6 7/6 7/12 7/12 7/12 7/12     (mean 1)

Only what weights are to each other matters: they are scaled over the rows of a split, so that losses and gradients are
of the size that they have without. With 1 / (pairs of its context) every context counts alike.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float

from perl_jax.errors import UserError

FIELD = 'weight'


def of_rows(ds: Any, name: str) -> Any:
    """A tf.data.Dataset of pairs whose weights are float32; `name` is the task's.

    Raises:
      UserError: what is called so is not one number.
    """
    import tensorflow as tf

    spec = ds.element_spec[FIELD]
    if not (spec.dtype.is_floating or spec.dtype.is_integer) or spec.shape.rank != 0:
        raise UserError(
            f"task '{name}': `{FIELD}` of pairs is what each counts in the loss, one number; here it is of type "
            f'{spec.dtype.name} and shape {spec.shape}: give another field another name'
        )
    return ds.map(lambda row: row | {FIELD: tf.cast(row[FIELD], tf.float32)}, num_parallel_calls=tf.data.AUTOTUNE)


def check(weight: float, where: str) -> None:
    """Refuse what is no weight; `where` names its row."""
    if not 0 <= weight < math.inf:
        raise UserError(f'{where}: {FIELD} is {weight}; give what the pair counts in the loss, 0 or more')


def scaled(weights: Float[np.ndarray, ' N'], name: str) -> Float[np.ndarray, ' N']:
    """The weights with a mean of 1, float32; `name` is that of their rows."""
    mean = weights.mean(dtype=np.float64)
    if mean == 0:
        raise UserError(f'{name}: every {FIELD} is 0; give what a pair counts in the loss')
    return (weights / mean).astype(np.float32)
