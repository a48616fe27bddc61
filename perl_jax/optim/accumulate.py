"""Gradient accumulation: the gradients of a batch as the sum over its microbatches.

    batch [B, ...] -> microbatches [n, B/n, ...]     microbatch i has every n-th row: each device splits its own rows
    value, gradients = sum_i value_and_grad(loss of microbatch i)

A loss here is a sum over rows, weighted by the whole batch, so that the microbatches' gradients add up exactly to the
batch's, whatever their lengths are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen import spmd
from jaxtyping import PyTree

from perl_jax.types import AnyArray

Microbatch = Any  # a tree like `batch`, of B/n rows


class Aux(NamedTuple):
    """The results of a loss besides its value.

    Attributes:
      sums: a tree of sums over the rows of a microbatch, which are added up.
      rows: a tree of arrays [B/n, ...], one entry a row, which are joined to [B, ...].
    """

    sums: PyTree
    rows: PyTree


Loss = Callable[[Any, Microbatch, jax.Array], tuple[jax.Array, Aux]]


def value_and_grad(
    loss: Loss, adapter: PyTree, batch: PyTree, num_microbatches: int, rng: jax.Array
) -> tuple[jax.Array, PyTree, PyTree, PyTree]:
    """Compute a loss and its gradients, one microbatch after the other. Pure.

    Args:
      loss: (adapter, microbatch, rng) -> a sum over the rows, and a pair of trees: other sums over the rows, such as
        metrics; and arrays [B/n, ...] of the rows.
      adapter: the parameters to differentiate by.
      batch: a tree of arrays [B, ...].
      num_microbatches: n, a divisor of B.
      rng: each microbatch folds its index in, so dropout differs from that of the batch at once.

    Returns:
      The loss, gradients like `adapter`, the other sums, and the arrays [B, ...] of the whole batch.
    """
    grad_fn = jax.value_and_grad(loss, has_aux=True)
    if num_microbatches == 1:
        (value, (sums, rows)), grads = grad_fn(adapter, batch, rng)
        return value, grads, sums, rows

    def add(total: PyTree, indexed: tuple[jax.Array, Microbatch]) -> tuple[PyTree, PyTree]:
        i, microbatch = indexed
        (value, (sums, rows)), grads = grad_fn(adapter, microbatch, jax.random.fold_in(rng, i))
        return jax.tree.map(jnp.add, total, (value, grads, sums)), rows

    microbatches = jax.tree.map(lambda x: _split(x, num_microbatches), batch)
    first = jax.tree.map(lambda x: x[0], microbatches)
    (value, (sums, _)), grads = jax.eval_shape(grad_fn, adapter, first, rng)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (value, grads, sums))
    (value, grads, sums), rows = jax.lax.scan(add, zeros, (jnp.arange(num_microbatches), microbatches))
    return value, grads, sums, jax.tree.map(_join, rows)


def map_microbatches(fn: Callable[[Microbatch, jax.Array], PyTree], batch: PyTree, n: int, rng: jax.Array) -> PyTree:
    """Apply a function to microbatches, one after the other.

    Args:
      fn: (microbatch, rng) -> a tree of arrays [B/n, ...].
      batch: a tree of arrays [B, ...].
      n: microbatches, a divisor of B.
      rng: each microbatch folds its index in.

    Returns:
      A tree of arrays [B, ...].
    """
    microbatches = jax.tree.map(lambda x: _split(x, n), batch)
    rows = jax.lax.map(lambda pair: fn(pair[1], jax.random.fold_in(rng, pair[0])), (jnp.arange(n), microbatches))
    return jax.tree.map(_join, rows)


def _split(x: AnyArray, n: int) -> jax.Array:
    x = jnp.moveaxis(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 1, 0)
    # Every device has rows of every microbatch: they are computed one after the other, so their axis is not split.
    return spmd.with_logical_constraint(x, (None, 'batch', *[None] * (x.ndim - 2)))


def _join(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
