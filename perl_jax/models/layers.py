"""The parts of a transformer: a dense layer with its LoRA hook, embedding, norm, MLP.

Kernels are stored as T5X stores them, [in, out] with logical axis names, so that one table shards them
(partitioning.py) and one regex over paths chooses where LoRA goes (lora.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import spmd
from jax.typing import DTypeLike

from perl_jax import sharded
from perl_jax.kernels import widening


def partitioned(init: Callable[..., jax.Array], axes: tuple[str, ...]) -> Callable[..., jax.Array]:
    """An initializer of a parameter with logical axis names: `param` keeps them, and hands back the bare array."""
    return cast(Callable[..., jax.Array], nn.with_logical_partitioning(init, axes))


class Dense(nn.Module):
    """y = x W (+ bias), plus (x A) B where the `lora` collection holds a pair for this layer (Hu et al. 2021, eq. 3).

    The hook knows neither rank nor target list nor role: `lora.bind` decides what is there, with B already scaled by
    alpha/r. x [..., in] -> [..., features], in `dtype`. `init_scale` is of a random kernel's variance, 1 / in.
    """

    features: int
    axes: tuple[str, str]
    dtype: DTypeLike = jnp.float32
    use_bias: bool = False
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        lecun = nn.initializers.variance_scaling(self.init_scale, 'fan_in', 'truncated_normal')
        init = partitioned(lecun, self.axes)
        x = x.astype(self.dtype)
        kernel = self.param('kernel', init, (x.shape[-1], self.features))
        y = sharded.matmul(x, kernel.astype(self.dtype), self.axes)
        if self.use_bias:
            init = partitioned(nn.initializers.zeros, self.axes[1:])
            bias = self.param('bias', init, (self.features,)).astype(self.dtype)
            y += jnp.expand_dims(bias, range(y.ndim - 1))
        if self.has_variable('lora', 'a'):
            a, b = (self.get_variable('lora', name).astype(self.dtype) for name in 'ab')
            low = sharded.matmul(self._drop(x), a, (self.axes[0], None))
            y += widening.matmul(low, b, (None, self.axes[1]))
        return y

    def _drop(self, x: jax.Array) -> jax.Array:
        """LoRA's dropout: bound only by a learning step, and on only where that step hands in the randomness."""
        if not (self.has_variable('lora', 'dropout') and self.has_rng('dropout')):
            return x
        keep = 1.0 - self.get_variable('lora', 'dropout')
        return jnp.where(jax.random.bernoulli(self.make_rng('dropout'), keep, x.shape), x / keep.astype(x.dtype), 0)


class Embed(nn.Embed):
    """The table's rows of tokens: int [...] -> [..., D].

    Where FSDP splits the rows, each chip looks up its part of every token's row, and the parts change places: thousands
    of rows move, and not the table (a gigabyte for 128k tokens of 4,096 numbers).
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:
        if sharded.partitions('embed') == 1:
            return super().__call__(inputs)
        rest = (None,) * (inputs.ndim - 1)
        x = super().__call__(spmd.with_logical_constraint(inputs, (None, *rest)))
        x = spmd.with_logical_constraint(x, (None, *rest, 'embed'))
        return spmd.with_logical_constraint(x, ('batch', *rest, None))

    def attend(self, query: jax.Array) -> jax.Array:
        """The table as output layer: [..., D] -> [..., V]."""
        operands = self.promote_dtype(query, self.embedding, dtype=self.dtype)
        query, table = map(jnp.asarray, operands)  # neither is None, which flax's annotation allows
        return sharded.matmul(query, table.T, ('embed', 'vocab'))


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + scale), computed in float32 (Zhang and Sennrich 2019). x [..., D] -> [..., D] in `dtype`.

    `offset` is 1 for Gemma, whose scales are stored as what they differ from 1; `axis` is the logical axis of D.
    """

    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32
    offset: float = 0.0
    axis: str = 'embed'

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.constant(1.0 - self.offset)
        scale = self.param('scale', partitioned(init, (self.axis,)), (x.shape[-1],))
        scale = self.offset + scale.astype(jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * jnp.expand_dims(scale, range(x.ndim - 1))).astype(self.dtype)


class Mlp(nn.Module):
    """act(x W0) * (x W1), then back to the model width (gated units, Shazeer 2020). x [..., D] -> [..., D].

    SwiGLU is activation 'silu', GEGLU 'gelu' (its tanh form). Without `gated` it is act(x W) alone, under T5X's name
    for that, wi.
    """

    mlp_dim: int
    activation: str = 'silu'
    gated: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = lambda name: Dense(self.mlp_dim, ('embed', 'mlp'), self.dtype, name=name)(x)  # noqa: E731
        act = ACTIVATIONS[self.activation]
        if self.gated:  # the backward pass makes the activation again from what it is of
            hidden = jax.checkpoint(lambda gate, up: act(gate) * up)(wide('wi_0'), wide('wi_1'))
        else:
            hidden = act(wide('wi'))
        return Dense(x.shape[-1], ('mlp', 'embed'), self.dtype, name='wo')(hidden)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'silu': nn.silu, 'gelu': nn.gelu, 'relu': nn.relu,
}  # fmt: skip
