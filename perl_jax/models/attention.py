"""Positions, and attention of queries to segments of keys: the shared prompt, the branch itself, its cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, Shaped

from perl_jax import settings, sharded
from perl_jax.models import layers
from perl_jax.types import AnyArray

MASKED = -1e30  # finite: a query that may attend to nothing gets a uniform softmax instead of NaN


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Lower rotary frequencies, for contexts longer than a model was first trained on.

    Without `original_length` all frequencies are divided by `factor` (Gemma 3). With it, frequencies that make fewer
    than `low_freq_factor` rotations in that length are divided, those that make more than `high_freq_factor` are not,
    and the ones between are interpolated (Llama 3.1).

    Attributes:
      factor: divides frequencies.
      low_freq_factor: rotations in `original_length`; frequencies with fewer are divided.
      high_freq_factor: rotations in `original_length`; frequencies with more are unchanged.
      original_length: positions that the model was first trained on; None divides all frequencies.
    """

    factor: settings.Positive
    low_freq_factor: settings.Positive = 1.0
    high_freq_factor: settings.Positive = 4.0
    original_length: settings.Count | None = None

    def __post_init__(self) -> None:
        settings.check(self)

    def __call__(self, frequency: AnyArray) -> AnyArray:
        """Frequencies [E/2] in radians a position -> scaled ones."""
        unscaled = 0.0
        if self.original_length is not None:
            rotations, low = self.original_length * frequency / (2 * jnp.pi), self.low_freq_factor
            unscaled = jnp.clip((rotations - low) / (self.high_freq_factor - low), 0, 1)
        return frequency * (unscaled + (1 - unscaled) / self.factor)


def rope_table(
    positions: Int[Array, '*batch'], head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Float[Array, '*batch half'], Float[Array, '*batch half']]:
    """Sine and cosine of the rotary angles (Su et al. 2021).

    Args:
      positions: int [...].
      head_dim: E.
      theta: the base of the frequencies, theta^(-2i / E) radians a position.
      scaling: of the frequencies; None leaves them.

    Returns:
      Sine and cosine, float32 [..., E/2] each.
    """
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None:
        frequency = scaling(frequency)
    angles = jnp.tensordot(positions.astype(jnp.float32), frequency, axes=0)
    return jnp.sin(angles), jnp.cos(angles)


def rotate(
    x: Float[Array, '*batch H E'], table: tuple[Float[Array, '*batch E//2'], Float[Array, '*batch E//2']]
) -> Float[Array, '*batch H E']:
    """Rotate the halves of each head (Hugging Face's convention).

    Args:
      x: queries or keys, [..., T, H, E].
      table: sine and cosine of `rope_table`, [..., T, E/2] each.

    Returns:
      [..., T, H, E] in the dtype of x; computed in float32.
    """
    sin, cos = (t[..., None, :] for t in table)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


class RelativeBias(nn.Module):
    """A learned bias of the scores for each head and bucket of distances (Raffel et al. 2020, section 2.1).

    Small distances have a bucket each; larger ones share buckets that grow logarithmically up to `max_distance`. With
    `bidirectional`, half of the buckets are for keys before the query and half for keys after it; without it, attention
    must be causal.

    Attributes:
      num_heads: H.
      num_buckets: of distances, in both directions together.
      max_distance: in tokens; from here on all distances share the last bucket.
      bidirectional: whether keys after the query have buckets of their own.
      dtype: of the bias.
    """

    num_heads: int
    num_buckets: int
    max_distance: int
    bidirectional: bool
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, queries: Int[Array, ' Q'], keys: Int[Array, ' S']) -> Float[Array, 'H Q S']:
        """Positions int [Q] of queries and [S] of keys -> [H, Q, S] in dtype, a Segment's bias."""
        init = nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform')
        init = layers.partitioned(init, ('heads', 'relpos_buckets'))
        embedding = self.param('rel_embedding', init, (self.num_heads, self.num_buckets))
        offset, num_buckets = queries[:, None] - keys[None], self.num_buckets
        if self.bidirectional:
            num_buckets //= 2
        distance = jnp.abs(offset) if self.bidirectional else jnp.maximum(offset, 0)
        bucket = jnp.asarray(_buckets(num_buckets, self.max_distance))[jnp.minimum(distance, self.max_distance)]
        if self.bidirectional:
            bucket += jnp.where(offset < 0, num_buckets, 0)
        # A product with a one-hot matrix, as in T5X: a gather would put the heads last, where a TPU pads them to 128.
        one_hot = (bucket[None] == jnp.arange(self.num_buckets)[:, None, None]).astype(self.dtype)
        return jnp.einsum('hb,bqs->hqs', embedding.astype(self.dtype), one_hot, precision='highest')


