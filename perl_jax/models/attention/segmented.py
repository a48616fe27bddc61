"""Attention of queries to segments of keys: the shared prompt, the branch itself, its cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from perl_jax import sharded
from perl_jax.types import AnyArray

MASKED = -1e30  # finite: a query that may attend to nothing gets a uniform softmax instead of NaN
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
