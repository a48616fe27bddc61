"""T5's relative positions: a learned bias of the attention scores."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from perl_jax.models import layers


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
