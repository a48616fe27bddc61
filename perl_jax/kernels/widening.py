"""A product with LoRA's thin B [r, out], with a gradient of B for which XLA on a CPU transposes nothing large.

B's gradient is a sum over all tokens. JAX takes it as dy^T x [out, r] and transposes the result; XLA on a CPU then
first transposes all of dy, the larger of the two. Here it is x^T dy [r, out] at once, which saves 4 to 8% of a reward
step on a CPU. XLA on a TPU chooses the layouts of both by itself.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax.linen import spmd

from perl_jax import sharded

Axes = tuple[str | None, str | None]


def matmul(x: jax.Array, kernel: jax.Array, axes: Axes) -> jax.Array:
    """As `sharded.matmul`: x [batch, ..., r] times a kernel [r, out]."""
    return _matmul(x, kernel, axes)


_matmul = jax.custom_vjp(sharded.matmul, nondiff_argnums=(2,))


def _forward(x: jax.Array, kernel: jax.Array, axes: Axes) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return sharded.matmul(x, kernel, axes), (x, kernel)


def _backward(axes: Axes, residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    (dx,) = jax.linear_transpose(lambda x: sharded.matmul(x, kernel, axes), x)(dy)
    return dx, spmd.with_logical_constraint(jnp.einsum('...r,...o->ro', x, dy), sharded.gathered(axes))


_matmul.defvjp(_forward, _backward)
