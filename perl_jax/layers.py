"""The parts of a transformer: a dense layer with its LoRA hook, norm, rotary positions, attention over segments, MLP.

Kernels are stored as T5X stores them, [in, out] with logical axis names, so that one table shards them
(partitioning.py) and one regex over paths chooses where LoRA goes (lora.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

MASKED = -1e30  # finite, so that a row which may see nothing gives a uniform softmax instead of NaN


class Dense(nn.Module):
    """y = x W, plus (x A) B where the `lora` collection holds a pair for this layer (Hu et al. 2021, eq. 3).

    The hook knows neither rank nor target list nor role: `lora.bind` decides what is there, with B already scaled by
    alpha/r. x [..., in] -> [..., features], in `dtype`.
    """

    features: int
    axes: tuple[str, str]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), self.axes)
        kernel = self.param('kernel', init, (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        y = x @ kernel.astype(self.dtype)
        if self.has_variable('lora', 'a'):
            a = self.get_variable('lora', 'a').astype(self.dtype)
            b = self.get_variable('lora', 'b').astype(self.dtype)
            y += (self._drop(x) @ a) @ b
        return y

    def _drop(self, x: jax.Array) -> jax.Array:
        """LoRA's dropout: bound only by a learning step, and on only where that step hands in the randomness."""
        if not (self.has_variable('lora', 'dropout') and self.has_rng('dropout')):
            return x
        keep = 1.0 - self.get_variable('lora', 'dropout')
        return jnp.where(jax.random.bernoulli(self.make_rng('dropout'), keep, x.shape), x / keep.astype(x.dtype), 0)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in float32 (Zhang and Sennrich 2019). x [..., D] -> [..., D] in `dtype`."""

    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param('scale', nn.with_logical_partitioning(nn.initializers.ones, ('embed',)), (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * jnp.expand_dims(scale, range(x.ndim - 1))).astype(self.dtype)


class GatedMlp(nn.Module):
    """silu(x W0) * (x W1), then back to the model width (SwiGLU, Shazeer 2020). x [..., D] -> [..., D]."""

    mlp_dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = Dense(self.mlp_dim, ('embed', 'mlp'), self.dtype, name='wi_0')(x)
        up = Dense(self.mlp_dim, ('embed', 'mlp'), self.dtype, name='wi_1')(x)
        return Dense(x.shape[-1], ('mlp', 'embed'), self.dtype, name='wo')(nn.silu(gate) * up)


def rope_table(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Sine and cosine of the rotary angles (Su et al. 2021): positions int [...] -> two float32 [..., E/2]."""
    inverse = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = jnp.tensordot(positions.astype(jnp.float32), inverse, axes=0)
    return jnp.sin(angles), jnp.cos(angles)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn the halves of each head against each other (Hugging Face's form). x [..., T, H, E], table [..., T, E/2]."""
    sin, cos = (t[..., None, :] for t in table)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


Segment = tuple[jax.Array, jax.Array, jax.Array]


def attend(query: jax.Array, segments: Sequence[Segment]) -> jax.Array:
    """Softmax attention of K branches over several runs of keys at once, none of them copied per branch.

    Args:
      query: [B, K, R, H, E].
      segments: (key, value, mask) each. A segment that all branches share has key and value [B, S, N, E]; one of their
        own has [B, K, S, N, E]. `mask` is bool and broadcasts to [B, K, R, S]. H is a multiple of N (grouped queries).

    Returns:
      [B, K, R, H * E] in the query's dtype; the softmax is float32.
    """
    B, K, R, H, E = query.shape
    N = segments[0][0].shape[-2]
    query = query.reshape(B, K, R, N, H // N, E) * E**-0.5
    scores = []
    for key, _, may_see in segments:
        own = 'k' if key.ndim == 5 else ''
        score = jnp.einsum(f'bkrnge,b{own}sne->bkngrs', query, key, preferred_element_type=jnp.float32)
        mask = jnp.broadcast_to(may_see, (B, K, R, key.shape[-3]))
        scores.append(jnp.where(mask[:, :, None, None], score, MASKED))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(query.dtype)
    out, start = 0.0, 0
    for key, value, _ in segments:
        own, stop = 'k' if key.ndim == 5 else '', start + key.shape[-3]
        out += jnp.einsum(f'bkngrs,b{own}sne->bkrnge', weights[..., start:stop], value)
        start = stop
    return out.reshape(B, K, R, H * E)
