"""Reductions over the real tokens of a padded array."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from perl_jax.types import AnyArray


def lengths(mask: Bool[AnyArray, '*batch T']) -> Int[AnyArray, '*batch']:
    """The number of real tokens; masks are padded on the right."""
    return mask.sum(-1).astype(jnp.int32)


def total(x: Float[AnyArray, '*batch T'], mask: Bool[AnyArray, '*batch T']) -> Float[Array, '*batch']:
    """Sum over the real tokens. Padding is ignored, even NaN.

    Args:
      x: [..., T].
      mask: bool [..., T], true at the real tokens.

    Returns:
      [...].
    """
    return jnp.where(mask, x, 0).sum(-1)


def mean(x: Float[AnyArray, '*batch T'], mask: Bool[AnyArray, '*batch T']) -> Float[Array, '']:
    """Mean over all real tokens of all rows.

    Args:
      x: [..., T].
      mask: bool [..., T], true at the real tokens.

    Returns:
      []; 0 if there are none.
    """
    return total(x, mask).sum() / jnp.maximum(mask.sum(), 1)


def is_any(tokens: Int[AnyArray, '*batch'], ids: int | Sequence[int]) -> Bool[AnyArray, '*batch']:
    """Whether each token is one of a few, such as a vocabulary's EOS ids.

    Args:
      tokens: int [...].
      ids: static.

    Returns:
      bool [...].
    """
    return functools.reduce(operator.or_, [tokens == int(i) for i in np.ravel(ids)])


def share(mask: Bool[AnyArray, '*batch T']) -> Float[AnyArray, '*batch T']:
    """The weight of each token in a mean over all real tokens; they add up to 1."""
    return mask / jnp.maximum(mask.sum(), 1)


def weighted(x: Float[AnyArray, '*batch T'], weights: Float[AnyArray, '*batch T']) -> Float[Array, '']:
    """Weighted sum over the tokens. Tokens of weight 0 are ignored, even NaN.

    Args:
      x: [..., T].
      weights: [..., T], 0 at the padding.

    Returns:
      [].
    """
    return jnp.where(weights != 0, x * weights, 0).sum()


def at_last(x: Float[AnyArray, '*batch'], mask: Bool[AnyArray, '*batch T']) -> Float[Array, '*batch T']:
    """Place a number at each row's last real token.

    Args:
      x: [...], a number for each row.
      mask: bool [..., T], true at the real tokens.

    Returns:
      [..., T], 0 elsewhere; a row without real tokens is all 0.
    """
    is_last = jax.nn.one_hot(lengths(mask) - 1, mask.shape[-1], dtype=bool)
    return jnp.where(is_last, x[..., None], 0)