def _buckets(count: int, max_distance: int) -> np.ndarray:
    """The bucket of each distance 0 .. max_distance; larger distances share the last. T5X's formula and rounding."""
    distance, exact = np.arange(max_distance + 1), count // 2
    ratio = np.log(distance.astype(np.float32) / exact + np.finfo(np.float32).eps) / np.log(max_distance / exact)
    far = np.minimum(exact + (ratio * (count - exact)).astype(np.int32), count - 1)
    return np.where(distance < exact, distance, far)


def tokens_at(x: Shaped[Array, 'B T *rest'], index: Int[Array, 'B Q']) -> Shaped[Array, 'B Q *rest']:
    """Select tokens by index.

    Args:
      x: [B, T, ...].
      index: int [B, Q], into the T tokens of its row.

    Returns:
      [B, Q, ...].
    """
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


MAX_SCORES = 2**24  # floats of attention scores per device: 64 MiB


class Segment(NamedTuple):
    """S keys and values to attend to.

    Attributes:
      key, value: [B, S, N, E] where all branches share them, [B, K, S, N, E] where each branch has its own.
      mask: bool, broadcasts to [B, K, Q, S].
      bias: [H, Q, S], added to the scores (T5's relative positions).
    """

    key: jax.Array
    value: jax.Array
    mask: AnyArray
    bias: jax.Array | None = None


def attend(
    query: Float[Array, 'B K Q H E'],
    segments: Sequence[Segment],
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, 'B K Q H*E']:
    """Softmax attention of K branches over several segments of keys, without a copy of shared keys per branch.

    Args:
      query: [B, K, Q, H, E]. H is a multiple of N (grouped queries).
      segments: the keys and values to attend to.
      scale: factor of the scores; None is E^-1/2.
      softcap: c; scores become c tanh(scores / c) before bias and mask (Gemma 2).

    Returns:
      [B, K, Q, H * E] in the query's dtype; the softmax is float32.
    """
    B, K, Q, H, E = query.shape
    S = sum(segment.key.shape[-3] for segment in segments)
    shards = sharded.partitions('batch') * sharded.partitions('heads')
    size = max(1, MAX_SCORES * shards // (B * K * H * S))
    attend_chunk = functools.partial(_attend, scale=scale, softcap=softcap)
    if size >= Q:
        return attend_chunk(query, segments)
    chunks = -(-Q // size)

    def split(x: AnyArray | None, axis: int) -> jax.Array | None:
        """Split the queries' axis into chunks on a new axis 0; None for what all queries share."""
        if x is None or x.shape[axis] == 1:
            return None
        x = jnp.pad(x, [(0, chunks * size - Q if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], chunks, size, *x.shape[axis + 1 :]), axis, 0)

    @jax.checkpoint  # for memory: the backward pass computes a chunk's scores again
    def chunk(chunk_inputs: tuple) -> jax.Array:
        query, chunk_fields = chunk_inputs
        changed = [{name: x for name, x in fields.items() if x is not None} for fields in chunk_fields]
        return attend_chunk(query, [segment._replace(**fields) for segment, fields in zip(segments, changed)])

    chunk_fields = [{'mask': split(segment.mask, 2), 'bias': split(segment.bias, 1)} for segment in segments]
    out = jax.lax.map(chunk, (split(query, 2), chunk_fields))
    return jnp.moveaxis(out, 0, 2).reshape(B, K, chunks * size, H * E)[:, :, :Q]


def _attend(
    query: Float[Array, 'B K Q H E'], segments: Sequence[Segment], scale: float | None, softcap: float | None
) -> Float[Array, 'B K Q H*E']:
    B, K, Q, H, E = query.shape
    N = segments[0].key.shape[-2]
    query = query.reshape(B, K, Q, N, H // N, E) * (E**-0.5 if scale is None else scale)
    scores = []
    for segment in segments:
        branch_axis, S = 'k' if segment.key.ndim == 5 else '', segment.key.shape[-3]
        score = jnp.einsum(
            f'bkqnge,b{branch_axis}sne->bkngqs', query, segment.key, preferred_element_type=jnp.float32
        )
        if softcap is not None:
            score = softcap * jnp.tanh(score / softcap)
        if segment.bias is not None:
            score += segment.bias.reshape(1, 1, N, H // N, Q, S)
        mask = jnp.broadcast_to(segment.mask, (B, K, Q, S))
        scores.append(jnp.where(mask[:, :, None, None], score, MASKED))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(query.dtype)
    out, start = jnp.zeros((), query.dtype), 0
    for segment in segments:
        branch_axis, stop = 'k' if segment.key.ndim == 5 else '', start + segment.key.shape[-3]
        out_axes = 'bkn' if branch_axis else 'bnk'  # other orders make einsum transpose the weights, which are larger
        attended = jnp.einsum(f'bkngqs,b{branch_axis}sne->{out_axes}gqe', weights[..., start:stop], segment.value)
        out += jnp.einsum(f'{out_axes}gqe->bkqnge', attended)
        start = stop
    return out.reshape(B, K, Q, H * E)
