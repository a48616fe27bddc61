"""Attention in a packed sequence: a prompt followed by its K branches.

    prompt    p0 p1 p2 p3 .          the prompt attends to itself (causal)
    response        \\- a0 a1 a2      branch 0 attends to the prompt and itself; its positions continue the prompt's
                    \\- b0 b1 .       branch 1 likewise; branches never attend to each other

The prompt is in the sequence or in a cache; both give the same numbers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Shaped

from perl_jax import masked
from perl_jax.kernels import flash
from perl_jax.models.attention import segmented
from perl_jax.models.attention.segmented import Segment
from perl_jax.types import AnyArray

KeyValue = tuple[jax.Array, jax.Array]


class Packed(struct.PyTreeNode):
    """The layout of packed tokens [B, T = P + K R].

    Attributes:
      positions: int [B, T].
      prompt_mask: bool [B, P], of the prompt, in the sequence or in the cache.
      cached: int [], how many tokens of each response are in the cache.
      P: prompt tokens in the sequence; 0 if the prompt is in the cache.
      K: branches; 0 for prompts alone.
    """

    positions: jax.Array
    prompt_mask: jax.Array
    cached: jax.Array | int
    P: int = struct.field(pytree_node=False)
    K: int = struct.field(pytree_node=False)

    def branches(self, x: Shaped[Array, 'B T *rest']) -> Shaped[Array, 'B K R *rest']:
        """Select the responses of a packed array.

        Args:
          x: [B, T, ...].

        Returns:
          [B, K, R, ...].
        """
        B, T, *rest = x.shape
        return x[:, self.P :].reshape(B, self.K, (T - self.P) // self.K, *rest)


def attend(
    query: Float[Array, 'B T H E'],
    new_kv: KeyValue,
    packed: Packed,
    cache: tuple[KeyValue, KeyValue] | None,
    *,
    local: Bool[Array, ''] | None,
    window: int | None,
    use_flash: bool,
    scale: float | None,
    softcap: float | None,
) -> Float[Array, 'B T H*E']:
    """Softmax attention of packed tokens.

    Args:
      query: [B, T, H, E]. H is a multiple of N (grouped queries).
      new_kv: keys and values [B, T, N, E] of the packed tokens.
      packed: their layout.
      cache: keys and values of the prompt [B, P, N, E] and of responses [B, K, S, N, E]; None if the prompt is packed.
      local: bool [], whether tokens attend to the last `window` tokens alone, themselves included; None is no.
      window: see `local`.
      use_flash: use one kernel for prompts and branches where `flash.usable`.
      scale, softcap: as in `segmented.attend`.

    Returns:
      [B, T, H * E] in the query's dtype; the softmax is float32.
    """
    key, value = new_kv
    scores_kwargs: dict[str, Any] = {'scale': scale, 'softcap': softcap}
    P, T = packed.P, packed.positions.shape[1]
    R = (T - P) // max(packed.K, 1)

    def in_window(query: jax.Array, key: AnyArray) -> jax.Array | bool:  # positions [B, K, Q], [B, 1 or K, S]
        if local is None or window is None:
            return True
        return ~local | (query[..., None] - key[..., None, :] < window)

    unwindowed = local is None or window is None or window >= P + R  # the window hides nothing
    if P and unwindowed and use_flash and flash.usable(query, key):
        return flash.attend(query, key, value, packed.prompt_mask, packed.K, **scores_kwargs)
    outs = []
    if P:
        positions = packed.positions[:, None, :P]
        prompt_segment = Segment(key[:, :P], value[:, :P], _causal(P) & in_window(positions, positions))
        outs.append(segmented.attend(query[:, None, :P], [prompt_segment], **scores_kwargs)[:, 0])
    if packed.K:
        positions = packed.branches(packed.positions)
        prompt = (key[:, :P], value[:, :P]) if cache is None else cache[0]
        prompt_positions = jnp.arange(prompt[0].shape[1])[None, None]
        segments = [
            Segment(*prompt, packed.prompt_mask[:, None, None] & in_window(positions, prompt_positions)),
            Segment(packed.branches(key), packed.branches(value), _causal(R) & in_window(positions, positions)),
        ]
        if cache is not None:
            cached_steps = jnp.arange(cache[1][0].shape[2])
            cached_positions = masked.lengths(packed.prompt_mask)[:, None, None] + cached_steps[None, None]
            mask = (cached_steps < packed.cached)[None, None, None] & in_window(positions, cached_positions)
            segments.append(Segment(*cache[1], mask))
        out = segmented.attend(packed.branches(query), segments, **scores_kwargs)
        outs.append(out.reshape(len(out), -1, out.shape[-1]))
    return jnp.concatenate(outs, axis=1)


def _causal(n: int) -> Bool[Array, '1 1 n n']:
    return jnp.tri(n, dtype=bool)[None, None]
