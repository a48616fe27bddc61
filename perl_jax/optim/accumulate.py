"""Gradients of a batch that is too large for the device: a part of its rows at a time, summed up.

    batch [B, ...] -> parts [n, B/n, ...]     part i has every n-th row, so that each device splits its own rows
    value, gradients = sum_i value_and_grad(loss of part i)

A loss here is a sum over rows that knows its weights from the whole batch, so that the parts' gradients add up to the
whole batch's, whatever the parts' lengths are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen import spmd
from jaxtyping import PyTree

Part = Any  # what `batch` is, of B/n rows
Loss = Callable[[Any, Part, jax.Array], tuple[jax.Array, tuple[PyTree, PyTree]]]


def value_and_grad(
    loss: Loss, adapter: PyTree, batch: PyTree, num_microbatches: int, rng: jax.Array
) -> tuple[jax.Array, PyTree, PyTree, PyTree]:
    """A loss over a batch and its gradients, `num_microbatches` parts in turn. Pure.

    Args:
      loss: (adapter, part, rng) -> a sum over the part's rows; and two trees beside it: sums as well, and arrays
        [B/n, ...] of the part's rows.
      batch: a tree of arrays [B, ...].
      rng: a part's own is folded from it, so dropout differs from that of the batch at once.

    Returns:
      value, gradients like `adapter`, the sums, the arrays [B, ...] of the whole batch.
    """
    one = jax.value_and_grad(loss, has_aux=True)
    if num_microbatches == 1:
        (value, (sums, rows)), grads = one(adapter, batch, rng)
        return value, grads, sums, rows

    def add(total: PyTree, indexed: tuple[jax.Array, Part]) -> tuple[PyTree, PyTree]:
        i, part = indexed
        (value, (sums, rows)), grads = one(adapter, part, jax.random.fold_in(rng, i))
        return jax.tree.map(jnp.add, total, (value, grads, sums)), rows

    parts = jax.tree.map(lambda x: _split(x, num_microbatches), batch)
    first = jax.tree.map(lambda x: x[0], parts)
    (value, (sums, _)), grads = jax.eval_shape(one, adapter, first, rng)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (value, grads, sums))
    (value, grads, sums), rows = jax.lax.scan(add, zeros, (jnp.arange(num_microbatches), parts))
    return value, grads, sums, jax.tree.map(_join, rows)


def one_by_one(run: Callable[[Part, jax.Array], PyTree], batch: PyTree, n: int, rng: jax.Array) -> PyTree:
    """`run` of `n` parts of a batch in turn, each with a key of its own: arrays [B/n, ...] -> [B, ...]."""
    parts = jax.tree.map(lambda x: _split(x, n), batch)
    rows = jax.lax.map(lambda each: run(each[1], jax.random.fold_in(rng, each[0])), (jnp.arange(n), parts))
    return jax.tree.map(_join, rows)


def _split(x: jax.Array, n: int) -> jax.Array:
    x = jnp.moveaxis(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 1, 0)
    return spmd.with_logical_constraint(x, (None, 'batch', *[None] * (x.ndim - 2)))


def _join(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
