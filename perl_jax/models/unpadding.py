"""Remove the padding of a batch for the layers that work token by token; attention and losses get the rows back.

    [B, T]  a b c . .   unpad   [G, C]  a b c d e f .     G groups of rows, one for each data partition of the mesh,
            d . . . .  ------->                           so that no token leaves its device
            e f . . .  <-------
                         pad

C is a fraction of a group's tokens A, `Responses.fill`. A batch without a fill goes through the networks padded.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, SupportsInt, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

from perl_jax import sharded
from perl_jax.types import AnyArray, Responses, Variables

Batch = TypeVar('Batch', bound=Responses)
Counts = Int[AnyArray, ' B']  # tokens of each row: NumPy's of data, JAX's of a rollout


class Unpadding(struct.PyTreeNode):
    """The map between a padded array [*shape] and its real tokens.

    Attributes:
      index: for each slot, the token of its group that it holds; A where it holds none.
      slot: for each token, its slot; C where it is padding.
      shape: of the padded array, G A tokens in all.
    """

    index: Int[Array, 'G C']
    slot: Int[Array, 'G A']
    shape: tuple[int, ...] = struct.field(pytree_node=False)

    def unpad(self, x: jax.Array) -> jax.Array:
        """Remove the padding.

        Args:
          x: [*shape, ...].

        Returns:
          [G, C, ...]; 0 in slots without a token.
        """
        return _take(x.reshape(*self.slot.shape, *x.shape[len(self.shape) :]), self.index, self.slot)

    def pad(self, x: jax.Array) -> jax.Array:
        """Put tokens back into the padded shape.

        Args:
          x: [G, C, ...].

        Returns:
          [*shape, ...]; 0 at the padding.
        """
        return _take(x, self.slot, self.index).reshape(*self.shape, *x.shape[2:])


class RealTokens(struct.PyTreeNode):
    """The real tokens of a batch.

    Attributes:
      packed: of prompts followed by their responses, [B, P + K R]; None if its fill is 1.
      targets: of the responses, [B, K, R].
    """

    packed: Unpadding | None
    targets: Unpadding


def real_tokens(batch: Responses) -> RealTokens | None:
    """Find the real tokens of a batch.

    Args:
      batch: prompts and responses.

    Returns:
      RealTokens; None if the batch has no `fill`.
    """
    if batch.fill is None:
        return None
    prompts = jnp.asarray(batch.inputs_mask).at[:, 0].set(True)  # predicts the response to an empty prompt
    mask = jnp.concatenate([prompts, batch.targets_mask.reshape(len(prompts), -1)], axis=1)
    packed = _unpadding(mask, batch.fill[0]) if batch.fill[0] < 1 else None
    return RealTokens(packed, _unpadding(batch.targets_mask, batch.fill[1]))


def apply(
    network: nn.Module,
    variables: Variables,
    batch: Responses,
    ends: Int[AnyArray, 'B K'] | None = None,
    **kwargs: Any,
) -> Float[Array, 'b k t D'] | Float[Array, 'B K D']:
    """Run the network once: the hidden states that predict a batch's targets.

    Args:
      network: one with a method `unpadded` computes its dense layers for real tokens alone, where the batch has a fill.
      variables: `bind(base, adapter)`.
      batch: prompts and responses.
      ends: how many of its tokens each response has read, where only one state of each is needed.
      kwargs: for `network.apply` (`rngs` for dropout).

    Returns:
      [B, K, R, D]; for a batch with a fill the states of real targets alone, [G, 1, C, D], whose readouts `pad` puts
      back into rows; with `ends` [B, K, D].
    """
    args, real = (batch.inputs, batch.inputs_mask, batch.targets, ends), real_tokens(batch)
    if real is not None and real.packed is not None and hasattr(network, 'unpadded'):
        hidden = network.apply(variables, *args, real.packed, real.targets, method='unpadded', **kwargs)
        return cast(jax.Array, hidden)  # a pair only with `mutable`
    hidden = cast(jax.Array, network.apply(variables, *args, **kwargs))
    if ends is not None:
        return hidden
    hidden = hidden[..., :-1, :]
    return hidden if real is None else real.targets.unpad(hidden)[:, None]


def unpad(x: Shaped[AnyArray, 'B K R *rest'], batch: Responses) -> Shaped[Array, 'b k t *rest']:
    """Remove the padding of an array of targets.

    Args:
      x: [B, K, R, ...].
      batch: the prompts and responses that have these targets.

    Returns:
      [G, 1, C, ...], one row of real tokens a group; x as it is if the batch has no fill.
    """
    real = real_tokens(batch)
    x = jnp.asarray(x)
    return x if real is None else real.targets.unpad(x)[:, None]


def pad(x: Float[Array, 'b k t'], batch: Responses) -> Float[Array, 'B K R']:
    """Put values of real targets back into rows.

    NaN where a fill that is too small has lost a token: a run stops at NaN instead of learning from wrong numbers.

    Args:
      x: [G, 1, C]; [B, K, R] if the batch has no fill.
      batch: the prompts and responses that have these targets.

    Returns:
      [B, K, R]: 0 at the padding; x as it is if the batch has no fill.
    """
    real = real_tokens(batch)
    if real is None:
        return x
    lost = batch.targets_mask & (real.targets.slot.reshape(real.targets.shape) >= x.shape[2])
    return jnp.where(lost, jnp.nan, real.targets.pad(x[:, 0]))


def count_buckets(
    prompts: Counts, responses: Counts, P: int, KR: int, *, groups: int, num_microbatches: int, buckets: int
) -> tuple[Any, Any]:
    """Count the buckets that real tokens fill in the fullest group: of prompts with responses, and of responses.

    Args:
      prompts: the real tokens of each row's prompt.
      responses: the real tokens of all responses of each row.
      P, KR: the padded lengths of a prompt and of its responses together.
      groups: data partitions of the batch, each of equally many consecutive rows.
      num_microbatches: n; each microbatch takes every n-th row of a group (accumulate.py).
      buckets: into how many equal parts the padded lengths are divided.

    Returns:
      Two int scalars of NumPy or JAX, from 0 to `buckets`.
    """

    def fullest(lengths: Counts, width: int) -> Any:
        rows = lengths.reshape(groups, -1, num_microbatches)
        return -(-rows.sum(1).max() * buckets // (rows.shape[1] * width))

    return fullest(prompts + (prompts == 0) + responses, P + KR), fullest(responses, KR)


def with_fill(batch: Batch, count: tuple[SupportsInt, SupportsInt], buckets: int) -> Batch:
    """Set a batch's `fill`.

    Args:
      batch: prompts and responses.
      count: the buckets that `count_buckets` gave, of prompts with responses and of responses.
      buckets: into how many equal parts the padded lengths are divided.

    Returns:
      The batch with its fill; None as fill where all buckets are filled.
    """
    packed, targets = (Fraction(max(int(filled), 1), buckets) for filled in count)
    return batch.replace(fill=(packed, targets) if min(packed, targets) < 1 else None)


def _unpadding(mask: Bool[AnyArray, '*batch'], fill: Fraction) -> Unpadding:
    groups = mask.reshape(sharded.partitions('batch'), -1)
    A = groups.shape[1]
    C = math.ceil(fill * A)
    index = jax.vmap(lambda group: jnp.nonzero(group, size=C, fill_value=A)[0])(groups)
    return Unpadding(index, jnp.where(groups, jnp.cumsum(groups, axis=1) - 1, C), mask.shape)


@jax.custom_vjp
def _take(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """x [G, m, ...] at index [G, n] -> [G, n, ...], 0 where the index is out of range; `inverse` [G, m] maps back.

    Each position is taken at most once, so the gradient is a gather by `inverse`. JAX's own gradient of a gather is a
    scatter-add, which is slow on TPUs.
    """
    index = index.reshape(*index.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode='fill', fill_value=0)


def _forward(x: jax.Array, index: jax.Array, inverse: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _take(x, index, inverse), (index, inverse)


def _backward(residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, None, None]:
    index, inverse = residuals
    return _take(cotangent, inverse, index), None, None


_take.defvjp(_forward, _backward)
