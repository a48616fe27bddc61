"""A batch without its padding, for what works token by token; attention and losses have its rows back.

    [B, T]  a b c . .   unpad   [G, N]  a b c d e f .     G groups of rows, one for each data partition of the mesh,
            d . . . .  ------->                           so that no token leaves its device
            e f . . .  <-------
                         pad

N is a share of a group's tokens, `Responses.fill`. A batch that has none goes through the networks as it is.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, SupportsInt, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int, Shaped

from perl_jax import sharded
from perl_jax.types import Responses, Variables

Batch = TypeVar('Batch', bound=Responses)
Counts = Int[Array, ' B'] | Int[np.ndarray, ' B']  # tokens of each row: NumPy's of data, JAX's of a rollout


class Unpadding(struct.PyTreeNode):
    """Where the real tokens of a padded array [*shape] are, and where they go."""

    index: Int[Array, 'G N']  # which of its group's S tokens stands in each slot; S where none does
    slot: Int[Array, 'G S']  # in which slot each token stands; N where it is padding
    shape: tuple[int, ...] = struct.field(pytree_node=False)

    def unpad(self, x: jax.Array) -> jax.Array:
        """[*shape, ...] -> [G, N, ...]; 0 in slots without a token."""
        return _take(x.reshape(*self.slot.shape, *x.shape[len(self.shape) :]), self.index, self.slot)

    def pad(self, x: jax.Array) -> jax.Array:
        """[G, N, ...] -> [*shape, ...]; 0 at the padding."""
        return _take(x, self.slot, self.index).reshape(*self.shape, *x.shape[2:])


class Real(struct.PyTreeNode):
    """The real tokens of a batch."""

    run: Unpadding | None  # of prompts and their responses, one behind the other, [B, P + K R]; None if it is full
    targets: Unpadding  # [B, K, R]


def of(batch: Responses) -> Real | None:
    """The real tokens of a batch; None if it does not say how many slots they need (`fill`)."""
    if batch.fill is None:
        return None
    prompts = jnp.asarray(batch.inputs_mask).at[:, 0].set(True)  # what answers an empty prompt is read off there
    run = jnp.concatenate([prompts, batch.targets_mask.reshape(len(prompts), -1)], axis=1)
    run = _unpadding(run, batch.fill[0]) if batch.fill[0] < 1 else None
    return Real(run, _unpadding(batch.targets_mask, batch.fill[1]))


def apply(
    network: nn.Module,
    variables: Variables,
    batch: Responses,
    ends: Int[Array, 'B K'] | None = None,
    **kwargs: Any,
) -> Float[Array, 'B K R D'] | Float[Array, 'G 1 N D'] | Float[Array, 'B K D']:
    """The states of a batch that predict its targets, or with `ends` those that have read so many: one forward pass.

    Of a batch that says its fill, those of real targets alone, [G, 1, N, D]; `pad` puts back what is read off them. A
    network with a method `unpadded` then spares its dense layers the padding of prompts and responses too.

    Args:
      kwargs: for `network.apply` (`rngs` for dropout).
    """
    args, real = (batch.inputs, batch.inputs_mask, batch.targets, ends), of(batch)
    if real is not None and real.run is not None and hasattr(network, 'unpadded'):
        hidden = network.apply(variables, *args, real.run, real.targets, method='unpadded', **kwargs)
        return cast(jax.Array, hidden)  # a pair only with `mutable`
    hidden = cast(jax.Array, network.apply(variables, *args, **kwargs))
    if ends is not None:
        return hidden
    hidden = hidden[..., :-1, :]
    return hidden if real is None else real.targets.unpad(hidden)[:, None]


def unpad(x: Shaped[Array, 'B K R *rest'], batch: Responses) -> Shaped[Array, 'G 1 N *rest']:
    """What is of targets, as one response a group without padding; as it is if the batch says no fill."""
    real = of(batch)
    return x if real is None else real.targets.unpad(x)[:, None]


def pad(x: Float[Array, 'G 1 N'], batch: Responses) -> Float[Array, 'B K R']:
    """Back in its rows, 0 at the padding. NaN where a fill that was too small has lost a token: runs stop at that."""
    real = of(batch)
    if real is None:
        return x
    lost = batch.targets_mask & (real.targets.slot.reshape(real.targets.shape) >= x.shape[2])
    return jnp.where(lost, jnp.nan, real.targets.pad(x[:, 0]))


def needed(
    prompts: Counts, responses: Counts, P: int, KR: int, groups: int, parts: int, buckets: int
) -> tuple[Any, Any]:
    """How many `buckets`-ths of the run's and of the targets' tokens are real at most: scalars of NumPy or JAX.

    Args:
      prompts, responses: the real tokens of each row's prompt, and of all of its responses.
      groups: data partitions of a batch, each of as many consecutive rows.
      parts: microbatches, n in all; each takes every n-th row of a group (accumulate.py).
    """

    def most(real: Counts, width: int) -> Any:
        rows = real.reshape(groups, -1, parts)
        return -(-rows.sum(1).max() * buckets // (rows.shape[1] * width))

    return most(prompts + (prompts == 0) + responses, P + KR), most(responses, KR)


def filled(batch: Batch, count: tuple[SupportsInt, SupportsInt], buckets: int) -> Batch:
    """The batch that says how many `buckets`-ths are `needed`; one without padding to speak of is left as it is."""
    run, targets = (Fraction(max(int(each), 1), buckets) for each in count)
    return batch.replace(fill=(run, targets) if min(run, targets) < 1 else None)


def _unpadding(mask: jax.Array, fill: Fraction) -> Unpadding:
    groups = mask.reshape(sharded.partitions('batch'), -1)
    S = groups.shape[1]
    N = math.ceil(fill * S)
    index = jax.vmap(lambda group: jnp.nonzero(group, size=N, fill_value=S)[0])(groups)
    return Unpadding(index, jnp.where(groups, jnp.cumsum(groups, axis=1) - 1, N), mask.shape)


@jax.custom_vjp
def _take(x: jax.Array, index: jax.Array, back: jax.Array) -> jax.Array:
    """x [G, A, ...] at index [G, C] -> [G, C, ...], 0 where there is no such place. `back` [G, A] is the way back.

    Each place is taken once at most: the gradient is taken too, not added up row by row as that of any index would be.
    """
    index = index.reshape(*index.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode='fill', fill_value=0)


def _forward(x: jax.Array, index: jax.Array, back: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _take(x, index, back), (index, back)


def _backward(kept: tuple[jax.Array, jax.Array], given: jax.Array) -> tuple[jax.Array, None, None]:
    index, back = kept
    return _take(given, back, index), None, None


_take.defvjp(_forward, _backward)
