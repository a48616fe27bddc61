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
from jaxtyping import Array, Float, Int

from perl_jax import sharded
from perl_jax.kernels import widening
from perl_jax.types import AnyArray


def partitioned(init: Callable[..., jax.Array], axes: tuple[str, ...]) -> Callable[..., jax.Array]:
    """Add logical axis names to an initializer.

    Args:
      init: (key, shape, dtype) -> array.
      axes: the name of each axis.

    Returns:
      An initializer; `param` stores its names and returns the plain array.
    """
    return cast(Callable[..., jax.Array], nn.with_logical_partitioning(init, axes))


class Dense(nn.Module):
    """y = x W (+ bias), plus (x A) B where the `lora` collection holds a pair for this layer (Hu et al. 2021, eq. 3).

    The hook has no rank, targets or role: `lora.bind` decides which layers have a pair, and scales B by alpha/r.
    x [..., in] -> [..., features], in `dtype`.

    Attributes:
      features: the width of y.
      axes: the logical axes of W, [in, features].
      dtype: of the computation and of y.
      use_bias: whether there is a bias [features], initially 0.
      init_scale: multiplies the variance 1 / in of a random kernel.
    """

    features: int
    axes: tuple[str, str]
    dtype: DTypeLike = jnp.float32
    use_bias: bool = False
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, '*batch in']) -> Float[Array, '*batch out']:
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
            # r is small: a CPU's library is slow at this product, and everything else is the same there and on TPUs.
            y += widening.matmul(low, b, (None, self.axes[1]))
        return y

    def _drop(self, x: Float[Array, '*batch in']) -> Float[Array, '*batch in']:
        """LoRA's dropout, which needs both `bind(..., train=True)` and a 'dropout' rng."""
        if not (self.has_variable('lora', 'dropout') and self.has_rng('dropout')):
            return x
        keep = 1.0 - self.get_variable('lora', 'dropout')
        return jnp.where(jax.random.bernoulli(self.make_rng('dropout'), keep, x.shape), x / keep.astype(x.dtype), 0)


class Embed(nn.Embed):
    """Token embedding: int [...] -> [..., D].

    Where FSDP shards D, each chip looks up its slice of every token's row, and the slices are exchanged: thousands of
    rows are moved instead of the table (a gigabyte for 128k tokens of 4,096 numbers).
    """

    def __call__(self, inputs: Int[AnyArray, '*batch']) -> Float[Array, '*batch D']:
        if sharded.partitions('embed') == 1:
            return super().__call__(inputs)
        rest = (None,) * (inputs.ndim - 1)
        x = super().__call__(spmd.with_logical_constraint(inputs, (None, *rest)))
        x = spmd.with_logical_constraint(x, (None, *rest, 'embed'))
        return spmd.with_logical_constraint(x, ('batch', *rest, None))

    def attend(self, query: Float[Array, '*batch D']) -> Float[Array, '*batch V']:
        """The table as output layer.

        Args:
          query: hidden states, [..., D].

        Returns:
          Logits [..., V], in `dtype`.
        """
        operands = self.promote_dtype(query, self.embedding, dtype=self.dtype)
        query, table = map(jnp.asarray, operands)  # flax's annotation allows None
        return sharded.matmul(query, table.T, ('embed', 'vocab'))


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + scale), computed in float32 (Zhang and Sennrich 2019). x [..., D] -> [..., D] in `dtype`.

    Attributes:
      epsilon: is added to the mean square.
      dtype: of the result.
      offset: 1 for Gemma, which stores scale - 1.
      axis: the logical axis of D.
    """

    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32
    offset: float = 0.0
    axis: str = 'embed'

    @nn.compact
    def __call__(self, x: Float[Array, '*batch D']) -> Float[Array, '*batch D']:
        init = nn.initializers.constant(1.0 - self.offset)
        scale = self.param('scale', partitioned(init, (self.axis,)), (x.shape[-1],))
        scale = self.offset + scale.astype(jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * jnp.expand_dims(scale, range(x.ndim - 1))).astype(self.dtype)


class Mlp(nn.Module):
    """act(x W0) * (x W1), then back to the model width (gated units, Shazeer 2020). x [..., D] -> [..., D].

    SwiGLU is activation 'silu', GEGLU 'gelu' (its tanh form).

    Attributes:
      mlp_dim: F, the width between.
      activation: a key of `ACTIVATIONS`.
      gated: False computes act(x W) alone, under T5X's name for that, wi.
      dtype: of the computation and of the result.
    """

    mlp_dim: int
    activation: str = 'silu'
    gated: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, '*batch D']) -> Float[Array, '*batch D']:
        wide = lambda name: Dense(self.mlp_dim, ('embed', 'mlp'), self.dtype, name=name)(x)  # noqa: E731
        act = ACTIVATIONS[self.activation]
        if self.gated:  # for memory: the backward pass computes the activation again
            hidden = jax.checkpoint(lambda gate, up: act(gate) * up)(wide('wi_0'), wide('wi_1'))
        else:
            hidden = act(wide('wi'))
        return Dense(x.shape[-1], ('mlp', 'embed'), self.dtype, name='wo')(hidden)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'silu': nn.silu, 'gelu': nn.gelu, 'relu': nn.relu,
}  # fmt: skip
