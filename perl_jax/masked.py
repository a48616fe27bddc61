"""Reductions over the real tokens of a padded array."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def lengths(mask: Bool[Array, '*batch T']) -> Int[Array, '*batch']:
    """How many tokens are real; the mask is a run of ones from the left."""
    return mask.sum(-1).astype(jnp.int32)


def total(x: Float[Array, '*batch T'], mask: Bool[Array, '*batch T']) -> Float[Array, '*batch']:
    """Sum over the real tokens. What stands at the padding may be anything, NaN included."""
    return jnp.where(mask, x, 0).sum(-1)


def mean(x: Float[Array, '*batch T'], mask: Bool[Array, '*batch T']) -> Float[Array, '']:
    """Mean over all real tokens of all rows; 0 where there are none."""
    return total(x, mask).sum() / jnp.maximum(mask.sum(), 1)


def is_any(tokens: Int[Array, '*batch'], ids: int | Sequence[int]) -> Bool[Array, '*batch']:
    """Which tokens are one of `ids`: a few, known when this compiles, such as the EOS ids of a vocabulary."""
    return functools.reduce(operator.or_, [tokens == int(i) for i in np.ravel(ids)])


def share(mask: Bool[Array, '*batch T']) -> Float[Array, '*batch T']:
    """The weight of each token in a mean over all real tokens; they add up to 1."""
    return mask / jnp.maximum(mask.sum(), 1)


def weighted(x: Float[Array, '*batch T'], weights: Float[Array, '*batch T']) -> Float[Array, '']:
    """Sum of the weighted tokens. What stands where the weight is 0 may be anything, NaN included."""
    return jnp.where(weights != 0, x * weights, 0).sum()


def at_last(x: Float[Array, '*batch'], mask: Bool[Array, '*batch T']) -> Float[Array, '*batch T']:
    """`x` at each row's last real token and 0 elsewhere; a row with no real token gets it nowhere."""
    is_last = jax.nn.one_hot(lengths(mask) - 1, mask.shape[-1], dtype=bool)
    return jnp.where(is_last, x[..., None], 0)
