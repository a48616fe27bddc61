"""Attention in a packed run of tokens: a prompt and its K branches.

    prompt    p0 p1 p2 p3 .          the prompt sees itself (causal)
    response        \\- a0 a1 a2      branch 0 sees the prompt and itself; its positions go on where the prompt ends
                    \\- b0 b1 .       branch 1 likewise; branches never see each other

Whole runs, and runs whose prompt is in a cache; the one is as if cut out of the other.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from perl_jax import masked
from perl_jax.kernels import flash
from perl_jax.models import attention
from perl_jax.models.attention import Segment

KeyValue = tuple[jax.Array, jax.Array]


class Packed(struct.PyTreeNode):
    """What attention needs to know of tokens [B, T = P + K R]; P or K is 0 where there are none."""

    positions: jax.Array  # int [B, T]
    prompt_mask: jax.Array  # bool [B, P of the prompt, cached or not]
    cached: jax.Array | int  # how many response tokens came before
    P: int = struct.field(pytree_node=False)
    K: int = struct.field(pytree_node=False)

    def branches(self, x: jax.Array) -> jax.Array:
        """The responses' part of x [B, T, ...] as [B, K, R, ...]."""
        B, T, *rest = x.shape
        return x[:, self.P :].reshape(B, self.K, (T - self.P) // self.K, *rest)


def attend(
    query: jax.Array,
    own: KeyValue,
    run: Packed,
    cache: tuple[KeyValue, KeyValue] | None,
    *,
    local: jax.Array | None,
    window: int | None,
    use_flash: bool,
    scale: float | None,
    softcap: float | None,
) -> jax.Array:
    """Softmax attention of the tokens of a run.

    Args:
      query: [B, T, H, E]. H is a multiple of N (grouped queries).
      own: keys and values [B, T, N, E] of the run.
      cache: keys and values of the prompt [B, P, N, E] and of responses [B, K, S, N, E], where `run` has no prompt.
      local: bool [], whether only the last `window` tokens are seen, the token itself included; None is no.
      use_flash: whole runs in one kernel, where flash.usable says so.
      scale, softcap: as in `attention.attend`.

    Returns:
      [B, T, H * E] in the query's dtype; the softmax is float32.
    """
    key, value = own
    how: dict[str, Any] = {'scale': scale, 'softcap': softcap}
    P, T = run.P, run.positions.shape[1]
    R = (T - P) // max(run.K, 1)

    def near(query: jax.Array, key: jax.Array) -> jax.Array | bool:  # positions [B, K, R], [B, 1 or K, S]
        if local is None or window is None:
            return True
        return ~local | (query[..., None] - key[..., None, :] < window)

    far = local is None or window is None or window >= P + R  # no window hides anything
    if P and far and use_flash and flash.usable(query, key):
        return flash.attend(query, key, value, run.prompt_mask, run.K, **how)
    outs = []
    if P:
        at = run.positions[:, None, :P]
        itself = Segment(key[:, :P], value[:, :P], _causal(P) & near(at, at))
        outs.append(attention.attend(query[:, None, :P], [itself], **how)[:, 0])
    if run.K:
        at = run.branches(run.positions)
        prompt = (key[:, :P], value[:, :P]) if cache is None else cache[0]
        before = jnp.arange(prompt[0].shape[1])[None, None]
        segments = [
            Segment(*prompt, run.prompt_mask[:, None, None] & near(at, before)),
            Segment(run.branches(key), run.branches(value), _causal(R) & near(at, at)),
        ]
        if cache is not None:
            ahead = jnp.arange(cache[1][0].shape[2])
            there = masked.lengths(run.prompt_mask)[:, None, None] + ahead[None, None]
            segments.append(Segment(*cache[1], (ahead < run.cached)[None, None, None] & near(at, there)))
        out = attention.attend(run.branches(query), segments, **how)
        outs.append(out.reshape(len(out), -1, out.shape[-1]))
    return jnp.concatenate(outs, axis=1)


def _causal(n: int) -> jax.Array:
    return jnp.tri(n, dtype=bool)[None, None]
