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

from perl_jax import sharded
from perl_jax.models import layers

MASKED = -1e30  # finite, so that a row which may see nothing gives a uniform softmax instead of NaN


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Slower rotation, for contexts longer than a model was first trained on.

    Without `original_length` all frequencies are divided by `factor` (Gemma 3). With it those that turn fewer than
    `low_freq_factor` times in that length are, those that turn more than `high_freq_factor` times are not, and between
    the two it fades (Llama 3.1).
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int | None = None

    def __call__(self, frequency: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        """Frequencies [E/2] in radians a position -> scaled ones."""
        keep = 0.0
        if self.original_length is not None:
            turns = self.original_length * frequency / (2 * jnp.pi)
            keep = jnp.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return frequency * (keep + (1 - keep) / self.factor)


def rope_table(
    positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sine and cosine of the rotary angles (Su et al. 2021): positions int [...] -> two float32 [..., E/2]."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None:
        frequency = scaling(frequency)
    angles = jnp.tensordot(positions.astype(jnp.float32), frequency, axes=0)
    return jnp.sin(angles), jnp.cos(angles)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn the halves of each head against each other (Hugging Face's form). x [..., T, H, E], table [..., T, E/2]."""
    sin, cos = (t[..., None, :] for t in table)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


class RelativeBias(nn.Module):
    """A learned bias of the scores for each head and range of distances (Raffel et al. 2020, section 2.1).

    Near distances have a bucket each, farther ones share buckets that grow up to `max_distance`. `bidirectional` keeps
    half of the buckets for keys behind the query and half for those ahead; without it nothing ahead may be seen.
    """

    num_heads: int
    num_buckets: int
    max_distance: int
    bidirectional: bool
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """Positions int [R] of queries and [S] of keys -> [H, R, S] in dtype, a Segment's bias."""
        init = nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform')
        init = layers.partitioned(init, ('heads', 'relpos_buckets'))
        embedding = self.param('rel_embedding', init, (self.num_heads, self.num_buckets))
        back, sided = queries[:, None] - keys[None], self.num_buckets
        if self.bidirectional:
            sided //= 2
        distance = jnp.abs(back) if self.bidirectional else jnp.maximum(back, 0)
        bucket = jnp.asarray(_buckets(sided, self.max_distance))[jnp.minimum(distance, self.max_distance)]
        if self.bidirectional:
            bucket += jnp.where(back < 0, sided, 0)
        # As T5X has it: a gather would put the heads last, where a TPU pads them to 128.
        chosen = (bucket[None] == jnp.arange(self.num_buckets)[:, None, None]).astype(self.dtype)
        return jnp.einsum('hb,brs->hrs', embedding.astype(self.dtype), chosen, precision='highest')


def _buckets(count: int, max_distance: int) -> np.ndarray:
    """The bucket of each distance 0 .. max_distance, which everything farther shares; T5X's formula and rounding."""
    distance, exact = np.arange(max_distance + 1), count // 2
    ratio = np.log(distance.astype(np.float32) / exact + np.finfo(np.float32).eps) / np.log(max_distance / exact)
    far = np.minimum(exact + (ratio * (count - exact)).astype(np.int32), count - 1)
    return np.where(distance < exact, distance, far)


def tokens_at(x: jax.Array, index: jax.Array) -> jax.Array:
    """Some of the tokens: x [B, T, ...] at index [B, Q] -> [B, Q, ...]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


MAX_SCORES = 2**24  # floats a device holds at once: 64 MiB


class Segment(NamedTuple):
    """A run of S keys. One that all branches share has key and value [B, S, N, E]; of their own, [B, K, S, N, E].

    `mask` is bool and broadcasts to [B, K, R, S]. `bias` [H, R, S] is added to the scores (T5's positions).
    """

    key: jax.Array
    value: jax.Array
    mask: jax.Array
    bias: jax.Array | None = None


def attend(
    query: jax.Array, segments: Sequence[Segment], *, scale: float | None = None, softcap: float | None = None
) -> jax.Array:
    """Softmax attention of K branches over several runs of keys at once, none of them copied per branch.

    Args:
      query: [B, K, R, H, E]. H is a multiple of N (grouped queries).
      segments: what is attended to.
      scale: of the scores; None is E^-1/2.
      softcap: scores are capped * tanh(scores / cap) before bias and mask (Gemma 2).

    Returns:
      [B, K, R, H * E] in the query's dtype; the softmax is float32.
    """
    B, K, R, H, E = query.shape
    S = sum(segment.key.shape[-3] for segment in segments)
    shards = sharded.partitions('batch') * sharded.partitions('heads')
    size = max(1, MAX_SCORES * shards // (B * K * H * S))
    one = functools.partial(_attend, scale=scale, softcap=softcap)
    if size >= R:
        return one(query, segments)
    chunks = -(-R // size)

    def split(x: jax.Array | None, axis: int) -> jax.Array | None:
        """A chunk after the other along the queries, on a new axis 0; None, what is the same for all queries."""
        if x is None or x.shape[axis] == 1:
            return None
        x = jnp.pad(x, [(0, chunks * size - R if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], chunks, size, *x.shape[axis + 1 :]), axis, 0)

    @jax.checkpoint  # the backward pass makes a chunk's scores again
    def chunk(now: tuple) -> jax.Array:
        query, parts = now
        mine = [{name: x for name, x in part.items() if x is not None} for part in parts]
        return one(query, [segment._replace(**part) for segment, part in zip(segments, mine)])

    parts = [{'mask': split(segment.mask, 2), 'bias': split(segment.bias, 1)} for segment in segments]
    out = jax.lax.map(chunk, (split(query, 2), parts))
    return jnp.moveaxis(out, 0, 2).reshape(B, K, chunks * size, H * E)[:, :, :R]


def _attend(
    query: jax.Array, segments: Sequence[Segment], scale: float | None, softcap: float | None
) -> jax.Array:
    B, K, R, H, E = query.shape
    N = segments[0].key.shape[-2]
    query = query.reshape(B, K, R, N, H // N, E) * (E**-0.5 if scale is None else scale)
    scores = []
    for segment in segments:
        own, S = 'k' if segment.key.ndim == 5 else '', segment.key.shape[-3]
        score = jnp.einsum(f'bkrnge,b{own}sne->bkngrs', query, segment.key, preferred_element_type=jnp.float32)
        if softcap is not None:
            score = softcap * jnp.tanh(score / softcap)
        if segment.bias is not None:
            score += segment.bias.reshape(1, 1, N, H // N, R, S)
        mask = jnp.broadcast_to(segment.mask, (B, K, R, S))
        scores.append(jnp.where(mask[:, :, None, None], score, MASKED))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(query.dtype)
    out, start = jnp.zeros((), query.dtype), 0
    for segment in segments:
        own, stop = 'k' if segment.key.ndim == 5 else '', start + segment.key.shape[-3]
        first = 'bkn' if own else 'bnk'  # in this order einsum multiplies weights by values, and not the reverse
        part = jnp.einsum(f'bkngrs,b{own}sne->{first}gre', weights[..., start:stop], segment.value)
        out += jnp.einsum(f'{first}gre->bkrnge', part)
        start = stop
    return out.reshape(B, K, R, H * E)
