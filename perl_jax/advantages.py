"""From a score and a KL to token rewards and returns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from perl_jax import masked


def token_rewards(
    scores: Float[Array, 'B K'],
    logprobs: Float[Array, 'B K R'],
    anchor_logprobs: Float[Array, 'B K R'],
    mask: Bool[Array, 'B K R'],
    beta: float,
) -> Float[Array, 'B K R']:
    """-beta (log pi - log pi_anchor) at each token and (1 - beta) R at the last.

    Summed over a response this is the paper's objective (eq. 1) with KL estimated by its own sample; 0 at the padding.
    """
    kl = jnp.where(mask, logprobs - anchor_logprobs, 0)
    return (1 - beta) * masked.at_last(scores, mask) - beta * kl


def returns(rewards: Float[Array, 'B K R'], gamma: float = 1.0) -> Float[Array, 'B K R']:
    """The reward to go, Z_t = sum_{s >= t} gamma^(s - t) r_s, by a scan from the right."""

    def step(ahead: jax.Array, now: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = now + gamma * ahead
        return z, z

    time_first = jnp.moveaxis(rewards, -1, 0)
    _, z = jax.lax.scan(step, jnp.zeros_like(time_first[0]), time_first, reverse=True)
    return jnp.moveaxis(z, 0, -1)
