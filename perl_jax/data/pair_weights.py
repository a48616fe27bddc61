"""Weights of preference pairs in the loss, for tasks whose pairs have a `weight`.

    weight of the rows  1 1/2 1/2 1/4 1/4 1/4 1/4   ->   weights  7/3 7/6 7/6 7/12 7/12 7/12 7/12     (mean 1)

Only the ratios of the weights matter: they are scaled to a mean of 1 over the rows of a split, so that losses and
gradients keep their size. With a weight of 1 / (pairs of its context), every context counts equally.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float

from perl_jax.errors import UserError

FIELD = 'weight'


def with_float_weights(ds: Any, name: str) -> Any:
    """Returns a tf.data.Dataset of pairs with their weights as float32; `name` is the task's.

    Raises:
      UserError: the field is not a single number.
    """
    import tensorflow as tf

    spec = ds.element_spec[FIELD]
    if not (spec.dtype.is_floating or spec.dtype.is_integer) or spec.shape.rank != 0:
        raise UserError(
            f"task '{name}': `{FIELD}` of pairs is their weight in the loss, one number; here it is of type "
            f'{spec.dtype.name} and shape {spec.shape}: rename the field if it is something else'
        )
    return ds.map(lambda row: row | {FIELD: tf.cast(row[FIELD], tf.float32)}, num_parallel_calls=tf.data.AUTOTUNE)


def check(weight: float, where: str) -> None:
    """Refuse an invalid weight; `where` names the row in the message."""
    if not 0 <= weight < math.inf:
        raise UserError(f'{where}: {FIELD} is {weight}; give the weight of the pair in the loss, 0 or more')


def normalized(weights: Float[np.ndarray, ' rows'], name: str) -> Float[np.ndarray, ' rows']:
    """Returns the weights scaled to a mean of 1, float32; `name` names the data set in messages."""
    mean = weights.mean(dtype=np.float64)
    if mean == 0:
        raise UserError(f'{name}: every {FIELD} is 0; give the weights of pairs in the loss')
    return (weights / mean).astype(np.float32)
